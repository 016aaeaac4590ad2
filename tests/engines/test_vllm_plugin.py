"""The parts of the plugin for vLLM that need no running engine."""

import doctest
import importlib
import json
import pkgutil
import struct
import types

import pytest
import torch
import transformers_emo_vllm
from engines.engine_models import TINY, small_model
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from transformers_emo import ExpertSubset, SubsetError
from transformers_emo.conversion import shard_experts
from transformers_emo.modeling_emo.modeling_emo import EmoTopKRouter
from transformers_emo.subsets.exclusion import remaining_subset
from transformers_emo_vllm.architecture import layers_of
from transformers_emo_vllm.choice import (
    ExpertChoiceError,
    Held,
    Subset,
    excluded,
    fitted,
    read_subset,
    without,
)
from transformers_emo_vllm.config import EmoConfig
from transformers_emo_vllm.files import ModelFiles, WeightsError
from transformers_emo_vllm.requests import RESOLVED, RequestExperts, remember_server
from transformers_emo_vllm.routing import Row, Rows, route
from transformers_emo_vllm.startup import apply_choice
from transformers_emo_vllm.weights import WeightReader
from vllm import SamplingParams
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality

pytestmark = pytest.mark.engines
MODULES = [
    f"transformers_emo_vllm.{module.name}" for module in pkgutil.iter_modules(transformers_emo_vllm.__path__)
]


@pytest.mark.parametrize("name", ["transformers_emo_vllm", *MODULES])
def test_examples_run(name, tmp_path):
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    known = {"tmp_path": tmp_path, "emo_tiny": str(TINY), "emo_tiny_config": EmoConfig.from_pretrained(TINY)}
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, name, extraglobs=known):
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_shared_experts": 0},
        {"num_shared_experts": 3},
        {"num_shared_experts": 0, "always_active_experts": [3, 7]},
        {"num_shared_experts": 0, "norm_topk_prob": True},
        {"num_experts": 3},
    ],
)
def test_the_router_takes_the_experts_that_ours_takes(changes):
    model = small_model(**changes)
    router, layer = model.model.layers[0].mlp.gate, layers_of(model.config)[0]
    assert isinstance(router, EmoTopKRouter)
    logits_TE, weights_TK, ids_TK, _ = router(torch.randn(50, model.config.hidden_size))
    found_TK, found_ids_TK = route(logits_TE, layer, model.config.norm_topk_prob)
    assert torch.equal(found_ids_TK.sort().values, ids_TK.int().sort().values)
    assert torch.allclose(found_TK.sort().values, weights_TK.sort().values, atol=1e-6)


def subsets():
    """Good and bad choices of experts for a model whose layers hold 8, 0 and 6 experts of 8, 0 and 16."""
    yield from (
        [[0, 1, 7], None, [2, 3, 15]],
        [[7], None, [2, 15]],  # no routed expert
        [[0, 1], None, [2, 15]],  # no shared one
        [[0, 7], [1], [2, 15]],  # the layer is dense
        [[0, 7], None, [1, 15]],  # not held
        [[0, 8], None, [2, 15]],  # not there
        [[0, 7], None],
        [[0, 0, 7], None, [2, 15]],
        [[0, 7], None, None],
    )


def partial_config():
    return small_model(
        num_experts_per_layer=[8, 0, 6],
        dense_intermediate_size=32,
        retained_experts=[list(range(8)), None, [2, 3, 5, 9, 11, 15]],
        root_experts_per_layer=[8, 0, 16],
    ).config


@pytest.mark.parametrize("experts", list(subsets()), ids=str)
def test_subsets_fit_or_not_as_ours_do(experts, tmp_path):
    config = partial_config()
    path = tmp_path / "subset.json"
    path.write_text(json.dumps({"experts": experts}))
    try:
        wanted = ExpertSubset.load(path).for_model(config).experts
    except SubsetError:
        with pytest.raises(ExpertChoiceError):
            fitted(read_subset(path), Held.of(config), "The subset")
        return
    found = fitted(read_subset(path), Held.of(config), "The subset")
    assert [None if ids is None else list(ids) for ids in found] == wanted


@pytest.mark.parametrize(
    "never",
    [
        {0: [0, 1]},
        {"2": [2]},
        [[0], None, [3]],
        {0: [7]},
        {3: [0]},
        {0: [9]},
        {0: list(range(7))},
        [[0]],
        {2: [0]},
    ],
    ids=str,
)
def test_experts_are_excluded_or_not_as_ours_are(never):
    config = partial_config()
    held = Held.of(config)
    kept = [None if layer.is_dense else ids for layer, ids in zip(held.layers, held.present, strict=True)]
    try:
        wanted = remaining_subset(None, never, config).experts
    except SubsetError:
        with pytest.raises(ExpertChoiceError):
            without(kept, excluded(never, held, None), held)
        return
    found = without(kept, excluded(never, held, None), held)
    assert [None if ids is None else list(ids) for ids in found] == wanted


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"experts": 3}', '{"experts": [["a"]]}', '{"experts": [[true]]}']
)
def test_damaged_subsets_are_refused(text, tmp_path):
    (tmp_path / "subset.json").write_text(text)
    with pytest.raises(ExpertChoiceError):
        read_subset(tmp_path / "subset.json")


def tensors_of(folder, **choice):
    config = EmoConfig.from_pretrained(folder)
    for name, value in choice.items():
        setattr(config, name, value)
    files = ModelFiles(str(folder))
    apply_choice(config, files)
    return dict(WeightReader(config, files)), config


@pytest.fixture
def saved(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def test_every_layout_gives_the_same_tensors(saved, tmp_path):
    model, folder = saved
    wanted, _ = tensors_of(folder)
    shard_experts(folder, tmp_path / "sharded", progress=False)
    stacked = tmp_path / "stacked"
    stacked.mkdir()
    (stacked / "config.json").write_text((folder / "config.json").read_text())
    save_file(
        {name: p.detach().clone() for name, p in model.named_parameters()}, stacked / "model.safetensors"
    )
    subset = [[0, 4, 9, 15]] * 3
    part, config = tensors_of(folder, expert_subset=subset)
    assert config.num_experts == 4 and config.retained_experts == subset
    for other in (tmp_path / "sharded", stacked):
        for expected, choice in ((wanted, {}), (part, {"expert_subset": subset})):
            found, _ = tensors_of(other, **choice)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)
    name = "model.layers.1.mlp.experts.{}.up_proj.weight"
    assert torch.equal(part[name.format(2)], wanted[name.format(9)])
    gate = "model.layers.1.mlp.gate.weight"
    assert torch.equal(part[gate], wanted[gate][[0, 4, 9, 15]])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.experts.7.up_proj.weight"),
            r"lacks 1 tensors .*experts\.7\.up_proj",
        ),
        (lambda t: t.pop("model.norm.weight"), r"lacks 1 tensors .*model\.norm\.weight"),
        (lambda t: t.update({"model.layers.9.mlp.gate.weight": torch.zeros(1)}), "does not explain"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(3)}),
            r"shape \(3,\), the config wants \(128,\)",
        ),
        (lambda t: t.update({"model.norm.weight": torch.zeros(128, dtype=torch.int8)}), "of type I8"),
    ],
)
def test_weights_that_are_not_those_of_the_config_are_refused(saved, change, words):
    _, folder = saved
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=words):
        tensors_of(folder)


def test_damaged_files_are_refused(saved):
    _, folder = saved
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for damaged in (
        b"",
        whole[:100],
        whole[:-10],
        struct.pack("<Q", 1 << 60) + whole[8:],
        whole[:8] + b"x" + whole[9:],
    ):
        file.write_bytes(damaged)
        with pytest.raises(WeightsError):
            tensors_of(folder)
    file.unlink()
    with pytest.raises(WeightsError, match="neither"):
        tensors_of(folder)
    for place in ("../model.safetensors", "/etc/passwd", "model.bin"):
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"model.norm.weight": place}})
        )
        with pytest.raises(WeightsError, match="names the file"):
            tensors_of(folder)


class Settings:
    """What the plugin asks of vLLM's settings."""

    def __init__(self, config):
        self.model_config = types.SimpleNamespace(hf_config=config)


@pytest.fixture
def rows():
    config = EmoConfig(num_hidden_layers=2, num_experts=4, num_experts_per_tok=2, num_shared_experts=1)
    config.emo_serving = {
        "refused": [],
        "pools_refused": [],
        "subsets": {"a": [[0, 3], [1, 3]], "b": [[2, 3], [0, 3]]},
        "damaged": {"old": "The subset 'old' was made for another model."},
    }
    server = Settings(config)
    remember_server(server)
    processor = RequestExperts.__new__(RequestExperts)
    processor.layers = layers_of(config)
    processor.rows = Rows(processor.layers, max_rows=4, max_tokens=16, device=torch.device("cpu"))
    yield processor, config
    del server


def asked(**said):
    params = SamplingParams(extra_args=said or None)
    RequestExperts.validate_params(params)
    return params


def allowed(rows, layer=0):
    """The experts of each of four rows, one token a row."""
    rows.prepare(torch.arange(5), torch.zeros(4))
    finite = rows.restrict(torch.zeros(4, 4), layer).isfinite()
    return ["".join(str(e) for e in range(4) if row[e]) for row in finite]


def test_requests_keep_their_experts_when_rows_change(rows):
    processor, _ = rows
    a, b, free = asked(expert_subset="a"), asked(expert_subset="b"), asked()
    update = lambda **changes: processor.update_state(  # noqa: E731
        BatchUpdate(**{"batch_size": 4, "removed": [], "added": [], "moved": []} | changes)
    )
    update(added=[(0, a, [1], []), (1, free, [1], []), (2, b, [1], [])])
    assert allowed(processor.rows) == ["03", "0123", "23", "0123"]
    assert allowed(processor.rows, 1) == ["13", "0123", "03", "0123"]
    update(moved=[(0, 2, MoveDirectionality.SWAP)])
    assert allowed(processor.rows) == ["23", "0123", "03", "0123"]
    update(removed=[0], moved=[(2, 0, MoveDirectionality.UNIDIRECTIONAL)])
    assert allowed(processor.rows) == ["03", "0123", "0123", "0123"]
    update(added=[(0, free, [1], []), (3, b, [1], [])])  # another request takes the row
    assert allowed(processor.rows) == ["0123", "0123", "0123", "23"]
    processor.update_state(None)
    assert allowed(processor.rows) == ["0123", "0123", "0123", "23"]


def test_a_choice_that_was_not_checked_is_an_error(rows):
    processor, _ = rows
    unchecked = SamplingParams(extra_args={"expert_subset": "a"})
    with pytest.raises(RuntimeError, match="unchecked"):
        processor.update_state(BatchUpdate(1, [], [(0, unchecked, [1], [])], []))


def test_what_a_client_claims_to_be_checked_is_not_believed(rows):
    params = asked(**{RESOLVED: {"masks": ["f", "f"], "pool": None}})
    assert RESOLVED not in params.extra_args
    params = asked(**{RESOLVED: {"masks": ["f", "f"], "pool": None}, "expert_subset": "a"})
    assert params.extra_args[RESOLVED] == {"masks": ["9", "a"], "pool": None}


def test_parameters_can_be_used_again(rows):
    params = asked(expert_subset="a")
    before = dict(params.extra_args)
    RequestExperts.validate_params(params)
    assert params.extra_args == before


def test_a_damaged_subset_of_the_library_is_told_when_it_is_asked_for(rows):
    with pytest.raises(ExpertChoiceError, match="another model"):
        asked(expert_subset="old")


def test_a_server_without_choices_says_why(rows):
    _, config = rows
    config.emo_serving = config.emo_serving | {
        "refused": ["prefix caching"],
        "pools_refused": ["chunked prefill"],
    }
    with pytest.raises(ExpertChoiceError, match="prefix caching"):
        asked(expert_subset="a")
    config.emo_serving = config.emo_serving | {"refused": []}
    with pytest.raises(ExpertChoiceError, match="chunked prefill"):
        asked(document_pool=2)
    assert asked().extra_args is None


def test_two_models_in_one_process_cannot_be_told_apart(rows):
    _, config = rows
    other = EmoConfig(num_hidden_layers=2, num_experts=4, num_experts_per_tok=2, num_shared_experts=1)
    other.emo_serving = dict(config.emo_serving)
    again = Settings(other)
    remember_server(again)
    assert asked(expert_subset="a")  # the same model once more
    other.emo_serving["subsets"] = {}
    with pytest.raises(ExpertChoiceError, match="several EMO models"):
        asked(expert_subset="a")
    assert asked().extra_args is None


def test_other_models_are_left_alone():
    processor = RequestExperts(Settings(types.SimpleNamespace()), torch.device("cpu"), False)
    params = SamplingParams(extra_args={"document_pool": 3})
    processor.update_state(BatchUpdate(1, [], [(0, params, [1], [])], []))
    assert processor.add_request(0, params) is False
    logits = torch.zeros(1, 3)
    assert processor.apply(logits) is logits


def test_a_pool_is_chosen_from_the_whole_prompt_and_kept(rows):
    processor, _ = rows
    batch = processor.rows
    batch.put(0, Row(pool=1, prompt_length=2))
    logits = torch.tensor([[0.0, 3.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0]])
    batch.prepare(torch.tensor([0, 2, 3]), torch.tensor([0, 1, 7]))
    found = batch.restrict_to_pools(logits, 0)
    assert found[0].tolist() == [float("-inf"), 3.0, float("-inf"), 0.0]
    assert found[2].tolist() == logits[2].tolist()  # another request
    batch.prepare(torch.tensor([0, 1, 2]), torch.tensor([2, 8]))
    assert batch.restrict_to_pools(logits[2:].repeat(2, 1), 0)[0].tolist() == [
        float("-inf"),
        0.0,
        float("-inf"),
        0.0,
    ]


def test_a_prompt_in_parts_chooses_no_pool(rows):
    processor, _ = rows
    batch = processor.rows
    batch.put(0, Row(pool=1, prompt_length=5))
    batch.prepare(torch.tensor([0, 2]), torch.tensor([0, 1]))
    with pytest.raises(RuntimeError, match="--no-enable-chunked-prefill"):
        batch.restrict_to_pools(torch.zeros(2, 4), 0)
    batch.prepare(torch.tensor([0, 2]), torch.tensor([3, 4]))
    with pytest.raises(RuntimeError, match="prefix caching"):
        batch.restrict_to_pools(torch.zeros(2, 4), 0)


def test_rows_that_the_batch_does_not_have_are_an_error(rows):
    processor, _ = rows
    processor.rows.put(3, Row(allowed=[None, None]))
    with pytest.raises(RuntimeError, match="2 rows"):
        processor.rows.prepare(torch.arange(3), torch.zeros(2))


def test_a_subset_that_drops_shared_experts_is_for_the_start_only(tmp_path):
    from transformers_emo_vllm.startup import library_subset

    held = Held.of(EmoConfig(num_hidden_layers=1, num_experts=4, num_experts_per_tok=2, num_shared_experts=1))
    (tmp_path / "s.json").write_text(json.dumps({"experts": [[0, 1]], "drop_shared": True}))
    with pytest.raises(ExpertChoiceError, match="start a server"):
        library_subset(tmp_path / "s.json", "s", held)
    assert fitted(Subset(((0, 1),), drop_shared=True), held, "s") == ((0, 1),)


def test_of_a_repository_only_the_files_of_kept_experts_are_fetched(tmp_path):
    shard_experts(TINY, tmp_path / "sharded", progress=False)
    read = """
import hashlib, json, sys
from transformers_emo_vllm.config import EmoConfig
from transformers_emo_vllm.files import ModelFiles
from transformers_emo_vllm.startup import apply_choice
from transformers_emo_vllm.weights import WeightReader

def tensors(place):
    files, config = ModelFiles(place), EmoConfig.from_pretrained(place)
    config.expert_subset = "coq"
    apply_choice(config, files)
    return {name: hashlib.sha256(t.view(t.shape).float().numpy().tobytes()).hexdigest()
            for name, t in WeightReader(config, files)}
"""
    with HubServer() as hub:
        hub.commit("user/emo", tmp_path / "sharded")
        found = json.loads(hub.run(read + "print(json.dumps(tensors('user/emo')))").splitlines()[-1])
        served = hub.bytes_served()
        here = f"print(json.dumps(tensors({str(TINY)!r})))"
        assert found == json.loads(hub.run(read + here).splitlines()[-1])
        names = hub.run(read + "print(*ModelFiles('user/emo').library())").split()
        assert names == sorted(path.stem for path in (TINY / "subsets").glob("*.json"))
    assert served < 0.55 * sum(path.stat().st_size for path in (tmp_path / "sharded").rglob("*.safetensors"))


def settings_of_a_gpu(**graphs):
    """vLLM's settings where nothing but CUDA graphs is in the way of requests with experts of their own."""
    none = types.SimpleNamespace
    config = EmoConfig(num_hidden_layers=1, num_experts=4, num_experts_per_tok=2)
    return none(
        model_config=none(hf_config=config, enforce_eager=False, enable_prompt_embeds=False),
        cache_config=none(enable_prefix_caching=False),
        use_v2_model_runner=False,
        speculative_config=None,
        kv_transfer_config=None,
        compilation_config=none(**graphs),
        parallel_config=none(data_parallel_size=1, enable_dbo=False),
        scheduler_config=none(enable_chunked_prefill=False, long_prefill_token_threshold=0),
    )


@pytest.mark.parametrize(
    ("mode", "subsets", "pools"),
    [
        (None, False, False),
        ("FULL_AND_PIECEWISE", False, False),
        ("PIECEWISE", True, False),
        ("NONE", True, True),
    ],
)
def test_graphs_that_do_not_ask_are_no_place_for_choices(mode, subsets, pools, monkeypatch):
    from transformers_emo_vllm import startup
    from vllm.config import CUDAGraphMode
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    settings = settings_of_a_gpu(cudagraph_mode=None if mode is None else CUDAGraphMode[mode])
    assert (not startup.why_not(settings), not startup.why_no_pools(settings)) == (subsets, pools)
    # vLLM chooses full graphs after it has asked: the promise is noticed to be broken.
    settings.model_config.hf_config.emo_serving = {"refused": [], "pools_refused": ["x"]}
    settings.compilation_config.cudagraph_mode = CUDAGraphMode.FULL
    with pytest.raises(startup.UnsupportedModelError, match="changed its settings"):
        startup.check_promise(settings)
