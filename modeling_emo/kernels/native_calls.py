"""A library of kernels, whose functions take tensors.

Each function checks what it is given: C++ reads the memory behind the tensors, and trusts their sizes.
"""

import ctypes
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from .gradient_memory import empty_gradient
from .instruction_sets import fingerprint

AGAIN = (
    "`pip install -e .` in a checkout, or `pip install --no-cache-dir --force-reinstall --no-deps` of the "
    "package"
)
"""How a library is compiled anew."""


class KernelsError(RuntimeError):
    """The kernels cannot be used; the message says why, and what to do.

    Example: see `load_kernels`.
    """


_DTYPES = (torch.bfloat16, torch.float32)


def _are_readable(dtype: torch.dtype, *tensors: torch.Tensor) -> bool:
    """Whether all are contiguous tensors of a dtype in the memory of this process, so none is fake.

    A view that PyTorch marks as negated is refused, since its memory holds other numbers than its values.

    This runs for every product of every token.
    """
    for tensor in tensors:  # noqa: SIM110  `all` of a generator takes twice as long
        if not (
            tensor.dtype is dtype
            and tensor.is_cpu
            and tensor.is_contiguous()
            and not tensor.is_neg()
            and (tensor.data_ptr() or not tensor.numel())
        ):
            return False
    return True


def holds_all(tensor: torch.Tensor) -> bool:
    """Whether the memory of a weight is as long as it says: some may have been given back.

    What a layer has just computed need not be asked.

    Args:
        tensor (`torch.Tensor`): a contiguous tensor.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.modeling_emo.kernels.native_calls import holds_all
    >>> holds_all(torch.ones(2))
    True

    ```
    """
    offset = tensor.storage_offset() * tensor.element_size()
    return offset + tensor.nbytes <= tensor.untyped_storage().nbytes()


def _has_memory(tensor: torch.Tensor) -> bool:
    return bool(tensor.data_ptr()) and (not tensor.is_contiguous() or holds_all(tensor))


def _refusal(what: str, tensors: dict[str, torch.Tensor | None]) -> ValueError:
    """The error for inputs that do not fit. It lists all of them, under names that give their shapes."""
    found = ", ".join(
        f"{name} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
        + ("" if tensor.is_contiguous() else ", not contiguous")
        + (", a negated view" if tensor.is_neg() else "")
        + (", without memory" if tensor.is_cpu and tensor.numel() and not _has_memory(tensor) else "")
        for name, tensor in tensors.items()
        if tensor is not None
    )
    return ValueError(
        f"The inputs of {what} do not fit each other, or are not all on the CPU, contiguous and of one "
        f"dtype, bfloat16 or float32: {found}. Change those that differ."
    )


def _check(x_TD, gate_up_E2FD, down_EDF, weights_TK, index_TK) -> None:
    """Check the inputs of the experts. C++ does not: it would read past the end of one that is too short."""
    inputs = x_TD, gate_up_E2FD, down_EDF, weights_TK, index_TK
    sizes = (*x_TD.shape, *down_EDF.shape, *index_TK.shape)
    if len(sizes) == 7:
        tokens, hidden, experts, _, width, _, top_k = sizes
        picks = (tokens, top_k)
        fitting = (tokens, hidden), (experts, 2 * width, hidden), (experts, hidden, width), picks, picks
        if (
            all(tensor.shape == shape for tensor, shape in zip(inputs, fitting, strict=True))
            and x_TD.dtype in _DTYPES
            and _are_readable(x_TD.dtype, x_TD, gate_up_E2FD, down_EDF)
            and holds_all(gate_up_E2FD)
            and holds_all(down_EDF)
            and _are_readable(torch.float32, weights_TK)
            and _are_readable(torch.int64, index_TK)
        ):
            return
    names = "tokens (T, D)", "gate_up (E, 2F, D)", "down (E, D, F)", "weights (T, K)", "index (T, K)"
    raise _refusal("the experts (weights float32, index int64)", dict(zip(names, inputs, strict=True)))


class Kernels:
    """The compiled functions, for tensors on the CPU: contiguous, bfloat16 or float32.

    Args:
        path (`Path`): the compiled library, for an instruction set that this machine can run.
        flags (`Sequence[str]`, *optional*): the flags of its instruction set. If given, the library must have
            been compiled with them, from the sources of this package.

    Attributes:
        path (`Path`): the compiled library.
        has_tiles (`bool`): whether it uses AMX here.
        has_panels (`bool`): whether its vectors are faster than PyTorch for many rows too (`panels.h`).
        library (`ctypes.CDLL`): the library, for functions that other modules call.

    Raises:
        KernelsError: if the file cannot be loaded as a library here, or is not of this version.

    Example: see `load_kernels`.
    """

    def __init__(self, path: Path, flags: Sequence[str] | None = None):
        library = open_library(path, flags)
        self.path, self.library = path, library
        pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self._experts = library.emo_experts
        self._experts.argtypes = [number, *[pointer] * 7, *[size] * 5, number, number]
        self._experts_backward = library.emo_experts_backward
        self._experts_backward.argtypes = [number, *[pointer] * 11, *[size] * 5, number]
        self._linear = library.emo_linear
        self._linear.argtypes = [number, *[pointer] * 4, *[size] * 3, number]
        self._rms_norm = library.emo_rms_norm
        self._rms_norm.argtypes = [number, *[pointer] * 3, *[size] * 2, ctypes.c_float, number]
        self._rotate = library.emo_rotate
        self._rotate.argtypes = [number, *[pointer] * 4, *[size] * 4, number]
        self._rms_norm.restype = self._rotate.restype = None
        self.has_tiles = bool(library.emo_has_tiles())
        self.has_panels = bool(library.emo_has_panels())

    def fits_tiles(self, *sizes: int) -> bool:
        """Whether products along these sizes (of experts: hidden size and width) run on AMX here."""
        return self.has_tiles and all(size % 32 == 0 for size in sizes)

    def fits_gradients(self, *sizes: int) -> bool:
        """Whether the kernels can compute gradients of experts of these sizes, hidden size and width."""
        return all(size % 32 == 0 for size in sizes)

    def experts(
        self,
        x_TD: torch.Tensor,
        gate_up_E2FD: torch.Tensor,
        down_EDF: torch.Tensor,
        weights_TK: torch.Tensor,
        index_TK: torch.Tensor,
        *,
        save: bool = False,
        tiles: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weighted sum of each token's experts, SwiGLU with a SiLU.

        Args:
            x_TD (`torch.Tensor`): (T, D).
            gate_up_E2FD (`torch.Tensor`): (E, 2F, D), gate above up.
            down_EDF (`torch.Tensor`): (E, D, F).
            weights_TK (`torch.Tensor`): (T, K) float32.
            index_TK (`torch.Tensor`): (T, K) int64; picks outside 0 ... E - 1 add nothing.
            save (`bool`, defaults to `False`): return gate and up too.
            tiles (`bool`, defaults to `True`): use AMX if the machine has it.

        Returns:
            `tuple`: (T, D); (T * K, 2F) gate and up, sorted by expert, and by token within an expert (no rows
            without `save`).

        Raises:
            ValueError: if the shapes do not fit each other, or a tensor is not on the CPU, contiguous and of
                the dtype it should have.
        """
        _check(x_TD, gate_up_E2FD, down_EDF, weights_TK, index_TK)
        (tokens, hidden), top_k, (experts, _, width) = x_TD.shape, index_TK.shape[1], down_EDF.shape
        out_TD = torch.empty_like(x_TD)
        saved_P2F = x_TD.new_empty(tokens * top_k if save else 0, 2 * width)
        failed = self._experts(
            x_TD.dtype == torch.bfloat16,
            x_TD.data_ptr(),
            gate_up_E2FD.data_ptr(),
            down_EDF.data_ptr(),
            weights_TK.data_ptr(),
            index_TK.data_ptr(),
            out_TD.data_ptr(),
            saved_P2F.data_ptr() if save else None,
            *(tokens, top_k, experts, hidden, width),
            torch.get_num_threads(),
            tiles,
        )
        if failed:
            raise MemoryError(
                f"No memory for the activations of {tokens} tokens with {top_k} experts each: give fewer "
                "tokens at a time."
            )
        return out_TD, saved_P2F

    def experts_backward(
        self,
        grad_TD: torch.Tensor,
        x_TD: torch.Tensor,
        gate_up_E2FD: torch.Tensor,
        down_EDF: torch.Tensor,
        weights_TK: torch.Tensor,
        index_TK: torch.Tensor,
        saved_P2F: torch.Tensor,
        wants: Sequence[bool] = (True, True, True, True),
    ) -> list[torch.Tensor | None]:
        """Gradients of `experts`, for sizes that `fits_gradients` accepts.

        Args:
            grad_TD (`torch.Tensor`): (T, D), the gradient of the output of `experts`.
            x_TD, gate_up_E2FD, down_EDF, weights_TK, index_TK: as for `experts`.
            saved_P2F (`torch.Tensor`): (T * K, 2F), what `experts` returned with `save`.
            wants (`Sequence[bool]`, defaults to all): which gradients to compute.

        Returns:
            `list`: gradients of x, gate_up, down and weights (float32); `None` for those not wanted.

        Raises:
            ValueError: if `fits_gradients` refuses the sizes, or as `experts`.
        """
        _check(x_TD, gate_up_E2FD, down_EDF, weights_TK, index_TK)
        (tokens, hidden), top_k, (experts, _, width) = x_TD.shape, index_TK.shape[1], down_EDF.shape
        if not self.fits_gradients(hidden, width):
            raise ValueError(
                f"Gradients of sizes {hidden} and {width} need multiples of 32: use the experts "
                'implementation "emo_sorted", which computes them for all sizes.'
            )
        expected = (tokens, hidden), (tokens * top_k, 2 * width)
        found = tuple(grad_TD.shape), tuple(saved_P2F.shape)
        if found != expected:
            raise ValueError(
                f"The gradient and what `experts` saved are of shapes {found[0]} and {found[1]}, expected "
                f"{expected[0]} and {expected[1]}: call it with `save=True`."
            )
        if not _are_readable(x_TD.dtype, grad_TD, saved_P2F):
            raise _refusal(
                "the experts' gradients",
                {"tokens (T, D)": x_TD, "gradient (T, D)": grad_TD, "saved (P, 2F)": saved_P2F},
            )
        inputs = x_TD, gate_up_E2FD, down_EDF, weights_TK
        # The number of tokens changes from batch to batch. Memory kept for one batch would fit no other.
        gradients = [
            None if not wanted else empty_gradient(tensor) if tensor.dim() == 3 else torch.empty_like(tensor)
            for tensor, wanted in zip(inputs, wants, strict=True)
        ]
        failed = self._experts_backward(
            x_TD.dtype == torch.bfloat16,
            *(tensor.data_ptr() for tensor in (grad_TD, *inputs, index_TK, saved_P2F)),
            *(None if gradient is None else gradient.data_ptr() for gradient in gradients),
            *(tokens, top_k, experts, hidden, width),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(
                f"No memory for the gradients of {tokens} tokens with {top_k} experts each: give fewer "
                "tokens at a time."
            )
        return gradients

    def linear(
        self, x_MD: torch.Tensor, weight_ND: torch.Tensor, bias_N: torch.Tensor | None
    ) -> torch.Tensor:
        """`torch.nn.functional.linear` of a few rows: (M, D) and (N, D) to (M, N).

        Raises:
            ValueError: if the shapes do not fit each other, or a tensor is not on the CPU, contiguous and of
                the dtype of the others.
        """
        (rows, inputs), (outputs, columns), dtype = x_MD.shape, weight_ND.shape, x_MD.dtype
        if (
            inputs != columns
            or dtype not in _DTYPES
            or not _are_readable(dtype, x_MD, weight_ND)
            or not holds_all(weight_ND)
            or (bias_N is not None and (bias_N.shape != (outputs,) or not _are_readable(dtype, bias_N)))
        ):
            raise _refusal(
                "a product", {"rows (M, D)": x_MD, "weight (N, D)": weight_ND, "bias (N,)": bias_N}
            )
        out_MN = x_MD.new_empty(rows, outputs)
        bias = None if bias_N is None else bias_N.data_ptr()
        pointers = x_MD.data_ptr(), weight_ND.data_ptr(), bias, out_MN.data_ptr()
        sizes = rows, inputs, outputs, torch.get_num_threads()
        if self._linear(dtype == torch.bfloat16, *pointers, *sizes):
            raise MemoryError(
                f"No memory for a product of {rows} rows with {outputs} outputs: give fewer rows at a time."
            )
        return out_MN

    def rms_norm(self, x_MD: torch.Tensor, weight_D: torch.Tensor, epsilon: float) -> torch.Tensor:
        """`weight * x / sqrt(mean(x ** 2) + epsilon)` of each row (M, D), in float32, rounded at the end.

        Raises:
            ValueError: as `linear`.
        """
        dtype = x_MD.dtype
        if (
            x_MD.dim() != 2
            or weight_D.shape != x_MD.shape[1:]
            or dtype not in _DTYPES
            or not _are_readable(dtype, x_MD, weight_D)
            or not holds_all(weight_D)
        ):
            raise _refusal("a norm", {"rows (M, D)": x_MD, "weight (D,)": weight_D})
        out_MD = torch.empty_like(x_MD)
        pointers = x_MD.data_ptr(), weight_D.data_ptr(), out_MD.data_ptr()
        self._rms_norm(dtype == torch.bfloat16, *pointers, *x_MD.shape, epsilon, torch.get_num_threads())
        return out_MD

    def rotate(self, x_MHW: torch.Tensor, cos_PW: torch.Tensor, sin_PW: torch.Tensor) -> torch.Tensor:
        """Rotary embedding of M rows with H heads. Row m takes the cosines and sines of row m modulo P.

        Raises:
            ValueError: as `linear`. Cosines and sines must be float32, and W even.
        """
        dtype, width = x_MHW.dtype, x_MHW.shape[-1]
        if (
            x_MHW.dim() != 3
            or cos_PW.dim() != 2
            or not cos_PW.shape[1] == width
            or width % 2
            or sin_PW.shape != cos_PW.shape
            or (len(x_MHW) and not len(cos_PW))
            or dtype not in _DTYPES
            or not (_are_readable(dtype, x_MHW) and _are_readable(torch.float32, cos_PW, sin_PW))
        ):
            raise _refusal(
                "a rotation (cosines and sines float32)",
                {"rows (M, H, W)": x_MHW, "cosines (P, W)": cos_PW, "sines (P, W)": sin_PW},
            )
        out_MHW = torch.empty_like(x_MHW)
        pointers = x_MHW.data_ptr(), cos_PW.data_ptr(), sin_PW.data_ptr(), out_MHW.data_ptr()
        sizes = *x_MHW.shape, len(cos_PW), torch.get_num_threads()
        self._rotate(dtype == torch.bfloat16, *pointers, *sizes)
        return out_MHW


def open_library(path: Path, flags: Sequence[str] | None) -> ctypes.CDLL:
    """Load a library, if it was compiled from these sources. One of others may take other arguments.

    Args:
        path (`Path`): the library.
        flags (`Sequence[str]`, *optional*): what it should have been compiled with; not looked at without.

    Raises:
        KernelsError: if it cannot be loaded, or was compiled from other sources.

    Example: see `load_kernels`.
    """
    _show_openmp()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelsError(f"the library cannot be loaded ({error}); compile it anew: {AGAIN}") from error
    if flags is not None:
        found = getattr(library, "emo_fingerprint", None)
        if found is not None:
            found.restype = ctypes.c_char_p
        if found is None or found().decode() != fingerprint(flags, path.parent):
            raise KernelsError(
                f"{path} was not compiled from the sources beside it as they are now; compile it anew: "
                f"{AGAIN}"
            )
    return library


@cache
def _show_openmp() -> None:
    """Let the libraries find PyTorch's OpenMP. They bring none, as it would be a second pool of threads."""
    if hasattr(ctypes.CDLL(None), "omp_get_thread_num"):
        return  # on Linux PyTorch makes it visible to all libraries
    folder = Path(torch.__file__).parent
    brought = [*folder.glob("lib/lib*omp*"), *folder.parent.glob("torch.libs/lib*omp*")]
    names = [str(file) for file in sorted(brought) if file.name.startswith(("libgomp", "libomp", "libiomp"))]
    for name in [*names, "libgomp.so.1", "libomp.dylib"]:
        with suppress(OSError):
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
            return
