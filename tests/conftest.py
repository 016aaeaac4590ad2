"""Fixtures for all tests: small models in the released layout, and nothing from outside this machine."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Each of several processes of tests has its share of the processors.
os.environ.setdefault(
    "OMP_NUM_THREADS",
    str(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))),
)
# Threads that wait leave the processor to the tests beside these.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import json
from pathlib import Path

import other_processor
import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers.utils import logging
from transformers_emo import EmoConfig, EmoForCausalLM

logging.disable_progress_bar()
if os.environ.get("EMO_TEST_PROCESSOR"):
    other_processor.imitate()
# How long Hypothesis takes says how busy the machine is, not whether the code is right.
settings.register_profile("any_machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any_machine")

GOLDENS = Path(__file__).parent / "goldens"
TOY = Path(__file__).parents[1] / "model_cards" / "toy-emo"

TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_experts": 12,
    "num_experts_per_tok": 4,
    "num_shared_experts": 1,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


def tiny_model(seed: int = 0, **changes) -> EmoForCausalLM:
    """Make a small random model; keyword arguments change its config."""
    torch.manual_seed(seed + int(os.environ.get("EMO_TEST_SEED", "0")))
    model = EmoForCausalLM(EmoConfig(**TINY | changes)).eval()
    with torch.no_grad():  # large enough weights that routing has margins and layers matter
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.5 if "gate.weight" in name else 0.15)
    return model


# These files of tests take longest. They begin first, so that no processor waits for the others in the end.
LONGEST = (
    "test_emo_distributed.py",
    "test_hub_subsets.py",
    "test_hub_network.py",
    "test_distributed.py",
    "test_examples.py",
    "test_snippets.py",
    "test_hub_round_trip.py",
    "subsets/publishing/test_push_folder.py",
    "test_ablations.py",
    "test_emo_common.py",
    "test_native_library.py",
)


def pytest_collection_modifyitems(items):
    """Order the files; within one, tests stay as they are written."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


@pytest.fixture
def make_model():
    """`tiny_model`."""
    return tiny_model


@pytest.fixture
def make_checkpoint(make_model, tmp_path_factory):
    """Save a small random model as released; `shards` cuts it into files of about 40 kB."""

    def make(seed: int = 0, *, shards: bool = False, **changes) -> Path:
        folder = tmp_path_factory.mktemp("checkpoint")
        make_model(seed, **changes).save_pretrained(folder, max_shard_size="40KB" if shards else "5GB")
        return folder

    return make


@pytest.fixture
def edit_json():
    """Change keys of a JSON file; `None` as a value removes the key."""

    def edit(path: Path, **changes) -> None:
        data = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))

    return edit
