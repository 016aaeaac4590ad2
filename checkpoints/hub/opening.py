"""Opening the wanted part of a repository by its headers, and fetching it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..checkpoint import Checkpoint, weight_files
from ..errors import CheckpointError
from ..lazy_tensor import LazyTensor, wanted_ranges
from ..safetensors_header import Source, read_index
from .repository import HubFiles

_MANY_FILES = 100


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
    single, sharded = weight_files(variant)
    # With an index in the cache there is no single file, and the Hub, which may be offline, is not asked.
    if files.is_whole(single) or (not files.is_whole(sharded) and files.exists(single)):
        files.fetch_headers([single])
        return Checkpoint.from_files("", [single], files)
    index = files.find(sharded)
    if index is None:
        raise CheckpointError(
            f"There are no safetensors weights in {'the cache of ' if files.offline else ''}{files.repo_id}: "
            f"expected {single} or {sharded}. Name a model's repository."
        )
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
