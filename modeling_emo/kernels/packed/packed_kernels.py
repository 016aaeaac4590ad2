"""The compiled products with weights in 8 and 4 bits (`native/packed_products.h`).

Shape suffixes: M rows, K inputs, N outputs, T tokens, P experts a token takes, E experts, D hidden size, F
expert width.
"""

import ctypes
from functools import cache

import torch

from ..native_calls import Kernels
from ..native_library import find_kernels, load_kernels
from .packed_weights import PackedWeight

_DTYPES = (torch.bfloat16, torch.float32)
_SMALL_GROUPS = (32, 64)
_LARGE_GROUP = 128  # or a multiple of it


def fits(weight: PackedWeight) -> bool:
    """Whether compiled code can read a weight.

    Args:
        weight (`PackedWeight`): of any dtype, on any device.

    Returns:
        `bool`: `True` for contiguous parts on the CPU, scales in bfloat16 or float32, and groups of 32, 64 or
        a multiple of 128.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.modeling_emo.kernels.packed.packed_kernels import fits
    >>> from transformers_emo.modeling_emo.kernels.packed.packed_weights import PackedWeight
    >>> fits(PackedWeight.quantise(torch.ones(2, 64), bits=4, group=32))
    True
    >>> fits(PackedWeight.quantise(torch.ones(2, 64), bits=4, group=16))
    False

    ```
    """
    if weight.scale.dtype not in _DTYPES or (
        weight.group not in _SMALL_GROUPS and weight.group % _LARGE_GROUP
    ):
        return False
    parts = (
        (weight.packed, weight.scale) if weight.zero is None else (weight.packed, weight.scale, weight.zero)
    )
    return all(_is_readable(part) and _holds_all(part) for part in parts)


def _is_readable(tensor: torch.Tensor) -> bool:
    """Whether it lies contiguously in the memory of this process, so it is not fake."""
    return (
        tensor.is_cpu
        and tensor.is_contiguous()
        and not tensor.is_neg()
        and bool(tensor.data_ptr() or not tensor.numel())
    )


def _holds_all(tensor: torch.Tensor) -> bool:
    """Whether its memory is as long as it says: some may have been given back."""
    end = tensor.storage_offset() * tensor.element_size() + tensor.nbytes
    return end <= tensor.untyped_storage().nbytes()


def _refusal(what: str, **tensors: torch.Tensor | None) -> ValueError:
    found = ", ".join(
        f"{name} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
        + ("" if tensor.is_contiguous() else ", not contiguous")
        for name, tensor in tensors.items()
        if tensor is not None
    )
    return ValueError(
        f"The inputs of {what} do not fit each other, or are not all on the CPU and contiguous, with "
        f"activations in bfloat16 or float32 and groups of 32, 64 or a multiple of 128: {found}. Change "
        "those that differ."
    )


def _pointers(weight: PackedWeight) -> tuple[int, int, int | None]:
    zero = None if weight.zero is None else weight.zero.data_ptr()
    return weight.packed.data_ptr(), weight.scale.data_ptr(), zero


class PackedKernels:
    """The compiled functions, for tensors on the CPU: contiguous, activations in bfloat16 or float32.

    Args:
        kernels (`Kernels`): the library that they are in.

    Attributes:
        has_tiles (`bool`): whether the machine has AMX.

    Example: see `find_packed_kernels`.
    """

    def __init__(self, kernels: Kernels):
        library, self.has_tiles = kernels.library, kernels.has_tiles
        pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self._linear = library.emo_packed_linear
        self._linear.argtypes = [number, *[pointer] * 6, *[size] * 4, *[number] * 4]
        self._experts = library.emo_packed_experts
        self._experts.argtypes = [number, *[pointer] * 10, *[size] * 7, *[number] * 4]
        self._bits_by_bytes = [bits for bits in (8, 4) if library.emo_has_bytes(bits)]
        self._unpack = library.emo_unpack
        self._unpack.argtypes = [number, *[pointer] * 4, *[size] * 3, *[number] * 3]
        self._unpack.restype = None

    def has_bytes(self, bits: int) -> bool:
        """Whether activations that may be rounded to 8 bits are, with weights of so many bits.

        Args:
            bits (`int`): 8 or 4.
        """
        return bits in self._bits_by_bytes

    def linear(
        self,
        x_MK: torch.Tensor,
        weight: PackedWeight,
        bias_N: torch.Tensor | None,
        *,
        may_round: bool = False,
    ) -> torch.Tensor:
        """`torch.nn.functional.linear` with a packed weight (N, K).

        Args:
            x_MK (`torch.Tensor`): (M, K).
            weight (`PackedWeight`): (N, K), one that `fits`.
            bias_N (`torch.Tensor`, *optional*): (N,), of the dtype of the activations.
            may_round (`bool`, defaults to `False`): whether activations in bfloat16 may be rounded to 8 bits,
                with a scale for each 32.

        Returns:
            `torch.Tensor`: (M, N).

        Raises:
            ValueError: if the shapes do not fit each other, or a tensor is not one that compiled code reads.
            MemoryError: if there is no memory for what lies in between.
        """
        dtype, shape = x_MK.dtype, weight.shape
        if (
            len(shape) != 2
            or x_MK.dim() != 2
            or x_MK.shape[1] != shape[1]
            or dtype not in _DTYPES
            or not _is_readable(x_MK)
            or not fits(weight)
            or (
                bias_N is not None
                and (bias_N.shape != shape[:1] or bias_N.dtype != dtype or not _is_readable(bias_N))
            )
        ):
            raise _refusal("a product", rows=x_MK, bias=bias_N, **weight.tensors)
        (outputs, inputs), rows = shape, len(x_MK)
        out_MN = x_MK.new_empty(rows, outputs)
        bias = None if bias_N is None else bias_N.data_ptr()
        failed = self._linear(
            dtype == torch.bfloat16,
            x_MK.data_ptr(),
            *_pointers(weight),
            bias,
            out_MN.data_ptr(),
            *(rows, inputs, outputs, weight.group, weight.bits),
            *(weight.scale.dtype == torch.bfloat16, may_round),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(
                f"No memory for a product of {rows} rows with {outputs} outputs: give fewer rows at a time."
            )
        return out_MN

    def experts(
        self,
        x_TD: torch.Tensor,
        gate_up: PackedWeight,
        down: PackedWeight,
        weights_TP: torch.Tensor,
        index_TP: torch.Tensor,
        *,
        may_round: bool = False,
    ) -> torch.Tensor:
        """Weighted sum of each token's experts, SwiGLU with a SiLU.

        Args:
            x_TD (`torch.Tensor`): (T, D).
            gate_up (`PackedWeight`): (E, 2F, D), gate above up, one that `fits`.
            down (`PackedWeight`): (E, D, F), of as many bits, with scales of the same dtype.
            weights_TP (`torch.Tensor`): (T, P) float32.
            index_TP (`torch.Tensor`): (T, P) int64; picks outside 0 ... E - 1 add nothing.
            may_round (`bool`, defaults to `False`): as for `linear`.

        Returns:
            `torch.Tensor`: (T, D).

        Raises:
            ValueError, MemoryError: as `linear`.
        """
        dtype, sizes = x_TD.dtype, (*x_TD.shape, *down.shape, *index_TP.shape)
        if (
            len(sizes) != 7
            or sizes[1] != sizes[3]
            or gate_up.shape != (sizes[2], 2 * sizes[4], sizes[1])
            or sizes[5] != sizes[0]
            or weights_TP.shape != index_TP.shape
            or (weights_TP.dtype, index_TP.dtype) != (torch.float32, torch.int64)
            or gate_up.bits != down.bits
            or gate_up.scale.dtype != down.scale.dtype
            or dtype not in _DTYPES
            or not all(map(_is_readable, (x_TD, weights_TP, index_TP)))
            or not (fits(gate_up) and fits(down))
        ):
            raise _refusal(
                "the experts (weights float32, index int64)",
                tokens=x_TD,
                **{f"gate_up.{name}": tensor for name, tensor in gate_up.tensors.items()},
                **{f"down.{name}": tensor for name, tensor in down.tensors.items()},
                weights=weights_TP,
                index=index_TP,
            )
        tokens, hidden, experts, _, width, _, picks = sizes
        out_TD = torch.empty_like(x_TD)
        failed = self._experts(
            dtype == torch.bfloat16,
            x_TD.data_ptr(),
            *_pointers(gate_up),
            *_pointers(down),
            *(weights_TP.data_ptr(), index_TP.data_ptr(), out_TD.data_ptr()),
            *(tokens, picks, experts, hidden, width, gate_up.group, down.group, gate_up.bits),
            *(gate_up.scale.dtype == torch.bfloat16, may_round),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(
                f"No memory for the activations of {tokens} tokens with {picks} experts each: give fewer "
                "tokens at a time."
            )
        return out_TD

    def unpack(self, weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
        """The weight as numbers, each rounded once: as `PackedWeight.dequantise`.

        Args:
            weight (`PackedWeight`): (..., N, K), one that `fits`.
            dtype (`torch.dtype`): bfloat16 or float32.

        Returns:
            `torch.Tensor`: (..., N, K).

        Raises:
            ValueError: for another dtype, or a weight that does not fit.
        """
        if dtype not in _DTYPES or not fits(weight):
            raise _refusal(f"a weight unpacked to {str(dtype).removeprefix('torch.')}", **weight.tensors)
        shape = weight.shape
        out = torch.empty(shape, dtype=dtype)
        self._unpack(
            dtype == torch.bfloat16,
            *_pointers(weight),
            out.data_ptr(),
            *(shape[:-1].numel(), shape[-1], weight.group, weight.bits),
            weight.scale.dtype == torch.bfloat16,
            torch.get_num_threads(),
        )
        return out


@cache
def _of(kernels: Kernels) -> PackedKernels:
    return PackedKernels(kernels)


def find_packed_kernels() -> PackedKernels | None:
    """The kernels that run here, of the library that `find_kernels` finds.

    Returns:
        `PackedKernels` or `None`: the same for every call; `None` as for `find_kernels`.

    Raises:
        KernelsError: as `find_kernels`.

    Example:

    ```python
    >>> from transformers_emo.modeling_emo.kernels.packed.packed_kernels import find_packed_kernels
    >>> kernels = find_packed_kernels()

    ```
    """
    kernels = find_kernels()
    return None if kernels is None else _of(kernels)


def load_packed_kernels(name: str = "") -> PackedKernels:
    """The kernels of an instruction set.

    Args:
        name (`str`, *optional*): as for `load_kernels`.

    Returns:
        `PackedKernels`: the same object for every call.

    Raises:
        KernelsError: as `load_kernels`.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.modeling_emo.kernels.packed.packed_kernels import load_packed_kernels
    >>> from transformers_emo.modeling_emo.kernels.packed.packed_weights import PackedWeight
    >>> weight = PackedWeight.quantise(torch.ones(2, 32), bits=8, group=32)
    >>> load_packed_kernels().linear(torch.ones(1, 32), weight, None).round()
    tensor([[32., 32.]])

    ```
    """
    return _of(load_kernels(name))
