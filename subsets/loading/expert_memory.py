"""`from_pretrained(..., expert_memory="6GB")`: a full model whose experts are read when a token takes them.

All expert layers share one memory of slots, each of the size of one expert. A token's experts are looked up
in a table by layer. Those that are missing are read straight into slots: into free ones first, then into
those of the experts that have not been used for longest. Experts that every token uses have slots of their
own, which are filled while the model is loaded and never given away.
"""

from __future__ import annotations

import copy
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ...checkpoints.checkpoint import Checkpoint, rows_of, weight_files
from ...checkpoints.errors import CheckpointError
from ...checkpoints.hub.opening import fetch_ahead
from ...checkpoints.hub.repository import HubFiles
from ...checkpoints.lazy_tensor import LazyTensor
from ...checkpoints.local_files import LocalFiles
from ...checkpoints.memory.large_pages import empty
from ...checkpoints.safetensors_header import TensorSpan, read_index
from ...checkpoints.source_files import SourceChangedError, SourceFiles
from ...checkpoints.writing.safetensors_writing import size_in_bytes
from ...configuration import EmoConfig
from ...modeling_emo.modeling_emo import EmoExperts
from ...modeling_emo.paged_experts import PagedExperts
from ...modeling_emo.weight_names import ROUTER, STACKED_EXPERTS
from .model_source import ModelSource
from .wanted_tensors import lazy_parameters
from .weight_loading import LazyStateDict

logger = logging.get_logger(__name__)

_NAMES = ("gate_up_proj", "down_proj")
_PARTS = ("gate", "up", "down")
_READERS = 4  # threads: a disk wants several reads at once, and copying from the page cache two processors


@dataclass(frozen=True)
class ExpertMemoryReport:
    """What a model with `expert_memory` has done since it was loaded, or since `reset_counts`.

    Args:
        budget (`int`): bytes for experts, as the caller gave them.
        slots (`int`): experts that there is room for, those that every token uses not counted.
        expert_bytes (`int`): bytes of one expert in memory.
        always_used_bytes (`int`): bytes of the experts that every token uses, which are beside the budget.
        resident (`list[list[int]]`): for each layer the experts in memory, in the numbering of the model.
        hits (`int`): how often a layer found an expert in memory that its tokens took.
        misses (`int`): how often it had to be read.
        bytes_read (`int`): bytes of experts read.
        tokens (`int`): tokens that went through the model.

    Example: see `ExpertMemory`.
    """

    budget: int
    slots: int
    expert_bytes: int
    always_used_bytes: int
    resident: list[list[int]]
    hits: int
    misses: int
    bytes_read: int
    tokens: int

    @property
    def hit_rate(self) -> float:
        """`float`: the share of the experts taken that were in memory; 1 if none was taken."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else 1.0

    @property
    def bytes_per_token(self) -> float:
        """`float`: bytes of experts read for each token."""
        return self.bytes_read / self.tokens if self.tokens else 0.0

    def __str__(self) -> str:
        held = [len(ids) for ids in self.resident if ids]
        layers = f"{min(held)} to {max(held)} a layer" if held else "none"
        return (
            f"expert memory: {sum(held)} experts in memory ({layers}), room for {self.slots} beside those "
            f"that every token uses; {self.hit_rate:.1%} of the experts taken were there, "
            f"{self.bytes_per_token / 1e6:.1f} MB read a token ({self.bytes_read / 1e9:.2f} GB for "
            f"{self.tokens} tokens)"
        )


class ExpertMemory:
    """A memory for experts of a budget of bytes, shared by all layers of a model.

    `from_pretrained` makes it. The model has it as `model.expert_memory`.

    Args:
        budget (`int` or `str`): bytes for experts, or a string such as `"6GB"`.
        config (`EmoConfig`): the config of the model in memory.
        rows (`Mapping[int, ExpertRows]`): for each expert layer, where its experts are.
        label (`str`): what the model is called in messages.
        files (`SourceFiles`): the state of the files, noted before anything of them was read.

    Raises:
        ValueError: if the budget is no size.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo import EmoForCausalLM
    >>> model = EmoForCausalLM.from_pretrained("model_cards/toy-emo", expert_memory="8MB")
    >>> logits = model(torch.tensor([[5, 6, 7]])).logits
    >>> report = model.expert_memory.report()
    >>> report.slots, report.tokens, report.bytes_read == report.misses * report.expert_bytes
    (81, 3, True)

    ```
    """

    def __init__(
        self,
        budget: int | str,
        config: EmoConfig,
        rows: Mapping[int, ExpertRows],
        *,
        label: str,
        files: SourceFiles,
    ):
        self.budget = size_in_bytes(budget, name="expert_memory")
        self.config = config
        self.rows = dict(rows)
        self.label = label
        self.files = files
        self.slots: Any = None
        self.is_loaded = False
        self._layers = {index: config.layer_experts[index] for index in self.rows}
        self._lock, self._pid = threading.RLock(), os.getpid()
        self._readers: ThreadPoolExecutor | None = None
        self.reset_counts()

    # Into the network.

    def install(self, model: Any, device: str | torch.device = "cpu") -> None:
        """Put the memory into a network in place of its experts, and read those that every token uses.

        Args:
            model (`EmoPreTrainedModel`): the network; its experts may be on the meta device.
            device (`str` or `torch.device`, defaults to `"cpu"`): where the slots are.

        Raises:
            ValueError: if the budget has no room for the experts of one token.
            CheckpointError: if experts have another shape than the network's, or cannot be read.

        Example: see `ExpertMemory`.
        """
        blocks = {index: model.base_model.layers[index].mlp for index in self.rows}
        experts = next(block.experts for block in blocks.values())
        shapes = {name: tuple(getattr(experts, name).shape[1:]) for name in _NAMES}
        for index, rows in self.rows.items():
            rows.check(shapes, f"layer {index} of {self.label}")
        self._allocate(experts.down_proj.dtype, torch.device(device), experts.config)
        for index, block in blocks.items():
            block.experts = PagedExperts(self, index, self._layers[index].num_experts)
        model.base_model._expert_memory = self
        model._can_compile_fullgraph = False
        logger.info(
            f"{self.label}: {self.num_slots} of {self.num_routed} experts fit into the "
            f"{self.budget / 1e9:.2f} GB of `expert_memory`; {self.always_used_bytes / 1e9:.2f} GB "
            "of experts that every token uses and the rest of the model are beside them."
        )

    def _allocate(self, dtype: torch.dtype, device: torch.device, config: Any) -> None:
        """Make slots, and read the experts that every token uses into those of their own, the last ones."""
        shapes = next(iter(self.rows.values())).shapes
        self.expert_bytes = sum(shape[0] * shape[1] for shape in shapes.values()) * dtype.itemsize
        self.num_routed = sum(layer.num_experts - len(layer.always_used) for layer in self._layers.values())
        self.num_slots = min(self.budget // self.expert_bytes, self.num_routed)
        needed = max(layer.top_k - len(layer.always_used) for layer in self._layers.values())
        if self.num_slots < needed:
            raise ValueError(
                f"`expert_memory` of {self.budget} bytes has room for {self.num_slots} experts of "
                f"{self.expert_bytes} bytes, expected the {needed} that a token takes in a layer: give at "
                f"least {needed * self.expert_bytes} bytes."
            )
        fixed = [(index, expert) for index, layer in self._layers.items() for expert in layer.always_used]
        total = self.num_slots + len(fixed)
        with torch.device("meta"):
            slots = EmoExperts(self.config, 0)
        slots.config, slots.num_experts = config, total
        # Picks of experts in another group are marked as expert parallelism marks those of other ranks.
        parallel: Any = slots
        parallel._is_expert_parallel = True
        for name, shape in shapes.items():
            numel = total * shape[0] * shape[1]
            memory = (
                empty(numel, dtype)
                if device.type == "cpu"
                else torch.empty(numel, dtype=dtype, device=device)
            )
            setattr(slots, name, nn.Parameter(memory.view(total, *shape), requires_grad=False))
        self.slots = slots.eval()
        self._used: OrderedDict[tuple[int, int], int] = OrderedDict()  # by last use, the latest at the end
        self._free = list(reversed(range(self.num_slots)))
        self._fixed = {key: self.num_slots + place for place, key in enumerate(fixed)}
        self._tables = {
            index: torch.full((layer.num_experts,), total) for index, layer in self._layers.items()
        }
        self._read(self._fixed)
        for (index, expert), slot in self._fixed.items():
            self._tables[index][expert] = slot

    @property
    def always_used_bytes(self) -> int:
        """`int`: bytes of the experts that every token uses. They are beside the budget."""
        return len(self._fixed) * self.expert_bytes

    # For the layers.

    def at_work(self) -> AbstractContextManager[Any]:
        """Keep other threads out while experts are brought in and used."""
        if self._pid != os.getpid():  # forked: another thread of the parent may have held the lock
            self._lock, self._pid, self._readers = threading.RLock(), os.getpid(), None
        return self._lock

    def table(self, layer: int) -> torch.Tensor:
        """The slot (E,) of each expert of a layer; the number of slots for one that has none."""
        return self._tables[layer]

    def groups(self, layer: int, experts: Iterable[int], tokens: int) -> Iterator[dict[int, int] | None]:
        """Bring the experts that tokens take into slots, as many at a time as there is room for.

        A group may be used until the next one is asked for. The caller must be inside `at_work`.

        Args:
            layer (`int`): the layer.
            experts (`Iterable[int]`): the experts.
            tokens (`int`): how many tokens take them.

        Returns:
            `Iterator[dict[int, int] | None]`: the slot of each expert of a group, or once `None` if all are
            in memory together: `table` has their slots.

        Raises:
            CheckpointError: if an expert cannot be read.
        """
        if layer == next(iter(self.rows)):
            self._tokens += tokens
        used, always = self._used, self._layers[layer].always_used
        missing = []
        for expert in experts:
            if (layer, expert) in used:
                used.move_to_end((layer, expert))
                self._hits += 1
            elif expert not in always:
                missing.append(expert)
        if not missing:
            yield None
            return
        missing.sort()
        self._misses += len(missing)
        here = [expert for expert in experts if expert not in missing]
        routed = len([expert for expert in here if expert not in always])
        room = self.num_slots - routed
        if len(missing) <= room:
            self._bring(layer, missing)
            yield None
            return
        group = {expert: int(self._tables[layer][expert]) for expert in here}
        while missing or group:
            coming, missing = missing[:room], missing[room:]
            self._bring(layer, coming)
            yield group | {expert: used[layer, expert] for expert in coming}
            group, room = {}, self.num_slots

    def _bring(self, layer: int, experts: Sequence[int]) -> None:
        """Read experts into free slots, or those of experts that have not been used for longest."""
        slots: dict[tuple[int, int], int] = {}
        for expert in experts:
            if not self._free:
                (old_layer, old), slot = self._used.popitem(last=False)
                self._tables[old_layer][old] = self.slots.num_experts
                self._free.append(slot)
            slots[layer, expert] = self._free.pop()
        try:
            self._read(slots)
        except BaseException:
            self._free += slots.values()
            raise
        self._used |= slots
        self._tables[layer][list(experts)] = torch.tensor(list(slots.values()), dtype=torch.int64)

    # Reading.

    def _read(self, slots: Mapping[tuple[int, int], int]) -> None:
        """Fill slots, each with the expert (layer, expert) that it is for."""
        jobs: list[tuple[Any, TensorSpan, torch.Tensor]] = []
        ahead: dict[int, tuple[Any, list[LazyTensor]]] = {}
        wanted: dict[int, list[int]] = {}
        for layer, expert in slots:
            wanted.setdefault(layer, []).append(expert)
        lazies = {
            (layer, expert): tensors
            for layer, experts in wanted.items()
            for expert, tensors in zip(experts, self.rows[layer].tensors(experts), strict=True)
        }
        for key, slot in slots.items():
            for name, lazy in lazies[key].items():
                target = getattr(self.slots, name).data[slot].view(-1)
                ahead.setdefault(id(lazy.source), (lazy.source, []))[1].append(lazy)
                begin = 0
                for piece in lazy.pieces:
                    end = begin + (piece.end - piece.start) // piece.dtype.itemsize
                    jobs.append((lazy.source, piece, target[begin:end]))
                    begin = end
        for source, each in ahead.values():
            fetch_ahead(source, each)
        if len(jobs) == 1:
            self._fill(*jobs[0])
        elif jobs:
            if self._readers is None:
                self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="expert-memory")
            futures = [self._readers.submit(self._fill, *job) for job in jobs]
            try:
                for future in futures:
                    future.result()
            finally:  # nobody may write to a slot that is given to another expert
                for future in futures:
                    future.cancel()
                wait(futures)
        if slots is not self._fixed:
            self._bytes_read += sum(piece.end - piece.start for _, piece, _ in jobs)

    def _fill(self, source: Any, span: TensorSpan, target: torch.Tensor) -> None:
        raw = target
        if target.dtype != span.dtype or target.device.type != "cpu":
            raw = torch.empty(len(target), dtype=span.dtype)
        source.read_into(span.file, span.start, memoryview(raw.view(torch.uint8).numpy().data))
        self._check_file(source, span.file)
        if raw is not target:
            target.copy_(raw)

    def _check_file(self, source: Any, file: str) -> None:
        """Check that a file is the one that the model was loaded from."""
        before = self.files.files.get(file)
        if before is None or not isinstance(source, LocalFiles):
            return
        with source.opened(file) as descriptor:
            state = os.fstat(descriptor)
        if (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns) != before[:4]:
            raise SourceChangedError(
                f"{file} of {self.label} changed after the model was loaded with `expert_memory`, which "
                "reads experts from it: they could be those of another model. Load the model again."
            )

    # What it did.

    def report(self) -> ExpertMemoryReport:
        """What was read and found in memory, and which experts are there now.

        Returns:
            `ExpertMemoryReport`: numbers; as text, one line of them.
        """
        with self.at_work():
            resident: list[list[int]] = [[] for _ in self.config.layer_experts]
            for layer, expert in (*self._used, *self._fixed):
                resident[layer].append(expert)
            return ExpertMemoryReport(
                budget=self.budget,
                slots=self.num_slots,
                expert_bytes=self.expert_bytes,
                always_used_bytes=self.always_used_bytes,
                resident=[sorted(ids) for ids in resident],
                hits=self._hits,
                misses=self._misses,
                bytes_read=self._bytes_read,
                tokens=self._tokens,
            )

    def reset_counts(self) -> None:
        """Count from now on: hits, misses, bytes and tokens are 0. Experts stay in memory."""
        self._hits = self._misses = self._bytes_read = self._tokens = 0

    # As part of a model that is moved or copied.

    def follow(self, move: Any) -> None:
        """Go where a model goes that is moved to another device.

        Args:
            move (`Callable`): what `nn.Module._apply` calls with every parameter.

        Raises:
            ValueError: if it changes the dtype: experts on disk would not change with it.
        """
        old = self.slots.down_proj
        probe = move(torch.empty(0, dtype=old.dtype, device=old.device))
        if probe.dtype != old.dtype or probe.device.type == "meta":
            to = str(probe.dtype if probe.dtype != old.dtype else probe.device).removeprefix("torch.")
            raise ValueError(
                f"A model with `expert_memory` cannot be converted to {to}: its experts are read in the "
                f"dtype that it was loaded with. Load it again with `dtype={to!r}`."
            )
        if probe.device != old.device:
            with self.at_work():
                self._allocate(old.dtype, probe.device, self.slots.config)

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertMemory:
        """A memory of its own for a copy of the model, holding what every token uses."""
        twin = type(self)(
            self.budget, copy.deepcopy(self.config, memo), self.rows, label=self.label, files=self.files
        )
        memo[id(self)] = twin
        weight = self.slots.down_proj
        twin._allocate(weight.dtype, weight.device, copy.deepcopy(self.slots.config, memo))
        twin.is_loaded = self.is_loaded
        return twin

    def __reduce__(self) -> Any:
        raise TypeError(
            "A model with `expert_memory` cannot be pickled: its experts are in the files that it was loaded "
            "from. Load it again where it is needed."
        )


class ExpertRows:
    """Where the experts of one layer are: a lazy tensor for each parameter, with a row for each expert.

    Args:
        stacks (`Mapping[str, LazyTensor]`): `gate_up_proj` and `down_proj` of all experts, or of some.
        find (`Callable`, *optional*): gives for rows the parameters of each, if the stacks have only some.

    Example:

    ```python
    >>> from transformers_emo.checkpoints import Checkpoint
    >>> from transformers_emo.subsets.loading.expert_memory import ExpertRows
    >>> checkpoint = Checkpoint.from_folder("model_cards/toy-emo")
    >>> names = ["model.layers.0.mlp.experts.3.down_proj.weight"]
    >>> rows = ExpertRows({"down_proj": checkpoint.lazy(names, shape=(1, 128, 64))})
    >>> rows.tensors([0])[0]["down_proj"].shape
    (1, 128, 64)

    ```
    """

    def __init__(
        self,
        stacks: Mapping[str, LazyTensor],
        find: Callable[[Sequence[int]], Mapping[int, dict[str, LazyTensor]]] | None = None,
    ):
        self.shapes = {name: stack.shape[1:] for name, stack in stacks.items()}
        self._stacks = dict(stacks)
        self._find = find or self._take
        self._known: dict[int, dict[str, LazyTensor]] = {}

    def _take(self, rows: Sequence[int]) -> dict[int, dict[str, LazyTensor]]:
        return {row: {name: stack.take([row]) for name, stack in self._stacks.items()} for row in rows}

    def tensors(self, experts: Sequence[int]) -> list[dict[str, LazyTensor]]:
        """The parameters of experts, (1, ...) each.

        Args:
            experts (`Sequence[int]`): their rows.
        """
        unknown = [expert for expert in experts if expert not in self._known]
        if unknown:
            self._known |= self._find(unknown)
        return [self._known[expert] for expert in experts]

    def check(self, shapes: Mapping[str, tuple[int, ...]], label: str) -> None:
        """Check that the experts have the shapes of the network's.

        Args:
            shapes (`Mapping[str, tuple[int, ...]]`): by parameter, without the number of experts.
            label (`str`): what they are called in the message.

        Raises:
            CheckpointError: if they have not.
        """
        for name, shape in shapes.items():
            if self.shapes[name] != shape:
                raise CheckpointError(
                    f"{name} of {label} has experts of shape {self.shapes[name]}, expected {shape}: "
                    "config.json and the weights differ. Download both again."
                )


def check_memory_arguments(kwargs: Mapping[str, Any], *, check_weights: bool = False) -> None:
    """Check that `from_pretrained` is asked for nothing that does not go with `expert_memory`.

    Args:
        kwargs (`Mapping[str, Any]`): its keyword arguments.
        check_weights (`bool`, defaults to `False`): as there.

    Raises:
        ValueError: if it is.

    Example:

    ```python
    >>> from transformers_emo.subsets.loading.expert_memory import check_memory_arguments
    >>> try:
    ...     check_memory_arguments({"tp_plan": "auto"})
    ... except ValueError as error:
    ...     print(str(error)[:44])
    `expert_memory` cannot go with `tp_plan`: it

    ```
    """
    reasons = {
        "quantization_config": "it reads experts as they are in the files",
        "ignore_mismatched_sizes": "all experts have to have one size",
        "tp_plan": "it is for one process",
        "distributed_config": "it is for one process",
        "device_mesh": "it is for one process",
    }
    given = {name: reason for name, reason in reasons.items() if kwargs.get(name)}
    if check_weights:
        given["check_weights"] = "it does not read all experts"
    for name, reason in given.items():
        raise ValueError(f"`expert_memory` cannot go with `{name}`: {reason}. Leave out one of the two.")


def paged_parameters(
    source: ModelSource,
    kept: list[list[int] | None],
    config: EmoConfig,
    budget: int | str,
    files: SourceFiles,
) -> tuple[ExpertMemory, LazyStateDict]:
    """The parameters of a network without its experts, and the memory for those.

    Args:
        source (`ModelSource`): where the model is.
        kept (`list[list[int] | None]`): for each layer the experts to use, in the numbering of the source.
        config (`EmoConfig`): the config of the model with these experts.
        budget (`int` or `str`): bytes for experts.
        files (`SourceFiles`): the state of the files, noted before the source was opened.

    Returns:
        `tuple`: the memory, and the parameters, which put it into the network when they are loaded.

    Raises:
        ValueError: if the model has no expert layer, or the budget is no size.
        CheckpointError: if the weights and the config differ.

    Example: see `ExpertMemory`.
    """
    budget = size_in_bytes(budget, name="expert_memory")
    # Of a repository, files that hold experts alone are left where they are.
    needed = [
        None if ids is None else sorted(ids[e] for e in layer.always_used) or ids[:1]
        for ids, layer in zip(kept, config.layer_experts, strict=True)
    ]
    checkpoint = source.checkpoint(needed)
    all_here = not checkpoint.elsewhere
    tensors = LazyStateDict(lazy_parameters(checkpoint, source.config, kept if all_here else needed))
    rows: dict[int, ExpertRows] = {}
    stacks: dict[int, dict[str, LazyTensor]] = {}
    for name in list(tensors):
        if match := STACKED_EXPERTS.fullmatch(name):
            stacks.setdefault(int(match["layer"]), {})[name.rpartition(".")[2]] = tensors.pop(name)
            if not all_here:
                index = int(match["layer"])
                shard = _ExpertFiles(source, checkpoint, match["experts"], kept[index] or [])
                rows[index] = ExpertRows(stacks[index], shard.open)
        elif not all_here and (match := ROUTER.fullmatch(name)):
            ids = kept[int(match["layer"])] or []
            pieces = rows_of(checkpoint.tensors[name], ids)
            tensors[name] = checkpoint.from_pieces(pieces, (len(ids), *tensors[name].shape[1:]))
    if not stacks:
        raise ValueError(
            f"{os.fspath(source.path)} has no experts that `expert_memory` could be for: leave it out."
        )
    rows = {index: rows.get(index) or ExpertRows(stacks[index]) for index in sorted(stacks)}
    memory = ExpertMemory(budget, config, rows, label=os.fspath(source.path), files=files)

    def prepare(model: Any, load_config: Any) -> None:
        devices = {str(device) for device in (load_config.device_map or {"": "cpu"}).values()}
        if len(devices) > 1 or devices & {"disk", "meta"}:
            raise ValueError(
                f"`expert_memory` has its slots on one device, and the device map has {sorted(devices)}: "
                "give one device, such as `device_map='cuda'`, or leave it out."
            )
        device = torch.device(int(found) if (found := devices.pop()).isdecimal() else found)
        memory.install(model, device)

    tensors.prepare = prepare
    tensors.label = os.fspath(source.path)
    return memory, tensors


class _ExpertFiles:
    """Experts of one layer in files of a repository that are opened when an expert is wanted."""

    def __init__(self, source: ModelSource, checkpoint: Checkpoint, experts: str, ids: Sequence[int]):
        self.files = checkpoint.source
        self.variant = source.variant
        self.checkpoint, self.experts, self.ids = checkpoint, experts, list(ids)
        self.weight_map: dict[str, str] | None = None

    def open(self, rows: Sequence[int]) -> dict[int, dict[str, LazyTensor]]:
        """The parameters of some experts; their files are downloaded, if all that they hold is theirs."""
        assert isinstance(self.files, HubFiles)
        names = {row: [f"{self.experts}.{self.ids[row]}.{p}_proj.weight" for p in _PARTS] for row in rows}
        lacking = {n for three in names.values() for n in three} - self.checkpoint.tensors.keys()
        if lacking and self.weight_map is None:
            index = self.files.find(weight_files(self.variant)[1])
            self.weight_map = {} if index is None else read_index(index)
        shards = sorted({(self.weight_map or {})[name] for name in lacking})
        self.files.download(shards)
        tensors = dict(self.checkpoint.tensors)
        if shards:
            tensors |= Checkpoint.from_files("", shards, self.files).tensors
        found = Checkpoint(self.files, tensors)
        opened = {}
        for row, (gate, up, down) in names.items():
            width, hidden = tensors[gate].shape
            opened[row] = {
                "gate_up_proj": found.lazy([gate, up], shape=(1, 2 * width, hidden)),
                "down_proj": found.lazy([down], shape=(1, hidden, width)),
            }
        return opened
