"""How large the pool of each document is in training: drawn anew in every step, whoever computes it.

A size depends on three things alone: the seed of the step, the document and the layer. It does not matter
which process has the document, in which micro-batch, or what stands beside it. So a run draws the same sizes
on any number of processes, and processes that share a document (tensor parallelism) agree without a word.

A document is told by its tokens and by where in its window they stand. Nothing here waits for the device, and
no product leaves 63 bits, so that it compiles and is the same everywhere.

Shape suffixes: B batch, S sequence, T = B * S tokens, N documents, L layers.
"""

import torch

_BITS = 32
_MASK = (1 << _BITS) - 1
_FACTOR = 0x45D9F3B  # 27 bits: its product with 32 bits fits into a signed number of 64
_LAYER = 0x9E3779B9  # the golden ratio in 32 bits: layers far apart


def _mix(bits: torch.Tensor) -> torch.Tensor:
    """Numbers of 32 bits to others, one to one: each bit of one changes half of the bits of the other."""
    for _ in range(2):
        bits = (bits ^ (bits >> 16)) * _FACTOR & _MASK
    return bits ^ (bits >> 16)


def step_seed(seed: int, step: int, device: torch.device | str | None = None) -> torch.Tensor:
    """What the sizes of one optimiser step are drawn from.

    Args:
        seed (`int`): the seed of the run.
        step (`int`): the number of the step.
        device (`torch.device` or `str`, *optional*): the device of the result.

    Returns:
        `torch.Tensor`: an int64 scalar, the same for equal arguments on every machine.

    Example:

    ```python
    >>> from transformers_emo.modeling_emo.pools.pool_sizes import step_seed
    >>> bool(step_seed(3, 10) == step_seed(3, 10)), bool(step_seed(3, 10) == step_seed(3, 11))
    (True, False)

    ```
    """
    mixed = _mix(_mix(torch.tensor(seed & _MASK)) ^ (step & _MASK)).item()
    return torch.full((), mixed, device=device)  # filled there: copying it would make the host wait


def document_numbers(
    segment_T: torch.Tensor,
    num_documents: int,
    tokens: torch.Tensor | None,
    token_mask_BS: torch.Tensor | None,
    shape: tuple[int, int],
) -> torch.Tensor:
    """A number for each document, from its tokens and their places in the row. Padding does not count.

    Args:
        segment_T (`torch.Tensor`): the document of each token, as `flatten_segments` numbers them.
        num_documents (`int`): N.
        tokens (`torch.Tensor`, *optional*): token ids (B, S), or where there are none, their embeddings
            (B, S, D).
        token_mask_BS (`torch.Tensor`, *optional*): false for padding.
        shape (`tuple[int, int]`): (B, S).

    Returns:
        `torch.Tensor`: (N,) int64 of 32 bits.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.modeling_emo.pools.pool_sizes import document_numbers
    >>> alone = document_numbers(torch.tensor([0, 0]), 1, torch.tensor([[5, 6]]), None, (1, 2))
    >>> beside = document_numbers(torch.tensor([0, 0, 1]), 2, torch.tensor([[5, 6, 7]]), None, (1, 3))
    >>> bool(alone[0] == beside[0])
    True

    ```
    """
    batch, length = shape
    if token_mask_BS is None:
        place_BS = torch.arange(length, device=segment_T.device).expand(batch, length)
    else:
        token_mask_BS = token_mask_BS.long()
        place_BS = token_mask_BS.cumsum(dim=1) - 1
    bits_BS = torch.zeros_like(place_BS)
    if tokens is not None and tokens.dim() == 3:
        # Of a token that is an embedding, its first number. Adapters put such tokens in front of others.
        bits_BS = tokens.detach()[..., 0].float().contiguous().view(torch.int32).long()
    elif tokens is not None:
        bits_BS = tokens.long()
    token_BS = _mix(_mix(bits_BS & _MASK) ^ (place_BS & _MASK))
    if token_mask_BS is not None:
        token_BS = token_BS * token_mask_BS
    sums_N = segment_T.new_zeros(num_documents).index_add_(0, segment_T, token_BS.reshape(-1))
    return _mix(sums_N & _MASK)


def draw_pool_sizes(
    documents_N: torch.Tensor, num_layers: int, smallest: int, largest: int, *, seed: torch.Tensor
) -> torch.Tensor:
    """Draw a pool size for each document in each layer, uniformly from `smallest` to `largest` (included).

    Args:
        documents_N (`torch.Tensor`): a number for each document, from `document_numbers`.
        num_layers (`int`): L.
        smallest (`int`): the smallest pool, at least 1.
        largest (`int`): the largest pool.
        seed (`torch.Tensor`): an int64 scalar, such as `step_seed` gives.

    Returns:
        `torch.Tensor`: (L, N) int64, on the device of `documents_N`.

    Raises:
        ValueError: if the range is empty or begins below 1.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.modeling_emo import draw_pool_sizes, step_seed
    >>> sizes = draw_pool_sizes(torch.arange(500), 2, 8, 128, seed=step_seed(0, 0))
    >>> sizes.shape, sizes.min() >= 8, sizes.max() <= 128
    (torch.Size([2, 500]), tensor(True), tensor(True))

    ```
    """
    if not 1 <= smallest <= largest:
        raise ValueError(
            f"Pool sizes from {smallest} to {largest} are impossible: give 1 <= smallest <= largest."
        )
    layer_L = torch.arange(num_layers, device=documents_N.device) * _LAYER & _MASK
    drawn_N = _mix(documents_N ^ (seed.to(documents_N.device) & _MASK))
    drawn_LN = _mix(drawn_N[None] ^ _mix(layer_L)[:, None])
    return smallest + (drawn_LN * (largest - smallest + 1) >> _BITS)
