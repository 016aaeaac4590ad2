"""A fixed sample of a model's weights: whether a run goes on with the model that it began with."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from ..quantization.packed_parts import parts_of

PREFIX = "sample-1:"
"""What digests of this kind begin with. Those of earlier versions have none: they summed every weight."""
_NUMBERS = 16  # next to each other, so that they are in one page of a mapped file
_BLOCKS = 64  # of a tensor that is no stack of experts


def weight_sample(model: torch.nn.Module) -> str:
    """A digest of a few numbers of every tensor, and of every expert.

    It differs for models that were trained apart, for fine-tuned ones and for other dtypes. It can miss a
    change of single numbers: of each expert's matrices 16 numbers are read, and of each other tensor 1,024.

    Args:
        model (`torch.nn.Module`): the model. Of tensors on the meta device only the shape counts.

    Example:

    ```python
    >>> from transformers_emo import EmoForCausalLM
    >>> from transformers_emo.analysis.weight_sample import weight_sample
    >>> model = EmoForCausalLM.from_pretrained("model_cards/toy-emo")
    >>> before = weight_sample(model)
    >>> _ = model.model.layers[0].mlp.experts.down_proj.data[3].mul_(1.01)
    >>> weight_sample(model) == before
    False

    ```
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        for part, plain in parts_of(tensor).items():
            digest.update(f"{name} {part} {plain.dtype} {tuple(plain.shape)}".encode())
            if not plain.is_meta:
                digest.update(_sample(plain.detach()))
    return PREFIX + digest.hexdigest()[:32]


def sum_of_weights(model: Any) -> str:
    """The digest of earlier versions, which reads every weight: for folders that they began.

    Args:
        model (`EmoForCausalLM`): the model.

    Example:

    ```python
    >>> from transformers_emo import EmoForCausalLM
    >>> from transformers_emo.analysis.weight_sample import sum_of_weights
    >>> len(sum_of_weights(EmoForCausalLM.from_pretrained("model_cards/toy-emo")))
    16

    ```
    """
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        total = None if weight.is_meta else weight.sum(dtype=torch.float64).item()
        digest.update(f"{name} {tuple(weight.shape)} {total!r}".encode())
    return digest.hexdigest()[:16]


def _sample(tensor: torch.Tensor) -> bytes:
    """The middle of each matrix of a stack, or blocks that are spread over the tensor."""
    if tensor.dim() > 2:
        flat = tensor.reshape(tensor.shape[0], -1)
        start = flat.shape[1] // 2
        taken = flat[:, start : start + _NUMBERS]
    else:
        flat = tensor.reshape(-1)
        step = max(len(flat) // _BLOCKS, 1)
        starts = range(0, len(flat), step)[:_BLOCKS] if len(flat) > _BLOCKS * _NUMBERS else [0]
        width = _NUMBERS if len(starts) > 1 else len(flat)
        taken = torch.cat([flat[start : start + width] for start in starts])
    return taken.contiguous().cpu().view(-1).view(torch.uint8).numpy().tobytes()
