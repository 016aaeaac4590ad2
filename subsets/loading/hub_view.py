"""Loading from the Hub only what is wanted: which files, which parts, and what Transformers sees of it."""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.file_download import repo_folder_name
from transformers.utils import SAFE_WEIGHTS_NAME

from ...checkpoints.hub.repository import HubFiles
from ...checkpoints.safetensors_header import DTYPE_NAMES

# What `from_pretrained` reads beside the weights. The config makes a generation config, where there is none.
_SIDE_FILES = ("config.json", "generation_config.json", "adapter_config.json", "adapter_model.safetensors")


@contextmanager
def cache_view(files: HubFiles, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """A passing cache folder that has everything of a repository but its weights.

    Transformers downloads the weights of a repository before it asks its model class to load them. Shown this
    cache, it finds an empty file in their place, and takes everything else as if from the Hub: so the model
    keeps its name, its generation settings and its adapters.

    Args:
        files (`HubFiles`): the repository's.
        dtype (`torch.dtype`): of the weights, which Transformers takes from the file if the config has none.

    Yields:
        `dict[str, Any]`: the arguments for `from_pretrained` that make it look there.

    Example: see `EmoPreTrainedModel.from_pretrained`.
    """
    with tempfile.TemporaryDirectory(prefix="emo-view-") as cache_dir:
        name = repo_folder_name(repo_id=files.repo_id, repo_type="model")
        snapshot = Path(cache_dir, name, "snapshots", files.commit, files.subfolder)
        snapshot.mkdir(parents=True)
        for file in _SIDE_FILES:
            found = files.find(file)
            if found is not None:
                (snapshot / file).symlink_to(os.path.abspath(found))
        empty = {"empty": {"dtype": DTYPE_NAMES[dtype], "shape": [0], "data_offsets": [0, 0]}}
        header = json.dumps(empty).encode()
        (snapshot / SAFE_WEIGHTS_NAME).write_bytes(struct.pack("<Q", len(header)) + header)
        yield {
            "cache_dir": cache_dir,
            "revision": files.commit,
            "local_files_only": True,
            "force_download": False,
        }
