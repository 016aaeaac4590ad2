"""`model_info` as a short text for people."""

from __future__ import annotations

from ..subsets.numbering import size_range
from .byte_text import bytes_text, columns
from .model_info import ModelInfo


def info_text(info: ModelInfo) -> str:
    """What `emo info` prints.

    Args:
        info (`ModelInfo`): from `model_info`.

    Example:

    ```python
    >>> from transformers_emo.planning import model_info
    >>> from transformers_emo.planning.info_text import info_text
    >>> print(info_text(model_info("model_cards/emo-tiny")).splitlines()[0])
    model_cards/emo-tiny: a full EMO, trained with document pools

    ```
    """
    parts = [_about(info), _sizes(info)]
    if info.budgets:
        rows = [["routed experts a layer", "expert_memory", "memory"]]
        rows += [
            [str(b.experts), bytes_text(b.expert_memory), bytes_text(b.memory_bytes)] for b in info.budgets
        ]
        parts.append("The whole model with a budget for experts:\n" + columns(rows))
    if info.subsets:
        rows = [["subset", "experts", "files", "memory"]]
        for one in info.subsets:
            if one.size is None:
                rows.append([one.name, "-", "-", f"cannot be used: {one.problem}"])
            else:
                size = one.size
                rows.append(
                    [one.name, one.experts, bytes_text(size.file_bytes), bytes_text(size.memory_bytes)]
                )
        parts.append("Ready subsets (expert_subset=NAME):\n" + columns(rows))
    parts.append(_needs(info))
    return "\n\n".join(parts)


def _about(info: ModelInfo) -> str:
    what = "a full EMO" if info.variant == "full" else "a subset of an EMO"
    pools = "trained with document pools"
    if not info.trained_with_pools:
        pools = "trained without document pools by its config: it loses quality with every expert"
    at = f" at {info.commit}" if info.commit else ""
    experts = "dense layers"
    if any(info.experts):
        experts = f"{size_range(n for n in info.experts if n)} experts"
        dense = info.experts.count(0)
        experts += f" ({info.shared} used by every token, {info.top_k} by each)"
        experts += f", {dense} of them dense" if dense else ""
    kept = f"{info.packed_bits} bits, computed in {info.dtype}" if info.packed_bits else info.dtype
    return (
        f"{info.model}{at}: {what}, {pools}\n"
        f"  {info.layers} layers of {experts}; {kept}; context {info.context} tokens\n"
        f"  {info.files} file{'s' * (info.files != 1)} of weights, {bytes_text(info.file_bytes)}; "
        f"keys and values take {bytes_text(info.cache_bytes)} a token"
    )


def _sizes(info: ModelInfo) -> str:
    bits = list(dict.fromkeys(size.bits for size in info.sizes))
    numbers = list(dict.fromkeys(tuple(size.experts) for size in info.sizes))
    found = {(tuple(size.experts), size.bits): size for size in info.sizes}
    heading = ["experts a layer", "weights"]
    for each in bits:
        heading += [f"{each} bits: files", "memory"]
    rows = [heading]
    for number in numbers:
        first = found[number, bits[0]]
        row = [
            size_range(n for n in number if n) if any(number) else "dense",
            f"{first.parameters / 1e6:,.1f} M",
        ]
        for each in bits:
            size = found.get((number, each))
            row += (
                ["-", "-"] if size is None else [bytes_text(size.file_bytes), bytes_text(size.memory_bytes)]
            )
        rows.append(row)
    return "Sizes:\n" + columns(rows)


def _needs(info: ModelInfo) -> str:
    machine = info.machine
    gpus = f", GPUs of {', '.join(map(bytes_text, machine.gpus))}" if machine.gpus else ""
    rows = [["", "memory", "disk", ""]]
    for need in info.needs:
        fits = "fits" if need.fits else need.problem or ""
        rows.append([need.command, bytes_text(need.memory), bytes_text(need.disk), fits])
    widest = max(len(row[3]) for row in rows)
    rows = [[*row[:3], row[3].ljust(widest)] for row in rows]
    return (
        f"This machine has {bytes_text(machine.free_memory)} of {bytes_text(machine.memory)} memory free, "
        f"{bytes_text(machine.free_disk)} of disk, {machine.processors} processors{gpus}:\n" + columns(rows)
    )
