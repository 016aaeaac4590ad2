"""How much the traffic of a server used each expert: what experts can be chosen by in place of text.

Two things are read. The plugin for vLLM sums router probabilities and writes them to a file. vLLM itself can
report which experts each token took (`--enable-return-routed-experts`).

Shape suffixes: T tokens, L layers, K experts taken per token, E experts of a layer.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ...checkpoints.small_files import read_json
from ...checkpoints.writing.durable_files import write_whole
from ...configuration import EmoConfig
from ..numbering import present_experts, root_experts
from ..validation import SubsetError, is_id

_FORMAT, _VERSION = "emo-expert-usage", 1
_KINDS = ("probability", "picks")


@dataclass(frozen=True)
class ExpertUsage:
    """How much each expert was used.

    Args:
        usage (`list[list[float | None] | None]`): for each layer a sum over tokens for each expert of the
            root model, `None` for an expert that the served model does not hold, and for a dense layer.
        num_tokens (`int`): over how many tokens.
        kind (`str`, defaults to `"probability"`): what was added up. `"probability"`: the router's
            probabilities, as `select_experts` does with the method `"global"`. `"picks"`: 1 for an expert
            that the token took. Picks say less: a token takes few experts, and gives many of the others some
            weight.

    Raises:
        SubsetError: if the sums are not finite numbers from 0, or there is no token.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.subsets import ExpertUsage
    >>> usage = ExpertUsage([[3.0, 0.5, 0.5, 4.0]], num_tokens=4)
    >>> usage.save(tmp_path / "usage.json")
    >>> config = EmoConfig(num_hidden_layers=1, num_experts=4, num_experts_per_tok=2)
    >>> ExpertUsage.load(tmp_path / "usage.json").scores(config)[0].tolist()
    [0.75, 0.125, 0.125, 1.0]

    ```
    """

    usage: list[list[float | None] | None]
    num_tokens: int
    kind: Literal["probability", "picks"] = "probability"

    def __post_init__(self):
        if self.kind not in _KINDS:
            raise SubsetError(f"`kind` is {self.kind!r}, expected one of {', '.join(_KINDS)}.")
        if not is_id(self.num_tokens) or self.num_tokens == 0:
            raise SubsetError(
                f"`num_tokens` is {self.num_tokens!r}, expected a number from 1: no request was counted yet."
            )
        layers = self.usage if isinstance(self.usage, list) else [self.usage]
        for index, sums in enumerate(layers):
            numbers = [value for value in sums if value is not None] if isinstance(sums, list) else []
            is_list = sums is None or (isinstance(sums, list) and bool(numbers))
            if not is_list or not all(
                isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
                for value in numbers
            ):
                raise SubsetError(
                    f"The usage of layer {index} is {str(sums)[:60]!r}, expected a list of finite numbers "
                    "from 0."
                )

    @classmethod
    def load(cls, path: str | os.PathLike) -> ExpertUsage:
        """Read the file that the plugin for vLLM or `save` wrote.

        Args:
            path (`str` or `os.PathLike`): the file.

        Raises:
            SubsetError: if it is no such file.

        Example: see `ExpertUsage`.
        """
        place = os.fspath(path)
        try:
            data = read_json(path)
        except OSError as error:
            raise SubsetError(f"Cannot read the usage {place!r}: {error.strerror or error}.") from error
        except ValueError as error:
            raise SubsetError(f"{place!r} holds no usage of experts: it is no JSON ({error}).") from error
        if (
            not isinstance(data, dict)
            or (data.get("format"), data.get("version")) != (_FORMAT, _VERSION)
            or not isinstance(data.get("usage"), list)
        ):
            raise SubsetError(
                f"{place!r} holds no usage of experts: expected an object with the format {_FORMAT!r}, "
                "version "
                f"{_VERSION}, and a list `usage`."
            )
        try:
            return cls(data["usage"], data.get("num_tokens", 0), data.get("kind", "probability"))
        except SubsetError as error:
            raise SubsetError(f"{place!r}: {error}") from error

    def save(self, path: str | os.PathLike) -> None:
        """Write the usage as JSON. The file appears only when it is complete.

        Args:
            path (`str` or `os.PathLike`): the file.

        Example: see `ExpertUsage`.
        """
        data = {"format": _FORMAT, "version": _VERSION, "kind": self.kind, "num_tokens": self.num_tokens}
        write_whole(path, json.dumps(data | {"usage": self.usage}) + "\n")

    @classmethod
    def of_routed_experts(cls, routed_experts: Iterable[Any], config: EmoConfig) -> ExpertUsage:
        """Count the experts that vLLM reports.

        Args:
            routed_experts (`Iterable`): for each request `output.outputs[0].routed_experts`, an array (T, L,
                K) of ids; over HTTP, the array in the base64 text of the answer.
            config (`EmoConfig`): the config of the model that vLLM served.

        Raises:
            SubsetError: if an array has another shape, or ids that the model does not have.

        Example:

        ```python
        >>> import numpy as np
        >>> from transformers_emo import EmoConfig
        >>> from transformers_emo.subsets import ExpertUsage
        >>> config = EmoConfig(num_hidden_layers=1, num_experts=4, num_experts_per_tok=2)
        >>> ExpertUsage.of_routed_experts([np.array([[[0, 3]], [[2, 3]]])], config).usage
        [[1.0, 0.0, 1.0, 2.0]]

        ```
        """
        layers = config.layer_experts
        counts = [torch.zeros(max(layer.num_experts, 1), dtype=torch.long) for layer in layers]
        num_tokens = 0
        for array in routed_experts:
            ids_TLK = torch.as_tensor(array).long()
            if ids_TLK.dim() != 3 or ids_TLK.shape[1] != len(layers):
                raise SubsetError(
                    f"An array of routed experts has the shape {tuple(ids_TLK.shape)}, expected (tokens, "
                    f"{len(layers)} layers, experts a token)."
                )
            num_tokens += ids_TLK.shape[0]
            for index, layer in enumerate(layers):
                if layer.is_dense or not len(ids_TLK):
                    continue
                ids = ids_TLK[:, index, : layer.top_k].flatten()
                if int(ids.min()) < 0 or int(ids.max()) >= layer.num_experts:
                    raise SubsetError(
                        f"Layer {index} is said to have taken expert {int(ids.max())}, expected 0 to "
                        f"{layer.num_experts - 1}: the ids are of another model."
                    )
                counts[index] += ids.bincount(minlength=layer.num_experts)
        usage: list[list[float | None] | None] = []
        for layer, count_E, present, size in zip(
            layers, counts, present_experts(config), root_experts(config), strict=True
        ):
            by_root = dict(zip(present, count_E.double().tolist(), strict=False))
            usage.append(None if layer.is_dense else [by_root.get(e) for e in range(size)])
        return cls(usage, num_tokens, "picks")

    def scores(self, config: EmoConfig) -> list[torch.Tensor | None]:
        """The scores of a model's experts, as `select_experts` takes them.

        Args:
            config (`EmoConfig`): the model's config.

        Returns:
            `list[torch.Tensor | None]`: for each layer the usage of a token (E,), float64, in the layer's own
            numbering; 1 for experts that every token uses. `None` for a dense layer.

        Raises:
            SubsetError: if the usage is of another model, or says nothing of an expert.

        Example: see `ExpertUsage`.
        """
        sizes = root_experts(config)
        found = [0 if sums is None else len(sums) for sums in self.usage]
        if found != sizes:
            raise SubsetError(
                f"The usage is of another model: one with {found} experts in its layers, and this one has "
                f"{sizes}."
            )
        scores: list[torch.Tensor | None] = []
        for index, (sums, layer, present) in enumerate(
            zip(self.usage, config.layer_experts, present_experts(config), strict=True)
        ):
            if sums is None:
                scores.append(None)
                continue
            unknown = [e for e in present if sums[e] is None]
            if unknown:
                raise SubsetError(
                    f"The usage says nothing of expert {unknown[0]} of layer {index}: it was counted on a "
                    "subset. "
                    "Count it on a server with the full model."
                )
            score_E = torch.tensor([sums[e] for e in present], dtype=torch.float64) / self.num_tokens
            score_E[list(layer.always_used)] = 1.0
            scores.append(score_E)
        return scores
