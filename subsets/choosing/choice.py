"""Making subsets of scores: the best experts of every layer, in root numbering.

Shape suffixes: E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...configuration import EmoConfig
from ...modeling_emo import EmoPreTrainedModel
from ..expert_subset import ExpertSubset
from ..numbering import present_experts, root_experts
from ..ranking import best_experts
from ..validation import SubsetError


@dataclass
class Choice:
    """What was asked for, of which model. It makes subsets of the scores of experts.

    Args:
        config (`EmoConfig`): the model's config.
        method, budget (`str`): as for `select_experts`.
        sizes (`Sequence[int]`): how many experts to keep in a layer, for each subset.
        source, revision (`str`, *optional*): where the model is from.
        excluded (`list[set[int]]`): for each layer the experts never to choose, in root numbering.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.subsets.choosing.choice import Choice
    >>> config = EmoConfig(num_hidden_layers=1, num_experts=5, num_experts_per_tok=2)
    >>> choice = Choice(config, "global", "uniform", [3], None, None, [{0}])
    >>> choice.pick(0, torch.tensor([0.4, 0.1, 0.2, 0.3, 0.0]), 3)
    [2, 3, 4]

    ```
    """

    config: EmoConfig
    method: str
    budget: str
    sizes: Sequence[int]
    source: str | None
    revision: str | None
    excluded: list[set[int]]

    def __post_init__(self):
        self.present = present_experts(self.config)
        self.excluded = [ids & set(there) for ids, there in zip(self.excluded, self.present, strict=True)]
        self.always = [set(layer.always_used) for layer in self.config.layer_experts]
        # With a budget over all layers, each layer keeps at least as many routed experts as a token takes.
        self.least = min(
            (
                layer.top_k - len(always)
                for layer, always in zip(self.config.layer_experts, self.always, strict=True)
                if not layer.is_dense
            ),
            default=1,
        )

    def pick(self, index: int, scores_E: torch.Tensor, size: int) -> list[int]:
        """The best experts of a layer, in the layer's own numbering."""
        self._check_finite(index, scores_E)
        never, present = self.excluded[index], self.present[index]
        scores = [None if e in never else score for e, score in zip(present, scores_E.tolist(), strict=True)]
        return best_experts(scores, self.always[index], size)

    def of_scores(self, scores: list[torch.Tensor | None], **counted: Any) -> list[ExpertSubset]:
        """The subsets of the best experts, one for each size."""
        for index, score_E in enumerate(scores):
            if score_E is not None:
                self._check_finite(index, score_E)
        full = self.subset(scores, [None if s is None else list(range(len(s))) for s in scores], **counted)
        most = max(len(always) for always in self.always)
        return [
            full.top(size, budget=self.budget, least=max(1, min(self.least, size - most)))
            for size in self.sizes
        ]

    def subset(
        self, scores: list[torch.Tensor | None], kept: list[list[int] | None], **counted: Any
    ) -> ExpertSubset:
        """A subset of experts that are given in the layers' own numbering."""
        roots = root_experts(self.config)
        experts: list[list[int] | None] = []
        root_scores: list[list[float | None] | None] = []
        for score_E, ids, present, never, size in zip(
            scores, kept, self.present, self.excluded, roots, strict=True
        ):
            if score_E is None or ids is None:
                experts.append(None)
                root_scores.append(None)
                continue
            experts.append([present[e] for e in ids])
            by_root = dict(zip(present, score_E.tolist(), strict=True))
            root_scores.append([None if e in never else by_root.get(e) for e in range(size)])
        return ExpertSubset(
            experts,
            scores=root_scores,
            always_kept=[
                None if score is None else sorted(present[e] for e in always)
                for score, present, always in zip(scores, self.present, self.always, strict=True)
            ],
            root_experts_per_layer=roots,
            method=self.method,
            source=self.source,
            revision=self.revision,
            **counted,
        )

    def _check_finite(self, index: int, scores_E: torch.Tensor) -> None:
        if not scores_E.isfinite().all():
            raise ValueError(
                f"The scores of layer {index} are not finite: the model's numbers overflow. Run it in "
                "float32."
            )


def masked_experts(model: EmoPreTrainedModel) -> list[set[int]]:
    """The experts of each layer that an open `use_experts` leaves out, in root numbering.

    Args:
        model (`EmoPreTrainedModel`): the model.

    Example:

    ```python
    >>> from transformers_emo import EmoModel
    >>> from transformers_emo.subsets.choosing.choice import masked_experts
    >>> model = EmoModel.from_pretrained("model_cards/toy-emo")
    >>> with model.use_experts(exclude_experts={1: [3, 5]}):
    ...     masked_experts(model)
    [set(), {3, 5}, set(), set()]

    ```
    """
    base: Any = model.base_model
    return [
        set() if mask is None else {e for e, used in zip(present, mask.tolist(), strict=True) if not used}
        for present, mask in zip(present_experts(model.config), base.expert_masks, strict=True)
    ]


def check_num_experts(config: EmoConfig, sizes: Sequence[int], excluded: Sequence[set[int]]) -> None:
    """Check that every layer has the experts that are asked for, and would keep a routed one.

    Args:
        config (`EmoConfig`): the model's config.
        sizes (`Sequence[int]`): how many experts to keep in a layer, for each subset.
        excluded (`Sequence[set[int]]`): for each layer the experts never to choose.

    Raises:
        SubsetError: if a layer has too few, or a number is none.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.subsets.choosing.choice import check_num_experts
    >>> config = EmoConfig(num_hidden_layers=1, num_experts=5, num_experts_per_tok=2)
    >>> check_num_experts(config, [2, 5], [set()])

    ```
    """
    if not sizes:
        raise SubsetError("`num_experts` is empty: give at least one number.")
    for size in sizes:
        if not isinstance(size, int) or isinstance(size, bool):
            raise SubsetError(f"`num_experts` is {size!r}, expected an integer, or several.")
        for index, layer in enumerate(config.layer_experts):
            protected, there = len(layer.always_used), layer.num_experts - len(excluded[index])
            if not layer.is_dense and not protected < size <= there:
                raise SubsetError(
                    f"Cannot keep {size} experts in layer {index}: it has {there} to choose from, of which "
                    f"{protected} are always kept; expected {protected + 1} to {there}."
                )


def random_scores(config: EmoConfig, seed: int) -> list[torch.Tensor | None]:
    """Random scores of the experts of each layer: (E,), float64, or `None` for a dense layer.

    Args:
        config (`EmoConfig`): the model's config.
        seed (`int`): the seed.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.subsets.choosing.choice import random_scores
    >>> [scores] = random_scores(EmoConfig(num_hidden_layers=1, num_experts=5, num_experts_per_tok=2), 0)
    >>> scores.shape
    torch.Size([5])

    ```
    """
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"`seed` is {seed}, expected a number of at most 64 bits: give a smaller one.")
    generator = torch.Generator().manual_seed(seed)
    return [
        None if layer.is_dense else torch.rand(layer.num_experts, generator=generator, dtype=torch.float64)
        for layer in config.layer_experts
    ]
