"""A subset is known to be of the model that it is used on, or not, whatever the names are."""

import json
import os
import shutil

import pytest
import torch
from hub_server import HubServer
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers_emo import EmoForCausalLM, ExpertSubset, SubsetError, extract_subset, select_experts
from transformers_emo.checkpoints import Checkpoint
from transformers_emo.checkpoints.local_files import LocalFiles
from transformers_emo.subsets import union
from transformers_emo.subsets.fingerprint import (
    agreement,
    attention_of,
    fingerprint_of,
    fingerprint_of_folder,
    warn_if_chosen_elsewhere,
)
from transformers_emo.training import train_only

INPUT_IDS = torch.tensor([[5, 17, 60, 2, 33, 8, 90], [44, 44, 3, 71, 12, 9, 28]])
FIRST = [[0, 3, 4, 11], [1, 5, 11], [0, 6, 9, 10, 11]]
WARNING = "looks like another model"


def chosen_on(model, **kwargs) -> ExpertSubset:
    return select_experts(model, input_ids=[INPUT_IDS], num_experts=4, progress=False, **kwargs)


def warnings_of(caplog, folder, subset, tmp_path) -> list[str]:
    """What loading and extracting a subset warn of, which is the same."""
    said = []
    for use in (
        lambda: EmoForCausalLM.from_pretrained(folder, expert_subset=subset),
        lambda: extract_subset(folder, subset, tmp_path / "extracted", progress=False),
    ):
        caplog.clear()
        use()
        said.append([record.getMessage() for record in caplog.records])
    shutil.rmtree(tmp_path / "extracted")
    assert said[0] == said[1]
    return said[0]


@pytest.fixture
def full(make_checkpoint):
    return make_checkpoint()


@pytest.mark.parametrize(
    "kind",
    ["renamed", "relative path", "links", "bfloat16", "float16", "sharded", "stacked", "subset", "extracted"],
)
def test_the_same_model_is_known_under_any_name_and_in_any_form(
    full, make_checkpoint, tmp_path, caplog, monkeypatch, kind
):
    subset, other = chosen_on(full), tmp_path / "another name"
    if kind == "renamed":
        shutil.copytree(full, other)
        shutil.rmtree(full)
    elif kind == "relative path":
        monkeypatch.chdir(full.parent)
        other = f"../{full.parent.name}/{full.name}/../{full.name}"
    elif kind == "links":
        other.symlink_to(full)
    elif kind == "sharded":
        other = make_checkpoint(shards=True)
    elif kind == "extracted":
        extract_subset(full, [list(range(12))] * 3, other, progress=False)
    else:
        held = {"expert_subset": subset} if kind == "subset" else {}
        dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(kind, torch.float32)
        model = EmoForCausalLM.from_pretrained(full, dtype=dtype, **held)
        model.save_pretrained(other, save_original_format=kind != "stacked")
    subset.save(tmp_path / "subset.json")
    for given_as in (subset, tmp_path / "subset.json"):
        assert warnings_of(caplog, other, given_as, tmp_path) == []


def test_another_model_of_the_same_name_and_sizes_is_not(full, make_checkpoint, tmp_path, caplog):
    subset = chosen_on(full)
    shutil.rmtree(full)
    shutil.copytree(make_checkpoint(seed=1), full)
    (message,) = warnings_of(caplog, full, subset, tmp_path)
    assert WARNING in message and os.fspath(full) in message and "% agree" in message


@pytest.mark.parametrize(
    "serve", ["mask", "generate", "swap", "swap from", "swap within", "share", "exclude"]
)
def test_serving_warns_of_a_subset_of_another_model_and_of_no_other(full, make_checkpoint, caplog, serve):
    on_full = serve in ("mask", "generate")

    def use(subset):
        held = [list(range(12))] * 3 if serve == "swap within" else FIRST
        model = EmoForCausalLM.from_pretrained(full, expert_subset=None if on_full else held)
        caplog.clear()
        if serve == "mask":
            with model.use_experts(subset):
                pass
        elif serve == "generate":
            model.generate(INPUT_IDS, expert_subset=subset, max_new_tokens=1)
        elif serve == "share":
            model.share_backbone(subset)
        elif serve == "exclude":
            model.swap_experts(subset, exclude_experts={0: [7]})
        else:
            model.swap_experts(subset, source=full if serve == "swap from" else None)
        return [record.getMessage() for record in caplog.records]

    assert use(chosen_on(full)) == []
    (message,) = use(chosen_on(make_checkpoint(seed=1)))
    assert WARNING in message and os.fspath(full) in message


@pytest.mark.parametrize("use", ["select", "select in memory", "random", "load", "mask", "swap", "swap in"])
def test_experts_left_out_are_those_of_the_same_model_too(full, make_checkpoint, tmp_path, caplog, use):
    def said_of(excluded):
        excluded.save(tmp_path / "excluded.json")
        model = EmoForCausalLM.from_pretrained(full) if use != "swap" else None
        caplog.clear()
        if use == "select":
            chosen_on(full, exclude_experts=tmp_path / "excluded.json")
        elif use == "select in memory":
            chosen_on(model, exclude_experts=excluded)
        elif use == "random":
            select_experts(full, num_experts=4, method="random", exclude_experts=excluded.to_dict())
        elif use == "load":
            EmoForCausalLM.from_pretrained(full, exclude_experts=excluded)
        elif use == "mask":
            with model.use_experts(exclude_experts=tmp_path / "excluded.json"):
                pass
        else:
            held = FIRST if use == "swap" else None
            model = EmoForCausalLM.from_pretrained(full, expert_subset=held)
            caplog.clear()
            model.swap_experts(exclude_experts=excluded)
        return [record.getMessage() for record in caplog.records]

    assert said_of(chosen_on(full)) == []
    (message,) = said_of(chosen_on(make_checkpoint(seed=1)))
    assert WARNING in message and "The subset of experts to leave out" in message
    other_size = ExpertSubset([[0, 3]] * 3, root_experts_per_layer=[16] * 3)
    with pytest.raises(SubsetError, match="leave out was made for another model"):
        said_of(other_size)


@pytest.mark.parametrize("chosen", ["on the full model", "on the tuned one", "kept in the tuned one"])
def test_a_fine_tuned_model_takes_the_subsets_of_what_it_was(full, tmp_path, caplog, chosen):
    subset = chosen_on(full)
    model = EmoForCausalLM.from_pretrained(full, expert_subset=subset)
    train_only(model, "all")
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for _ in range(20):
        loss = model(INPUT_IDS, labels=INPUT_IDS).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert loss < 2
    model.save_pretrained(tmp_path / "tuned")
    here = [fingerprint_of_folder(folder, 3) for folder in (full, tmp_path / "tuned")]
    assert here[0] != here[1]  # it was trained
    folder = tmp_path / "tuned"
    if chosen == "on the tuned one":  # and used on the full one
        subset, folder = chosen_on(folder), full
    elif chosen == "kept in the tuned one":
        subset.save(folder / "subsets" / "own.json")
        subset = "own"
    assert warnings_of(caplog, folder, subset, tmp_path) == []


def test_the_two_trained_models_of_this_repository_are_told_apart():
    # From the same random numbers and in the same order of texts: as alike as two models can be.
    prints = [fingerprint_of_folder(f"model_cards/{name}", 4) for name in ("emo-tiny", "std-tiny")]
    assert len(prints[0]) == len(prints[1]) == len("signs-1:") + 128
    assert agreement(*prints) < 0.65 and agreement(prints[0], prints[0]) == 1


@pytest.mark.parametrize("method", ["layerwise", "global", "random"])
@pytest.mark.parametrize("where", ["folder", "in memory"])
def test_every_choice_has_the_fingerprint_of_its_model(full, tmp_path, method, where):
    model = full if where == "folder" else EmoForCausalLM.from_pretrained(full)
    expected = fingerprint_of_folder(full, 3)
    text = {} if method == "random" else {"input_ids": [INPUT_IDS]}
    several = select_experts(model, num_experts=[3, 5], method=method, progress=False, **text)
    for subset in several:
        subset.save(tmp_path / "subset.json")
        assert ExpertSubset.load(tmp_path / "subset.json").fingerprint == expected
        assert subset.top(2).fingerprint == (subset | several[0]).fingerprint == expected


def test_the_signs_are_those_that_the_format_names(full):
    tensors = load_file(full / "model.safetensors")
    bits = ""
    for layer in (1, 2):
        for matrix in "qkvo":
            weights = tensors[f"model.layers.{layer}.self_attn.{matrix}_proj.weight"].flatten()[:64]
            bits += "".join("1" if weight < 0 else "0" for weight in weights.tolist())
    expected = "signs-1:" + "".join(f"{int(bits[i : i + 4], 2):x}" for i in range(0, 512, 4))
    assert fingerprint_of_folder(full, 3) == expected
    base = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    assert fingerprint_of(base, 3) == expected  # of a model without its head


def test_little_is_read_for_it(full, monkeypatch):
    checkpoint, read, original = Checkpoint.from_folder(full), [], LocalFiles.read_into

    def counted(self, file, start, buffer):
        read.append(len(buffer))
        original(self, file, start, buffer)

    monkeypatch.setattr(LocalFiles, "read_into", counted)
    assert fingerprint_of(attention_of(checkpoint), 3)
    assert read == [256] * 8
    del read[:]
    warn_if_chosen_elsewhere(ExpertSubset(FIRST), full, attention_of(checkpoint), 3)
    assert read == []  # nothing to compare with
    checkpoint.source.close()


@pytest.mark.parametrize("why", ["meta", "integers", "no attention", "adapter names"])
def test_what_cannot_be_read_has_no_fingerprint(make_model, why):
    tensors = dict(make_model().state_dict())
    name = "model.layers.2.self_attn.v_proj.weight"
    if why == "meta":
        tensors[name] = tensors[name].to("meta")
    elif why == "integers":
        tensors[name] = tensors[name].to(torch.int8)
    elif why == "no attention":
        tensors = {key: value for key, value in tensors.items() if "self_attn" not in key}
    else:
        tensors[name.replace(".weight", ".base_layer.weight")] = tensors.pop(name)
    assert fingerprint_of(tensors, 3) is None


def test_a_folder_without_weights_has_none_and_a_random_choice_needs_none(full):
    (full / "model.safetensors").unlink()
    assert fingerprint_of_folder(full, 3) is None
    assert select_experts(full, num_experts=4, method="random").fingerprint is None


@given(st.binary(min_size=1, max_size=80), st.data())
def test_agreement_counts_signs(digits, data):
    flips = data.draw(st.sets(st.integers(0, 8 * len(digits) - 1)))
    number = int.from_bytes(digits, "big")
    other = number
    for flip in flips:
        other ^= 1 << flip
    a, b = (f"signs-1:{n:0{2 * len(digits)}x}" for n in (number, other))
    assert agreement(a, b) == agreement(b, a) == 1 - len(flips) / (8 * len(digits))


@pytest.mark.parametrize(
    "other", ["", "signs-1:", "signs-2:0f", "0f", "signs-1:0f0", "signs-1:xy", "signs-1:0F"]
)
def test_what_is_no_fingerprint_of_this_format_is_not_compared(other):
    assert agreement("signs-1:0f", other) is None


class TestWithoutFingerprint:
    """Files of earlier versions, the authors' and those written by hand."""

    @pytest.mark.parametrize(
        ("source", "model", "warned"),
        [
            ("allenai/Emo_1b14b_1T", "allenai/StdMoE_1b14b_1T", True),
            ("allenai/Emo_1b14b_1T", "me/Emo_1b14b_1T", False),
            ("allenai/Emo_1b14b_1T", "/models/emo", False),
            ("/runs/a/step100", "/models/emo", False),
            ("model_cards/emo-tiny", "me/emo", False),  # a folder that is there
            (None, "me/emo", False),
        ],
    )
    def test_only_names_of_repositories_are_compared(self, caplog, source, model, warned):
        warn_if_chosen_elsewhere(ExpertSubset(FIRST, source=source), model, {}, 3)
        assert (WARNING in caplog.text) == warned == ("no fingerprint" in caplog.text)

    def test_old_files_are_read(self, full, tmp_path, caplog):
        data = chosen_on(full).to_dict()
        del data["fingerprint"]
        assert data["version"] == 1
        (tmp_path / "old.json").write_text(json.dumps(data))
        assert ExpertSubset.load(tmp_path / "old.json").fingerprint is None
        assert warnings_of(caplog, full, tmp_path / "old.json", tmp_path) == []

    def test_a_model_that_cannot_be_compared_is_judged_by_names(self, full, caplog, tmp_path):
        subset = chosen_on(full)
        tensors = load_file(full / "model.safetensors")
        del tensors["model.layers.2.self_attn.q_proj.weight"]
        warn_if_chosen_elsewhere(subset, full, tensors, 3)
        assert not caplog.records


def test_subsets_of_different_models_are_warned_of_when_composed(full, make_checkpoint, tmp_path, caplog):
    shutil.copytree(full, tmp_path / "copy")
    first, same = chosen_on(full), chosen_on(tmp_path / "copy")
    assert union(first, same).fingerprint == first.fingerprint and not caplog.records
    union(first, ExpertSubset(FIRST), same)
    assert not caplog.records
    union(first, ExpertSubset(FIRST), chosen_on(make_checkpoint(seed=1)))
    assert "chosen on different models" in caplog.text


def test_on_the_hub_no_request_is_made_for_it(full, make_checkpoint, tmp_path):
    subset = chosen_on(full)
    subset.save(tmp_path / "with.json")
    ExpertSubset(subset.experts).save(tmp_path / "without.json")
    code = """
import logging, sys
from transformers_emo import EmoForCausalLM
logging.getLogger("transformers_emo.subsets.fingerprint").addHandler(logging.StreamHandler(sys.stdout))
EmoForCausalLM.from_pretrained({repo!r}, expert_subset={subset!r})
"""
    with HubServer() as hub:
        hub.commit("user/other-name", full)
        hub.commit("user/another", make_checkpoint(seed=1))
        sent = []
        for name in ("without", "with"):
            hub.forget()
            said = hub.run(
                code.format(repo="user/other-name", subset=str(tmp_path / f"{name}.json")),
                HF_HOME=str(tmp_path / name),
            )
            assert WARNING not in said
            sent.append(sorted((request.method, request.file or "") for request in hub.requests))
        assert sent[0] == sent[1]
        said = hub.run(
            code.format(repo="user/another", subset=str(tmp_path / "with.json"))
            + "from transformers_emo import select_experts\n"
            "print(select_experts('user/other-name', input_ids=[[[5, 6, 7]]], num_experts=4, "
            "progress=False).fingerprint)"
        )
        assert WARNING in said and said.split()[-1] == subset.fingerprint
