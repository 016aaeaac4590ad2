"""Compiles the C++ kernels on the machine that runs them, once, and loads them.

The source has a plain C interface and no headers of Python or PyTorch: it compiles in seconds with whatever
compiler the system has, and one build serves every version of PyTorch. Where there is no
compiler, all runs without, slower.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from transformers.utils import logging

from .gradient_memory import empty_gradient

logger = logging.get_logger(__name__)

_SOURCE = Path(__file__).parent / "native"
_FLAGS = ["-O3", "-std=c++17", "-fopenmp", "-shared", "-fPIC", "-w"]
# What the compiler is told of the machine. All but the first are for tests: each takes away something the
# machine has.
VARIANTS = {
    "native": ["-march=native"],
    "without_tiles": ["-march=native", "-mno-amx-tile"],
    "without_bf16": ["-march=native", "-mno-amx-tile", "-mno-avx512bf16"],
    "avx2": ["-march=x86-64-v3"],
    "portable": [],
}
_COMPILERS = ("c++", "g++", "clang++")
_OFF = "EMO_KERNELS"


class KernelBuildError(RuntimeError):
    """The kernels cannot be compiled here; the message says why, and what to do.

    Example: see `build_kernels`.
    """


def _check(x_TD, gate_up_E2FD, down_EDF, weights_TK, index_TK) -> None:
    """C++ reads where it is told to: what does not fit would be read past its end."""
    inputs = x_TD, gate_up_E2FD, down_EDF, weights_TK, index_TK
    sizes = (*x_TD.shape, *down_EDF.shape, *index_TK.shape)
    if len(sizes) == 7:
        tokens, hidden, experts, _, width, _, top_k = sizes
        picks = (tokens, top_k)
        fitting = (tokens, hidden), (experts, 2 * width, hidden), (experts, hidden, width), picks, picks
        if all(tensor.shape == shape for tensor, shape in zip(inputs, fitting, strict=True)) and all(
            tensor.is_cpu for tensor in inputs
        ):
            return
    names = "tokens (T, D)", "gate_up (E, 2F, D)", "down (E, D, F)", "weights (T, K)", "index (T, K)"
    found = ", ".join(
        f"{name} {tuple(tensor.shape)} on {tensor.device}" for name, tensor in zip(names, inputs, strict=True)
    )
    raise ValueError(f"The experts' inputs do not fit each other, or are not all on the CPU: {found}.")


class Kernels:
    """The compiled functions, for tensors on the CPU: contiguous, bfloat16 or float32.

    Args:
        path (`Path`): the compiled library.

    Raises:
        OSError: if the file is no library that this machine can load.

    Example: see `load_kernels`.
    """

    def __init__(self, path: Path):
        library = ctypes.CDLL(str(path))
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

    def fits_tiles(self, *sizes: int) -> bool:
        """Whether products along these sizes (of experts: hidden size and width) run on AMX here."""
        return self.has_tiles and all(size % 32 == 0 for size in sizes)

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
            save (`bool`, defaults to `False`): give gate and up too.
            tiles (`bool`, defaults to `True`): use AMX where there is any.

        Returns:
            `tuple`: (T, D); (T * K, 2F) gate and up, sorted by expert and within one by token (no rows unless
            `save`).

        Raises:
            ValueError: if the shapes do not fit each other, or a tensor is not on the CPU.
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
            raise MemoryError(f"No memory for the activations of {tokens} tokens with {top_k} experts each.")
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
        """Gradients of `experts`, where `fits_tiles`.

        Args:
            grad_TD (`torch.Tensor`): (T, D), of its output.
            x_TD, gate_up_E2FD, down_EDF, weights_TK, index_TK: as there.
            saved_P2F (`torch.Tensor`): (T * K, 2F), what `experts` gave with `save`.
            wants (`Sequence[bool]`, defaults to all): which gradients to compute.

        Returns:
            `list`: gradients of x, gate_up, down and weights (float32); `None` for those not wanted.

        Raises:
            ValueError: if `fits_tiles` says no, or as `experts`.
        """
        _check(x_TD, gate_up_E2FD, down_EDF, weights_TK, index_TK)
        (tokens, hidden), top_k, (experts, _, width) = x_TD.shape, index_TK.shape[1], down_EDF.shape
        if not self.fits_tiles(hidden, width):
            raise ValueError(
                f"Gradients of sizes {hidden} and {width} need AMX and multiples of 32; the experts "
                'implementation "emo_sorted" has them for all sizes.'
            )
        expected = (tokens, hidden), (tokens * top_k, 2 * width)
        found = tuple(grad_TD.shape), tuple(saved_P2F.shape)
        if found != expected:
            raise ValueError(
                f"The gradient and what `experts` saved are of shapes {found[0]} and {found[1]}, expected "
                f"{expected[0]} and {expected[1]}: call it with `save=True`."
            )
        inputs = x_TD, gate_up_E2FD, down_EDF, weights_TK
        # Tokens come in other numbers in every batch: memory kept for one would serve no other, and pile up.
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
            raise MemoryError(f"No memory for the gradients of {tokens} tokens with {top_k} experts each.")
        return gradients

    def linear(
        self, x_MD: torch.Tensor, weight_ND: torch.Tensor, bias_N: torch.Tensor | None
    ) -> torch.Tensor:
        """`torch.nn.functional.linear` of a few rows: (M, D) and (N, D) to (M, N)."""
        (rows, inputs), outputs = x_MD.shape, weight_ND.shape[0]
        out_MN = x_MD.new_empty(rows, outputs)
        bias = None if bias_N is None else bias_N.data_ptr()
        pointers = x_MD.data_ptr(), weight_ND.data_ptr(), bias, out_MN.data_ptr()
        sizes = rows, inputs, outputs, torch.get_num_threads()
        if self._linear(x_MD.dtype == torch.bfloat16, *pointers, *sizes):
            raise MemoryError(f"No memory for a product of {rows} rows with {outputs} outputs.")
        return out_MN

    def rms_norm(self, x_MD: torch.Tensor, weight_D: torch.Tensor, epsilon: float) -> torch.Tensor:
        """`weight * x / sqrt(mean(x ** 2) + epsilon)` of each row (M, D), in float32, rounded at the end."""
        out_MD = torch.empty_like(x_MD)
        pointers = x_MD.data_ptr(), weight_D.data_ptr(), out_MD.data_ptr()
        self._rms_norm(x_MD.dtype == torch.bfloat16, *pointers, *x_MD.shape, epsilon, torch.get_num_threads())
        return out_MD

    def rotate(self, x_MHW: torch.Tensor, cos_PW: torch.Tensor, sin_PW: torch.Tensor) -> torch.Tensor:
        """Rotary embedding of M rows with H heads; row m has the float32 cosines and sines of m modulo P."""
        out_MHW = torch.empty_like(x_MHW)
        pointers = x_MHW.data_ptr(), cos_PW.data_ptr(), sin_PW.data_ptr(), out_MHW.data_ptr()
        sizes = *x_MHW.shape, len(cos_PW), torch.get_num_threads()
        self._rotate(x_MHW.dtype == torch.bfloat16, *pointers, *sizes)
        return out_MHW


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "transformers_emo"


def _processor() -> str:
    """What the compiler's `native` depends on: a cache may be shared by different machines."""
    kept = ("vendor_id", "cpu family", "model\t", "flags", "Features", "CPU implementer", "CPU part")
    with suppress(OSError):
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
        return "\n".join(line for line in first.splitlines() if line.startswith(kept))
    return platform.processor()


def library_path(variant: str = "native") -> Path:
    """Where the compiled kernels are kept: a name of their own for every source, flags and processor.

    Args:
        variant (`str`, defaults to `"native"`): one of `VARIANTS`.

    Returns:
        `Path`: in the user's cache folder; it need not exist.

    Example:

    ```python
    >>> from transformers_emo.modeling_emo.native_library import library_path
    >>> library_path().suffix
    '.so'

    ```
    """
    parts = [
        *(file.read_text(encoding="utf-8") for file in sorted(_SOURCE.glob("*.[ch]*"))),
        *_FLAGS,
        *VARIANTS[variant],
        platform.machine(),
        _processor(),
    ]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return _cache_folder() / f"emo_kernels-{variant}-{digest}.so"


def build_kernels(variant: str = "native") -> Path:
    """Compile the kernels for this machine; done by itself when they are first needed.

    `python -m transformers_emo.modeling_emo.native_library` does so beforehand, for a container image, say.

    Args:
        variant (`str`, defaults to `"native"`): one of `VARIANTS`.

    Returns:
        `Path`: the library. It stays as it is if another process builds the same at the same time.

    Raises:
        KernelBuildError: if there is no compiler, it fails, or the cache folder cannot be written.

    Example:

    ```python
    >>> from transformers_emo.modeling_emo.native_library import build_kernels
    >>> build_kernels().exists()
    True

    ```
    """
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else _COMPILERS
    compiler = next((found for name in candidates if (found := shutil.which(name))), None)
    if compiler is None:
        raise KernelBuildError(
            f"no C++ compiler was found ({', '.join(candidates)}): install one (Debian: `apt install g++`), "
            "or set CXX to one"
        )
    path = library_path(variant)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = Path(folder) / path.name
            command = [
                compiler,
                *_FLAGS,
                *VARIANTS[variant],
                str(_SOURCE / "emo_kernels.cpp"),
                "-o",
                str(built),
            ]
            run = subprocess.run(command, capture_output=True, text=True, timeout=600)
            if run.returncode:
                reason = "\n".join(run.stderr.strip().splitlines()[:8])
                raise KernelBuildError(f"`{' '.join(command)}` failed:\n{reason}")
            # The checksum at the end (a loader does not mind) tells a whole file from a cut one, which could
            # kill the process that loads it.
            data = built.read_bytes()
            built.write_bytes(data + hashlib.sha256(data).digest())
            built.replace(path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelBuildError(
            f"{error}; XDG_CACHE_HOME chooses another cache folder than {path.parent}"
        ) from error
    return path


def _is_whole(path: Path) -> bool:
    with suppress(OSError):
        data = path.read_bytes()
        return hashlib.sha256(data[:-32]).digest() == data[-32:]
    return False


@cache
def load_kernels(variant: str = "native") -> Kernels:
    """The kernels, compiled if need be.

    Args:
        variant (`str`, defaults to `"native"`): one of `VARIANTS`.

    Returns:
        `Kernels`: the same object for every call.

    Raises:
        KernelBuildError: as `build_kernels`, or if what was compiled cannot be loaded.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.modeling_emo.native_library import load_kernels
    >>> load_kernels().linear(torch.ones(1, 3), torch.ones(2, 3), None)
    tensor([[3., 3.]])

    ```
    """
    path = library_path(variant)
    if _is_whole(path):
        with suppress(OSError, AttributeError):
            return Kernels(path)
    logger.warning(f"Compiling EMO's kernels for this processor, once: some seconds ({path}).")
    try:
        return Kernels(build_kernels(variant))
    except (OSError, AttributeError) as error:
        raise KernelBuildError(f"what was compiled cannot be loaded: {error}") from error


@cache
def find_kernels() -> Kernels | None:
    """The kernels, or `None`: they are switched off by `EMO_KERNELS=0`, or cannot be compiled.

    Why they cannot be compiled is said once, as a warning.

    Returns:
        `Kernels` or `None`: the same for every call.

    Example:

    ```python
    >>> from transformers_emo.modeling_emo.native_library import find_kernels
    >>> kernels = find_kernels()

    ```
    """
    if os.environ.get(_OFF, "").lower() in ("0", "off", "false", "no"):
        return None
    try:
        return load_kernels()
    except KernelBuildError as error:
        logger.warning(
            f"EMO runs without its compiled kernels, several times slower on a CPU: {error}. "
            f"`{_OFF}=0` runs without and without this warning."
        )
        return None


if __name__ == "__main__":
    print(build_kernels())
