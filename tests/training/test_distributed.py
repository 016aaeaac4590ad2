"""Two gloo ranks on CPUs against one process: DDP, both ways to FSDP2, resuming, frozen rows, adapters."""

import pytest
import torch
import training_runs
from ranks import launch
from safetensors import safe_open
from tolerances import TRAINING, assert_same_numbers, same_number
from training_runs import SAME, SHARDED, run_adapter, run_same, same_model
from transformers_emo import EmoConfig, EmoForCausalLM
from transformers_emo.modeling_emo import step_seed
from transformers_emo.training import accumulate_balance, load_adapter

# What the logs say, apart from times.
REPORTED = ["loss", "grad_norm", "ce_loss", "balance_loss", "router_z_loss", "lm_z_loss", "pool_size"]
REPORTED += ["experts_used", "learning_rate", "epoch", "step"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The models are tiny: more threads gain nothing, and on a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder):
    launch(training_runs.__file__, folder)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same runs in one process, each made once."""
    results = {}

    def run(name: str) -> dict:
        if name not in results:
            results[name] = run_same(name, tmp_path_factory.mktemp("alone"), ranks=1)
        return results[name]

    return run


def reports(result: dict) -> list[dict[str, float]]:
    return [{name: log[name] for name in REPORTED if name in log} for log in result["logs"]]


def assert_same(result: dict, expected: dict) -> None:
    """The same but for the order of sums."""
    assert len(result["logs"]) == len(expected["logs"]) == 2
    for log, other in zip(reports(result), reports(expected), strict=True):
        assert log == {name: same_number(value, terms=TRAINING) for name, value in other.items()}
    for name, weight in expected["weights"].items():
        assert_same_numbers(result["weights"][name], weight, terms=TRAINING, name=name)


class TestAsOneProcess:
    @pytest.mark.parametrize("name", SAME)
    def test_ddp(self, ranks, alone, name):
        assert ranks[0][name]["wrapper"] == "DistributedDataParallel"
        assert_same(ranks[0][name], alone(name))

    @pytest.mark.parametrize(("way", "name"), [(way, name) for way in SHARDED for name in SHARDED[way]])
    def test_fsdp(self, ranks, alone, way, name):
        results = [rank[way, name] for rank in ranks]
        assert results[0]["wrapper"] == "FSDPEmoForCausalLM"
        whole = sum(weight.numel() for weight in results[0]["weights"].values())
        assert sum(result["num_local"] for result in results) == whole  # nothing is held twice
        assert_same(results[0], alone(name))

    def test_the_runs_tell_what_matters_apart(self, alone):
        """Else the comparisons above would not see a rank that balances by itself, or is not counted."""
        names = ["accumulated", "exact", "unequal", "exact, unequal"]
        losses = {alone(name)["logs"][1]["loss"] for name in names}
        assert len(losses) == len(names)
        used = [log["experts_used"] for name in names for log in alone(name)["logs"]]
        assert min(used) < 11

    def test_ranks_agree(self, ranks):
        for name in SAME:
            assert reports(ranks[0][name]) == reports(ranks[1][name])
            for parameter, weight in ranks[0][name]["weights"].items():
                assert torch.equal(ranks[1][name]["weights"][parameter], weight)

    def test_ranks_see_different_windows(self, ranks):
        first, second = (rank["accumulated"]["batches"] for rank in ranks)
        assert len(first) == len(second) == 4
        assert not any(
            torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, second, strict=True)
        )

    def test_means_of_each_ranks_own_are_averaged(self, ranks):
        """Ranks with different numbers of targets, each divided by its own: no one process does that."""
        results = [rank["own mean, unequal"] for rank in ranks]
        model = same_model().train()
        model.model.pool_seed = step_seed(3, 0)  # of the run, and its first step
        of_step = [result["batches"][:2] for result in results]  # of the first step, of each rank
        targets = [sum((batch["labels"][:, 1:] != -100).sum() for batch in batches) for batches in of_step]
        assert targets[0] != targets[1]
        ce_loss = 0
        with accumulate_balance(model, [batch for batches in of_step for batch in batches]):
            for batches, number in zip(of_step, targets, strict=True):
                for batch in batches:
                    output = model(**batch | {"num_items_in_batch": number})
                    (output.loss / 2).backward()
                    ce_loss += output.ce_loss.item() / 2
        log = results[0]["logs"][0]
        assert log["ce_loss"] == same_number(ce_loss, terms=TRAINING)
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        assert log["grad_norm"] == same_number(norm.item(), terms=TRAINING)


class TestResuming:
    @pytest.mark.parametrize("kind", [False, True, "stream", "FULL_STATE_DICT", "SHARDED_STATE_DICT"])
    def test_it_is_bit_equal(self, ranks, kind):
        for rank in ranks:
            whole, resumed = rank["resumed", kind]["whole"], rank["resumed", kind]["resumed"]
            assert reports(whole)[3:] == reports(resumed)[3:] and len(resumed["logs"]) == 5
            for name, weight in whole["weights"].items():
                assert torch.equal(resumed["weights"][name], weight), name

    @pytest.mark.parametrize("kind", [False, True, "stream", "FULL_STATE_DICT", "SHARDED_STATE_DICT"])
    def test_each_rank_goes_on_with_its_own_windows_and_pools(self, ranks, kind):
        for rank in ranks:
            whole, resumed = rank["resumed", kind]["whole"], rank["resumed", kind]["resumed"]
            assert len(whole["batches"]) == 10 and len(resumed["batches"]) == 4
            assert whole["pool_sizes"][6:] == resumed["pool_sizes"]
            for batch, other in zip(whole["batches"][6:], resumed["batches"], strict=True):
                assert torch.equal(batch["input_ids"], other["input_ids"])

    def test_it_is_in_the_middle_of_an_epoch(self, ranks):
        assert 0 < ranks[0]["resumed", True]["whole"]["logs"][4]["epoch"] < 1


def test_ranks_draw_different_pools_from_one_seed(ranks):
    """For their windows are different ones. (That they draw what one process would: `TestAsOneProcess`.)"""
    first, second = (rank["accumulated"]["pool_sizes"] for rank in ranks)
    assert len(first) == len(second) == 4 and first != second


class TestSavedModels:
    @pytest.mark.parametrize("way", ["fsdp", "loaded sharded"])
    def test_they_are_ordinary_ones_in_the_released_layout(self, ranks, folder, way):
        saved = folder / way
        expected = ranks[0][way] if way == "loaded sharded" else ranks[0][way]["weights"]
        model = EmoForCausalLM.from_pretrained(saved)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, expected[name]), name
        with safe_open(saved / "model.safetensors", "pt") as file:
            names = set(file.keys())
        assert "model.layers.2.mlp.experts.11.down_proj.weight" in names
        assert not any("gate_up_proj" in name for name in names)
        assert EmoConfig.from_pretrained(saved).num_experts == 12


class TestFrozenRows:
    @pytest.mark.parametrize("run", ["routed", ("fsdp", "routed"), ("loaded sharded", "routed")], ids=str)
    def test_they_stay_and_nothing_else_does(self, ranks, run):
        weights, before = ranks[0][run]["weights"], same_model().state_dict()
        for name, parameter in same_model().named_parameters():
            if ".mlp.experts." not in name:
                assert torch.equal(weights[name], parameter), name
                continue
            assert torch.equal(weights[name][-1], before[name][-1]), name
            assert all(not torch.equal(weights[name][row], before[name][row]) for row in range(11)), name


def test_an_adapter_is_trained_as_in_one_process_and_saved(ranks, folder, tmp_path):
    result = ranks[0]["adapter"]
    assert_same(result, run_adapter(tmp_path, ranks=1))
    adapted = load_adapter(same_model(), folder / "adapter")
    weights = dict(adapted.named_parameters())
    assert all(torch.equal(weights[name], weight) for name, weight in result["weights"].items())
    factors = [weight for name, weight in result["weights"].items() if "lora_B" in name]
    assert len(factors) == 3 * 4 and all(factor.any() for factor in factors)
