"""Exchanging experts in memory: the right model afterwards, only the difference read, all or nothing."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hub_server import HubServer
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from tolerances import assert_same_numbers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers_emo import CheckpointError, EmoForCausalLM, ExpertSubset, SubsetError
from transformers_emo.checkpoints.local_files import LocalFiles
from transformers_emo.subsets.loading import swapping
from transformers_emo.training import lora_config

INPUT_IDS = torch.tensor([[5, 17, 60, 2, 33, 8, 90], [44, 44, 3, 71, 12, 9, 28]])
FIRST = [[0, 1, 2, 3, 4, 5, 6, 11], [0, 2, 4, 6, 7, 8, 10, 11], [1, 3, 5, 7, 8, 9, 10, 11]]
# Half of FIRST and four others in every layer.
SECOND = [[4, 5, 6, 7, 8, 9, 10, 11], [0, 1, 2, 3, 5, 6, 9, 11], [0, 2, 4, 6, 8, 9, 10, 11]]
OTHER_SIZES = [[0, 3, 4, 8, 9, 10, 11], [5, 11], [0, 6, 11]]
VARIANTS = {
    "released": ({}, FIRST, SECOND),
    "no shared": ({"num_shared_experts": 0}, FIRST, SECOND),
    "two shared": ({"num_shared_experts": 2}, [[0, 1, 10, 11]] * 3, [[1, 2, 3, 10, 11]] * 3),
    "other sizes": ({}, FIRST, OTHER_SIZES),
    "from other sizes": ({}, OTHER_SIZES, FIRST),
    "always active": (
        {"num_shared_experts": 0, "always_active_experts": [7, 3]},
        [[0, 3, 5, 7, 9]] * 3,
        [[1, 3, 7, 8, 9, 11]] * 3,
    ),
    "dense first": (
        {"num_experts_per_layer": [0, 12, 12], "dense_intermediate_size": 40, "dense_mlp_bias": True},
        [None, *FIRST[1:]],
        [None, *OTHER_SIZES[1:]],
    ),
    "grown": ({}, [[0, 11]] * 3, [list(range(12))] * 3),
    "shrunk": ({}, [list(range(12))] * 3, [[3, 11]] * 3),
}


@pytest.fixture(params=VARIANTS)
def variant(request, make_checkpoint):
    changes, first, second = VARIANTS[request.param]
    return make_checkpoint(**changes), first, second


@pytest.fixture
def tensor_bytes(monkeypatch):
    """Bytes of tensors read so far, headers not counted, as a list of one number."""
    count, read_into = [0], LocalFiles.read_into

    def counting(self, file, start, buffer):
        header = 8 + int.from_bytes((self.folder / file).read_bytes()[:8], "little")
        count[0] += len(buffer) if start >= header else 0
        read_into(self, file, start, buffer)

    monkeypatch.setattr(LocalFiles, "read_into", counting)
    return count


def load(folder, experts=None, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, expert_subset=experts, **kwargs)


def assert_same(model, expected):
    """Weights bit by bit, config, and what both compute."""
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == ours[name].dtype and torch.equal(ours[name], tensor), name
    assert model.config.to_diff_dict() == expected.config.to_diff_dict()
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in expected.parameters()]
    with torch.no_grad():
        assert torch.equal(model(INPUT_IDS).logits, expected(INPUT_IDS).logits)
    kwargs = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(INPUT_IDS, **kwargs), expected.generate(INPUT_IDS, **kwargs))


def experts_and_rows(model):
    return sum(
        p.numel() * p.element_size() for n, p in model.named_parameters() if ".experts." in n or ".gate." in n
    )


def test_a_swapped_model_is_the_other_subset_loaded(variant):
    folder, first, second = variant
    model = load(folder, first)
    model.swap_experts(second)
    assert_same(model, load(folder, second))
    model.swap_experts(ExpertSubset(first))
    assert_same(model, load(folder, first))


def test_a_swapped_model_saves_and_loads(variant, tmp_path):
    folder, first, second = variant
    model = load(folder, first)
    model.swap_experts(second)
    model.save_pretrained(tmp_path)
    assert_same(load(tmp_path), load(folder, second))


def test_subsets_that_share_half_read_half_the_bytes(make_checkpoint, tensor_bytes):
    folder = make_checkpoint()
    model = load(folder, FIRST)
    tensor_bytes[0] = 0
    model.swap_experts(SECOND)
    assert tensor_bytes[0] * 2 == experts_and_rows(model) > 0
    tensor_bytes[0] = 0
    model.swap_experts([ids[3:] for ids in SECOND])  # a part of what is there
    assert tensor_bytes[0] == 0


def test_dtype_and_parameters_stay(make_checkpoint):
    folder = make_checkpoint()
    model = load(folder, FIRST, dtype="bfloat16")
    model.model.layers[0].mlp.experts.requires_grad_(False)
    before = dict(model.named_parameters())
    model.swap_experts(SECOND)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())  # compiled code stays valid
    model.swap_experts(OTHER_SIZES)
    assert not model.model.layers[0].mlp.experts.down_proj.requires_grad
    model.requires_grad_(True)
    assert_same(model, load(folder, OTHER_SIZES, dtype="bfloat16"))


def test_base_models_and_classifiers_swap_too(make_checkpoint):
    folder = make_checkpoint()
    model = AutoModelForSequenceClassification.from_pretrained(folder, expert_subset=FIRST, num_labels=3)
    model.swap_experts(OTHER_SIZES)
    base = load(folder, OTHER_SIZES).model
    with torch.no_grad():
        got, expected = model.model(INPUT_IDS), base(INPUT_IDS)
    assert torch.equal(got.last_hidden_state, expected.last_hidden_state)


def test_a_saved_subset_reads_from_the_source_given_and_then_from_there(make_checkpoint, tmp_path):
    folder = make_checkpoint(shards=True)
    load(folder, FIRST).save_pretrained(tmp_path)
    model = load(tmp_path)
    with pytest.raises(SubsetError, match="is itself a subset.*`source` names another place"):
        model.swap_experts(SECOND)
    model.swap_experts(SECOND, source=folder)
    assert_same(model, load(folder, SECOND))
    model.swap_experts(OTHER_SIZES)
    assert_same(model, load(folder, OTHER_SIZES))


def test_exclusion_swaps_to_all_but_those(make_checkpoint):
    folder = make_checkpoint()
    model = load(folder, FIRST)
    model.swap_experts(exclude_experts={1: [3, 4]})
    assert_same(model, load(folder, exclude_experts=[[], [3, 4], []]))


def test_compiled_models_see_the_new_experts(make_checkpoint):
    folder = make_checkpoint()
    model = load(folder, FIRST, experts_implementation="batched_mm")
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(INPUT_IDS, use_cache=False)
        for experts in (SECOND, OTHER_SIZES):
            compiled.swap_experts(experts)
            expected = load(folder, experts, experts_implementation="batched_mm")
            logits = compiled(INPUT_IDS, use_cache=False).logits
            assert_same_numbers(logits, expected(INPUT_IDS).logits)


class TestAllOrNothing:
    """Whatever goes wrong, the model is as it was."""

    @pytest.fixture
    def model(self, make_checkpoint):
        return load(make_checkpoint(shards=True), FIRST)

    @pytest.fixture
    def unchanged(self, model):
        before = copy.deepcopy(model)
        parameters = list(model.parameters())
        yield
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
        assert_same(model, before)

    @pytest.mark.parametrize("reads", [0, 1, 20])
    def test_when_reading_fails(self, model, unchanged, tensor_bytes, monkeypatch, reads):
        read_into, left = LocalFiles.read_into, [reads]

        def failing(self, file, start, buffer):
            before = tensor_bytes[0]
            read_into(self, file, start, buffer)
            if tensor_bytes[0] > before:
                left[0] -= 1
                if left[0] < 0:
                    raise CheckpointError("the disk is gone")

        monkeypatch.setattr(LocalFiles, "read_into", failing)
        with pytest.raises(CheckpointError, match="the disk is gone"):
            model.swap_experts(SECOND)
        monkeypatch.undo()

    def test_when_memory_runs_out(self, model, unchanged, monkeypatch):
        assemble, left = swapping._Layer.assemble, [4]

        def failing(self, name, old):
            left[0] -= 1
            if left[0] < 0:
                raise MemoryError
            return assemble(self, name, old)

        monkeypatch.setattr(swapping._Layer, "assemble", failing)
        with pytest.raises(MemoryError):
            model.swap_experts(OTHER_SIZES)
        with pytest.raises(MemoryError):
            model.share_backbone(OTHER_SIZES)

    @pytest.mark.parametrize(
        ("experts", "message"),
        [
            ([[0, 11]] * 2, "has 2 layers, the model 3"),
            ([[0, 12, 11]] * 3, "has no expert 12"),
            ([[7, 8]] * 3, "drops expert 11"),
            (None, "needs an `expert_subset` or `exclude_experts`"),
        ],
    )
    def test_when_the_subset_does_not_fit(self, model, unchanged, experts, message):
        with pytest.raises(SubsetError, match=message):
            model.swap_experts(experts)

    def test_when_the_source_is_another_model(self, model, unchanged, make_checkpoint):
        for changes, message in (
            ({"hidden_size": 48}, "its `hidden_size` is 48, this model's 32"),
            ({"num_experts": 16}, "another model: it has \\[16, 16, 16\\] experts"),
        ):
            with pytest.raises(CheckpointError, match=message):
                model.swap_experts(SECOND, source=make_checkpoint(**changes))

    @pytest.mark.parametrize("way", ["swap_experts", "share_backbone"])
    def test_when_the_source_is_another_model_of_the_same_sizes(self, model, unchanged, make_checkpoint, way):
        with pytest.raises(CheckpointError, match=r"is another model: .*% agree"):
            getattr(model, way)(SECOND, source=make_checkpoint(seed=1))

    def test_when_the_source_is_quantised(self, model, unchanged, edit_json, make_checkpoint):
        folder = make_checkpoint()
        edit_json(folder / "config.json", quantization_config={"quant_method": "torchao"})
        with pytest.raises(CheckpointError, match="quantised"):
            model.swap_experts(SECOND, source=folder)

    def test_when_the_model_is_from_nowhere(self, make_model):
        model = make_model()
        model.swap_experts(FIRST)  # all there
        assert model.config.retained_experts == FIRST
        with pytest.raises(SubsetError, match="give the `source`"):
            model.swap_experts(SECOND)

    def test_under_a_mask(self, model, unchanged):
        with (
            model.use_experts([[0, 1, 11], [0, 11], [1, 11]]),
            pytest.raises(ValueError, match="open `use_exp"),
        ):
            model.swap_experts(SECOND)

    def test_with_an_unknown_argument(self, model, unchanged):
        with pytest.raises(TypeError, match="unexpected keyword argument 'revison'"):
            model.swap_experts(SECOND, revison="main")


def test_experts_that_are_no_plain_tensors_are_refused(make_checkpoint):
    folder = make_checkpoint()
    adapted = load(folder, FIRST)
    get_peft_model(adapted, lora_config(adapted, r=2, target_modules=["q_proj"]))
    quantised = load(folder, FIRST)
    quantised.config.quantization_config = {"quant_method": "torchao"}
    offloaded = load(folder, FIRST)
    offloaded.model.layers[1].mlp.experts.to("meta")
    for model, message in ((adapted, "under adapters"), (quantised, "quantised"), (offloaded, "offloaded")):
        for change in (model.swap_experts, model.share_backbone):
            with pytest.raises(ValueError, match=message):
                change(SECOND)


@settings(deadline=None)
@given(data=st.data())
def test_rows_in_place_are_the_rows_assembled(data):
    ids = st.lists(st.integers(0, 9), min_size=4, max_size=4, unique=True).map(sorted)
    old_ids, new_ids = data.draw(ids), data.draw(ids)
    held = [(new_ids.index(e), old_ids.index(e)) for e in new_ids if e in old_ids]
    new_rows = [row for row, e in enumerate(new_ids) if e not in old_ids]
    read = {"w": torch.tensor([[float(new_ids[row])] for row in new_rows])}
    layer = swapping._Layer(
        0,
        EmoForCausalLM.config_class(num_experts=4, num_experts_per_tok=2).layer_experts[0],
        held,
        new_rows,
        read,
    )
    old = torch.tensor([[float(e)] for e in old_ids])
    assert layer.assemble("w", old).flatten().tolist() == new_ids
    layer.write_into("w", old)
    assert old.flatten().tolist() == new_ids


class TestSharedBackbone:
    """Two tasks in one process."""

    def test_both_are_the_models_loaded_apart(self, variant):
        folder, first, second = variant
        one = load(folder, first)
        two = one.share_backbone(second)
        assert_same(two, load(folder, second))
        assert_same(one, load(folder, first))

    def test_the_backbone_is_there_once(self, make_checkpoint, tensor_bytes):
        folder = make_checkpoint(tie_word_embeddings=True)
        one = load(folder, FIRST)
        tensor_bytes[0] = 0
        two = one.share_backbone(SECOND)
        assert tensor_bytes[0] * 2 == experts_and_rows(two)

        def storages(*models):
            return {
                p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
                for m in models
                for p in m.parameters()
            }

        together = sum(storages(one, two).values())
        assert together == sum(storages(one).values()) + experts_and_rows(two)
        for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
            assert (a is b) == (".experts." not in name and ".gate." not in name), name
        assert two.config is two.model.config is not one.config

    def test_each_swaps_masks_and_saves_by_itself(self, make_checkpoint, tmp_path):
        folder = make_checkpoint()
        one = load(folder, FIRST)
        two = one.share_backbone(SECOND)
        two.swap_experts(OTHER_SIZES)
        assert_same(one, load(folder, FIRST))
        with one.use_experts([[0, 1, 11], [0, 11], [1, 11]]):
            assert_same(two, load(folder, OTHER_SIZES))
            twin = one.share_backbone(SECOND)
        assert_same(twin, load(folder, SECOND))
        two.save_pretrained(tmp_path)
        assert_same(load(tmp_path), load(folder, OTHER_SIZES))

    def test_they_generate_in_threads_of_their_own(self, make_checkpoint):
        folder = make_checkpoint()
        one = load(folder, FIRST)
        models = [one, one.share_backbone(SECOND)]

        def generate(index):
            kwargs = {"max_new_tokens": 6, "do_sample": False, "document_pool": 4 + index}
            return models[index].generate(INPUT_IDS, **kwargs)

        expected = [generate(0), generate(1)]
        with ThreadPoolExecutor(4) as threads:
            for index, got in enumerate(threads.map(generate, [0, 1] * 6)):
                assert torch.equal(got, expected[index % 2])

    def test_what_belongs_to_one_model_is_not_copied(self, make_checkpoint):
        one = load(make_checkpoint(), FIRST).train()
        one.model.pool_generator = torch.Generator().manual_seed(0)
        one._compiled_call = lambda: None  # what `generate` leaves on a model once it has compiled it
        two = one.share_backbone(SECOND)
        assert not hasattr(two, "_compiled_call")
        assert two.training and two.model.pool_generator is None
        assert one.model.pool_generator is not None


FROM_THE_HUB = """
import json, torch
from transformers_emo import EmoForCausalLM

first, second = [[0, 1, 11]] * 3, [[1, 2, 4, 11]] * 3

def load(repo, experts, revision):
    return EmoForCausalLM.from_pretrained(repo, expert_subset=experts, revision=revision)

def holds(model, repo, revision, of):
    # Routed experts alone: others are not read again when they come from elsewhere.
    expected = load(repo, of, revision)
    pairs = zip(model.model.layers, expected.model.layers)
    rows = len(of[0]) - 1
    return all(torch.equal(a.mlp.experts.down_proj[:rows], b.mlp.experts.down_proj[:rows]) for a, b in pairs)

held = []
for model, revision in (
    (load("user/emo", first, "main"), "main"),
    (load("user/emo", first, "old"), "old"),
    (EmoForCausalLM.from_pretrained("user/emo", revision="old"), "old"),
):
    model.swap_experts(first)
    model.swap_experts(second)
    held.append(holds(model, "user/emo", revision, second))
model.swap_experts([[5, 11]] * 3, source="user/other", revision="old")
model.swap_experts(second)  # which is read from there too
held.append(holds(model, "user/other", "old", second))
print(json.dumps(held))
"""


def test_experts_come_from_the_commit_of_the_hub_that_was_loaded(make_checkpoint, make_model, tmp_path):
    # Tuned from the model, as far as can be seen: of its attention.
    tuned, attention = make_model(4), {n: w for n, w in make_model(2).state_dict().items() if "_attn." in n}
    tuned.load_state_dict(attention, strict=False)
    tuned.save_pretrained(tmp_path)
    with HubServer() as hub:
        hub.commit("user/emo", make_checkpoint(1, shards=True))
        hub.commit("user/emo", make_checkpoint(2, shards=True), branch="old")
        hub.commit("user/other", make_checkpoint(3))
        hub.commit("user/other", tmp_path, branch="old")
        assert json.loads(hub.run(FROM_THE_HUB).strip().splitlines()[-1]) == [True] * 4
