"""The part of a repository that is wanted: opened by its headers, and fetched."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..checkpoint import Checkpoint
from ..errors import CheckpointError
from ..lazy_tensor import LazyTensor, wanted_ranges
from ..safetensors_header import Source, read_index
from .repository import HubFiles

_MANY_FILES = 100


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
