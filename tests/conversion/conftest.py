"""A training checkpoint written by the training library, and others cut up as by many ranks."""

from pathlib import Path

import pytest
from conftest import GOLDENS
from safetensors.torch import load_file

FOLDER = GOLDENS / "D_olmo_core_checkpoint"


@pytest.fixture(scope="session")
def step10(tmp_path_factory) -> Path:
    """`step10/` as the training library wrote it; holes where the optimiser's state was."""
    step = tmp_path_factory.mktemp("training") / "step10"
    (step / "model_and_optim").mkdir(parents=True)
    for file in ("config.json", ".metadata.json", "model_and_optim/.metadata"):
        (step / file).write_bytes((FOLDER / "step10" / file).read_bytes())
    for place, chunk in load_file(FOLDER / "chunks_of_the_model.safetensors").items():
        file, start = place.split(":")
        path = step / "model_and_optim" / file
        path.touch()
        with open(path, "r+b") as shard:
            shard.seek(int(start))
            shard.write(chunk.numpy().tobytes())
    return step
