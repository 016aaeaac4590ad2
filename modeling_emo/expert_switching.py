"""Serving with part of the experts: masked for a while, exchanged in place, or two sets on one backbone."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any, ClassVar, Self
from weakref import WeakKeyDictionary

import torch
from torch import nn

# Also in code saved beside a model, where it is all that tells of the package.
NEEDS_PACKAGE = (
    "`expert_subset` needs the package transformers-emo, which this code was saved by: install it, as with "
    "`pip install .` in its checkout, and load the model without `trust_remote_code`."
)
# Serialises `use_experts` on one model. Not an attribute of it: models are copied and pickled, unlike locks.
_mask_locks: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


class ExpertServing:
    """What every EMO model can do with its experts after loading.

    Example: see `ExpertServing.swap_experts`.
    """

    # What the package adds to this network: reading part of a checkpoint, and naming expert subsets. Set on
    # import of the package; `None` where this file is used alone, as code saved beside a model.
    _package: ClassVar[Any] = None

    @contextmanager
    def use_experts(self, expert_subset=None, *, exclude_experts=None) -> Iterator[Self]:
        """Route only to the experts of a subset while the context is open; no weight is touched.

        The logits and what is generated are those of the model loaded with that subset. Router logits stay
        those of all experts, and so does the balance loss. Inside another `use_experts`, the inner choice
        holds alone.

        The mask belongs to the model: a second thread that opens a context waits for the first to close, and
        a call from another thread without a context of its own is masked too.

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
        package, base = self._needed_package(), model.base_model
        kept = package.kept_experts(
            expert_subset, model.config, exclude_experts, dict(model.named_parameters())
        )
        sizes = [layer.num_experts for layer in model.config.layer_experts]
        # One copy to the device for all layers: the host waits for each.
        flags = [
            expert in (ids or ()) for ids, size in zip(kept, sizes, strict=True) for expert in range(size)
        ]
        split = torch.tensor(flags, dtype=torch.bool, device=model.device).split(sizes)
        masks = [None if ids is None else mask for ids, mask in zip(kept, split, strict=True)]
        with _mask_locks.setdefault(base, RLock()):
            previous, base.expert_masks = base.expert_masks, masks
            try:
                yield self
            finally:
                base.expert_masks = previous

    def swap_experts(
        self, expert_subset=None, *, exclude_experts=None, source=None, progress: bool = True, **hub_kwargs
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
        self._needed_package().swap_experts(
            self, expert_subset, exclude_experts, source, progress, hub_kwargs
        )

    def share_backbone(
        self, expert_subset=None, *, exclude_experts=None, source=None, progress: bool = True, **hub_kwargs
    ) -> Self:
        """A second model with experts of its own on this model's backbone, for two tasks in one process.

        Embeddings, attention, norms, dense layers and heads are the same parameters in both: training them in
        one changes the other. Move or cast (`to`, `half`) before, not after: it takes the backbone of both
        along and leaves the other model's experts behind. Experts and router rows are the second model's own:
        copied where this one holds them, read where not. Each generates, masks, swaps and saves like a model
        loaded by itself, also in threads of their own.

        Args:
            expert_subset, exclude_experts, source, progress, hub_kwargs: as in `swap_experts`.

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
        return self._needed_package().share_backbone(
            self, expert_subset, exclude_experts, source, progress, hub_kwargs
        )

    def _needed_package(self) -> Any:
        if self._package is None:
            raise ImportError(NEEDS_PACKAGE)
        return self._package
