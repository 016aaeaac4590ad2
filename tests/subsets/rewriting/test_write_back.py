"""Fine-tuned subsets go back into the full model: only what is meant to changes, to the byte."""

import json
import re
import shutil
import sys

import pytest
import torch
from hub_server import HubServer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tolerances import assert_same_numbers
from transformers_emo import EmoForCausalLM, ExpertSubset, extract_subset, write_back
from tuned_models import (
    FIRST,
    INPUT_IDS,
    MATRICES,
    SECOND,
    changed,
    expert_names,
    hashes,
    router_names,
    same_files,
    trained,
)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_shared_experts": 0},
        {"num_experts_per_layer": [12, 0, 12], "dense_intermediate_size": 20},
        {"num_shared_experts": 0, "always_active_experts": [11, 3]},
    ],
    ids=["released", "no shared", "dense layer", "always active"],
)
def test_after_training_exactly_the_kept_experts_change(make_checkpoint, tmp_path, changes):
    full = make_checkpoint(shards=True, **changes)
    experts = [[0, 3, 4, 11], [1, 3, 11], [0, 3, 9, 10, 11]]
    if "num_experts_per_layer" in changes:
        experts[1] = None
    model = trained(full, experts, tmp_path / "tuned", "routed")
    result = write_back(full, tmp_path / "tuned", out=tmp_path / "out", progress=False)
    always = changes.get("always_active_experts") or ([] if "num_shared_experts" in changes else [11])
    expected = expert_names(experts, drop=always)
    assert changed(full, tmp_path / "out") == expected == {f"model.{name}" for name in result.written}
    assert result.averaged == []
    # The full model, masked to the subset, now is the tuned one.
    updated = EmoForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad(), updated.use_experts(experts):
        assert_same_numbers(updated(INPUT_IDS).logits, model.eval()(INPUT_IDS).logits)


@pytest.mark.parametrize(
    ("what", "parts"),
    [
        ("routed", {"routed"}),
        ("shared", {"shared"}),
        ("router", {"router"}),
        ("routed+shared+router", {"routed", "shared", "router"}),
        ("backbone", {"backbone"}),
        ("all", {"routed", "shared", "router", "backbone"}),
    ],
)
def test_only_what_is_asked_for_is_written(make_checkpoint, tmp_path, what, parts):
    full = make_checkpoint()
    trained(full, FIRST, tmp_path / "tuned", "all")  # everything was trained
    write_back(full, tmp_path / "tuned", out=tmp_path / "out", what=what, progress=False)
    shared = expert_names([[11]] * 3)
    # With one shared expert, its softmax weight is 1 whatever its row: that row gets no gradient.
    by_part = {
        "routed": expert_names(FIRST) - shared,
        "shared": shared,
        "router": router_names(FIRST) - router_names([[11]] * 3),
    }
    others = {name for name in hashes(full) if ".experts." not in name and ".mlp.gate." not in name}
    by_part["backbone"] = others
    assert changed(full, tmp_path / "out") == set().union(*(by_part[part] for part in parts))


@pytest.mark.parametrize("layout", ["single", "sharded", "stacked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("what", "weight"), [("routed", 1.0), ("all", 1.0), ("all", 0.3)])
def test_without_training_every_file_is_the_same(make_checkpoint, tmp_path, layout, dtype, what, weight):
    full = make_checkpoint(shards=layout == "sharded")
    if layout == "stacked":
        model = EmoForCausalLM.from_pretrained(full)
        full = tmp_path / "stacked"
        model.save_pretrained(full, save_original_format=False)
    tuned = []
    for number, experts in enumerate((FIRST, SECOND, FIRST)):  # saved in bf16, weights lose digits
        tuned.append(tmp_path / str(number))
        EmoForCausalLM.from_pretrained(full, expert_subset=experts, dtype=dtype).save_pretrained(tuned[-1])
    write_back(full, tuned, out=tmp_path / "out", what=what, weight=weight, progress=False)
    assert same_files(full, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in full.iterdir()}


def test_an_extracted_subset_goes_back_to_where_it_came_from(make_checkpoint, tmp_path):
    full = make_checkpoint(shards=True)
    extract_subset(full, FIRST, tmp_path / "small", progress=False)
    write_back(full, tmp_path / "small", out=tmp_path / "out", what="all", progress=False)
    assert same_files(full, tmp_path / "out")


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data(), weight=st.sampled_from([0.25, 0.5, 1.0]))
def test_overlaps_are_averaged_and_blended(make_checkpoint, tmp_path_factory, monkeypatch, data, weight):
    # Less than a matrix at a time.
    monkeypatch.setattr(sys.modules[write_back.__module__], "_BUFFER_BYTES", 1000)
    full = make_checkpoint()
    folder = tmp_path_factory.mktemp("blend")
    routed = st.sets(st.integers(0, 10), min_size=1, max_size=5)
    before = load_file(full / "model.safetensors")
    total: dict[str, list[torch.Tensor]] = {}
    for number in range(data.draw(st.integers(1, 3))):
        experts = [sorted(data.draw(routed)) + [11] for _ in range(3)]
        model = EmoForCausalLM.from_pretrained(full, expert_subset=experts)
        for layer in model.model.layers:
            for parameter in layer.mlp.experts.parameters():
                parameter.data += torch.randn_like(parameter)
        model.save_pretrained(folder / str(number))
        saved = load_file(folder / str(number) / "model.safetensors")
        for layer, ids in enumerate(experts):
            for local, e in enumerate(ids[:-1]):
                for matrix in MATRICES:
                    stem = f"model.layers.{layer}.mlp.experts"
                    total.setdefault(f"{stem}.{e}.{matrix}.weight", []).append(
                        saved[f"{stem}.{local}.{matrix}.weight"]
                    )
    tuned = sorted(folder.iterdir())
    result = write_back(full, tuned, out=folder / "out", weight=weight, progress=False)
    after = load_file(folder / "out" / "model.safetensors")
    assert {f"model.{n}" for n in result.averaged} == {n for n, tensors in total.items() if len(tensors) > 1}
    for name, tensor in after.items():
        if name in total:
            mean = torch.stack(total[name]).mean(0)
            expected = before[name] + weight * (mean - before[name])
            assert_same_numbers(tensor, expected, terms=6)
            if weight == 1 and len(total[name]) == 1:
                assert torch.equal(tensor, total[name][0])
        else:
            assert torch.equal(tensor, before[name])


def test_a_model_in_memory_is_written_like_its_folder(make_checkpoint, tmp_path):
    full = make_checkpoint()
    model = trained(full, FIRST, tmp_path / "tuned")
    write_back(full, tmp_path / "tuned", out=tmp_path / "a", what="all", progress=False)
    write_back(full, [model], out=tmp_path / "b", what="all", progress=False)
    assert changed(full, tmp_path / "a") and same_files(tmp_path / "a", tmp_path / "b")


def test_a_subset_of_a_subset_is_written_back_to_either(make_checkpoint, tmp_path):
    full = make_checkpoint()
    extract_subset(full, FIRST, tmp_path / "middle", progress=False)
    inner = [[3, 11], [5, 11], [6, 10, 11]]  # ids of the root model
    trained(tmp_path / "middle", inner, tmp_path / "tuned", "routed")
    write_back(full, tmp_path / "tuned", out=tmp_path / "a", progress=False)
    assert changed(full, tmp_path / "a") == expert_names(inner, drop={11})
    write_back(tmp_path / "middle", tmp_path / "tuned", out=tmp_path / "b", progress=False)
    extract_subset(tmp_path / "a", FIRST, tmp_path / "c", progress=False)
    assert hashes(tmp_path / "b") == hashes(tmp_path / "c")


def test_what_was_trained_in_half_precision_is_taken_and_the_rest_keeps_its_digits(make_checkpoint, tmp_path):
    full = make_checkpoint()
    model = EmoForCausalLM.from_pretrained(full, expert_subset=FIRST, dtype=torch.bfloat16)
    model.model.layers[0].mlp.experts.down_proj.data[1, 0, 0] = 2.0  # local expert 1 is expert 3
    model.save_pretrained(tmp_path / "tuned")
    write_back(full, tmp_path / "tuned", out=tmp_path / "out", progress=False)
    name = "model.layers.0.mlp.experts.3.down_proj.weight"
    assert changed(full, tmp_path / "out") == {name}
    before = load_file(full / "model.safetensors")[name]
    after = load_file(tmp_path / "out" / "model.safetensors")[name]
    assert after[0, 0] == 2.0 and (before != after).sum() == 1


SIDE_FILES = {
    "README.md": "---\nlicense: apache-2.0\n---\n",
    "LICENSE": "Apache",
    "generation_config.json": '{"do_sample": true, "top_p": 0.5}',
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "subsets/math.json": None,
    "subsets/code.json": None,
}
LEFT_BEHIND = {"modeling_emo.py": "", "pytorch_model.bin": "", "subsets/note.txt": "", "results/a.json": "{}"}


@pytest.mark.parametrize("subfolder", ["", "inner"])
@pytest.mark.parametrize("where", ["folder", "hub"])
def test_other_files_of_the_full_model_come_along(make_checkpoint, tmp_path, where, subfolder):
    full = make_checkpoint(shards=True)
    for name, content in (SIDE_FILES | LEFT_BEHIND).items():
        (full / name).parent.mkdir(exist_ok=True)
        if content is None:
            ExpertSubset(FIRST).save(full / name)
        else:
            (full / name).write_text(content)
    trained(full, FIRST, tmp_path / "tuned")
    (tmp_path / "repo").mkdir()
    shutil.move(full, tmp_path / "repo" / subfolder)
    folder = tmp_path / "repo" / subfolder if subfolder else tmp_path / "repo" / full.name
    out = tmp_path / "out"
    code = f"""
from transformers_emo import write_back
tuned, rest = {str(tmp_path / "tuned")!r}, dict(subfolder={subfolder!r}, progress=False)
write_back("user/emo", tuned, out={str(tmp_path / "online")!r}, **rest)
# With what the run before has put into the cache.
write_back("user/emo", tuned, out={str(out)!r}, local_files_only=True, **rest)
"""
    if where == "folder":
        repo = folder.parent if subfolder else folder
        write_back(repo, tmp_path / "tuned", out=out, subfolder=subfolder, progress=False)
    else:
        with HubServer() as hub:
            hub.commit("user/emo", folder.parent if subfolder else folder)
            hub.run(code)
        assert hashes(tmp_path / "online") == hashes(out)
        assert {p.name for p in (tmp_path / "online").rglob("*")} == {p.name for p in out.rglob("*")}
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    copied = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert copied == files - LEFT_BEHIND.keys() and SIDE_FILES.keys() <= copied
    assert all((out / name).read_bytes() == (folder / name).read_bytes() for name in SIDE_FILES)
    assert EmoForCausalLM.from_pretrained(out, expert_subset="math").config.retained_experts == FIRST


def test_code_that_stays_behind_is_not_named(make_checkpoint, tmp_path, edit_json):
    full = make_checkpoint()
    edit_json(full / "config.json", auto_map={"AutoModelForCausalLM": "modeling_emo.EmoForCausalLM"})
    trained(full, FIRST, tmp_path / "tuned")
    write_back(full, tmp_path / "tuned", out=tmp_path / "out", progress=False)
    config = json.loads((full / "config.json").read_text())
    del config["auto_map"]
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config


@pytest.mark.parametrize("weight", [1.0, 0.3])
@pytest.mark.parametrize("tuned_in", ["float32", "bfloat16", "float16", "float64", "mixed"])
@pytest.mark.parametrize("kept_in", ["float32", "bfloat16", "float16"])
def test_overlaps_of_any_dtypes_are_averaged_exactly(make_model, tmp_path, kept_in, tuned_in, weight):
    full, kept_in = tmp_path / "full", getattr(torch, kept_in)
    make_model().to(kept_in).save_pretrained(full)
    dtypes = [torch.float32, torch.bfloat16] if tuned_in == "mixed" else [getattr(torch, tuned_in)] * 2
    tuned = []
    for number, (experts, dtype) in enumerate(zip((FIRST, SECOND), dtypes, strict=True)):
        # As a fine-tune does: loaded in a dtype at least as long, trained, saved in another.
        long = torch.promote_types(kept_in, dtype)
        model = EmoForCausalLM.from_pretrained(full, expert_subset=experts, dtype=long)
        generator = torch.Generator().manual_seed(number)
        for layer in model.model.layers:
            for parameter in layer.mlp.experts.parameters():  # every other value is trained
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data += (noise * (noise > 0)).to(long)
        model.to(dtype).save_pretrained(tmp_path / str(number))
        tuned.append(tmp_path / str(number))
    result = write_back(full, tuned, out=tmp_path / "out", weight=weight, progress=False)
    before, after = (load_file(folder / "model.safetensors") for folder in (full, tmp_path / "out"))
    values: dict[str, list[torch.Tensor]] = {}
    for folder, experts in zip(tuned, (FIRST, SECOND), strict=True):
        for name, tensor in load_file(folder / "model.safetensors").items():
            if match := re.fullmatch(r"(model\.layers\.(\d+)\.mlp\.experts\.)(\d+)(\..*)", name):
                root = experts[int(match[2])][int(match[3])]
                if root != 11:
                    values.setdefault(f"{match[1]}{root}{match[4]}", []).append(tensor)
    assert set(values) == {f"model.{name}" for name in result.written}
    assert (
        {f"model.{name}" for name in result.averaged}
        == {n for n, v in values.items() if len(v) == 2}
        != set()
    )
    for name, old in before.items():
        assert after[name].dtype == old.dtype == kept_in
        exact = old.double()
        if name in values:
            news = [torch.where(v == old.to(v.dtype), exact, v.double()) for v in values[name]]
            exact = (1 - weight) * exact + weight * sum(news) / len(news)
            untrained = torch.stack([v == old.to(v.dtype) for v in values[name]]).all(0)
            assert untrained.any() and not untrained.all()
            assert torch.equal(after[name][untrained], old[untrained])
            # To the nearest: no further away than its neighbours.
            for neighbour in (torch.inf, -torch.inf):
                beside = torch.nextafter(after[name], torch.tensor(neighbour, dtype=kept_in)).double()
                assert ((after[name].double() - exact).abs() <= (beside - exact).abs() + 1e-12).all()
        else:
            assert torch.equal(after[name], old)


def test_models_on_the_hub_are_taken_apart_and_put_together(make_checkpoint, tmp_path):
    full = make_checkpoint(shards=True)
    ExpertSubset(FIRST).save(full / "subsets" / "math.json")
    extract_subset(full, FIRST, tmp_path / "local", progress=False)
    code = f"""
from pathlib import Path
from transformers_emo import extract_subset, write_back
work = Path({str(tmp_path)!r})
extract_subset("user/emo", "math", work / "small", revision="main", progress=False)
write_back("user/emo", work / "small", out=work / "out", revision="main", progress=False)
"""
    with HubServer() as hub:
        hub.commit("user/emo", full)
        hub.run(code)
    assert same_files(tmp_path / "local", tmp_path / "small")
    assert same_files(full, tmp_path / "out")
