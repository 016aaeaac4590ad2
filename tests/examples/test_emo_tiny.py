"""What ships of emo-tiny and std-tiny is whole, alike but for the pools, and as the cards say."""

import csv
import json
import runpy
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers_emo import ExpertSubset
from transformers_emo.analysis import Retention, document_losses, encode_documents, read_domains

ROOT = Path(__file__).parents[2]
CARDS = ROOT / "model_cards"
EMO, STANDARD = CARDS / "emo-tiny", CARDS / "std-tiny"


@pytest.fixture(scope="module")
def publish():
    return runpy.run_path(str(ROOT / "examples" / "emo_tiny" / "publish.py"))


@pytest.mark.parametrize("folder", [EMO, STANDARD], ids=lambda folder: folder.name)
def test_weights_are_small_and_load_with_the_auto_classes(folder):
    assert (folder / "model.safetensors").stat().st_size < 20e6
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    assert model.config.num_experts == 64 and all(p.isfinite().all() for p in model.parameters())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "def f(x):\n    return x  # größer, 大, больше"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_the_pair_differs_in_the_pools_alone():
    configs = [json.loads((folder / "config.json").read_text()) for folder in (EMO, STANDARD)]
    pools = [config.pop("document_pool_min") for config in configs]
    assert pools == [7, 63] and configs[0] == configs[1]
    assert (EMO / "tokenizer.json").read_bytes() == (STANDARD / "tokenizer.json").read_bytes()
    for folder in (EMO, STANDARD):
        with (folder / "training.csv").open() as file:
            assert list(csv.DictReader(file))[-1]["step"] == "2800"


def test_documents_may_be_passed_on_and_splits_share_none(publish):
    seen: dict[str, str] = {}
    for path in sorted((EMO / "documents").glob("*.jsonl")):
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            assert row["licence"] in publish["LICENCES"] and row["source"] and row["domain"] == path.stem
            assert seen.setdefault(row["text"], row["split"]) == row["split"]
    assert len(seen) > 150 and set(seen.values()) == {"calibration", "test"}


def test_ready_subsets_are_of_this_model_and_found_by_name():
    names = sorted(path.stem for path in (EMO / "subsets").glob("*.json"))
    assert len(names) == 16
    for name in names:
        subset = ExpertSubset.load(EMO / "subsets" / f"{name}.json")
        assert subset.method == "layerwise" and [len(ids) for ids in subset.experts] == [16] * 4
        assert all(ids[-1] == 63 for ids in subset.experts)  # the shared expert
    model = AutoModelForCausalLM.from_pretrained(EMO, expert_subset="python", dtype="float32")
    assert model.config.retained_experts == ExpertSubset.load(EMO / "subsets" / "python.json").experts


@pytest.mark.parametrize("name", ["emo-tiny", "std-tiny"])
def test_cards_say_what_was_measured(publish, name):
    text = (CARDS / name / "README.md").read_text(encoding="utf-8")
    assert text == publish["card"](name, CARDS)
    assert "<<" not in text
    assert ModelCard(text).data.library_name == "transformers"
    for line in text.splitlines():
        if "](" in line and not line.startswith("["):
            for part in line.split("](")[1:]:
                target = part.split(")")[0]
                assert target.startswith("http") or (CARDS / name / target).exists()


def test_results_are_those_of_the_shipped_weights():
    """The curve's first domain once more, from the documents' window that was measured."""
    retention = Retention.read(EMO / "results" / "retention")
    assert {"emo-tiny", "std-tiny"} <= set(retention.models) and len(retention.domains) == 16
    tokenizer = AutoTokenizer.from_pretrained(EMO)
    (domain,) = read_domains(EMO / "documents", ["scripture"])
    documents = [ids for ids in encode_documents(tokenizer, domain.test, 512) if len(ids) == 512]
    model = AutoModelForCausalLM.from_pretrained(EMO, dtype="float32")
    found = document_losses(model, documents).loss_N
    wanted = ("emo-tiny", "scripture", "full")
    (measured,) = (m.loss for m in retention.measurements if (m.model, m.domain, m.method) == wanted)
    # Those that ship are the first ones of those measured, where a window fits into what ships of them.
    known = torch.tensor(measured, dtype=torch.float64)
    assert len(found) > 2 and all((known - loss).abs().min() < 1e-3 * loss for loss in found)


def test_chosen_experts_keep_the_quality_that_random_ones_lose():
    tokenizer = AutoTokenizer.from_pretrained(EMO)
    losses: dict[str, list[float]] = {}
    for domain in read_domains(EMO / "documents", ["python", "scripture", "metamath"], max_test=4):
        documents = encode_documents(tokenizer, domain.test, 512)
        chosen = ExpertSubset.load(EMO / "subsets" / f"{domain.name}.json")
        other = ExpertSubset.load(EMO / "subsets" / "japanese.json")
        model = AutoModelForCausalLM.from_pretrained(EMO, dtype="float32")
        for what, subset in (("full", None), ("chosen", chosen), ("other", other)):
            found = document_losses(model, documents, expert_subset=subset)
            losses.setdefault(what, []).append(found.loss)
    full, chosen, other = (sum(losses[what]) / 3 for what in ("full", "chosen", "other"))
    assert chosen - full < 0.1 * (other - full)
