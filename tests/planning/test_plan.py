"""What `emo plan` says is what real ranks hold and send, and the operations that PyTorch counts."""

import json

import plan_runs
import pytest
import torch
from conftest import TOY, tiny_model
from parallel_runs import EXCHANGES, ways
from ranks import launch
from torch.utils.flop_counter import FlopCounterMode
from transformers_emo import EmoConfig, EmoForCausalLM, PackedConfig, cli
from transformers_emo.planning import HARDWARE, ModelSizes, ParallelLayout, plan_run
from transformers_emo.planning.step import Step
from transformers_emo.planning.work import experts_touched, forward_traffic, rank_flops

TINY = TOY.parent / "emo-tiny"
RELEASED = EmoConfig(dtype="bfloat16")


def launched(tmp_path_factory, ranks: int) -> list[dict]:
    folder = tmp_path_factory.mktemp(f"{ranks} ranks")
    tiny_model(num_experts=16).save_pretrained(folder / "model")
    launch(plan_runs.__file__, folder, ranks=ranks)
    return [json.loads((folder / f"plan{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return launched(tmp_path_factory, 2)


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory):
    return launched(tmp_path_factory, 4)


def layout_of(settings: dict) -> ParallelLayout:
    return ParallelLayout(**{name: settings[name] for name in settings if name.endswith("_size")})


def check_held(found: list[dict], way: str, settings: dict) -> None:
    config = tiny_model(num_experts=16).config
    for rank, counted in enumerate(found):
        assert counted[way]["held"] == 4 * sum(layout_of(settings).held(config, rank).values()), (way, rank)


def check_sent(found: list[dict], way: str, settings: dict) -> None:
    layout, config = layout_of(settings), tiny_model(num_experts=16).config
    step = Step(config, layout, torch.float32, 1, plan_runs.TOKENS)
    expected = sum(
        one.size for one in forward_traffic(config, layout, plan_runs.TOKENS, 4, training=False)
    ) + sum(one.size for one in step.sent(training=False) if one.what == "weights gathered")
    counted = [one[way]["sent"] for one in found]
    if layout.ep_size == layout.tp_size or layout.ep_size == 1:
        assert counted == [expected] * len(found), way
    else:  # where the tokens' experts are differs from rank to rank, and is even on average
        assert sum(counted) / len(found) == pytest.approx(expected, rel=0.05), way


@pytest.mark.skipif(not EXCHANGES, reason="older versions share models in other ways")
class TestRealRanks:
    @pytest.mark.parametrize("way", ways(2))
    def test_two_hold_and_send_what_the_plan_says(self, two_ranks, way):
        check_held(two_ranks, way, ways(2)[way])
        check_sent(two_ranks, way, ways(2)[way])

    @pytest.mark.slow
    @pytest.mark.parametrize("way", ways(4))
    def test_four_hold_and_send_what_the_plan_says(self, four_ranks, way):
        check_held(four_ranks, way, ways(4)[way])
        check_sent(four_ranks, way, ways(4)[way])


def test_one_rank_holds_what_a_loaded_model_does():
    plan = plan_run(TINY)
    model = EmoForCausalLM.from_pretrained(TINY)
    assert plan.weight_bytes == sum(parameter.nbytes for parameter in model.parameters())
    assert plan.parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("experts", [None, 16])
def test_packed_weights_take_what_emo_info_says(bits, experts):
    assert (
        plan_run(TINY, bits=bits, experts=experts).weight_bytes
        == ModelSizes.open(TINY).of(experts, bits).memory_bytes
    )


def count_all(model) -> None:
    """Have a model compute by operations that PyTorch's counter knows."""
    model.set_experts_implementation("eager")
    model.set_attn_implementation("eager")


@pytest.mark.parametrize(
    "changes", [{}, {"num_experts_per_layer": [0, 12, 6], "dense_intermediate_size": 40}]
)
def test_operations_are_those_that_pytorch_counts(changes):
    model = tiny_model(**changes)
    count_all(model)
    tokens = 16
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(2, 2 + tokens)[None])
    planned = rank_flops(model.config, ParallelLayout(), tokens, tokens, training=False)
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_operations_of_training_are_those_that_pytorch_counts():
    model = tiny_model().train()
    count_all(model)
    model.gradient_checkpointing_enable()
    ids = torch.arange(2, 18)[None]
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).loss.backward()
    planned = rank_flops(model.config, ParallelLayout(), 16, 16, training=True)
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.06)


def test_experts_touched_are_those_of_even_picks():
    layer = EmoConfig(num_experts=64, num_experts_per_tok=5).layer_experts[0]
    generator = torch.Generator().manual_seed(0)
    for tokens in (1, 4, 32):
        trials = []
        for _ in range(300):
            picks = [torch.randperm(63, generator=generator)[:4] for _ in range(tokens)]
            trials.append(torch.cat(picks).unique().numel() + 1)
        assert experts_touched(layer, tokens) == pytest.approx(sum(trials) / 300, rel=0.03)


class TestLayouts:
    def test_from_a_laptop_to_a_thousand_gpus(self):
        laptop = plan_run(RELEASED, hardware=HARDWARE["laptop"], bits=4, context=4096)
        assert laptop.fits and laptop.weight_bytes < 9e9
        whole = plan_run(RELEASED, hardware=HARDWARE["rtx4090"])
        assert not whole.fits
        many = plan_run(
            RELEASED, task="train", layout=ParallelLayout(fsdp_size=8, ep_size=8, replicas=128), sequences=2
        )
        assert many.ranks == 1024 and many.fits and many.step_tokens == 1024 * 2 * 4096

    def test_replicas_multiply_tokens_and_change_no_rank_when_serving(self):
        one = plan_run(RELEASED, sequences=8)
        many = plan_run(RELEASED, sequences=8, layout=ParallelLayout(replicas=1024))
        assert many.step_tokens == 1024 * one.step_tokens
        assert (many.memory_bytes, many.step_seconds) == (one.memory_bytes, one.step_seconds)

    def test_groups_beyond_a_node_use_its_slower_links(self):
        within = plan_run(RELEASED, task="train", layout=ParallelLayout(fsdp_size=8))
        beyond = plan_run(RELEASED, task="train", layout=ParallelLayout(fsdp_size=16))
        assert beyond.link_seconds > 5 * within.link_seconds

    def test_an_expert_of_all_tokens_makes_its_rank_the_busiest(self):
        even = EmoConfig(dtype="bfloat16", num_shared_experts=0)
        layout = ParallelLayout(fsdp_size=8, ep_size=8)
        assert plan_run(RELEASED, layout=layout).rank_flops > 1.2 * plan_run(even, layout=layout).rank_flops


class TestRefused:
    @pytest.mark.parametrize(
        ("layout", "error"),
        [
            ({"tp_size": 3}, "shares 16 heads of attention among 3"),
            ({"fsdp_size": 3, "ep_size": 3}, "layer 0 has 128: load 126 or 129 experts"),
        ],
    )
    def test_what_loading_refuses_by_the_same_words(self, layout, error):
        with pytest.raises(ValueError, match=error):
            plan_run(RELEASED, layout=ParallelLayout(**layout))

    def test_experts_for_ranks_that_are_not_there(self):
        with pytest.raises(ValueError, match="Experts cannot go to 4 of 1 x 2 ranks"):
            ParallelLayout(fsdp_size=2, ep_size=4)

    @pytest.mark.parametrize(
        ("arguments", "error"),
        [
            ({"task": "dream"}, "Unknown task 'dream', expected one of serve, train"),
            ({"sequences": 0}, "`sequences` is 0"),
            ({"context": 0}, "`context` is 0"),
            ({"bits": 4, "task": "train"}, "only adapters train"),
            ({"bits": 4, "layout": ParallelLayout(tp_size=2)}, "whole in every rank"),
            ({"bits": 5}, "bits"),
            ({"experts": 129}, "129 experts a layer: expected 1 to 128"),
            ({"experts": 1}, "without a routed one"),
        ],
    )
    def test_arguments_that_make_no_plan(self, arguments, error):
        with pytest.raises(ValueError, match=error):
            plan_run(RELEASED, **arguments)

    def test_other_bits_of_a_packed_model(self, tmp_path):
        config = EmoConfig(dtype="bfloat16", quantization_config=PackedConfig(4).to_dict())
        with pytest.raises(ValueError, match="is in 4 bits"):
            plan_run(config, bits=8)
        assert plan_run(config).weight_bytes == plan_run(RELEASED, bits=4).weight_bytes

    @pytest.mark.parametrize("number", [0, -1, float("nan"), float("inf")])
    def test_hardware_without_a_rate(self, number):
        with pytest.raises(ValueError, match="`bandwidth` of the hardware is"):
            HARDWARE["h100"].replace(bandwidth=number)


class TestCommand:
    def test_prints_a_plan_and_the_same_as_json(self, capsys):
        words = ["plan", str(TINY), "--gpus", "4", "--fsdp", "2", "--ep", "2", "--task", "train"]
        assert cli.main(words) == 0
        text = capsys.readouterr().out
        assert "4 ranks" in text and "weights" in text and "tokens a second" in text
        assert cli.main([*words, "--json"]) == 0
        data = json.loads(capsys.readouterr().out)
        assert data["layout"]["replicas"] == 2 and data["ranks"] == 4
        held = 2 * sum(ParallelLayout(fsdp_size=2, ep_size=2).held(EmoConfig.from_pretrained(TINY)).values())
        assert data["weight_bytes"] == held

    def test_refuses_numbers_of_gpus_that_do_not_go_round(self, capsys):
        assert cli.main(["plan", str(TINY), "--gpus", "6", "--fsdp", "4"]) == 1
        assert "6 GPUs are no multiple of --tp 1 times --fsdp 4" in capsys.readouterr().err

    def test_takes_hardware_by_numbers(self, capsys):
        words = ["plan", str(TINY), "--hardware", "h100", "--memory", "1MB", "--bandwidth", "1GB", "--json"]
        assert cli.main(words) == 0
        data = json.loads(capsys.readouterr().out)
        assert not data["fits"] and data["hardware"]["bandwidth"] == 1e9
        assert cli.main(["plan", str(TINY), "--hardware", "abacus"]) == 1
        assert "There is no hardware 'abacus': expected one of laptop," in capsys.readouterr().err
