"""Write fine-tuned subsets back into the full model, file by file. Neither model has to be in memory."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ...checkpoints.checkpoint import Checkpoint
from ...checkpoints.errors import CheckpointError
from ...checkpoints.hub.names import folder_or_repo
from ...checkpoints.hub.repository import HubFiles
from ...checkpoints.lazy_tensor import LazyTensor
from ...checkpoints.safetensors_header import TensorSpan
from ...checkpoints.side_files import SIDE_FILES, copy_side_files, optional_file, side_files
from ...checkpoints.source_files import SourceFiles
from ...checkpoints.writing.output_folder import check_new, check_space, new_folder
from ...checkpoints.writing.safetensors_writing import write_json
from ...configuration import EmoConfig
from ..library import LIBRARY_FILES
from ..loading.model_source import ModelSource
from ..loading.weights_check import check_whole
from ..reduced_config import held_experts
from ..validation import SubsetError
from .expert_tensors import Part, PartOfModel, parts_of_model

_BUFFER_BYTES = 1 << 24
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Routers of two models have nothing in common: their cosine is near 0. Training changes a router little.
_LEAST_COSINE = 0.5


@dataclass(frozen=True)
class WriteBack:
    """What `write_back` put into the full model.

    Args:
        written (`list[str]`): the tensors and router rows, with ids of the root model in their names.
        averaged (`list[str]`): those of them that several tuned models hold.

    Example: see `write_back`.
    """

    written: list[str]
    averaged: list[str]


@dataclass(frozen=True)
class _Model:
    """One of the models: the full one, or a tuned one."""

    label: str
    config: EmoConfig
    parts: dict[str, PartOfModel]
    source: ModelSource | None = None  # None for a model in memory, and so the next
    identity: dict[str, Any] | None = None  # by which an interrupted run recognises it when it continues
    files: SourceFiles | None = None  # as they were before anything was read


def write_back(
    full: str | os.PathLike,
    tuned: str | os.PathLike | PreTrainedModel | Sequence[str | os.PathLike | PreTrainedModel],
    *,
    out: str | os.PathLike,
    what: str = "routed",
    weight: float = 1.0,
    check_root: bool = True,
    progress: bool = True,
    **hub_kwargs: Any,
) -> WriteBack:
    """Write the full model anew, with the experts of fine-tuned subsets in their old places.

    Every file is copied with the new bytes in their places; all other bytes stay the same. A part that was
    not trained does not change, even if the tuned model was saved in a shorter dtype. Where several tuned
    models hold a part, their mean is written.

    A trained value is rounded once, to the dtype that the full model has on disk: from bfloat16 to float32 it
    is exact, from float32 to bfloat16 it becomes the nearest number. A value counts as not trained if it is
    the old value in the dtype of the tuned model. Means and blends are computed in float64. Save a tuned
    model in the dtype that it was trained in: if it was loaded in a shorter dtype and saved in a longer one,
    a trained value looks like one that only lost digits.

    The config, generation config, tokenizer, model card, licence and library of subsets of the full model are
    copied, from a folder and from a repository.

    An interrupted or killed run continues at the file that it was writing: call it again with the same
    arguments. The models must not have changed (config, files, commit of a repository). Until then the files
    are in `.<name>.partial` beside `out`. With a tuned model in memory nothing is kept: a later run could not
    recognise it.

    Args:
        full (`str` or `os.PathLike`): folder or Hub repository of the model, full or itself a subset that
            holds the tuned experts.
        tuned (`str`, `os.PathLike`, `PreTrainedModel` or a sequence of these): fine-tuned models: what
            `save_pretrained` of a subset wrote, or the model itself. Adapters must have been merged.
        out (`str` or `os.PathLike`): the folder to make; it must not exist.
        what (`str`, defaults to `"routed"`): what is written: `"routed"` experts, `"shared"` and
            always-active experts, the `"router"` rows of the tuned models' experts, the `"backbone"` (all the
            rest), several joined by `+`, or `"all"`.
        weight (`float`, defaults to 1.0): of the tuned values against the old ones: 1 replaces, 0.5 is the
            mean of both.
        check_root (`bool`, defaults to `True`): compare router rows, to refuse models that are no descendants
            of `full` although all sizes are equal.
        progress (`bool`, defaults to `True`): show a progress bar.
        hub_kwargs: `revision`, `token`, `cache_dir` and so on of `full`, as for `from_pretrained`.

    Returns:
        `WriteBack`: what was written.

    Raises:
        SubsetError: if a tuned model has another root model, or holds experts that `full` lacks.
        CheckpointError: if a checkpoint is damaged or quantised, or shapes differ.
        ValueError: if an argument is wrong, a tuned model has adapters, or a value is not finite; then
            nothing is left of `out`.
        FileExistsError: if `out` exists, or another job for it was interrupted.
        OSError: if the disk has no room, or another run is writing to `out`. The error says what is left.

    Example:

    ```python
    >>> from transformers_emo import EmoForCausalLM, write_back
    >>> toy = "model_cards/toy-emo"
    >>> tuned = EmoForCausalLM.from_pretrained(toy, expert_subset=[[0, 1, 31]] * 4)
    >>> tuned.model.layers[0].mlp.experts.down_proj.data *= 1.01  # in place of training
    >>> result = write_back(toy, tuned, out=tmp_path / "updated", progress=False)
    >>> len(result.written)  # two routed experts of three matrices in four layers
    24

    ```
    """
    out = Path(out)
    check_new(out)
    parts = _parts(what)
    if isinstance(weight, str) or not 0 <= weight <= 1:
        raise ValueError(f"`weight` is {weight!r}, expected 0 to 1: 1 replaces, 0 changes nothing.")
    several = tuned if isinstance(tuned, Sequence) and not isinstance(tuned, str) else [tuned]
    if not several:
        raise ValueError("Got no tuned model: give at least one.")
    opened: list[_Model] = []
    try:
        opened.append(_open(full, whole=True, **hub_kwargs))
        shared_kwargs = {name: v for name, v in hub_kwargs.items() if name not in ("revision", "subfolder")}
        opened += [_open(model, **shared_kwargs) for model in several]
        base, *others = opened
        assert base.source is not None
        sources = _sources(base, others, parts, check_root)
        plan: dict[str, Any] | None = {"what": sorted(parts), "weight": weight}
        for number, model in enumerate(opened):
            if model.identity is None:
                plan = None
            elif plan is not None:
                plan["full" if number == 0 else f"tuned model {number}"] = model.identity
        names = _names_to_copy(base)
        states = [model.files for model in opened if model.files is not None]
        with new_folder(out, plan=plan, hopeless=(ValueError,), sources=states) as work:
            _write_files(base, sources, weight, work, out, progress)
            _copy_rest(base, names, work)
    finally:
        for each in opened:
            if each.source is not None:
                each.source.close()
    return WriteBack(list(sources), [name for name, tensors in sources.items() if len(tensors) > 1])


def _parts(what: str) -> set[Part]:
    known: tuple[Part, ...] = get_args(Part)
    names = known if what == "all" else what.split("+")
    if not set(names) <= set(known):
        raise ValueError(f"`what` is {what!r}, expected some of {', '.join(known)} joined by '+', or 'all'.")
    return {part for part in known if part in names}


def _open(model: str | os.PathLike | PreTrainedModel, *, whole: bool = False, **hub_kwargs: Any) -> _Model:
    if isinstance(model, str | os.PathLike):
        label = os.fspath(model)
        before = SourceFiles.of(model, subfolder=hub_kwargs.get("subfolder"))
        with folder_or_repo(model):
            adapter = optional_file(model, "adapter_config.json", **hub_kwargs)
        if adapter is not None:
            raise ValueError(
                f"{label} holds an adapter: merge it into its model (`merge_and_unload` of PEFT), and give "
                "what `save_pretrained` of that writes."
            )
        source = ModelSource.open(model, **hub_kwargs)
        try:
            source.refuse_quantised()
            files = source.checkpoint().source
            if isinstance(files, HubFiles):  # all of it will be read
                files.download(span.file for span in source.checkpoint().tensors.values())
            parameters = source.parameters()
            if whole:
                check_whole(parameters, source.config, label)
            parts = parts_of_model(parameters, source.config)
            identity = source.identity()
        except BaseException:
            source.close()
            raise
        return _Model(label, source.config, parts, source, identity, before)
    if not isinstance(model, PreTrainedModel) or not isinstance(model.config, EmoConfig):
        raise ValueError(
            f"Cannot write back a {type(model).__name__}: give a folder, a Hub repository or an EMO model. "
            "An adapter is merged into its model first (`merge_and_unload` of PEFT)."
        )
    state = model.state_dict()
    if getattr(model, "_hf_peft_config_loaded", False) or any(".base_layer." in name for name in state):
        raise ValueError("The tuned model carries an adapter: merge it into the weights first.")
    ModelSource("the tuned model", model.config).refuse_quantised()
    for name, tensor in state.items():
        if tensor.is_meta or type(tensor.data) is not torch.Tensor:
            what = "offloaded" if tensor.is_meta else f"a {type(tensor.data).__name__}"
            raise ValueError(
                f"{name} of the tuned model is {what}: save the model with `save_pretrained` and give the "
                "folder."
            )
    return _Model("the tuned model", model.config, parts_of_model(_Memory(state).tensors(), model.config))


class _Memory:
    """Gives the bytes of tensors in memory, each a file of its own."""

    def __init__(self, state: dict[str, torch.Tensor]):
        self._state = state

    def size(self, file: str) -> int:
        return self._state[file].nbytes

    def read_into(self, file: str, start: int, buffer: memoryview) -> None:
        flat = self._state[file].detach().contiguous().view(-1).view(torch.uint8)
        buffer[:] = memoryview(flat[start : start + len(buffer)].cpu().numpy().data)

    def close(self) -> None:
        pass

    def tensors(self) -> dict[str, LazyTensor]:
        return {
            name: LazyTensor(
                self, [TensorSpan(name, 0, t.nbytes, t.dtype, tuple(t.shape))], t.dtype, tuple(t.shape)
            )
            for name, t in self._state.items()
        }


def _sources(
    base: _Model, others: Sequence[_Model], parts: set[Part], check_root: bool
) -> dict[str, list[LazyTensor]]:
    """The tensors of the tuned models to write, by name, all of them checked."""
    sources: dict[str, list[LazyTensor]] = {}
    for model in others:
        try:
            replace(held_experts(model.config), drop_shared=True).for_model(base.config)
        except SubsetError as error:
            raise SubsetError(f"{model.label} does not belong to {base.label}. {error}") from error
        for size in ("hidden_size", "intermediate_size"):
            got, expected = getattr(model.config, size), getattr(base.config, size)
            if got != expected:
                raise CheckpointError(
                    f"{model.label} has `{size}` {got}, expected {expected} as in {base.label}."
                )
        chosen = {name: part for name, part in model.parts.items() if part.part in parts}
        if base.config.tie_word_embeddings and "lm_head.weight" not in base.parts:
            chosen.pop("lm_head.weight", None)  # it is the embeddings
        if "backbone" in parts:
            lacking = [n for n, p in base.parts.items() if p.part == "backbone" and n not in chosen]
            if lacking:
                raise CheckpointError(f"{model.label} has no tensor {lacking[0]}, which {base.label} has.")
        for name, part in chosen.items():
            old = base.parts.get(name)
            if old is None:
                raise CheckpointError(f"{base.label} has no tensor {name}, which {model.label} has.")
            if old.tensor.shape != part.tensor.shape:
                raise CheckpointError(
                    f"{name} has shape {list(part.tensor.shape)} in {model.label}, expected "
                    f"{list(old.tensor.shape)} as in {base.label}."
                )
            for tensor, label in ((old.tensor, base.label), (part.tensor, model.label)):
                if tensor.dtype not in _DTYPES:
                    raise CheckpointError(
                        f"{name} of {label} is of {tensor.dtype}, expected floating point numbers of 16 bits "
                        "or more."
                    )
            sources.setdefault(name, []).append(part.tensor)
        if check_root:
            _check_same_root(base, model)
    if not sources:
        raise ValueError(f"Nothing to write: the models have nothing of {', '.join(sorted(parts))}.")
    return sources


def _check_same_root(base: _Model, model: _Model) -> None:
    """Check that the routers of a tuned model are those of the full model, changed a little."""
    rows: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for name, part in model.parts.items():
        if part.part == "router" and part.layer is not None:
            pair = (base.parts[name].tensor[...].double(), part.tensor[...].double())
            rows.setdefault(part.layer, []).append(pair)
    for layer, pairs in rows.items():
        old, new = (torch.stack(side).flatten() for side in zip(*pairs, strict=True))
        if torch.equal(old, new):
            continue
        cosine = torch.nn.functional.cosine_similarity(old, new, dim=0).item()
        if not cosine >= _LEAST_COSINE:
            raise SubsetError(
                f"{model.label} does not come from {base.label}: the router rows of layer {layer} have a "
                f"cosine of {cosine:.2f} with those of the same experts, expected about 1. Give the model it "
                "was taken from, or check_root=False if it is right."
            )


def _write_files(
    base: _Model, sources: dict[str, list[LazyTensor]], weight: float, work: Path, out: Path, progress: bool
) -> None:
    assert base.source is not None
    checkpoint = base.source.checkpoint()
    # Of each file: where new bytes begin, and what they are of.
    patches: dict[str, list[tuple[int, str]]] = {}
    for name in sources:
        (span,) = base.parts[name].tensor.pieces  # a matrix, or rows of one, lies in one piece
        patches.setdefault(span.file, []).append((span.start, name))
    sizes = {file: checkpoint.source.size(file) for file in {s.file for s in checkpoint.tensors.values()}}
    left = {file: size for file, size in sorted(sizes.items()) if not (work / file).exists()}
    for partial in work.rglob("*.partial"):
        partial.unlink()
    check_space(out, sum(left.values()))
    total = sum(sizes.values())
    bar = tqdm(total=total, desc="Writing back", unit="B", unit_scale=True, disable=not progress, delay=1)
    with bar:
        bar.update(total - sum(left.values()))
        for file, size in left.items():
            partial = work / f"{file}.partial"
            partial.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as to:
                position = 0
                for start, name in sorted(patches.get(file, [])):
                    _copy(checkpoint, file, position, start, to, bar)
                    position = start
                    for new in _merged(base.parts[name].tensor, sources[name], weight, name, out):
                        to.write(new)
                        bar.update(len(new))
                        position += len(new)
                _copy(checkpoint, file, position, size, to, bar)
                to.flush()
                os.fsync(to.fileno())  # a whole file is trusted later
            partial.rename(work / file)


def _copy(checkpoint: Checkpoint, file: str, start: int, stop: int, to, bar) -> None:
    for begin in range(start, stop, _BUFFER_BYTES):
        buffer = memoryview(bytearray(min(_BUFFER_BYTES, stop - begin)))
        checkpoint.source.read_into(file, begin, buffer)
        to.write(buffer)
        bar.update(len(buffer))


def _merged(
    old: LazyTensor, tuned: Sequence[LazyTensor], weight: float, name: str, out: Path
) -> Iterator[memoryview]:
    """The bytes to write, in the dtype of the full model, some rows at a time."""
    row_bytes = max(math.prod(old.shape[1:]) * old.dtype.itemsize, 1)
    step = max(_BUFFER_BYTES // row_bytes, 1)
    for start in range(0, old.shape[0], step):
        rows = slice(start, start + step)
        if weight == 1 and len(tuned) == 1 and tuned[0].dtype == old.dtype:
            merged = tuned[0][rows]
        else:
            before = old[rows]
            exact = before.double()
            total = torch.zeros_like(exact)
            for tensor in tuned:
                new = tensor[rows]
                # A value that only lost digits when the tuned model was saved was not trained.
                total += torch.where(new == before.to(new.dtype), exact, new.double())
            mean = total / len(tuned)
            merged = _rounded(mean if weight == 1 else exact + weight * (mean - exact), old.dtype)
        if not merged.isfinite().all():
            raise ValueError(
                f"{name} would hold values that are not finite (NaN, infinity or beyond {old.dtype}): the "
                f"tuned model is damaged or its training diverged. Nothing of {out} is left: give a model "
                "that is whole, or leave this one out."
            )
        yield memoryview(merged.contiguous().view(-1).view(torch.uint8).numpy().data)


def _rounded(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64 to the nearest of a dtype.

    PyTorch goes from float64 to 16 bits through float32, and so rounds twice. Rounding to odd in between
    keeps the side of a tie that a number is on (Boldo and Melquiond 2008,
    https://doi.org/10.1109/TC.2007.70819).
    """
    if dtype.itemsize > 2:
        return exact.to(dtype)
    single = exact.float()
    even = single.view(torch.int32) % 2 == 0
    beside = torch.nextafter(single, (exact - single.double()).sign().float() * torch.inf)
    return torch.where(even & (single.double() != exact), beside, single).to(dtype)


def _names_to_copy(base: _Model) -> list[str]:
    """The files to copy beside the weights. The weights keep their files' names, and so their index."""
    assert base.source is not None
    names = side_files(base.label, (*SIDE_FILES, LIBRARY_FILES), **base.source.hub_kwargs)
    files = {span.file for span in base.source.checkpoint().tensors.values()}
    return names if files == {SAFE_WEIGHTS_NAME} else [*names, SAFE_WEIGHTS_INDEX_NAME]


def _copy_rest(base: _Model, names: Sequence[str], work: Path) -> None:
    """The config and other files of the full model, as they are."""
    assert base.source is not None
    copy_side_files(base.label, names, work, **base.source.hub_kwargs)
    config = json.loads((work / "config.json").read_text(encoding="utf-8"))
    if config.pop("auto_map", None) is not None:  # the code that it names stays behind: Transformers has it
        write_json(work / "config.json", config)
