"""Loading from the Hub only what is wanted: which files, which parts, and what Transformers sees of it."""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.file_download import repo_folder_name
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .checkpoint import Checkpoint, LazyTensor, wanted_ranges
from .hub_files import HubFiles
from .safetensors_header import DTYPE_NAMES, CheckpointError, Source, read_index

_MANY_FILES = 100
# What `from_pretrained` reads beside the weights. The config makes a generation config, where there is none.
_SIDE_FILES = ("config.json", "generation_config.json", "adapter_config.json", "adapter_model.safetensors")


def open_part(
    files: HubFiles, wants: Callable[[str], bool] | None = None, *, variant: str | None = None
) -> Checkpoint:
    """The checkpoint of a repository, known by the headers of the files that hold something wanted.

    Files that are wanted as a whole are downloaded into the ordinary cache: so are expert shards. Of others
    only the header comes now; their bytes come when asked for.

    Args:
        files (`HubFiles`): the repository's.
        wants (`Callable[[str], bool]`, *optional*): says of a tensor's name whether it is wanted; without it
            every header comes and nothing else.
        variant (`str`, *optional*): as in `from_pretrained`.

    Raises:
        CheckpointError: if there are no safetensors weights, or they are damaged or out of reach.

    Example: see `EmoPreTrainedModel.from_pretrained`.
    """
    infix = "" if variant is None else f".{variant}"
    single = SAFE_WEIGHTS_NAME.replace(".safetensors", f"{infix}.safetensors")
    sharded = SAFE_WEIGHTS_INDEX_NAME.replace(".index", f".index{infix}")
    # With an index in the cache there is no single file: not asked again, the Hub may be out of reach.
    if files.is_whole(single) or (not files.is_whole(sharded) and files.exists(single)):
        files.fetch_headers([single])
        return Checkpoint.from_files("", [single], files)
    index = files.find(sharded)
    if index is None:
        raise CheckpointError(
            f"There are no safetensors weights in {'the cache of ' if files.offline else ''}{files.repo_id}: "
            f"expected {single} or {sharded}."
        )
    weight_map = read_index(index)
    names: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        names.setdefault(file, []).append(name)
    needed = [file for file, held in names.items() if wants is None or any(map(wants, held))]
    if wants is not None:
        files.download(file for file in needed if all(map(wants, names[file])))
    elif len(needed) > _MANY_FILES:  # expert shards: a request for every header would take longer
        files.download(needed)
    files.fetch_headers(needed)
    return Checkpoint.from_index(weight_map, needed, files)


def fetch_ahead(source: Source, tensors: Iterable[LazyTensor], *, progress: bool = False) -> None:
    """Have the bytes of tensors fetched all at once and in parallel, where they come from the Hub.

    Args:
        source (`Source`): the tensors' source; nothing happens if they are on this machine.
        tensors (`Iterable[LazyTensor]`): what will be read.
        progress (`bool`, defaults to `False`): show a progress bar in bytes.

    Raises:
        CheckpointError: if they are not there and cannot be had.

    Example: see `EmoPreTrainedModel.from_pretrained`.
    """
    if isinstance(source, HubFiles):
        source.fetch(wanted_ranges(tensors), progress="Fetching experts" if progress else None)


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
