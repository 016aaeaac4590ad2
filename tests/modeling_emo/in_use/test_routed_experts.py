"""`generate(..., return_experts=True)`: the experts it tells are those that the routers pick."""

import copy

import pytest
import torch
from conftest import tiny_model
from device_scenarios import generate as on_device
from transformers import CompileConfig, GenerationConfig, StaticCache
from transformers.generation.streamers import BaseStreamer
from transformers_emo import EmoForCausalLM, PackedConfig

PROMPT = torch.tensor([[0, 0, 0, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15]])
MASK = (PROMPT != 0).long()


def generate(model, prompt=PROMPT, mask=MASK, **settings):
    settings = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [0, 1]} | settings
    return model.generate(prompt, attention_mask=mask, return_experts=True, **settings)


def picks(model, sequences, mask=None, *, num_routed=11, top=3, **kwargs):
    """Root ids (B, L, S, top) that one forward over whole sequences picks, in ascending order."""
    seen = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _, __, output: seen.append(output[2]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(sequences, attention_mask=mask, use_cache=False, **kwargs)
    for hook in hooks:
        hook.remove()
    ids = torch.stack([index.unflatten(0, sequences.shape) for index in seen], dim=1)
    return ids.sort(-1).values


def mask_of(output, prompt=PROMPT, mask=MASK):
    new = output.sequences.shape[1] - prompt.shape[1] - 1
    return torch.cat([mask, torch.ones(len(mask), new, dtype=torch.long)], dim=1)


def assert_experts_of(model, output, **kwargs):
    """The experts of an output are those of one forward over its text."""
    experts = output.experts
    mask = mask_of(output)
    expected = picks(model, output.sequences[:, :-1], mask, **kwargs)
    read = mask.bool()[:, None, :, None]
    assert torch.equal(experts.ids_BLSK.sort(-1).values, expected.masked_fill(~read, -1))
    assert torch.equal(experts.is_read_BS, mask.bool())


def test_the_experts_of_prompt_and_new_tokens_are_those_of_the_routers():
    model = tiny_model()
    output = generate(model)
    assert_experts_of(model, output)
    assert (output.experts.num_prompt, output.experts.num_before) == (7, 0)
    # The shared expert has weight 1 alone, and padding has none.
    assert output.experts.weights_BLSK[1, :, :, -1].eq(1).all()
    assert output.experts.weights_BLSK[0, :, :3].eq(0).all()


def test_text_and_scores_are_those_without():
    model = tiny_model()
    settings = {
        "max_new_tokens": 6,
        "do_sample": False,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    plain = model.generate(PROMPT, attention_mask=MASK, **settings)
    told = model.generate(PROMPT, attention_mask=MASK, return_experts=True, **settings)
    assert torch.equal(plain.sequences, told.sequences)
    assert len(plain.scores) == len(told.scores)
    assert told.past_key_values is told.cache


@pytest.mark.parametrize(
    "settings",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 3},
        {"max_new_tokens": 1},
        {"max_new_tokens": 70},  # more forwards than are kept apart
    ],
    ids=str,
)
def test_every_way_of_reading_tells_the_same_experts(settings):
    model = tiny_model()
    assert_experts_of(model, generate(model, **settings))


def test_more_sequences_of_a_prompt_have_experts_of_their_own():
    model = tiny_model()
    torch.manual_seed(0)
    output = generate(model, do_sample=True, num_return_sequences=2)
    mask = torch.cat([MASK.repeat_interleave(2, 0), torch.ones(4, 5, dtype=torch.long)], dim=1)
    expected = picks(model, output.sequences[:, :-1], mask).masked_fill(~mask.bool()[:, None, :, None], -1)
    assert torch.equal(output.experts.ids_BLSK.sort(-1).values, expected)


def test_a_pool_of_the_prompt_holds_all_experts_that_are_told():
    output = generate(tiny_model(), document_pool=4)
    for sequence in output.experts.ids_BLSK:
        for layer in sequence:
            routed = layer[..., :-1]
            assert len(routed[routed >= 0].unique()) <= 4
    assert output.experts.is_read_BS.sum() == MASK.sum() + 10


def test_masked_and_excluded_experts_are_not_told():
    model = tiny_model()
    subset = [[0, 2, 4, 6, 11], [1, 3, 5, 7, 11], [0, 1, 2, 3, 11]]
    output = generate(model, expert_subset=subset)
    for layer, ids in enumerate(subset):
        assert set(output.experts.ids_BLSK[1, layer].unique().tolist()) <= set(ids)
    output = generate(model, exclude_experts={1: [0, 1, 2]})
    assert not set(output.experts.ids_BLSK[1, 1].unique().tolist()) & {0, 1, 2}


def test_a_subset_tells_ids_of_the_full_model(make_checkpoint):
    folder = make_checkpoint()
    subset = [[0, 2, 4, 6, 11], [1, 3, 5, 7, 11], [2, 3, 11]]
    full = EmoForCausalLM.from_pretrained(folder)
    part = EmoForCausalLM.from_pretrained(folder, expert_subset=subset)
    masked, loaded = generate(full, expert_subset=subset), generate(part)
    assert torch.equal(masked.sequences, loaded.sequences)
    told = [output.experts.ids_BLSK.sort(-1).values for output in (masked, loaded)]
    assert torch.equal(told[0][:, :2], told[1][:, :2])
    # The last layer has fewer experts than a token takes in the others: they fill up with -1 there.
    assert set(loaded.experts.ids_BLSK[1, 2].unique().tolist()) == {-1, 2, 3, 11}
    assert loaded.experts.sizes == masked.experts.sizes == [12, 12, 12]
    assert loaded.experts.always_used == [[11], [11], [11]]


def test_weights_in_few_bits_tell_their_experts(make_checkpoint):
    folder = make_checkpoint(hidden_size=64, intermediate_size=64)
    model = EmoForCausalLM.from_pretrained(folder, quantization_config=PackedConfig(bits=8, group_size=32))
    assert_experts_of(model, generate(model))


def test_behind_the_end_of_a_sequence_there_is_no_expert():
    model = tiny_model()
    free = generate(model).sequences[:, 7:]
    end = int(free[0, 2])  # the first sequence ends here, the other goes on
    assert end not in free[1].tolist() and end not in free[0, :2].tolist()
    output = generate(model, eos_token_id=end, pad_token_id=0)
    read = output.experts.is_read_BS[:, 7:]
    assert read.tolist() == [[True, True, True, False, False], [True] * 5]
    assert output.experts.ids_BLSK[0, :, 10:].eq(-1).all()
    by_config = GenerationConfig(
        max_new_tokens=6, do_sample=False, eos_token_id=[end, 95], pad_token_id=0, suppress_tokens=[0, 1]
    )
    output = model.generate(PROMPT, attention_mask=MASK, generation_config=by_config, return_experts=True)
    assert torch.equal(output.experts.is_read_BS[:, 7:], read)


def test_a_conversation_tells_what_it_read_in_this_call():
    model = tiny_model()
    first = model.generate(PROMPT[1:], max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    more = torch.cat([first.sequences, torch.tensor([[20, 21]])], dim=1)
    cache = copy.deepcopy(first.past_key_values)
    output = generate(model, more, None, past_key_values=cache, max_new_tokens=3)
    held = first.sequences.shape[1] - 1
    assert (output.experts.num_before, output.experts.num_prompt) == (held, 3)
    expected = picks(model, output.sequences[:, :-1])[:, :, held:]
    assert torch.equal(output.experts.ids_BLSK.sort(-1).values, expected)


def test_a_prompt_of_embeddings_tells_its_experts():
    model = tiny_model()
    by_ids = generate(model)
    embeddings = model.model.embed_tokens(PROMPT).detach()
    settings = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [0, 1]}
    output = model.generate(inputs_embeds=embeddings, attention_mask=MASK, return_experts=True, **settings)
    assert torch.equal(output.sequences, by_ids.sequences[:, 7:])
    assert torch.equal(output.experts.ids_BLSK, by_ids.experts.ids_BLSK)


def test_compiled_generation_tells_the_same_experts():
    model = tiny_model()
    expected = generate(model)
    compiling = CompileConfig(backend="eager", mode=None, fullgraph=True)
    compiling._compile_all_devices = True
    for _ in range(2):
        output = generate(model, cache_implementation="static", compile_config=compiling)
        assert torch.equal(output.sequences, expected.sequences)
        assert torch.equal(output.experts.ids_BLSK, expected.experts.ids_BLSK)
    assert getattr(model, "_compiled_call", None) is not None
    static = StaticCache(config=model.config, max_cache_len=20)
    output = generate(model, past_key_values=static, compile_config=compiling)
    assert torch.equal(output.experts.ids_BLSK, expected.experts.ids_BLSK)


def test_layers_whose_inputs_are_moved_tell_their_experts():
    hooks = pytest.importorskip("accelerate.hooks")
    model = tiny_model()
    expected = generate(model).experts.ids_BLSK
    for layer in model.model.layers:
        hooks.add_hook_to_module(layer, hooks.AlignDevicesHook("cpu", io_same_device=True))
    assert torch.equal(generate(model).experts.ids_BLSK, expected)


class Listener(BaseStreamer):
    def __init__(self):
        self.told = []

    def put(self, value):
        self.told.append(("tokens", value.numel()))

    def put_experts(self, ids_BLSK, weights_BLSK):
        self.told.append(("experts", tuple(ids_BLSK.shape)))

    def end(self):
        self.told.append("end")


def test_a_streamer_gets_the_experts_of_a_token_before_the_next_token():
    listener = Listener()
    generate(tiny_model(), PROMPT[1:], None, max_new_tokens=3, streamer=listener)
    assert listener.told == [
        ("tokens", 7), ("experts", (1, 3, 7, 4)), ("tokens", 1), ("experts", (1, 3, 1, 4)), ("tokens", 1),
        ("experts", (1, 3, 1, 4)), ("tokens", 1), "end",
    ]  # fmt: skip


def test_dense_layers_have_no_experts():
    model = tiny_model(num_experts_per_layer=[12, 0, 12], dense_intermediate_size=16)
    experts = generate(model).experts
    assert experts.ids_BLSK[:, 1].eq(-1).all() and experts.ids_BLSK[1, 2].ge(0).all()
    assert experts.usage().shape == (2, 3, 12)


def test_usage_adds_up_picks_and_weights():
    experts = generate(tiny_model()).experts
    usage = experts.usage()
    assert usage[0].sum(-1).eq(3 * int(experts.is_read_BS[0].sum())).all()
    assert usage[..., 11].eq(0).all()  # the shared expert
    assert torch.equal(experts.usage("prompt") + experts.usage("new"), usage)
    expected = experts.weights_BLSK[..., :-1].sum(dim=(2, 3))
    assert torch.allclose(experts.usage(weighted=True).sum(-1), expected)
    with pytest.raises(ValueError, match="'first', expected one of all, prompt, new"):
        experts.usage("first")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"num_beams": 2}, "num_beams=2"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens=2"),
        ({"generation_config": GenerationConfig(num_beams=3)}, "num_beams=3"),
        ({"cache_implementation": "paged"}, "cache_implementation=paged"),
        ({"custom_generate": lambda model, **kwargs: None}, "custom_generate=function"),
    ],
    ids=["beams", "lookup", "config", "paged", "custom"],
)
def test_other_orders_of_reading_are_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        tiny_model().generate(PROMPT, return_experts=True, **settings)


def test_an_assistant_is_refused_and_afterwards_all_is_as_before():
    model = tiny_model()
    with pytest.raises(ValueError, match="assistant_model=EmoForCausalLM"):
        generate(model, assistant_model=tiny_model(1))
    assert torch.equal(model.generate(PROMPT, max_new_tokens=2)[:, :7], PROMPT)
    with pytest.raises(ValueError, match="every layer of this model is dense"):
        generate(tiny_model(num_experts_per_layer=[0, 0, 0], dense_intermediate_size=16))


def test_nothing_waits_for_a_device_while_tokens_pass():
    plain = on_device("meta", "grouped_mm")
    told = on_device("meta", "grouped_mm", return_experts=True)
    assert told.in_layers == {}
    assert (told.theirs, told.ours) == (plain.theirs, plain.ours)
