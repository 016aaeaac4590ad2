"""Router statistics: exact, streaming, resumable, and the same however many processes make them."""

import json
import math
from collections import Counter

import pyarrow.parquet as pq
import pytest
import torch
from conftest import TOY
from tolerances import assert_same_numbers
from transformers import AutoTokenizer
from transformers_emo import EmoForCausalLM
from transformers_emo.analysis.routing import Document, RoutingStatistics, documents_of, router_statistics
from transformers_emo.analysis.routing import statistics as module
from transformers_emo.checkpoints.writing.folder_lock import locked_folder

TEXTS = [
    ("import os, sys\n\ndef main():\n    return 0\n" * 3, "python"),
    ("Theorem plus_comm : forall n m, n + m = m + n.\nProof. intros. omega. Qed.\n" * 2, "coq"),
    ("x", "python"),
    ("Lemma app_nil_r : forall l, l ++ [] = l.", "coq"),
    ("class A:\n    pass\n", "python"),
]
SETTINGS = {"window": 40, "tokens_per_document": 12, "vectors_per_document": 5, "prefixes": (4, 16)}


@pytest.fixture(scope="module")
def documents():
    return [Document(text, domain, ("calibration", "test")[i % 2]) for i, (text, domain) in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def statistics(documents, tmp_path_factory):
    out = tmp_path_factory.mktemp("statistics")
    return router_statistics(TOY, documents, out, documents_per_part=2, progress=False, **SETTINGS)


@pytest.fixture(scope="module")
def naive(documents):
    """Routed probabilities (S, R) of each document and layer, from the model's own forward."""
    model, tokenizer = EmoForCausalLM.from_pretrained(TOY), AutoTokenizer.from_pretrained(TOY)
    found = []
    for document in documents:
        ids = torch.tensor([tokenizer(document.text)["input_ids"][:40]])
        logits = model(ids, output_router_logits=True).router_logits
        found.append([layer[:, :31].float().softmax(-1).detach() for layer in logits])
    return found


def test_probabilities_and_entropy_are_those_of_the_model(statistics, naive):
    for part in statistics.parts():
        for layer in statistics.layers:
            rows = statistics.layer_rows(part, layer)
            for row, document in enumerate(range(2 * part, min(2 * part + 2, len(naive)))):
                probs_SR = naive[document][layer]
                assert_same_numbers(torch.tensor(rows.probability_NR[row]).float(), probs_SR.sum(0))
                entropy = float(torch.distributions.Categorical(probs_SR).entropy().sum()) / math.log(2)
                assert float(rows.entropy_N[row]) == pytest.approx(entropy, rel=1e-4)
                prefix_PR = torch.tensor(rows.prefix_NPR[row])
                assert_same_numbers(prefix_PR, torch.stack([probs_SR[:4].sum(0), probs_SR[:16].sum(0)]))


def test_picks_are_those_of_the_model(statistics, naive):
    for layer in statistics.layers:
        found = Counter()
        for part in statistics.parts():
            tokens = statistics.tokens(part, ["document", "position", f"picks_{layer}"])
            rows = statistics.layer_rows(part, layer)
            top = [naive[2 * part + row][layer].topk(3).indices for row in range(len(rows.picks_NR))]
            counts = torch.stack([ids.flatten().bincount(minlength=31) for ids in top])
            assert rows.picks_NR.tolist() == counts.tolist()
            for document, position, picks in zip(*tokens.values(), strict=True):
                found[int(document)] += 1
                assert picks.tolist() == top[document - 2 * part][position].tolist()
        assert found == {i: min(12, len(layers[0])) for i, layers in enumerate(naive)}


def test_probabilities_of_the_first_tokens_are_kept(statistics, naive):
    tokens = statistics.tokens(0, ["document", "position", "probability_2"])
    kept = (tokens["position"] < 5).nonzero()[0]
    assert len(tokens["probability_2"]) == len(kept)
    for row, place in enumerate(kept):
        exact_R = naive[tokens["document"][place]][2][tokens["position"][place]]
        assert torch.allclose(torch.tensor(tokens["probability_2"][row]).float(), exact_R, atol=2e-3)


def test_a_loaded_model_gives_the_same_bits(documents, statistics, tmp_path):
    model = EmoForCausalLM.from_pretrained(TOY)
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    router_statistics(
        model, documents, tmp_path, documents_per_part=2, tokenizer=tokenizer, progress=False, **SETTINGS
    )
    assert files_of(tmp_path) == files_of(statistics.folder)


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_processes_make_the_same_files_as_one(documents, statistics, tmp_path, processes):
    for number in reversed(range(processes)):
        router_statistics(
            TOY,
            iter(documents),
            tmp_path,
            documents_per_part=2,
            process=(number, processes),
            progress=False,
            **SETTINGS,
        )
        if number:
            with pytest.raises(ValueError, match="parts are missing"):
                RoutingStatistics(tmp_path).parts()
    assert files_of(tmp_path) == files_of(statistics.folder)


def test_an_interrupted_run_goes_on_where_it_was(documents, statistics, tmp_path, monkeypatch):
    def run():
        return router_statistics(TOY, documents, tmp_path, documents_per_part=2, progress=False, **SETTINGS)

    passed = []
    real = module.pass_full_model

    def pass_once(*args):
        if len(passed) == 2:
            raise KeyboardInterrupt
        passed.append(1)
        real(*args)

    monkeypatch.setattr(module, "pass_full_model", pass_once)
    with pytest.raises(KeyboardInterrupt):
        run()
    with pytest.raises(ValueError, match="not finished"):
        RoutingStatistics(tmp_path).parts()
    passed.clear()
    run()
    assert len(passed) == 1  # the third part only
    assert files_of(tmp_path) == files_of(statistics.folder)


def test_documents_are_read_as_they_come(tmp_path):
    read = []

    def stream():
        for number in range(7):
            read.append(number)
            yield Document("def main(): pass", "python")
            # A part of two documents is written before the one after next is read.
            assert len(list(tmp_path.glob("documents-*.parquet"))) >= (number - 1) // 2

    found = router_statistics(TOY, stream(), tmp_path, documents_per_part=2, window=8, progress=False)
    assert (len(read), found.num_documents, found.parts()) == (7, 7, [0, 1, 2, 3])


def test_memory_holds_one_layer_of_a_folder(documents, tmp_path, monkeypatch):
    held = []

    class Layers(module_layers()):
        def decoder(self, index):
            decoder = super().decoder(index)
            real = [i for i, layer in enumerate(self.network.layers) if holds_weights(layer)]
            held.append(real)
            return decoder

    monkeypatch.setattr("transformers_emo.subsets.choosing.model_opening.CheckpointLayers", Layers)
    router_statistics(TOY, documents[:1], tmp_path, window=8, progress=False)
    assert held == [[0], [1], [2], [3]]


def test_dense_layers_and_always_active_experts(make_model, tmp_path):
    model = make_model(
        num_experts_per_layer=[12, 0, 8],
        dense_intermediate_size=40,
        num_shared_experts=0,
        always_active_experts=[2],
        vocab_size=4096,
    )
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    found = router_statistics(
        model, [Document("import os", "python")], tmp_path, tokenizer=tokenizer, progress=False
    )
    assert found.layers == [0, 2]
    assert found.experts(2) == [0, 1, 3, 4, 5, 6, 7] and found.picks(2) == 3
    ids = torch.tensor([tokenizer("import os")["input_ids"]])
    probs = model(ids, output_router_logits=True).router_logits[1].softmax(-1)[:, found.experts(2)]
    assert_same_numbers(torch.tensor(found.layer_rows(0, 2).probability_NR[0]).float(), probs.sum(0).detach())


def test_other_texts_settings_and_models_are_refused(documents, statistics, tmp_path, make_model):
    def again(documents, **changes):
        settings = {"documents_per_part": 2, "progress": False} | SETTINGS | changes
        return router_statistics(TOY, documents, statistics.folder, **settings)

    with pytest.raises(ValueError, match="window = 40, and now it is 20"):
        again(documents, window=20)
    with pytest.raises(ValueError, match="Part 1 .* was made of other documents"):
        again([*documents[:3], Document("other", "coq")])
    with pytest.raises(ValueError, match="found 5 documents .* this one 4"):
        again(documents[:4])
    with pytest.raises(ValueError, match="There is no document"):
        router_statistics(TOY, [], tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"`process` is \(2, 2\)"):
        router_statistics(TOY, documents, tmp_path, process=(2, 2), progress=False)
    with pytest.raises(ValueError, match="`batch_size` is 0"):
        router_statistics(TOY, documents, tmp_path, batch_size=0, progress=False)
    with pytest.raises(ValueError, match="no router statistics"):
        RoutingStatistics(tmp_path / "nothing")


def test_a_second_run_of_the_same_share_is_refused(documents, tmp_path):
    with locked_folder(tmp_path / ".process-1-of-1"), pytest.raises(BlockingIOError, match="Another run"):
        router_statistics(TOY, documents, tmp_path, progress=False)


def test_rows_of_datasets_are_read(tmp_path):
    rows = [{"body": text, "topic": domain} for text, domain in TEXTS]
    found = list(documents_of(rows, text="body", domain="topic"))
    assert [(one.domain, one.split) for one in found] == [
        ("python", "calibration"),
        ("coq", "calibration"),
        ("python", "test"),
        ("coq", "test"),
        ("python", "calibration"),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(documents_of(path, text="body", domain="topic")) == found
    assert list(documents_of(path, text="body", domain="topic", limit=2)) == found[:2]
    with pytest.raises(ValueError, match="no text in the column 'domain': it has .'body', 'topic'.*Name the"):
        list(documents_of(rows, text="body"))
    with pytest.raises(ValueError, match="`limit` is 0"):
        list(documents_of(rows, limit=0))


def test_files_are_plain_parquet(statistics):
    table = pq.read_table(statistics.folder / "documents-00000.parquet").to_pandas()
    assert list(table.columns[:5]) == ["document", "domain", "split", "layer", "tokens"]
    assert table["probability"].map(sum).tolist() == pytest.approx(table["tokens"].tolist())


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}


def holds_weights(layer):
    return any(parameter.device.type != "meta" for parameter in layer.parameters())


def module_layers():
    from transformers_emo.subsets.choosing.layer_sources import CheckpointLayers

    return CheckpointLayers
