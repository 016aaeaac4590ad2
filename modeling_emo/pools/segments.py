"""Documents in batches: where they begin, and how many there are.

EOS tokens, position ids that start again or the lengths of packed sequences tell where documents begin.
Nothing here loops over documents or waits for the device, and no shape depends on values, so that all of it
compiles. The exceptions are `lengths_from_segments`, and `count_segments` on a CPU.

Shape suffixes: B batch, S sequence, T = B * S tokens, N segments.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def ids_on(ids: Sequence[int], device: torch.device) -> torch.Tensor:
    """Make a tensor of a few ids on the device itself. Copying it there would make the host wait.

    Args:
        ids (`Sequence[int]`): a few numbers.
        device (`torch.device`): the device of the result.

    Returns:
        `torch.Tensor`: int64, one dimension.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.modeling_emo.pools.segments import ids_on
    >>> ids_on([3, 40], torch.device("cpu"))
    tensor([ 3, 40])

    ```
    """
    if device.type == "cpu" or not ids:
        return torch.tensor(ids, dtype=torch.int64, device=device)
    return torch.cat([torch.full((1,), number, device=device) for number in ids])


def is_eos(input_ids: torch.Tensor, eos_token_id: int | Sequence[int]) -> torch.Tensor:
    """Which tokens are an EOS.

    Args:
        input_ids (`torch.Tensor`): token ids of any shape.
        eos_token_id (`int` or `Sequence[int]`): the EOS token or tokens.

    Returns:
        `torch.Tensor`: bool, of the same shape.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.modeling_emo.pools.segments import is_eos
    >>> is_eos(torch.tensor([5, 9, 7]), [7, 8]).tolist()
    [False, False, True]

    ```
    """
    if isinstance(eos_token_id, int):
        return input_ids == eos_token_id
    return torch.isin(input_ids, ids_on(eos_token_id, input_ids.device))


def segments_from_eos(
    input_ids: torch.Tensor, eos_token_id: int | Sequence[int], *, eos_opens: bool
) -> torch.Tensor:
    """Number the documents of each row by their EOS tokens.

    EMO has two rules. For *routing* an EOS opens the next segment (one at position 0 changes nothing). For
    *attention* an EOS closes its own document.

    Args:
        input_ids (`torch.Tensor`): (B, S) token ids.
        eos_token_id (`int` or `Sequence[int]`): the EOS token or tokens.
        eos_opens (`bool`): whether an EOS belongs to the segment after it (routing) or before it (attention).

    Returns:
        `torch.Tensor`: (B, S) int64, 0 for the first segment of each row.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.modeling_emo import segments_from_eos
    >>> ids = torch.tensor([[1, 2, 9, 3, 4, 9, 5, 6]])
    >>> segments_from_eos(ids, 9, eos_opens=True).tolist()
    [[0, 0, 1, 1, 1, 2, 2, 2]]
    >>> segments_from_eos(ids, 9, eos_opens=False).tolist()
    [[0, 0, 0, 1, 1, 1, 2, 2]]

    ```
    """
    found = is_eos(input_ids, eos_token_id)
    starts = found[:, 1:] if eos_opens else found[:, :-1]
    return F.pad(starts.long(), (1, 0)).cumsum(dim=1)


def segments_from_positions(position_ids: torch.Tensor) -> torch.Tensor:
    """Number the documents of each row by where its position ids start again.

    Args:
        position_ids (`torch.Tensor`): (B, S); a position that is not larger than the one before begins a
            document.

    Returns:
        `torch.Tensor`: (B, S) int64, 0 for the first segment of each row.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.modeling_emo import segments_from_positions
    >>> segments_from_positions(torch.tensor([[0, 1, 2, 0, 1, 0]])).tolist()
    [[0, 0, 0, 1, 1, 2]]

    ```
    """
    starts = position_ids[:, 1:] <= position_ids[:, :-1]
    return F.pad(starts.long(), (1, 0)).cumsum(dim=1)


def segments_from_lengths(cumulative_lengths: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Number the documents of packed rows by their cumulative lengths (`cu_seq_lens_q`).

    Args:
        cumulative_lengths (`torch.Tensor`): (N + 1,), starting at 0, as `DataCollatorWithFlattening` makes
            them.
        num_tokens (`int`): T.

    Returns:
        `torch.Tensor`: (1, T) int64.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.modeling_emo import segments_from_lengths
    >>> segments_from_lengths(torch.tensor([0, 3, 5]), 5).tolist()
    [[0, 0, 0, 1, 1]]

    ```
    """
    positions = torch.arange(num_tokens, device=cumulative_lengths.device)
    return torch.searchsorted(cumulative_lengths[1:].contiguous(), positions, right=True).unsqueeze(0)


def lengths_from_segments(
    segments_BS: torch.Tensor, attention_mask_BS: torch.Tensor | None = None
) -> tuple[torch.Tensor, int]:
    """Cumulative lengths of the documents of all rows, one after the other, as flash attention takes them.

    Padding before or after a document counts as a document of its own.

    Args:
        segments_BS (`torch.Tensor`): (B, S) segment numbers or document ids.
        attention_mask_BS (`torch.Tensor`, *optional*): (B, S), 0 or false for padding.

    Returns:
        `tuple[torch.Tensor, int]`: (N + 1,) int32, from 0 to B * S; the longest length.

    Raises:
        ValueError: if the mask has another shape, or padding lies inside a document, where lengths cannot
            leave it out. (Compiled code does not check the latter.)

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.modeling_emo import lengths_from_segments
    >>> lengths_from_segments(torch.tensor([[0, 0, 1], [0, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]]))
    (tensor([0, 2, 3, 4, 6], dtype=torch.int32), 2)

    ```
    """
    if attention_mask_BS is None:
        attention_mask_BS = torch.ones_like(segments_BS)
    if attention_mask_BS.shape != segments_BS.shape:
        raise ValueError(
            f"The attention mask has shape {tuple(attention_mask_BS.shape)}, expected "
            f"{tuple(segments_BS.shape)}: flash attention needs a 2-D mask, with a value for each token."
        )
    real_BS = attention_mask_BS.to(segments_BS.device, torch.bool)
    starts_BS = torch.ones_like(real_BS)
    starts_BS[:, 1:] = (segments_BS[:, 1:] != segments_BS[:, :-1]) | (real_BS[:, 1:] != real_BS[:, :-1])
    # Flash attention needs the number of documents and the longest length on the host. It waits for both
    # here, once in a forward. If the longest length stayed a tensor, every layer would wait for it.
    start_N = starts_BS.flatten().nonzero().flatten()
    cumulative = F.pad(start_N, (0, 1), value=segments_BS.numel()).int()
    segment_N, real_N = flatten_segments(segments_BS)[start_N], real_BS.flatten()[start_N]
    # Padding cuts a document in two if it holds tokens, then padding, then tokens.
    cut = ((segment_N[2:] == segment_N[:-2]) & real_N[2:]).any()
    longest, is_cut = torch.stack([cumulative.diff().max(), cut.int()]).tolist()
    if not torch.compiler.is_compiling() and is_cut:
        raise ValueError(
            "Padding lies inside a document, where flash attention cannot leave it out: move it to an end of "
            "the row, or use eager, sdpa or flex attention."
        )
    return cumulative, longest


def flatten_segments(segments_BS: torch.Tensor) -> torch.Tensor:
    """Number the segments of all rows one after the other: (B, S) to (T,).

    A new segment begins with each row, and wherever the number or id changes from one token to the next.

    Args:
        segments_BS (`torch.Tensor`): (B, S) segment numbers or document ids.

    Returns:
        `torch.Tensor`: (T,) int64 from 0, without gaps.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.modeling_emo import flatten_segments
    >>> flatten_segments(torch.tensor([[0, 0, 1], [0, 1, 2]])).tolist()
    [0, 0, 1, 2, 3, 4]

    ```
    """
    starts = F.pad((segments_BS[:, 1:] != segments_BS[:, :-1]).long(), (1, 0), value=1)
    return starts.flatten().cumsum(0) - 1


def count_segments(segment_T: torch.Tensor) -> int:
    """The number of rows that the table of pools needs: one for each segment, or for each of T tokens.

    On an accelerator the host would wait for the number of segments, and a compiled graph cannot depend on
    it. In both cases the table has a row for every token, and most rows stay empty.

    Args:
        segment_T (`torch.Tensor`): segment numbers from `flatten_segments`.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.modeling_emo.pools.segments import count_segments
    >>> count_segments(torch.tensor([0, 0, 1, 2, 2]))
    3

    ```
    """
    if segment_T.device.type != "cpu" or torch.compiler.is_compiling():
        return len(segment_T)
    return int(segment_T[-1]) + 1
