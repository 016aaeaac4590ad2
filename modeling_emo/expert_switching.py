"""Switch the experts of a loaded model: mask some, exchange them, or put two sets on one backbone.

The work is done by the installed package, through one hook: `package.hooks`.
"""

import asyncio
import inspect
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .package_hooks import package

Masks = list[torch.Tensor | None]  # for each layer a bool mask (E,) of the experts to route to, or all


# Drivers of generators that are context managers: what such a generator opens holds for who entered it.
_DRIVERS = ("contextlib", "_pytest.")
_SUSPENDABLE = (
    inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ITERABLE_COROUTINE | inspect.CO_ASYNC_GENERATOR
)


class _OpenMask:
    """The masks of one `use_experts`, while it is open.

    A generator has no context of its own: what it opens would hold for whoever takes its next value. So the
    frame that opened the masks is known, and they hold for it only while it runs.
    """

    def __init__(self, base: nn.Module, masks: Masks):
        self.masks = masks
        self.base = base
        self.caller = _caller()
        self.frame = _opening_frame()
        known = tuple(mask for mask in _open_masks.get() if mask.is_open)
        self.outer = tuple(mask for mask in known if mask.holds_here())
        _open_masks.set((*known, self))
        with _lock:
            _all_open.setdefault(base, []).append(self)
            _show(base)

    @property
    def is_open(self) -> bool:
        """Whether its block has not been left."""
        return self in _all_open.get(self.base, ())

    def close(self) -> None:
        """Close it, for every context that knows it: the block may be left in another than it was entered."""
        _open_masks.set(tuple(mask for mask in _open_masks.get() if mask is not self))
        with _lock:
            if self.is_open:  # not in a forked process
                _all_open[self.base].remove(self)
            _show(self.base)
        self.frame = None

    def holds_here(self) -> bool:
        """Whether it holds for the caller."""
        if not self.is_open:
            return False
        if self.frame is None or self.caller != _caller():  # no generator; or inherited by a task or thread
            return True
        is_coroutine = not self.frame.f_code.co_flags & (inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR)
        if is_coroutine and self.caller[1] is not None:  # a task has a context of its own
            return True
        frame: FrameType | None = inspect.currentframe()
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is not None


_open_masks: ContextVar[tuple[_OpenMask, ...]] = ContextVar("expert_masks", default=())
# Of every caller, in the order in which they were opened.
_all_open: WeakKeyDictionary[nn.Module, list[_OpenMask]] = WeakKeyDictionary()
_lock = threading.RLock()


def _show(base: Any) -> None:
    """Let compiled code see open masks: it can neither read a context variable nor look at frames."""
    showing = _all_open.get(base, [])
    base.compiled_masks = showing[-1].masks if showing else [None] * len(base.layers)
    # Opened inside each other, the last holds. Otherwise there are several callers.
    base.compiled_masks_differ = any(
        before not in mask.outer for index, mask in enumerate(showing) for before in showing[:index]
    )


def _forget_all() -> None:
    """In a forked process nobody is inside a block: the parent is."""
    global _lock
    _lock = threading.RLock()
    for base, opened in list(_all_open.items()):
        opened.clear()
        _show(base)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


def check_layers(base: Any) -> None:
    """See that the config is about the layers that the model has: tools take layers out.

    Args:
        base (`EmoModel`): the decoder.

    Raises:
        ValueError: if there are fewer layers than the config says, or its lists are about others.

    Example:

    ```python
    >>> from transformers_emo import EmoModel
    >>> from transformers_emo.modeling_emo.expert_switching import check_layers
    >>> model = EmoModel.from_pretrained("model_cards/toy-emo")
    >>> model.layers = model.layers[:2]
    >>> try:
    ...     check_layers(model)
    ... except ValueError as error:
    ...     print(str(error)[:57])
    The model has 2 layers, and its config is about 4 layers:

    ```
    """
    config, layers = base.config, base.layers
    if len(layers) < config.num_hidden_layers:
        raise ValueError(
            f"The model has {len(layers)} layers, and its config is about {config.num_hidden_layers} layers: "
            f"set `model.config.num_hidden_layers = {len(layers)}`."
        )
    used = layers[: config.num_hidden_layers]
    numbers = [getattr(layer, "number", index) for index, layer in enumerate(used)]
    lists = config.retained_experts, config.num_experts_per_layer, config.always_active_experts_per_layer
    if numbers != list(range(len(used))) and any(value is not None for value in lists):
        raise ValueError(
            f"The model has the layers {numbers} of the one it was made from, and its config lists the "
            f"experts of the layers 0 to {len(used) - 1}: give `retained_experts` and the lists that end in "
            "`_per_layer` the entries of the layers that are there, and number these anew (`layer.number`)."
        )


def masks_here(base: nn.Module) -> Masks | None:
    """The masks that hold for the caller.

    Args:
        base (`EmoModel`): the decoder.

    Returns:
        `list[torch.Tensor | None]`, *optional*: for each layer a bool mask (E,), false for experts that must
        not be taken; `None` where every expert may be.

    Example:

    ```python
    >>> from transformers_emo import EmoModel
    >>> from transformers_emo.modeling_emo.expert_switching import masks_here
    >>> model = EmoModel.from_pretrained("model_cards/toy-emo")
    >>> with model.use_experts([[0, 1, 31]] * 4):
    ...     masks_here(model)[0].sum()
    tensor(3)
    >>> masks_here(model) is None
    True

    ```
    """
    for mask in reversed(_open_masks.get()):
        if mask.base is base and mask.holds_here():
            return mask.masks
    return None


def masked_by_anyone(base: nn.Module) -> bool:
    """Whether a `use_experts` is open on a model, in this context or another.

    Args:
        base (`EmoModel`): the decoder.

    Example:

    ```python
    >>> from transformers_emo import EmoModel
    >>> from transformers_emo.modeling_emo.expert_switching import masked_by_anyone
    >>> model = EmoModel.from_pretrained("model_cards/toy-emo")
    >>> masked_by_anyone(model)
    False

    ```
    """
    return bool(_all_open.get(base))


def move_masks(base: nn.Module) -> None:
    """Move open masks to the devices of their layers: once, and not in every forward.

    Args:
        base (`EmoModel`): the decoder, which was moved.

    Example: see `EmoModel.to`.
    """
    layers: Any = base.layers
    for opened in _all_open.get(base, ()):
        for index, mask in enumerate(opened.masks):
            if mask is not None:
                opened.masks[index] = mask.to(next(layers[index].parameters()).device)


def _caller() -> tuple[int, Any]:
    """The thread, and the task that runs in it; `None` if there is no task with a context of its own."""
    task: Any = None
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no loop of asyncio runs here
        if "sniffio" in sys.modules:
            try:
                task = sys.modules["sniffio"].current_async_library()
            except Exception:  # of sniffio: no other library runs either
                task = None
    return threading.get_ident(), task


def _opening_frame() -> FrameType | None:
    """The frame whose `with` opened the masks, if it is that of a generator or coroutine."""
    here = inspect.currentframe()  # called by `_OpenMask`, and that by `use_experts`, a generator
    assert here is not None and here.f_back is not None
    frame = here.f_back.f_back
    while frame is not None and frame.f_code.co_flags & _SUSPENDABLE:
        driver = frame.f_back
        if driver is None or not _drives(driver):
            return frame
        while driver is not None and _drives(driver):
            driver = driver.f_back
        frame = driver
    return None


def _drives(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__", "").startswith(_DRIVERS)


class ExpertSwitching:
    """What every EMO model can do with its experts after loading.

    Example: see `ExpertSwitching.swap_experts`.
    """

    @contextmanager
    def use_experts(self, expert_subset=None, *, exclude_experts=None) -> Iterator[Self]:
        """Route only to the experts of a subset while the context is open; no weight is touched.

        The logits and what is generated are those of the model loaded with that subset. Router logits stay
        those of all experts, and so does the balance loss. Inside another `use_experts`, the inner choice
        holds alone.

        The choice belongs to the caller, as a `contextvars.ContextVar` does. It holds for calls inside the
        block, for tasks that are started there and for `asyncio.to_thread`. It does not hold for other
        threads, tasks and generators: each may have a choice of its own meanwhile, or none. A copy of the
        model has no choice, and neither has a forked process.

        Compiled code (`torch.compile`) cannot see who calls. It takes the choice that is open, whoever calls,
        and refuses to run while several callers have one.

        Args:
            expert_subset (`ExpertSubset`, path, `dict` or list of lists, *optional*): the experts to route
                to, shared ones included, in the numbering of the root model; all by default.
            exclude_experts (*optional*): experts never to route to, of those: a list with one list of ids a
                layer, ids by layer (`{3: [17, 40]}`), or an `ExpertSubset` or its file, of which the shared
                and always-active experts stay.

        Raises:
            SubsetError: if the subset does not fit the model, or shared or always-active experts would be
                dropped (which a mask cannot).
            ImportError: if this file is used without the `transformers_emo` package.

        Example:

        ```python
        >>> import torch
        >>> from transformers_emo import EmoForCausalLM
        >>> model = EmoForCausalLM.from_pretrained("model_cards/toy-emo")
        >>> with model.use_experts([[0, 1, 2, 31]] * 4):
        ...     logits = model(torch.tensor([[5, 6, 7]])).logits
        >>> with model.use_experts(exclude_experts={0: [1, 2], 3: [5]}):
        ...     logits = model(torch.tensor([[5, 6, 7]])).logits

        ```
        """
        model: Any = self
        base = model.base_model
        check_layers(base)
        kept = package.needed().kept_experts(
            expert_subset, model.config, exclude_experts, dict(model.named_parameters())
        )
        sizes = [layer.num_experts for layer in model.config.layer_experts]
        # One copy to the device for all layers: the host waits for each.
        flags = [
            expert in (ids or ()) for ids, size in zip(kept, sizes, strict=True) for expert in range(size)
        ]
        split = torch.tensor(flags, dtype=torch.bool, device=model.device).split(sizes)
        masks = [None if ids is None else mask for ids, mask in zip(kept, split, strict=True)]
        opened = _OpenMask(base, masks)
        try:
            yield self
        finally:
            opened.close()

    def swap_experts(
        self,
        expert_subset=None,
        *,
        exclude_experts=None,
        source=None,
        progress: bool = True,
        check_weights: bool = False,
        **hub_kwargs,
    ) -> None:
        """Replace the experts by those of another subset, read from disk; the backbone stays where it is.

        Only what the model does not hold yet is read: experts and router rows of the new subset that are not
        in the old one (and two kilobytes of another `source`, to know the model by). Afterwards the model is
        what `from_pretrained` with that subset would load, in the same dtype and on the same device.
        Everything is read and checked before the first weight changes, so that a failure leaves the model as
        it was. Layers may change their number of experts; where it stays the same, the parameters stay the
        same objects, and compiled code stays valid. Document pools in caches are not: begin with new ones.

        Experts that both subsets hold are not read again: if they were trained meanwhile, they stay trained.
        No call may run in the model meanwhile. Not for training: an optimiser would go on with the moments
        of other experts.

        Args:
            expert_subset (`ExpertSubset`, path, `dict` or list of lists, *optional*): the experts to hold,
                shared ones included, in the numbering of the root model; all by default.
            exclude_experts (*optional*): experts not to hold, as in `use_experts`.
            source (`str` or `os.PathLike`, *optional*): the folder or Hub repository that has them; where the
                model was loaded from by default.
            progress (`bool`, defaults to `True`): show a progress bar, if it takes longer than two seconds.
            check_weights (`bool`, defaults to `False`): refuse weights that are read and are NaN or infinite,
                as in `from_pretrained`.
            hub_kwargs: `revision`, `token`, `cache_dir` and so on, as for `from_pretrained`.

        Raises:
            SubsetError: if the subset does not fit the model or what it is read from.
            CheckpointError: if the weights are missing, damaged, quantised or those of another model.
            ValueError: if the model's own experts are quantised, sharded, offloaded or under adapters, or
                masked by an open `use_experts`.
            ImportError: if this file is used without the `transformers_emo` package.

        Example:

        ```python
        >>> from transformers_emo import EmoForCausalLM
        >>> path = "model_cards/toy-emo"
        >>> model = EmoForCausalLM.from_pretrained(path, expert_subset=[[0, 1, 2, 31]] * 4)
        >>> model.swap_experts([[1, 2, 7, 9, 31]] * 4)
        >>> model.config.retained_experts[0]
        [1, 2, 7, 9, 31]

        ```
        """
        check_layers(self.base_model)  # type: ignore[attr-defined]
        package.needed().swap_experts(
            self, expert_subset, exclude_experts, source, progress, check_weights, hub_kwargs
        )

    def share_backbone(
        self,
        expert_subset=None,
        *,
        exclude_experts=None,
        source=None,
        progress: bool = True,
        check_weights: bool = False,
        **hub_kwargs,
    ) -> Self:
        """A second model with experts of its own on this model's backbone, for two tasks in one process.

        Embeddings, attention, norms, dense layers and heads are the same parameters in both: training them in
        one changes the other. Move or cast (`to`, `half`) before, not after: it takes the backbone of both
        along and leaves the other model's experts behind. Experts and router rows are the second model's own:
        copied where this one holds them, read where not. Each generates, masks, swaps and saves like a model
        loaded by itself, also in threads of their own.

        Args:
            expert_subset, exclude_experts, source, progress, check_weights, hub_kwargs: as in `swap_experts`.

        Returns:
            A model of the same class, dtype, device and mode (training or not).

        Raises:
            SubsetError, CheckpointError, ValueError, ImportError: as in `swap_experts`.

        Example:

        ```python
        >>> from transformers_emo import EmoForCausalLM
        >>> path = "model_cards/toy-emo"
        >>> code = EmoForCausalLM.from_pretrained(path, expert_subset=[[0, 1, 2, 31]] * 4)
        >>> math = code.share_backbone([[3, 4, 5, 31]] * 4)
        >>> math.lm_head.weight is code.lm_head.weight, math.config.retained_experts[0]
        (True, [3, 4, 5, 31])

        ```
        """
        check_layers(self.base_model)  # type: ignore[attr-defined]
        return package.needed().share_backbone(
            self, expert_subset, exclude_experts, source, progress, check_weights, hub_kwargs
        )
