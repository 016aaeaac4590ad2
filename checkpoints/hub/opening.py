"""Opening the wanted part of a repository by its headers, and fetching it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from ..checkpoint import Checkpoint, weight_files
from ..errors import CheckpointError
from ..lazy_tensor import LazyTensor, wanted_ranges
from ..safetensors_header import MAX_HEADER_BYTES, Source, read_index
from ..small_files import read_json
from .repository import HubFiles

_MANY_FILES = 100
_NUMBER = re.compile(r"\d+")


def open_part(
    files: HubFiles, wants: Callable[[str], bool] | None = None, *, variant: str | None = None
) -> Checkpoint:
    """Open the checkpoint of a repository: read the headers of the files that hold something wanted.

    A file of which every tensor is wanted, such as an expert shard, is downloaded into the ordinary cache. Of
    other files only the header is fetched now, and the rest when it is read.

    Args:
        files (`HubFiles`): the files of the repository.
        wants (`Callable[[str], bool]`, *optional*): says for the name of a tensor whether it is wanted.
            Without it all headers are fetched and nothing else.
        variant (`str`, *optional*): as in `from_pretrained`.

    Raises:
        CheckpointError: if there are no safetensors weights, or they are damaged or cannot be reached.

    Example: see `EmoPreTrainedModel.from_pretrained`.
    """
    single, index = _weights_of(files, variant)
    if index is None:
        files.fetch_headers([single])
        return Checkpoint.from_files("", [single], files)
    weight_map = read_index(index)
    names: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        names.setdefault(file, []).append(name)
    needed = [file for file, held in names.items() if wants is None or any(map(wants, held))]
    if wants is not None:
        files.download(file for file in needed if all(map(wants, names[file])))
    elif len(needed) > _MANY_FILES:  # expert shards: fetching each header by itself would take longer
        files.download(needed)
    files.fetch_headers(needed)
    return Checkpoint.from_index(weight_map, needed, files)


def open_headers(files: HubFiles, *, variant: str | None = None) -> Checkpoint:
    """Where all tensors of a repository lie, from its index and from headers. Nothing else is fetched.

    Of very many files (expert shards) only those headers are fetched that show tensors of a new kind. Tensors
    whose names differ in numbers only are taken to be alike; if the index gives another total size, the
    other headers are fetched too.

    Args:
        files (`HubFiles`): the files of the repository.
        variant (`str`, *optional*): as in `from_pretrained`.

    Returns:
        `Checkpoint`: for sizes. Where a header was not fetched, the places of tensors are not known.

    Raises:
        CheckpointError: if there are no safetensors weights, or they are damaged or cannot be reached.

    Example: see `transformers_emo.planning.model_info`.
    """
    single, index = _weights_of(files, variant)
    if index is None:
        files.fetch_headers([single])
        return Checkpoint.from_files("", [single], files)
    weight_map = read_index(index)
    needed = set(weight_map.values())
    if len(needed) > _MANY_FILES:
        known: set[str] = set()
        shown = set()
        for name, file in sorted(weight_map.items(), key=lambda item: item[1]):
            kind = _NUMBER.sub("*", name)
            if kind not in known:
                known.add(kind)
                shown.add(file)
        checkpoint = _with_the_rest(weight_map, shown, files, index)
        if checkpoint is not None:
            return checkpoint
    files.fetch_headers(needed)
    return Checkpoint.from_index(weight_map, needed, files)


def _weights_of(files: HubFiles, variant: str | None) -> tuple[str, Path | None]:
    """The name of a single file of weights, or the index of several."""
    single, sharded = weight_files(variant)
    # With an index in the cache there is no single file, and the Hub, which may be offline, is not asked.
    if files.is_whole(single) or (not files.is_whole(sharded) and files.exists(single)):
        return single, None
    index = files.find(sharded)
    if index is None:
        raise CheckpointError(
            f"There are no safetensors weights in {'the cache of ' if files.offline else ''}{files.repo_id}: "
            f"expected {single} or {sharded}. Name a model's repository."
        )
    return single, index


def _with_the_rest(
    weight_map: dict[str, str], shown: set[str], files: HubFiles, index: Path
) -> Checkpoint | None:
    """A checkpoint of files whose headers are fetched, and of tensors like theirs; `None` if sizes differ."""
    files.fetch_headers(shown)
    checkpoint = Checkpoint.from_index(weight_map, shown, files)
    kinds = {_NUMBER.sub("*", name): span for name, span in checkpoint.tensors.items()}
    tensors = dict(checkpoint.tensors)
    for name in checkpoint.elsewhere:
        like = kinds[_NUMBER.sub("*", name)]
        tensors[name] = replace(like, file=weight_map[name], start=0, end=like.end - like.start)
    metadata = read_json(index, MAX_HEADER_BYTES).get("metadata")
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    total = sum(span.end - span.start for span in tensors.values())
    return Checkpoint(files, tensors) if said == total else None


def fetch_ahead(source: Source, tensors: Iterable[LazyTensor], *, progress: bool = False) -> None:
    """Fetch the bytes of tensors at once and in parallel, if they are on the Hub.

    Args:
        source (`Source`): where the tensors are. If they are on this machine, nothing happens.
        tensors (`Iterable[LazyTensor]`): the tensors that will be read.
        progress (`bool`, defaults to `False`): show a progress bar in bytes.

    Raises:
        CheckpointError: if bytes are not in the cache and cannot be fetched.

    Example: see `EmoPreTrainedModel.from_pretrained`.
    """
    if isinstance(source, HubFiles):
        source.fetch(wanted_ranges(tensors), progress="Fetching experts" if progress else None)
