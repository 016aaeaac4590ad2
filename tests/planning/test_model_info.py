"""What `emo info` says of sizes is what is written, loaded and fetched."""

import json
from pathlib import Path

import pytest
import torch
from conftest import TOY, tiny_model
from hub_server import HubServer
from transformers_emo import EmoForCausalLM, ExpertSubset, PackedConfig, cli, extract_subset
from transformers_emo.checkpoints import CheckpointError
from transformers_emo.conversion import shard_experts
from transformers_emo.planning import Machine, ModelSizes, model_info
from transformers_emo.planning.info_text import info_text
from transformers_emo.quantization.packed_parts import parts_of

TINY = TOY.parent / "emo-tiny"
PLENTY = Machine(10**15, 10**15, 8, [], 10**15, 10**15)


def weights_on_disk(folder: Path) -> int:
    files = [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]
    return sum(file.stat().st_size for file in files)


def in_memory(model) -> int:
    return sum(part.nbytes for tensor in model.parameters() for part in parts_of(tensor).values())


def shapes(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture(scope="module")
def sizes():
    return ModelSizes.open(TINY)


class TestSizes:
    @pytest.mark.parametrize("bits", [16, 8, 4])
    @pytest.mark.parametrize("kept", [64, 32, 16, 8, 4])
    def test_are_those_of_what_is_extracted_and_loaded(self, sizes, tmp_path, kept, bits):
        packing = None if bits == 16 else PackedConfig(bits)
        size = sizes.of(kept, bits)
        experts = [sorted({*range(kept - 1), 63})] * 4
        extract_subset(TINY, experts, tmp_path / "x", quantization_config=packing, progress=False)
        assert weights_on_disk(tmp_path / "x") == size.file_bytes
        model = EmoForCausalLM.from_pretrained(TINY, expert_subset=experts, quantization_config=packing)
        assert in_memory(model) == size.memory_bytes
        assert size.experts == [kept] * 4 and size.bits == bits

    @pytest.mark.parametrize("bits", [16, 4])
    def test_are_those_of_what_is_saved(self, sizes, tmp_path, bits):
        packing = None if bits == 16 else PackedConfig(bits)
        model = EmoForCausalLM.from_pretrained(TINY, quantization_config=packing)
        model.save_pretrained(tmp_path)
        size = sizes.of(None, bits)
        assert weights_on_disk(tmp_path) == pytest.approx(size.file_bytes, rel=1e-3)
        assert packing is not None or shapes(model) == size.parameters

    def test_of_a_packed_folder_are_its_own(self, tmp_path):
        extract_subset(
            TINY, [[0, 1, 2, 3, 63]] * 4, tmp_path / "x", quantization_config=PackedConfig(4), progress=False
        )
        packed = ModelSizes.open(tmp_path / "x")
        assert packed.bits == [4]
        assert packed.of().file_bytes == weights_on_disk(tmp_path / "x")
        assert packed.of().memory_bytes == in_memory(EmoForCausalLM.from_pretrained(tmp_path / "x"))
        with pytest.raises(ValueError, match=r"cannot be had in 8 bits: expected one of \[4\]"):
            packed.of(5, 8)

    def test_count_the_index_of_several_files(self, make_checkpoint, monkeypatch, tmp_path):
        monkeypatch.setattr("transformers_emo.planning.model_sizes._SHARD", 40_000)
        folder = make_checkpoint(shards=True)
        assert len(list(folder.glob("*.safetensors"))) > 2
        size = ModelSizes.open(folder).of()
        extract_subset(folder, [range(12)] * 3, tmp_path / "x", max_shard_size=40_000, progress=False)
        assert weights_on_disk(tmp_path / "x") == size.file_bytes
        assert weights_on_disk(folder) == pytest.approx(size.file_bytes, rel=1e-3)

    def test_where_layers_differ_each_keeps_what_it_has(self, make_checkpoint):
        folder = make_checkpoint(num_experts=12, num_experts_per_layer=[12, 8, 6])
        sizes = ModelSizes.open(folder)
        assert sizes.of(8).experts == [8, 8, 6]
        experts = [[*range(7), 11], range(8), range(6)]
        model = EmoForCausalLM.from_pretrained(folder, expert_subset=[list(ids) for ids in experts])
        assert sizes.of(8).memory_bytes == in_memory(model)

    def test_of_tied_and_dense_models(self, make_checkpoint, tmp_path):
        folder = make_checkpoint(
            tie_word_embeddings=True, num_experts_per_layer=[0, 12, 12], dense_intermediate_size=48
        )
        size = ModelSizes.open(folder).of()
        model = EmoForCausalLM.from_pretrained(folder)
        assert (size.file_bytes, size.memory_bytes) == (weights_on_disk(folder), in_memory(model))

    def test_memory_is_that_of_the_dtype_it_is_loaded_in(self, make_checkpoint, edit_json):
        folder = make_checkpoint()
        edit_json(folder / "config.json", dtype="bfloat16")
        size = ModelSizes.open(folder).of()
        model = EmoForCausalLM.from_pretrained(folder)
        assert model.dtype == torch.bfloat16 and size.memory_bytes == in_memory(model)

    def test_of_no_routed_expert_are_refused(self, sizes):
        with pytest.raises(ValueError, match="1 experts leave layer 0 without a routed one"):
            sizes.of(1)


class TestInfo:
    @pytest.mark.parametrize("experts", [3, 15])
    def test_a_budget_takes_what_expert_memory_does(self, experts):
        info = model_info(TINY, machine=PLENTY)
        [budget] = [budget for budget in info.budgets if budget.experts == experts]
        model = EmoForCausalLM.from_pretrained(TINY, expert_memory=budget.expert_memory)
        report = model.expert_memory.report()
        assert report.slots == 4 * experts
        slots = sum(p.nbytes for p in model.expert_memory.slots.parameters())
        assert budget.memory_bytes == in_memory(model) + slots

    def test_the_least_budget_is_the_least_that_is_taken(self):
        least = ModelSizes.open(TINY).least_budget
        EmoForCausalLM.from_pretrained(TINY, expert_memory=least)
        with pytest.raises(ValueError, match=f"at least {least} bytes"):
            EmoForCausalLM.from_pretrained(TINY, expert_memory=least - 1)

    def test_the_library_is_listed_with_sizes(self):
        info = model_info(TINY, machine=PLENTY)
        found = {subset.name: subset for subset in info.subsets}
        assert set(found) == {path.stem for path in (TINY / "subsets").glob("*.json")}
        model = EmoForCausalLM.from_pretrained(TINY, expert_subset="python")
        assert found["python"].size.memory_bytes == in_memory(model) and found["python"].experts == "16"

    def test_a_damaged_subset_is_named_and_the_others_are_listed(self, make_checkpoint):
        folder = make_checkpoint()
        ExpertSubset([[0, 1, 11]] * 3).save(folder / "subsets" / "good.json")
        ExpertSubset([[0, 1, 11]] * 2).save(folder / "subsets" / "short.json")
        (folder / "subsets" / "bad.json").write_text("{")
        info = model_info(folder, machine=PLENTY)
        problems = {subset.name: subset.problem for subset in info.subsets}
        assert problems["good"] is None
        assert "does not hold JSON" in problems["bad"] and "has 2 layers" in problems["short"]
        assert "cannot be used" in info_text(info)

    def test_what_does_not_fit_says_what_it_lacks(self):
        small = Machine(10**9, 460_000_000, 1, [], 10**7, 10**7)
        needs = {need.command: need for need in model_info(TINY, machine=small).needs}
        whole = needs["from_pretrained(MODEL)"]
        assert not whole.fits and whole.problem.startswith("lacks") and "of memory" in whole.problem
        assert needs["emo extract MODEL, 16 experts"].fits
        assert needs["emo shard MODEL"].problem == "lacks 5.36 MB of disk"

    def test_a_subset_and_a_model_without_pools_are_called_what_they_are(self, make_checkpoint, tmp_path):
        extract_subset(TINY, "python", tmp_path / "x", progress=False)
        assert "a subset of an EMO, trained with" in info_text(model_info(tmp_path / "x", machine=PLENTY))
        text = info_text(model_info(TOY.parent / "std-tiny", machine=PLENTY))
        assert "trained without document pools" in text

    def test_a_model_of_dense_layers_has_no_budgets(self, make_checkpoint):
        folder = make_checkpoint(num_experts_per_layer=[0, 0, 0], dense_intermediate_size=48)
        info = model_info(folder, machine=PLENTY)
        assert info.budgets == [] and [size.experts for size in info.sizes if size.bits == 32] == [[0, 0, 0]]
        assert "dense" in info_text(info)

    def test_numbers_that_it_cannot_have_are_refused(self):
        with pytest.raises(ValueError, match=r"65 experts a layer: expected 1 to 64"):
            model_info(TINY, experts=[65])

    def test_a_damaged_model_is_an_error(self, make_checkpoint):
        folder = make_checkpoint()
        with (folder / "model.safetensors").open("r+b") as file:
            file.truncate(5000)
        with pytest.raises(CheckpointError):
            model_info(folder)

    def test_the_command_prints_the_same_as_json(self, capsys):
        assert cli.main(["info", str(TINY), "--experts", "16", "--json"]) == 0
        data = json.loads(capsys.readouterr().out)
        assert [size["experts"] for size in data["sizes"]] == [[16] * 4] * 3
        assert data["variant"] == "full" and len(data["subsets"]) == 16
        assert {"command", "memory", "disk", "fits", "problem"} == set(data["needs"][0])


INFO = """
import json
from transformers_emo.planning import Machine, model_info
info = model_info({!r}, machine=Machine(10**15, 10**15, 8, [], 10**15, 10**15))
print(json.dumps(info.to_dict()))
"""


def of_hub(hub, repo: str) -> dict:
    return json.loads(hub.run(INFO.format(repo)).splitlines()[-1])


@pytest.mark.parametrize("layout", ["one file", "shards", "expert shards"])
def test_of_a_repository_headers_are_fetched_and_nothing_else(tmp_path, layout):
    model = tiny_model(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_experts=40)
    model.save_pretrained(tmp_path / "plain", max_shard_size="200KB" if layout == "shards" else "5GB")
    folder = tmp_path / "plain"
    if layout == "expert shards":
        folder = tmp_path / "sharded"
        shard_experts(tmp_path / "plain", folder, progress=False)
        assert len(list(folder.glob("*.safetensors"))) > 100
    ExpertSubset([[0, 1, 2, 39]] * 4).save(folder / "subsets" / "math.json")
    here = model_info(folder, machine=PLENTY).to_dict()
    files = list(folder.glob("*.safetensors"))
    with HubServer() as hub:
        hub.commit("user/model", folder)
        there = of_hub(hub, "user/model")
        served = sum(hub.bytes_served(f"user/model/{file.name}") for file in files)
    if layout == "expert shards":
        assert served < 60_000  # the backbone's header alone: its kinds of tensors are all there are
    else:
        headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files)
        assert served <= headers + 16 * len(files)
    for name in ("sizes", "budgets", "subsets", "files", "file_bytes", "experts"):
        assert there[name] == here[name], name
    assert there["commit"] and all(need["disk"] >= 0 for need in there["needs"])


def test_expert_shards_that_are_not_alike_are_read_one_by_one(tmp_path):
    """A packed expert beside plain ones, as another tool may write: the index tells that sizes differ."""
    model = tiny_model(hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_experts=40)
    model.save_pretrained(tmp_path / "plain")
    shard_experts(tmp_path / "plain", tmp_path / "x", progress=False)
    index = json.loads((tmp_path / "x" / "model.safetensors.index.json").read_text())
    index["metadata"]["total_size"] += 2
    (tmp_path / "x" / "model.safetensors.index.json").write_text(json.dumps(index))
    with HubServer() as hub:
        hub.commit("user/model", tmp_path / "x")
        there = of_hub(hub, "user/model")
        seen = sum(
            hub.bytes_served(f"user/model/{file.name}") > 0 for file in (tmp_path / "x").glob("*.safetensors")
        )
    assert there["file_bytes"] == model_info(tmp_path / "x", machine=PLENTY).file_bytes
    assert seen == len(list((tmp_path / "x").glob("*.safetensors")))
