"""Fingerprints: whether a subset was chosen on the model that it is used on.

A fingerprint is made of the signs of a few weights. Names cannot answer the question: one model may be moved,
renamed and copied, and two folders with one name may hold different models. Sizes cannot either: a model and
its baseline have the same. The attention weights can. Every subset of a model keeps them whole. Another dtype
keeps their signs. Fine-tuning changes few of the signs. A model that was trained separately has other signs.
The attention is always read with the model, so nothing more has to be fetched.

The format, `ExpertSubset.fingerprint`: `"signs-1:"` and 128 hexadecimal digits. They are 512 bits, the first
digit's highest bit first; 1 for a negative weight, also for -0.0. The weights are those of layer L // 2 (of
L), then of the last layer: the first 64 of `q_proj.weight`, then of `k_proj`, `v_proj` and `o_proj`, in the
order of the file. Matrices with fewer than 64 weights, and models of one layer, give fewer digits.

Two models trained apart agree in half of the signs. Trained on the same text from the same random numbers,
as emo-tiny and std-tiny were, they agree in 54 % of those in such layers (66 % in the first, which is why it
has no part). A share p stands for an angle of (1 - p) pi between the weights (sign random projections,
https://doi.org/10.1145/509907.509965, section 3): 3/4, from which on models count as one, for 45 degrees.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from transformers.utils import logging

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.errors import CheckpointError
from ..checkpoints.hub.names import is_repo_name
from ..checkpoints.lazy_tensor import LazyTensor
from ..modeling_emo.weight_names import ATTENTION_MATRIX
from ..quantization.packed_files import first_numbers

logger = logging.get_logger(__name__)

_PREFIX = "signs-1:"
_WEIGHTS = 64
_MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj")
_LEAST_AGREEMENT = 0.75
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Fingerprinted(Protocol):
    """A subset, as far as it tells what it was chosen on; see `ExpertSubset`."""

    @property
    def fingerprint(self) -> str | None:
        """Its fingerprint."""
        ...

    @property
    def source(self) -> str | None:
        """The model that they were chosen on."""
        ...


def fingerprint_of(tensors: Mapping[str, torch.Tensor | LazyTensor], num_layers: int) -> str | None:
    """The fingerprint of a model: other models of its shape have another, its subsets have the same.

    Args:
        tensors (`Mapping[str, torch.Tensor | LazyTensor]`): the model's, by name; two kilobytes are read.
        num_layers (`int`): its layers.

    Returns:
        `str`, *optional*: as described at the top of this file, `None` where the weights cannot be read as
        they are: on the meta device, quantised, sharded or under adapters.

    Raises:
        CheckpointError: if a file cannot be read.

    Example:

    ```python
    >>> from transformers_emo import EmoForCausalLM
    >>> from transformers_emo.subsets.fingerprint import fingerprint_of
    >>> model = EmoForCausalLM.from_pretrained("model_cards/toy-emo", expert_subset=[[0, 31]] * 4)
    >>> fingerprint_of(model.state_dict(), 4)[:16]
    'signs-1:40665a01'

    ```
    """
    attention = {
        match["matrix"]: tensors[name] for name in tensors if (match := ATTENTION_MATRIX.fullmatch(name))
    }
    bits = ""
    for layer in sorted({num_layers // 2, num_layers - 1}):
        for matrix in _MATRICES:
            tensor = attention.get(f"layers.{layer}.self_attn.{matrix}")
            if tensor is None or tensor.dtype not in _DTYPES:
                return None
            packed = first_numbers(tensor, _WEIGHTS)
            if packed is not None:
                weights = packed
            elif isinstance(tensor, LazyTensor):
                flat = LazyTensor(tensor.source, tensor.pieces, tensor.dtype, (_numel(tensor),))
                weights = flat[:_WEIGHTS]
            elif type(tensor.data) is torch.Tensor and not tensor.is_meta:
                weights = tensor.detach().reshape(-1)[:_WEIGHTS].cpu()
            else:
                return None
            bits += "".join("01"[bit] for bit in weights.signbit().tolist())
    bits = bits[: len(bits) - len(bits) % 4]
    return f"{_PREFIX}{int(bits, 2):0{len(bits) // 4}x}" if bits else None


def fingerprint_of_folder(folder: str | os.PathLike, num_layers: int) -> str | None:
    """The fingerprint of a model's folder.

    Args:
        folder (`str` or `os.PathLike`): the folder.
        num_layers (`int`): the model's layers.

    Returns:
        `str`, *optional*: see `fingerprint_of`; `None` also where there are no weights to be read.

    Example:

    ```python
    >>> from transformers_emo.subsets.fingerprint import fingerprint_of_folder
    >>> fingerprint_of_folder("model_cards/toy-emo", 4)[:16]
    'signs-1:40665a01'

    ```
    """
    try:
        checkpoint = Checkpoint.from_folder(folder)
    except CheckpointError:
        return None
    try:
        return fingerprint_of(attention_of(checkpoint), num_layers)
    finally:
        checkpoint.source.close()


def attention_of(checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    """The tensors of a checkpoint that fingerprints are made of.

    Args:
        checkpoint (`Checkpoint`): the checkpoint.

    Example:

    ```python
    >>> from transformers_emo.checkpoints import Checkpoint
    >>> from transformers_emo.subsets.fingerprint import attention_of
    >>> len(attention_of(Checkpoint.from_folder("model_cards/toy-emo")))  # four matrices in four layers
    16

    ```
    """
    return {name: checkpoint.lazy([name]) for name in checkpoint.tensors if ATTENTION_MATRIX.fullmatch(name)}


def _numel(tensor: LazyTensor) -> int:
    return sum(piece.end - piece.start for piece in tensor.pieces) // tensor.dtype.itemsize


def agreement(first: str | None, second: str | None) -> float | None:
    """The share of the signs that two fingerprints agree in.

    Args:
        first, second (`str`, *optional*): fingerprints.

    Returns:
        `float`, *optional*: from 0 to 1; `None` where they cannot be compared: one is missing, of another
        format (a later version's) or of another length.

    Example:

    ```python
    >>> from transformers_emo.subsets.fingerprint import agreement
    >>> agreement("signs-1:0f", "signs-1:0e"), agreement("signs-1:0f", None)
    (0.875, None)

    ```
    """
    bits = []
    for fingerprint in (first, second):
        digits = (fingerprint or "").removeprefix(_PREFIX)
        if fingerprint == digits or not re.fullmatch(r"[0-9a-f]+", digits):
            return None
        bits.append((int(digits, 16), 4 * len(digits)))
    (one, length), (other, same_length) = bits
    return 1 - (one ^ other).bit_count() / length if length == same_length else None


def differing_signs(first: str | None, second: str | None) -> str | None:
    """Why two fingerprints cannot be of one model.

    Args:
        first, second (`str`, *optional*): fingerprints.

    Returns:
        `str`, *optional*: the reason; `None` if there is none, or they cannot be compared.

    Example:

    ```python
    >>> from transformers_emo.subsets.fingerprint import differing_signs
    >>> differing_signs("signs-1:0f", "signs-1:f0")
    'of the signs of their attention weights only 0% agree, expected nearly all'

    ```
    """
    share = agreement(first, second)
    if share is None or share >= _LEAST_AGREEMENT:
        return None
    return f"of the signs of their attention weights only {share:.0%} agree, expected nearly all"


def are_apart(
    first: tuple[str | None, str | os.PathLike | None], second: tuple[str | None, str | os.PathLike | None]
) -> str | None:
    """The reason to think that two models differ, if there is one; see `warn_if_chosen_elsewhere`.

    Args:
        first, second (`tuple`): of each its fingerprint, and the folder or Hub repository it is from.

    Returns:
        `str`, *optional*: the reason, `None` if there is none.

    Example:

    ```python
    >>> from transformers_emo.subsets.fingerprint import are_apart
    >>> are_apart((None, "me/emo"), (None, "/models/emo-copy"))
    >>> are_apart((None, "me/emo"), (None, "me/std"))
    'the names differ, and there is no fingerprint to tell by'

    ```
    """
    if agreement(first[0], second[0]) is not None:
        return differing_signs(first[0], second[0])
    names = [_hub_name(source) for _, source in (first, second)]
    if None not in names and names[0] != names[1]:
        return "the names differ, and there is no fingerprint to tell by"
    return None


def _hub_name(source: str | os.PathLike | None) -> str | None:
    """The name of a Hub repository without its owner, which a fork keeps; `None` for a folder."""
    source = os.fspath(source or "")
    return source.split("/")[1] if is_repo_name(source) else None


def warn_if_chosen_elsewhere(
    subset: Fingerprinted | None,
    model: str | os.PathLike,
    tensors: Mapping[str, torch.Tensor | LazyTensor],
    num_layers: int,
    *,
    excluded: Any = None,
) -> None:
    """Warn if a subset was chosen on another model than the one it is used on.

    Fingerprints decide where the subset has one and the model's weights can be read; names then do not count.
    A warning means that fewer than three quarters of the signs agree. There is no warning for the same model
    under another name or path, in another dtype or layout, for a subset of it, or for a fine-tuned version of
    it. There is a warning for every model that was trained separately, even with the same sizes and name. Two
    models with the same attention and different experts count as one.

    Some subsets have no fingerprint: those written by hand, by the authors or by an earlier version, and
    random choices from a repository that was not read. They give a warning only if their source is a Hub
    repository and they are used on another repository, whose name differs in more than the owner. A folder's
    name says nothing. Without a source there is no warning.

    Args:
        subset (`ExpertSubset`, *optional*): the subset.
        model (`str` or `os.PathLike`): folder or Hub repository of the model it is used on.
        tensors (`Mapping[str, torch.Tensor | LazyTensor]`): the model's, by name. Two kilobytes are read, if
            the subset has a fingerprint.
        num_layers (`int`): the model's layers.
        excluded (*optional*): what `named_exclusion` gave; if it is a subset, the same is said of it.

    Example:

    ```python
    >>> from transformers_emo import ExpertSubset
    >>> from transformers_emo.subsets.fingerprint import warn_if_chosen_elsewhere
    >>> warn_if_chosen_elsewhere(ExpertSubset([[0, 1]], source="me/emo"), "/models/copy", {}, 1)

    ```
    """
    checked: list[tuple[str, Any]] = [
        ("The expert subset", subset),
        ("The subset of experts to leave out", excluded),
    ]
    for what, chosen in checked:
        if not hasattr(chosen, "fingerprint"):
            continue
        here = None if chosen.fingerprint is None else fingerprint_of(tensors, num_layers)
        reason = are_apart((chosen.fingerprint, chosen.source), (here, model))
        if reason is not None:
            where = "" if chosen.source is None else f" on {chosen.source!r}"
            logger.warning(
                f"{what} was chosen{where} and is used on {os.fspath(model)!r}, which looks like another "
                f"model: {reason}. Ids mean nothing in another model: make sure that it is the same."
            )
