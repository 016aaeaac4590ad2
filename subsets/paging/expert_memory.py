"""The memory behind `from_pretrained(..., expert_memory="6GB")`: experts are read when a token takes them.

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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers.utils import logging

from ...checkpoints.hub.opening import fetch_ahead
from ...checkpoints.local_files import LocalFiles
from ...checkpoints.safetensors_header import TensorSpan
from ...checkpoints.source_files import SourceChangedError, SourceFiles
from ...checkpoints.writing.safetensors_writing import size_in_bytes
from ...configuration import EmoConfig
from ...modeling_emo.modeling_emo import EmoExperts
from ...modeling_emo.paged_experts import PagedExperts
from ...quantization.empty_weights import empty_weight
from ...quantization.packed_files import LazyPacked
from ...quantization.packed_parts import parts_of, unpacked_zeros
from .expert_rows import ExpertRows
from .report import ExpertMemoryReport

logger = logging.get_logger(__name__)

_NAMES = ("gate_up_proj", "down_proj")
_READERS = 4  # threads: a disk wants several reads at once, and copying from the page cache two processors


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
        rows = next(iter(self.rows.values()))
        make = {
            name: partial(empty_weight, shape, dtype, rows.packing[name])
            for name, shape in rows.shapes.items()
        }
        one = [part for slots in make.values() for part in parts_of(slots(1, torch.device("meta"))).values()]
        self.expert_bytes = sum(part.nbytes for part in one)
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
        for name, made in make.items():
            setattr(slots, name, made(total, device))
        self.slots = slots.eval()
        self._parts = {name: parts_of(getattr(slots, name).data) for name in make}
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
        if self._came:
            for_moves = self._came.intersection((layer, expert) for expert in missing)
            self._came -= for_moves
            tensors = self.rows[layer].tensors([expert for _, expert in for_moves])
            pieces = (piece for each in tensors for lazy in each.values() for piece in lazy.pieces)
            self._moves_bytes_read += sum(piece.end - piece.start for piece in pieces)
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

    def came_into_pool(self, layer: int, experts: Sequence[int]) -> None:
        """Count experts that came into a document pool after the prompt. They are read when they are taken.

        Args:
            layer (`int`): the layer.
            experts (`Sequence[int]`): the experts.
        """
        with self.at_work():
            self._pool_moves += len(experts)
            keys = ((layer, expert) for expert in experts)
            self._came |= {key for key in keys if key not in self._used and key not in self._fixed}

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
        ahead: dict[int, tuple[Any, list[Any]]] = {}
        wanted: dict[int, list[int]] = {}
        zeros: list[tuple[torch.Tensor, int, torch.Tensor]] = []
        for layer, expert in slots:
            wanted.setdefault(layer, []).append(expert)
        lazies = {
            (layer, expert): tensors
            for layer, experts in wanted.items()
            for expert, tensors in zip(experts, self.rows[layer].tensors(experts), strict=True)
        }
        for key, slot in slots.items():
            for name, lazy in lazies[key].items():
                ahead.setdefault(id(lazy.source), (lazy.source, []))[1].append(lazy)
                into = {part: tensor[slot] for part, tensor in self._parts[name].items()}
                if isinstance(lazy, LazyPacked):
                    if "zero" in into:  # packed on disk, a byte each in memory
                        raw = torch.empty(lazy.parts["zero_point"].shape, dtype=torch.int32)
                        zeros.append((raw, lazy.packing.bits, into.pop("zero")))
                        into["zero_point"] = raw
                    parts = [(lazy.parts[part], target) for part, target in into.items()]
                else:
                    parts = [(lazy, into[""])]
                for part, target in parts:
                    begin, flat = 0, target.view(-1)
                    for piece in part.pieces:
                        end = begin + (piece.end - piece.start) // part.dtype.itemsize
                        jobs.append((lazy.source, replace(piece, dtype=part.dtype), flat[begin:end]))
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
        for raw, bits, zero in zeros:
            zero.copy_(unpacked_zeros(raw, bits, zero.shape[-2]))
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
                pool_moves=self._pool_moves,
                moves_bytes_read=self._moves_bytes_read,
            )

    def reset_counts(self) -> None:
        """Count from now on: hits, misses, bytes and tokens are 0. Experts stay in memory."""
        self._hits = self._misses = self._bytes_read = self._tokens = 0
        self._pool_moves = self._moves_bytes_read = 0
        self._came: set[tuple[int, int]] = set()

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
