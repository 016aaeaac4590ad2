"""Whether all weights are numbers: not one NaN or infinite."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch

from ...checkpoints.errors import CheckpointError
from ...modeling_emo.weight_names import STACKED_EXPERTS


def check_finite(
    label: str, tensors: Iterable[tuple[str, torch.Tensor]], experts: Mapping[int, list[int]]
) -> None:
    """Check that no weight is NaN or infinite.

    Args:
        label (`str`): what the model is called in messages.
        tensors (`Iterable[tuple[str, torch.Tensor]]`): weights, by the network's names.
        experts (`Mapping[int, list[int]]`): by layer, the ids of the experts that are stacked in its tensors.

    Raises:
        CheckpointError: if one is. It names the first tensors, an expert's as on disk, in the numbering of
            the root model.
        ValueError: if a tensor is not in memory.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo import CheckpointError
    >>> from transformers_emo.subsets.loading.finite_check import check_finite
    >>> try:
    ...     check_finite("my-model", [("model.norm.weight", torch.tensor([1, float("nan")]))], {})
    ... except CheckpointError as error:
    ...     print(str(error)[:67])
    my-model holds numbers that are none: model.norm.weight (1 NaN, 0 i

    ```
    """
    found = []
    for name, tensor in tensors:
        for part, values in _named_parts(name, tensor, experts):
            numbers = _plain_numbers(part, values)
            bad = [n for n in numbers if not torch.isfinite(n).all()]
            if bad:
                nans = sum(int(n.isnan().sum()) for n in bad)
                infinite = sum(int(n.isinf().sum()) for n in bad)
                found.append(f"{part} ({nans} NaN, {infinite} infinite)")
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise CheckpointError(
            f"{label} holds numbers that are none: {', '.join(found[:5])}{more}. Download the model again. "
            "If they are in the original too, leave these experts out, or train it again."
        )


def _named_parts(
    name: str, tensor: torch.Tensor, experts: Mapping[int, list[int]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The matrices of single experts under the names that they have on disk, and other tensors whole."""
    match = STACKED_EXPERTS.fullmatch(name)
    if match is None or type(tensor.data) is not torch.Tensor or tensor.dim() != 3:
        yield name, tensor
        return
    ids = experts[int(match["layer"])]
    parts = ("gate", "up") if match["kind"] == "gate_up" else ("down",)
    for expert, matrix in zip(ids, tensor, strict=True):
        for part, half in zip(parts, matrix.chunk(len(parts)), strict=True):
            yield f"{match['experts']}.{expert}.{part}_proj.weight", half


def _plain_numbers(name: str, tensor: torch.Tensor) -> list[torch.Tensor]:
    """The floating point numbers that a tensor is made of: of a quantised one mostly its scales."""
    if tensor.is_meta:
        raise ValueError(
            f"`check_weights=True` cannot read {name}, which is not in memory: load the model without "
            "offloading it to the disk."
        )
    data = tensor.detach()
    if hasattr(data, "__tensor_flatten__"):
        inner = [getattr(data, each) for each in data.__tensor_flatten__()[0]]
        return [part for each in inner for part in _plain_numbers(name, each)]
    if not data.is_floating_point():
        return []
    return [data.float() if data.element_size() == 1 else data]
