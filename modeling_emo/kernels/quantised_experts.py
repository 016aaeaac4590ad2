"""Experts in 8 or 4 bits, by torchao, as a `quantization_config` for `from_pretrained`.

torchao quantises linear layers, but the experts of a layer are one stacked parameter (E, N, K). Its 8-bit
tensor can have three dimensions and return single experts. None of its 4-bit tensors can on a CPU, so this
module stacks its two-dimensional ones. torchao is optional: this module is imported only when it is used.

Shape suffixes: E experts, N outputs, K inputs.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TorchAoConfig

from ...imports.transformers_versions import private_names
from .private_torch import private_torch

with private_names("torchao"):
    from torchao.core.config import AOBaseConfig
    from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor
    from torchao.quantization import FqnToConfig, Int8Tensor, Int8WeightOnlyConfig
    from torchao.quantization.granularity import PerGroup, PerRow
    from torchao.quantization.transform_module import register_quantize_module_handler
    from torchao.utils import TorchAOBaseTensor

_make_wrapper_subclass = private_torch("torch.Tensor._make_wrapper_subclass")

EXPERTS = r"re:.*\.mlp\.experts\.(gate_up|down)_proj"
_GROUPS = (32, 64, 128)


def quantised_experts(bits: int = 8, *, group_size: int | None = None) -> TorchAoConfig:
    """The `quantization_config` that keeps experts in few bits. All other parameters stay as they are.

    Only weights are quantised, during loading, for a whole model or a subset (`expert_subset=`). The experts
    then run one after the other (`experts_implementation="eager"`, the default here), since no other
    implementation reads quantised weights. A model in 8 bits can be saved and loaded again, one in 4 bits
    cannot. Experts in 8 bits can train a LoRA: each forward adds it to the weights of a layer in full
    precision. A model with experts in 4 bits cannot be trained.

    Args:
        bits (`int`, defaults to 8): 8, for torchao's `Int8WeightOnlyConfig`; or 4, on a CPU, for the packing
            of PyTorch's own 4-bit product.
        group_size (`int`, *optional*): how many weights of a row share a scale: 32, 64 or 128, which must
            divide the hidden size and the expert width. By default the whole row with 8 bits, and 32 with 4.

    Returns:
        `TorchAoConfig`: for `from_pretrained(..., quantization_config=)`.

    Raises:
        ValueError: for other bits or group sizes.

    Example:

    ```python
    >>> from transformers import AutoModelForCausalLM
    >>> from transformers_emo.modeling_emo.kernels.quantised_experts import quantised_experts
    >>> model = AutoModelForCausalLM.from_pretrained(
    ...     "model_cards/emo-tiny", expert_subset="python", dtype="bfloat16",
    ...     quantization_config=quantised_experts(8),
    ... )
    >>> type(model.model.layers[0].mlp.experts.down_proj.data).__name__
    'Int8Tensor'

    ```
    """
    if group_size not in (None, *_GROUPS):
        raise ValueError(
            f"group_size is {group_size}, expected one of {', '.join(map(str, _GROUPS))}: give one."
        )
    config: AOBaseConfig
    if bits == 8:
        config = Int8WeightOnlyConfig(granularity=PerRow() if group_size is None else PerGroup(group_size))
    elif bits == 4:
        config = Int4ExpertsConfig(group_size or 32)
    else:
        raise ValueError(f"bits is {bits}, expected 8 or 4: give one of them.")
    return TorchAoConfig(FqnToConfig(OrderedDict({EXPERTS: config})))


@dataclass
class Int4ExpertsConfig(AOBaseConfig):
    """The config by which torchao's `quantize_` turns a stacked parameter into `Int4Experts`.

    Args:
        group_size (`int`, defaults to 32): how many weights share a scale.

    Example: see `quantised_experts`.
    """

    group_size: int = 32


class Int4Experts(TorchAOBaseTensor):
    """Stacked weights (E, N, K) in 4 bits, from which single experts can be taken.

    Args:
        qdata (`torch.Tensor`): uint8 (E, N, K / 2), each expert packed for PyTorch's 4-bit product on this
            CPU.
        scale_and_zero (`torch.Tensor`): (E, K / group, N, 2), in the dtype of the weights.
        block_size (`list[int]`): `[1, group]`.
        shape (`torch.Size`): (E, N, K).

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.modeling_emo.kernels.quantised_experts import Int4Experts
    >>> stacked = Int4Experts.from_hp(torch.randn(3, 64, 32), group_size=32)
    >>> stacked.shape, torch.nn.functional.linear(torch.randn(5, 32), stacked[2]).shape
    (torch.Size([3, 64, 32]), torch.Size([5, 64]))

    ```
    """

    tensor_data_names = ["qdata", "scale_and_zero"]  # noqa: RUF012
    tensor_attribute_names = ["block_size", "shape"]  # noqa: RUF012

    def __new__(cls, qdata, scale_and_zero, block_size, shape):
        """Make the wrapper. Its data lies in the two tensors that it is made of."""
        return _make_wrapper_subclass(
            cls, shape, device=qdata.device, dtype=scale_and_zero.dtype, requires_grad=False
        )

    def __init__(self, qdata, scale_and_zero, block_size, shape):
        super().__init__()
        self.qdata = qdata
        self.scale_and_zero = scale_and_zero
        self.block_size = block_size

    @classmethod
    def from_hp(cls, weight_ENK: torch.Tensor, *, group_size: int) -> Int4Experts:
        """Quantise, one expert after the other.

        Args:
            weight_ENK (`torch.Tensor`): (E, N, K) on a CPU, of floating point.
            group_size (`int`): how many weights share a scale.

        Raises:
            ValueError: if there are not three dimensions or the weights are not on a CPU; or if K is no
                multiple of the group size, or N no multiple of 16, as PyTorch's 4-bit product needs.

        Example: see the class.
        """
        shape, device = tuple(weight_ENK.shape), weight_ENK.device.type
        if len(shape) != 3 or device != "cpu" or shape[2] % group_size or shape[1] % 16:
            raise ValueError(
                f"Weights of shape {shape} on {device} cannot be kept in 4 bits: expected (experts, outputs, "
                f"inputs) on a CPU, outputs a multiple of 16, inputs of the group size {group_size}. Use 8 "
                "bits, or another group size."
            )
        block_size = [1, group_size]
        experts = [Int4OpaqueTensor.from_hp(weight_NK, block_size) for weight_NK in weight_ENK]
        qdata = torch.stack([expert.qdata for expert in experts])
        scales = torch.stack([expert.scale_and_zero for expert in experts])
        return cls(qdata, scales, block_size, weight_ENK.shape)

    def _quantization_type(self) -> str:
        return f"shape={tuple(self.shape)}, block_size={self.block_size}"


@Int4Experts.implements(torch.ops.aten.select.int)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Int4OpaqueTensor:
    stacked, dim, expert = args
    if dim != 0:
        raise ValueError(
            f"Experts in 4 bits were cut along dimension {dim}, expected 0, that of the experts: take one "
            "expert first and `dequantize` it."
        )
    return Int4OpaqueTensor(
        stacked.qdata[expert], stacked.scale_and_zero[expert], stacked.block_size, stacked.shape[1:]
    )


# How PEFT adds an adapter to a parameter: one, by its factors; or the sum of several.
_ADDITIONS = [torch.ops.aten.baddbmm.default, torch.ops.aten.add.Tensor]


@Int8Tensor.implements(_ADDITIONS)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> torch.Tensor:
    whole = [arg.dequantize() if isinstance(arg, Int8Tensor) else arg for arg in args]
    return func(*whole, **kwargs or {})


@Int4Experts.implements(_ADDITIONS)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> torch.Tensor:
    raise ValueError(
        "Experts in 4 bits cannot have an adapter, since nothing can be added to them: load the model with "
        "`quantised_experts(8)`."
    )


@register_quantize_module_handler(Int4ExpertsConfig)
def _quantise_parameter(
    module: torch.nn.Module, config: Int4ExpertsConfig, *, parameter_name: str
) -> torch.nn.Module:
    weight = Int4Experts.from_hp(getattr(module, parameter_name).detach(), group_size=config.group_size)
    setattr(module, parameter_name, torch.nn.Parameter(weight, requires_grad=False))
    return module
