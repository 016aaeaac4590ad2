"""Damaged and hostile headers, indexes, configs, subset files: our own errors, and nothing else is written.

The damage is drawn from a seed, so that a failure can be had again: its number is in the message.
"""

import json
import random
import shutil
import struct

import fresh_processes
import pytest
import torch
from conftest import tiny_model
from safetensors.torch import save_file
from transformers.utils import logging
from transformers_emo import CheckpointError, EmoConfig, EmoForCausalLM, ExpertSubset, SubsetError
from transformers_emo.checkpoints import Checkpoint
from transformers_emo.checkpoints.hub.part_cache import PartialFile, cached_parts, clear_parts, part_folder

# How many cases of each kind.
some_cases = pytest.mark.parametrize("cases", [100, pytest.param(2000, marks=pytest.mark.slow)])
# What strangers put in place of a value.
VALUES = [
    None, True, -1, 0, 1, 10**9, 2**31, 2**63, 2**64, 10**400, 1.5, float("nan"), [], [[]], {},
    {"a": {}}, [2**62, 4], [-1, 2], "", "x", "..", "F32", "I4", "\0", "\ud800", "a" * 5000,
    "../outside.safetensors", "/etc/passwd", "\0.safetensors", "\ud800.safetensors",
    "x/../../outside.safetensors",
]  # fmt: skip


def snapshot(folder):
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }


def mutate_json(value, rng):
    """The same with something replaced, removed, doubled or nested, somewhere inside."""
    if rng.random() < 0.25 or not isinstance(value, dict | list) or not value:
        return rng.choice(VALUES)
    if isinstance(value, list):
        at = rng.randrange(len(value))
        changed = rng.choice([[], [value[at]] * 2, [mutate_json(value[at], rng)]])
        return value[:at] + changed + value[at + 1 :]
    key = rng.choice(list(value))
    changed = dict(value)
    kept = changed.pop(key)
    if rng.random() < 0.7:
        name = rng.choice([key, key, key, *(v for v in VALUES if isinstance(v, str))])
        changed[name] = mutate_json(kept, rng)
    return changed


def mutate_bytes(data, rng):
    """The same with some bytes changed, removed or put in."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(4):
            case 0:
                data[at : at + rng.randint(1, 20)] = b""
            case 1:
                data[at:at] = rng.randbytes(rng.randint(1, 20))
            case 2:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case _:
                data = data[:at] or bytearray(1)
    return bytes(data)


def mutate(value, rng):
    """JSON text, damaged in its structure or in its bytes."""
    text = json.dumps(value).encode()
    if rng.random() < 0.3:
        return mutate_bytes(text, rng)
    if rng.random() < 0.02:
        return b"[" * 100_000
    return json.dumps(mutate_json(value, rng)).encode()


def read_everything(folder):
    checkpoint = Checkpoint.from_folder(folder)
    try:
        for name in checkpoint.tensors:
            checkpoint.lazy([name])[...]
    finally:
        checkpoint.source.close()


@pytest.fixture
def parent(tmp_path):
    """A folder with a neighbour that must stay as it is."""
    (tmp_path / "outside.safetensors").write_bytes(b"not yours")
    (tmp_path / "model").mkdir()
    return tmp_path


def is_refused(
    read, refusal: type[Exception] | tuple[type[Exception], ...], parent, case: int, damaged: bytes
) -> bool:
    """Whether a damaged file is refused; any other error fails, and so does a file that was touched."""
    before = snapshot(parent)
    try:
        read()
    except refusal:
        return True
    except Exception as error:
        raise AssertionError(f"case {case}: {damaged[:300]!r}") from error
    finally:
        assert snapshot(parent) == before
    return False


@some_cases
def test_mutated_headers(parent, cases):
    path = parent / "model" / "model.safetensors"
    save_file({"a": torch.ones(3, 4), "b": torch.ones(2).bfloat16(), "s": torch.tensor(1)}, path)
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    refused = 0
    for case in range(cases):
        rng = random.Random(case)
        if rng.random() < 0.3:
            damaged = mutate_bytes(whole, rng)
        else:
            text = mutate(header, rng)
            claimed = rng.choice([len(text)] * 8 + [0, 2**40, 2**64 - 1])
            damaged = struct.pack("<Q", claimed) + text + data
        path.write_bytes(damaged)
        refused += is_refused(lambda: read_everything(path.parent), CheckpointError, parent, case, damaged)
    assert refused > cases // 2


@some_cases
def test_mutated_indexes(parent, cases):
    folder = parent / "model"
    save_file({"a": torch.ones(3)}, folder / "one.safetensors")
    save_file({"b": torch.ones(3)}, folder / "two.safetensors")
    index = {
        "metadata": {"total_size": 24},
        "weight_map": {"a": "one.safetensors", "b": "two.safetensors"},
    }
    path = folder / "model.safetensors.index.json"
    refused = 0
    for case in range(cases):
        damaged = mutate(index, random.Random(case))
        path.write_bytes(damaged)
        refused += is_refused(lambda: read_everything(folder), CheckpointError, parent, case, damaged)
    assert refused > cases // 2


@pytest.fixture
def errors_only():
    """No warnings of what is damaged on purpose; other tests look at theirs."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


def load_model(folder, **kwargs):
    try:
        EmoForCausalLM.from_pretrained(folder, **kwargs)
    except RuntimeError as error:  # how Transformers refuses smaller tensors than there are
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise CheckpointError("Transformers refused it") from error


@some_cases
@pytest.mark.usefixtures("errors_only")
@pytest.mark.parametrize("expert_subset", [None, [[0, 3]] * 2], ids=["whole", "subset"])
def test_mutated_configs(expert_subset, parent, cases):
    folder = parent / "model"
    tiny_model(num_hidden_layers=2, num_experts=4, num_experts_per_tok=2).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    refused = 0
    for case in range(cases):
        damaged = mutate(config, random.Random(case))
        (folder / "config.json").write_bytes(damaged)
        refused += is_refused(
            lambda: load_model(folder, expert_subset=expert_subset),
            (ValueError, OSError),
            parent,
            case,
            damaged,
        )
    assert refused > cases // 4


ABSURD = [
    {"num_hidden_layers": 10**9},
    {"num_hidden_layers": 900},
    {"vocab_size": 10**9},
    {"hidden_size": 2**20},
    {"head_dim": 10**9},
    {"num_experts": 10**9},
    {"num_experts": 9000},
    {"num_experts_per_layer": [10**9, 4]},
    {"intermediate_size": 10**9},
    {"num_labels": 10**9},
]
# Under a limit of memory: a billion of anything would end this process before its error.
LOAD_EACH = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
from transformers_emo import EmoForCausalLM, EmoForSequenceClassification
for folder in sys.argv[1:]:
    for cls, kwargs in (
        (EmoForCausalLM, {}),
        (EmoForSequenceClassification, {}),
        (EmoForCausalLM, {"expert_subset": [[0, 3]] * 2}),
        (EmoForCausalLM, {"exclude_experts": {0: [1]}}),
    ):
        try:
            cls.from_pretrained(folder, **kwargs)
        except (OSError, ValueError) as error:
            print(error)
        else:
            print("no error")
"""


def test_a_config_that_asks_for_more_than_the_weights_hold_is_one_error(tmp_path, edit_json):
    folders = []
    for number, changes in enumerate(ABSURD):
        folders.append(tmp_path / str(number))
        tiny_model(num_hidden_layers=2, num_experts=4, num_experts_per_tok=2).save_pretrained(folders[-1])
        edit_json(folders[-1] / "config.json", **changes)
    done = fresh_processes.run(LOAD_EACH, *map(str, folders))
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 4 * len(ABSURD)
    for number, changes in enumerate(ABSURD):
        for line in lines[4 * number : 4 * number + 4]:
            assert "config" in line, (changes, line)
            assert "and the weights hold" in line or "expected at most" in line, (changes, line)


def test_a_config_that_asks_for_less_is_left_to_transformers(tmp_path, edit_json):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatch"):
        EmoForCausalLM.from_pretrained(tmp_path, vocab_size=90)
    shallow = EmoForCausalLM.from_pretrained(tmp_path, num_hidden_layers=2)
    assert len(shallow.model.layers) == 2
    wide = EmoForCausalLM.from_pretrained(tmp_path, vocab_size=120, ignore_mismatched_sizes=True)
    assert wide.lm_head.weight.shape == (120, 32)
    with pytest.raises(ValueError, match="pad_token_id.* is 96"):
        EmoForCausalLM.from_pretrained(tmp_path, pad_token_id=96)


@some_cases
def test_mutated_subset_files(parent, cases):
    config = EmoConfig(num_hidden_layers=2, num_experts=8, num_experts_per_tok=4)
    subset = ExpertSubset(
        [[0, 1, 7], [2, 3, 7]],
        scores=[[0.1] * 7 + [None]] * 2,
        always_kept=[[7], [7]],
        root_experts_per_layer=[8, 8],
        method="global",
        num_tokens=5,
        settling=[{"num_texts": 1, "num_tokens": 2, "jaccard": 0.5}],
        source="user/model",
    ).to_dict()
    theirs = {"experts_kept_per_layer": [[0, 7], [1, 7]], "pruning_method": "x", "original_model": "y"}
    path = parent / "model" / "math.json"
    refused = 0
    for case in range(cases):
        rng = random.Random(case)
        damaged = mutate(rng.choice([subset, theirs]), rng)
        path.write_bytes(damaged)
        refused += is_refused(
            lambda: ExpertSubset.load(path).for_model(config),
            SubsetError,
            parent,
            case,
            damaged,
        )
    assert refused > cases // 4


@pytest.mark.parametrize("etag", ["../../../up", "/etc", "a/b", "", "..", "\0", "é" * 300, "0" * 64])
def test_parts_stay_in_the_cache_for_any_etag_of_the_server(parent, etag):
    folder = part_folder(parent / "models--user--model", etag)
    assert folder.parent == parent / "models--user--model" / "emo-ranges" and len(folder.name) <= 64
    PartialFile(folder, 10).close()


@some_cases
def test_damaged_records_of_cached_parts_are_not_believed(tmp_path, cases):
    folder = part_folder(tmp_path / "models--user--model", "0" * 64)
    for case in range(cases):
        rng = random.Random(case)
        shutil.rmtree(folder, ignore_errors=True)
        with PartialFile(folder, 100) as part:
            part.write(20, bytes(range(60)))
            part.record(20, 50)
            part.record(50, 80)
        about = {"file": "model.safetensors", "commits": ["c" * 40], "size": 100}
        (folder / "about.json").write_bytes(mutate(about, rng) if case % 2 else json.dumps(about).encode())
        text = (folder / "ranges").read_bytes()
        # A process that is killed leaves half a line, and the next one adds whole ones.
        (folder / "ranges").write_bytes(text[: rng.randrange(len(text) + 1)])
        with PartialFile(folder, 100) as part:
            assert all(20 <= start < end <= 80 for start, end in part.ranges), case
            part.record(0, 5)
        with PartialFile(folder, 100) as part:
            assert part.ranges[0] == (0, 5), case
            assert all(start == 0 or 20 <= start < end <= 80 for start, end in part.ranges), case
        listed = cached_parts(tmp_path)
        assert len(listed) <= 1 and all(part.size >= 0 for part in listed)
        clear_parts(cache_dir=tmp_path)
