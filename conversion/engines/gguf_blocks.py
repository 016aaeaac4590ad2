"""Numbers as the blocks of a GGUF in 8 bits, `q8_0`: 32 whole numbers and the scale that they share.

The `gguf` package does the same with NumPy in one thread. There it takes most of the time of an export. The
format is `block_q8_0` in https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

import torch

from ...checkpoints import CheckpointError

BLOCK, BLOCK_BYTES = 32, 34
"""The numbers of a block and its bytes: a scale in float16, and a byte for each number."""
_STEP = 1 << 18  # numbers that stay in the processor's caches


def q8_0_blocks(numbers_N: torch.Tensor, name: str = "The tensor") -> torch.Tensor:
    """Quantise to `q8_0`, to the same bytes as llama.cpp and the `gguf` package.

    Args:
        numbers_N (`torch.Tensor`): (N,) float32. N is a multiple of 32.
        name (`str`): the tensor, for errors.

    Returns:
        `torch.Tensor`: uint8 (N / 32 * 34,).

    Raises:
        CheckpointError: if a number is not finite, or too large for a scale in float16.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.conversion.engines.gguf_blocks import q8_0_blocks
    >>> q8_0_blocks(torch.arange(32.0) * 127 / 31)[2:].view(torch.int8)[[0, 1, 31]]
    tensor([  0,   4, 127], dtype=torch.int8)

    ```
    """
    blocks_BW = numbers_N.view(-1, BLOCK)
    written = torch.empty(len(blocks_BW), BLOCK_BYTES, dtype=torch.uint8)
    step = _STEP // BLOCK
    for start in range(0, len(blocks_BW), step):
        block_BW, out = blocks_BW[start : start + step], written[start : start + step]
        scale_B1 = block_BW.abs().amax(dim=1, keepdim=True).div_(127)
        half_B1 = scale_B1.half()
        if not half_B1.isfinite().all():
            raise CheckpointError(
                f"{name} holds a number that is not finite, or too large for q8_0 (above 8.3 million): "
                "export it as bfloat16 or float32."
            )
        inverse_B1 = scale_B1.reciprocal().masked_fill_(scale_B1 == 0, 0)
        scaled_BW = block_BW * inverse_B1
        # Halves are rounded away from zero. Conversion to int8 cuts off what is behind the point.
        whole_BW = scaled_BW.to(torch.int8)
        whole_BW += scaled_BW.sub_(whole_BW).mul_(2).to(torch.int8)
        out[:, :2] = half_B1.view(torch.uint8)
        out[:, 2:] = whole_BW.view(torch.uint8)
    return written.view(-1)
