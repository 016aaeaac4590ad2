"""A weight in 8 or 4 bits as a tensor, so that it can stand where any weight stands: in a parameter.

`torch.nn.Linear`, adapters and loaders see a tensor of the shape and dtype that the weight would have.
Products with it run on the packed numbers. Other operations get the numbers themselves, if they only read
them. What would write to them is refused: it would be lost, or be another weight than the packed one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..private_torch import private_torch
from .packed_products import packed_linear
from .packed_weights import PackedWeight

_make_wrapper_subclass = private_torch("torch.Tensor._make_wrapper_subclass")
_without_functions = private_torch("torch._C.DisableTorchFunctionSubclass")
_aten = torch.ops.aten


class PackedTensor(torch.Tensor):
    """A tensor (..., N, K) that is kept as a `PackedWeight`. It cannot be trained or written to.

    Args:
        weight (`PackedWeight`): what it is kept as.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.modeling_emo.kernels.packed.packed_tensor import PackedTensor
    >>> from transformers_emo.modeling_emo.kernels.packed.packed_weights import PackedWeight
    >>> linear = torch.nn.Linear(64, 8, bias=False)
    >>> packed = PackedTensor(PackedWeight.quantise(linear.weight, bits=8, group=32))
    >>> linear.weight = packed.as_parameter()
    >>> linear(torch.ones(3, 64)).shape
    torch.Size([3, 8])
    >>> torch.equal(linear.weight.sum(), packed.dequantize().sum())
    True

    ```
    """

    weight: PackedWeight

    @staticmethod
    def __new__(cls, weight: PackedWeight):
        """Make the wrapper. The numbers lie in the parts of the weight."""
        tensor = _make_wrapper_subclass(
            cls, weight.shape, dtype=weight.dtype, device=weight.packed.device, requires_grad=False
        )
        tensor.weight = weight
        return tensor

    def __init__(self, weight: PackedWeight):
        super().__init__()

    def as_parameter(self) -> nn.Parameter:
        """The same as a parameter that is not trained."""
        return nn.Parameter(self, requires_grad=False)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The numbers, as an ordinary tensor; see `PackedWeight.dequantise`.

        Args:
            dtype (`torch.dtype`, *optional*): by default that of the model.
        """
        return self.weight.dequantise(dtype)

    def requires_grad_(self, requires_grad: bool = True):
        """Only `False` is possible.

        Args:
            requires_grad (`bool`, defaults to `True`): whether to train it.

        Raises:
            ValueError: if it is `True`.
        """
        if requires_grad:
            raise ValueError(_untrainable(self))
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> Any:  # type: ignore[override]
        weight = self.weight
        zero = "" if weight.zero is None else ", with zero points"
        return (
            f"PackedTensor(shape={tuple(self.shape)}, dtype={self.dtype}, bits={weight.bits}, "
            f"group={weight.group}{zero})"
        )

    def __tensor_flatten__(self) -> tuple[list[str], tuple]:
        weight = self.weight
        return list(weight.tensors), (weight.bits, weight.group)

    def __getattr__(self, name: str) -> torch.Tensor:
        # PyTorch asks for the parts that `__tensor_flatten__` names as attributes.
        parts = self.__dict__["weight"].tensors if "weight" in self.__dict__ else {}
        if name in parts:
            return parts[name]
        raise AttributeError(f"PackedTensor has no attribute {name!r}.")

    @classmethod
    def __tensor_unflatten__(
        cls, tensors: dict[str, torch.Tensor], rest: tuple, outer_size: Any = None, outer_stride: Any = None
    ) -> PackedTensor:
        bits, group = rest
        return cls(PackedWeight(tensors["packed"], tensors["scale"], tensors.get("zero"), bits, group))

    def __deepcopy__(self, memo: dict) -> torch.Tensor:
        if id(self) in memo:
            return memo[id(self)]
        copied: torch.Tensor = PackedTensor(self.weight.map(torch.clone))
        if isinstance(self, nn.Parameter):
            copied = nn.Parameter(copied, requires_grad=False)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> tuple:
        weight = self.weight
        parts = (weight.packed, weight.scale, weight.zero, weight.bits, weight.group)
        return rebuild, (*parts, isinstance(self, nn.Parameter))

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return _linear(*args, **kwargs)
        if func == _set_requires_grad and args[1]:
            raise ValueError(_untrainable(args[0]))
        with _without_functions():  # a result is what the operation gives: mostly an ordinary tensor
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func in _OWN:
            return _OWN[func](*args, **kwargs)
        schema = func._schema
        if schema.is_mutable or any(result.alias_info is not None for result in schema.returns):
            raise ValueError(
                f"{func} was called on a weight in few bits, which can be neither written to nor viewed: "
                "load the model without `quantization_config`, or `dequantize()` it first."
            )
        return func(*_numbers(args), **{name: _numbers(value) for name, value in kwargs.items()})


_set_requires_grad = torch.Tensor.requires_grad.__set__  # type: ignore[attr-defined]


def _numbers(value: Any) -> Any:
    """An argument with ordinary tensors in place of packed ones."""
    if isinstance(value, PackedTensor):
        return value.dequantize()
    return type(value)(map(_numbers, value)) if type(value) in (list, tuple) else value


def _untrainable(tensor: torch.Tensor) -> str:
    return (
        f"A weight in few bits cannot be trained ({tensor!r}): train an adapter on it (`lora_config`), or "
        "load the model without `quantization_config`."
    )


def _linear(input: torch.Tensor, weight: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
    if not isinstance(weight, PackedTensor) or isinstance(input, PackedTensor):
        return F.linear(_numbers(input), _numbers(weight), _numbers(bias))
    return packed_linear(input, weight.weight, bias)


def _detach(tensor: PackedTensor) -> PackedTensor:
    return PackedTensor(tensor.weight)


def _clone(tensor: PackedTensor, *, memory_format: Any = None) -> PackedTensor:
    return PackedTensor(tensor.weight.map(torch.clone))


def _to(
    tensor: PackedTensor,
    *,
    dtype: torch.dtype | None = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
    non_blocking: bool = False,
    memory_format: Any = None,
) -> torch.Tensor:
    if dtype is not None and not dtype.is_floating_point:
        return tensor.dequantize().to(device=device, dtype=dtype)

    def move(part: torch.Tensor) -> torch.Tensor:
        to = dtype if part.is_floating_point() else None
        return part.to(device=device, dtype=to, non_blocking=non_blocking, copy=True)

    return PackedTensor(tensor.weight.map(move))


def _copy(into: Any, source: Any, non_blocking: bool = False) -> Any:
    if not isinstance(into, PackedTensor):
        return into.copy_(source.dequantize(), non_blocking)
    ours, theirs = into.weight, source.weight if isinstance(source, PackedTensor) else None
    if (
        theirs is None
        or (ours.bits, ours.group, ours.zero is None) != (theirs.bits, theirs.group, theirs.zero is None)
        or ours.shape != theirs.shape
    ):
        raise ValueError(
            f"{source!r:.200} cannot be copied into {into!r}: only a weight that is kept alike can. Load the "
            "model from its folder instead."
        )
    for name, part in ours.tensors.items():
        part.copy_(theirs.tensors[name], non_blocking)
    return into


def _select(tensor: PackedTensor, dim: int, index: int) -> PackedTensor:
    _check_stacked(tensor, dim)
    return PackedTensor(tensor.weight.map(lambda part: part[index]))


def _slice(
    tensor: PackedTensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> PackedTensor:
    if start in (None, 0) and step == 1 and (end is None or end >= tensor.shape[dim]):
        return PackedTensor(tensor.weight)
    _check_stacked(tensor, dim)
    return PackedTensor(tensor.weight.map(lambda part: part[start:end:step]))


def _check_stacked(tensor: PackedTensor, dim: int) -> None:
    if dim != 0 or tensor.dim() < 3:
        raise ValueError(
            f"{tensor!r} was cut along dimension {dim}: only stacked weights can be cut, along the first. "
            "Take one first and `dequantize` it."
        )


def _empty(tensor: PackedTensor, size: Any = None, **kwargs: Any) -> torch.Tensor:
    dtype, device = kwargs.get("dtype") or tensor.dtype, kwargs.get("device") or tensor.device
    return torch.empty(tensor.shape if size is None else size, dtype=dtype, device=device)


_OWN: dict[Any, Callable] = {
    _aten.detach.default: _detach,
    _aten.alias.default: _detach,
    _aten.clone.default: _clone,
    _aten._to_copy.default: _to,
    _aten.copy_.default: _copy,
    _aten.select.int: _select,
    _aten.slice.Tensor: _slice,
    _aten.new_empty.default: _empty,
    _aten.empty_like.default: _empty,
}


def rebuild(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bits: int,
    group: int,
    is_parameter: bool,
) -> torch.Tensor:
    """A `PackedTensor` from what pickle keeps of it.

    Args:
        packed, scale, zero, bits, group: of `PackedWeight`.
        is_parameter (`bool`): whether it was a parameter.

    Example:

    ```python
    >>> import copy, pickle, torch
    >>> from transformers_emo.modeling_emo.kernels.packed.packed_tensor import PackedTensor
    >>> from transformers_emo.modeling_emo.kernels.packed.packed_weights import PackedWeight
    >>> tensor = PackedTensor(PackedWeight.quantise(torch.ones(8, 32), bits=4))
    >>> pickle.loads(pickle.dumps(tensor))
    PackedTensor(shape=(8, 32), dtype=torch.float32, bits=4, group=32)

    ```
    """
    tensor = PackedTensor(PackedWeight(packed, scale, zero, bits, group))
    return tensor.as_parameter() if is_parameter else tensor


torch.serialization.add_safe_globals([rebuild])
