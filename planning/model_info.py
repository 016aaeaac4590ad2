"""What is known of a model before anything of it is downloaded."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.errors import CheckpointError
from ..checkpoints.hub.names import is_hub_repo, pinned
from ..subsets.expert_subset import ExpertSubset
from ..subsets.library import LIBRARY, HubLibrary, library_names, library_of, subset_file
from ..subsets.loading.model_source import check_hub_kwargs
from ..subsets.numbering import root_experts
from ..subsets.validation import SubsetError
from .machine import Machine, this_machine
from .model_sizes import ModelSizes, Size, fitting, subset_of, usual_numbers
from .needs import Need, needs_of

_USUAL = 16  # experts a layer that examples show


@dataclass(frozen=True)
class ReadySubset:
    """A subset in a model's library.

    Args:
        name (`str`): its name, for `expert_subset=`.
        experts (`str`): how many experts a layer it keeps, such as `"16"` or `"8 to 24"`.
        size (`Size`, *optional*): what it takes.
        problem (`str`, *optional*): why it cannot be used, if it cannot.

    Example: see `model_info`.
    """

    name: str
    experts: str
    size: Size | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Budget:
    """The whole model with `from_pretrained(expert_memory=...)`.

    Args:
        experts (`int`): routed experts that there is room for in every layer.
        expert_memory (`int`): the budget in bytes.
        memory_bytes (`int`): parameters in memory with it: the budget, the experts that every token uses, and
            the rest of the model.

    Example: see `model_info`.
    """

    experts: int
    expert_memory: int
    memory_bytes: int


@dataclass(frozen=True)
class ModelInfo:
    """What a model is, takes and offers.

    Args:
        model (`str`): its folder or repository.
        commit (`str`, *optional*): the commit of a repository.
        variant (`str`): `"full"` or `"subset"`.
        trained_with_pools (`bool`): whether its config says that documents had pools of a part of the
            experts, as EMO's does. A standard mixture of experts had none: it loses by every expert.
        layers (`int`): its layers.
        experts (`list[int]`): experts of each layer, 0 in a dense one.
        shared (`int`): of these, how many every token uses, in the first layer with experts.
        top_k (`int`): how many experts a token takes, those included.
        dtype (`str`): the dtype that it is loaded in.
        packed_bits (`int`, *optional*): the bits of its weights, if they are packed.
        context (`int`): the longest text in tokens.
        cache_bytes (`int`): memory of the keys and values of one token.
        files (`int`): files of weights.
        file_bytes (`int`): their tensors in bytes.
        sizes (`list[Size]`): for each number of experts and of bits.
        budgets (`list[Budget]`): for `expert_memory`; empty where it is not to be had.
        subsets (`list[ReadySubset]`): what is in its library.
        machine (`Machine`): what this machine has.
        needs (`list[Need]`): what commands take, and whether they fit.

    Example: see `model_info`.
    """

    model: str
    commit: str | None
    variant: str
    trained_with_pools: bool
    layers: int
    experts: list[int]
    shared: int
    top_k: int
    dtype: str
    packed_bits: int | None
    context: int
    cache_bytes: int
    files: int
    file_bytes: int
    sizes: list[Size]
    budgets: list[Budget]
    subsets: list[ReadySubset]
    machine: Machine
    needs: list[Need]

    def to_dict(self) -> dict[str, Any]:
        """`dict[str, Any]`: the same as JSON data."""
        return asdict(self)


def model_info(
    model: str | os.PathLike,
    *,
    experts: list[int] | None = None,
    machine: Machine | None = None,
    **hub_kwargs: Any,
) -> ModelInfo:
    """What a model is and takes, from its config and from the headers of its files.

    Of a repository `config.json`, the index, headers and the files of the library are fetched, and no
    weights.

    Args:
        model (`str` or `os.PathLike`): folder or Hub repository: full or a subset, in 16 or fewer bits, in
            any layout that `from_pretrained` loads.
        experts (`list[int]`, *optional*): numbers of experts a layer to give sizes for; by default all of
            them, by halves down to those that a token takes.
        machine (`Machine`, *optional*): what commands shall fit; this machine by default.
        hub_kwargs: `revision`, `token`, `cache_dir` and so on, as for `from_pretrained`.

    Raises:
        OSError: if there is neither such a folder nor such a repository.
        CheckpointError: if the weights are damaged, or quantised in a way that is not read.
        ValueError: if the model cannot have a number of `experts`.

    Example:

    ```python
    >>> from transformers_emo.planning import model_info
    >>> info = model_info("model_cards/emo-tiny")
    >>> info.variant, info.experts, [budget.experts for budget in info.budgets]
    ('full', [64, 64, 64, 64], [3, 7, 15, 31, 63])
    >>> {size.experts[0]: size.memory_bytes for size in info.sizes if size.bits == 16}[16]
    5785856

    ```
    """
    check_hub_kwargs("model_info", hub_kwargs)
    hub_kwargs = pinned(model, hub_kwargs)
    sizes = ModelSizes.open(model, **hub_kwargs)
    config = sizes.config
    _check_numbers(sizes, experts)
    numbers = experts or usual_numbers(config)
    by_size = [_try(sizes, number, bits) for number in numbers for bits in sizes.bits]
    commit = hub_kwargs.get("revision") if is_hub_repo(model) else None
    subsets = _library(model, sizes, hub_kwargs)
    machine = machine or this_machine(cache_dir=hub_kwargs.get("cache_dir"))
    layers = [layer for layer in config.layer_experts if not layer.is_dense]
    spans = sizes.checkpoint.files.tensors if hasattr(sizes.checkpoint, "files") else sizes.checkpoint.tensors
    whole, part = sizes.of(), fitting(numbers, _USUAL)
    return ModelInfo(
        model=os.fspath(model),
        commit=commit,
        variant="full" if config.retained_experts is None else "subset",
        trained_with_pools=_has_pools(sizes),
        layers=config.num_hidden_layers,
        experts=[layer.num_experts for layer in config.layer_experts],
        shared=len(layers[0].always_used) if layers else 0,
        top_k=max((layer.top_k for layer in layers), default=0),
        dtype=str(sizes.dtype).removeprefix("torch."),
        packed_bits=None if sizes.packing is None else sizes.packing.bits,
        context=config.max_position_embeddings,
        cache_bytes=sizes.cache_bytes,
        files=len({span.file for span in spans.values()}),
        file_bytes=sum(span.end - span.start for span in spans.values()),
        sizes=[size for size in by_size if size is not None],
        budgets=_budgets(sizes, whole),
        subsets=subsets,
        machine=machine,
        needs=needs_of(sizes, whole, part, machine, is_remote=is_hub_repo(model)),
    )


def _check_numbers(sizes: ModelSizes, experts: list[int] | None) -> None:
    for number in experts or ():
        subset_of(sizes.config, number)


def _try(sizes: ModelSizes, number: int, bits: int) -> Size | None:
    """The size, `None` if the model's widths do not go in groups of these bits."""
    try:
        return sizes.of(number or None, bits)
    except ValueError:
        if bits == sizes.bits[0]:
            raise
        return None


def _has_pools(sizes: ModelSizes) -> bool:
    """Whether documents had pools of a part of the experts; those of all of them are no pools."""
    least = sizes.config.document_pool_min
    roots = root_experts(sizes.config)
    return least is not None and least < max(roots) - sizes.config.num_shared_experts


def _budgets(sizes: ModelSizes, whole: Size) -> list[Budget]:
    if sizes.packing is not None or not sizes.expert_bytes:
        return []
    beside = sizes.backbone_bytes + sizes.always_used_bytes
    layers = [layer for layer in sizes.config.layer_experts if not layer.is_dense]
    routed = max(layer.num_experts - len(layer.always_used) for layer in layers)
    least = max(layer.top_k - len(layer.always_used) for layer in layers)
    always = len(layers[0].always_used)
    numbers = {least, *(n - always for n in usual_numbers(sizes.config)), routed}
    return [
        Budget(number, sizes.budget(number), beside + sizes.budget(number))
        for number in sorted(numbers)
        if number >= least
    ]


def _library(model: str | os.PathLike, sizes: ModelSizes, hub_kwargs: dict[str, Any]) -> list[ReadySubset]:
    folder, fetch = library_of(model, **hub_kwargs)
    names = fetch.names() if isinstance(fetch, HubLibrary) else library_names(folder or Path(model))
    found = []
    for name in names:
        try:
            # By its path in the library: a file of that name may lie where the command is called.
            path = subset_file(str(Path(folder, LIBRARY, f"{name}.json")) if folder else name, None, fetch)
            subset = ExpertSubset.load(path)
            kept = [len(ids) for ids in subset.experts if ids is not None]
            told = str(kept[0]) if len(set(kept)) == 1 else f"{min(kept)} to {max(kept)}"
            found.append(ReadySubset(name, told, sizes.of(subset)))
        except (SubsetError, CheckpointError, OSError, ValueError) as error:
            found.append(ReadySubset(name, "", problem=str(error)))
    return found
