"""Damaged configs and metadata: our own errors, or a result; nothing else is written, nothing is run."""

import copy
import json
import random
import shutil

import pytest
from transformers.utils import logging
from transformers_emo import CheckpointError, EmoConfig
from transformers_emo.conversion import convert_to_olmo_core, read_metadata, upgrade_checkpoint
from transformers_emo.conversion.olmo_core.config_reader import read_config

ROUNDS = [100, pytest.param(2000, marks=pytest.mark.slow)]
ODD = (
    *(None, True, False, 0, 1, -1, 2, 7, 10**9, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "x", "silu", "../x", "\0", "os.system", [], [0], [None], [[]], {}, {"a": 1}, [1] * 50),
)


def places(value, path=()) -> list[tuple]:
    """The path of every value in JSON."""
    found = [path] if path else []
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        found += places(one, (*path, key))
    return found


def mutated_json(content: dict, rng: random.Random) -> str:
    """Values replaced, removed or moved; now and then the text itself damaged."""
    content = copy.deepcopy(content)
    for _ in range(rng.randint(1, 3)):
        paths = places(content)
        if not paths:
            break
        *path, last = rng.choice(paths)
        inner = content
        for key in path:
            inner = inner[key]
        if rng.random() < 0.2:
            del inner[last]
        elif rng.random() < 0.1:
            inner[last] = copy.deepcopy(content)
        else:
            inner[last] = copy.deepcopy(rng.choice(ODD))
    text = json.dumps(content)
    return mutated_bytes(text.encode(), rng).decode("latin-1") if rng.random() < 0.15 else text


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    mutated = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(mutated) + 1)
        mutated[place : place + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 4))
    return bytes(mutated[: rng.randrange(len(mutated) + 1)] if rng.random() < 0.1 else mutated)


@pytest.mark.parametrize("rounds", ROUNDS)
def test_damaged_metadata(rounds, step10, tmp_path):
    rng = random.Random(rounds)
    original = (step10 / "model_and_optim" / ".metadata").read_bytes()
    refused = 0
    for _ in range(rounds):
        (tmp_path / ".metadata").write_bytes(mutated_bytes(original, rng))
        try:
            read_metadata(tmp_path / ".metadata")
        except CheckpointError as error:
            refused += 1
            assert len(str(error)) < 2000
    assert refused > rounds / 4
    assert [path.name for path in tmp_path.iterdir()] == [".metadata"]


@pytest.mark.parametrize("rounds", ROUNDS)
def test_damaged_training_configs(rounds, step10, tmp_path):
    rng = random.Random(rounds)
    original = json.loads((step10 / "config.json").read_text())
    original = {key: original[key] for key in ("model", "dataset", "train_module")}
    refused = 0
    for _ in range(rounds):
        (tmp_path / "config.json").write_text(mutated_json(original, rng), encoding="utf-8")
        try:
            assert type(read_config(tmp_path / "config.json")) is EmoConfig
        except (ValueError, CheckpointError):
            refused += 1
    assert refused > rounds / 4
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.fixture
def errors_only():
    """No warnings of what is damaged on purpose; other tests look at theirs."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


@pytest.mark.usefixtures("errors_only")
@pytest.mark.parametrize("rounds", ROUNDS)
@pytest.mark.parametrize("convert", [upgrade_checkpoint, convert_to_olmo_core])
def test_damaged_model_configs(convert, rounds, make_checkpoint, tmp_path):
    rng = random.Random(rounds)
    folder = make_checkpoint(num_hidden_layers=1, num_experts=4, num_experts_per_tok=2)
    original = json.loads((folder / "config.json").read_text())
    refused = 0
    for _ in range(rounds):
        (folder / "config.json").write_text(mutated_json(original, rng), encoding="utf-8")
        try:
            convert(folder, tmp_path / "out", progress=False)
        except (ValueError, CheckpointError):
            refused += 1
            assert list(tmp_path.iterdir()) == []
        else:
            assert [path.name for path in tmp_path.iterdir()] == ["out"]
            shutil.rmtree(tmp_path / "out")
    assert refused > rounds / 10
