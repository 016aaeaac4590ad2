"""A plan as a short text for people."""

from __future__ import annotations

from .byte_text import bytes_text, columns
from .plan import Plan


def plan_text(plan: Plan, model: str) -> str:
    """What `emo plan` prints.

    Args:
        plan (`Plan`): from `plan_run`.
        model (`str`): what the model is called.

    Example:

    ```python
    >>> from transformers_emo.planning import plan_run
    >>> from transformers_emo.planning.plan_text import plan_text
    >>> print(plan_text(plan_run("model_cards/emo-tiny"), "emo-tiny").splitlines()[0])
    emo-tiny, served by 1 rank of h200

    ```
    """
    layout, hardware, training = plan.layout, plan.hardware, plan.task == "train"
    ranks = f"{plan.ranks:,} rank{'s' * (plan.ranks > 1)} of {hardware.name}"
    ways = [
        f"{name} {size}"
        for name, size in (
            ("tensor", layout.tp_size),
            ("FSDP2", layout.fsdp_size),
            ("experts", layout.ep_size),
            ("replicas", layout.replicas),
        )
        if size > 1
    ]
    heading = f"{model}, {'trained' if training else 'served'} by {ranks}"
    heading += f" ({', '.join(ways)})" if ways else ""
    held = [
        ("weights", plan.weight_bytes),
        ("gradients", plan.gradient_bytes),
        ("moments of AdamW", plan.optimiser_bytes),
        ("gathered by FSDP2", plan.gathered_bytes),
        ("keys and values", plan.cache_bytes),
        ("activations, estimated", plan.activation_bytes),
    ]
    rows = [["memory of a rank", ""], *([name, bytes_text(size)] for name, size in held if size)]
    fits = "fits" if plan.fits else "does not fit"
    rows.append(["together", bytes_text(plan.memory_bytes)])
    memory = columns(rows) + f"\n  {fits} into {bytes_text(hardware.memory)}"
    with_overlap, without = plan.step_seconds
    least, most = plan.tokens_per_second
    work = [
        ["a step of a rank", "", "at least"],
        ["operations", _operations(plan.rank_flops), _seconds(plan.compute_seconds)],
        ["memory read and written", bytes_text(plan.read_bytes), _seconds(plan.memory_seconds)],
        *(["sent: " + one.what, bytes_text(one.size), f"{one.group} ranks"] for one in plan.sent),
        ["sent together", bytes_text(plan.sent_bytes), _seconds(plan.link_seconds)],
    ]
    what = "update" if training else "token of every sequence"
    speed = f"at most {most:,.0f} tokens a second of all ranks"
    if plan.sent:
        speed += f" where sending overlaps computing, {least:,.0f} where it does not"
    return (
        f"{heading}\n"
        f"  {plan.parameters / 1e6:,.1f} M weights, {plan.token_parameters / 1e6:,.1f} M for one token, "
        f"{_operations(plan.token_flops)} a token\n\n{memory}\n\n{columns(work)}\n\n"
        f"  One {what}, {plan.step_tokens:,} tokens: {_seconds(with_overlap)} to {_seconds(without)}; "
        f"{speed}.\n"
        "  Rates are the makers' peaks: what cannot be beaten, not what will be measured."
    )


def _seconds(seconds: float) -> str:
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 1e-9:.3g} ns"


def _operations(number: float) -> str:
    for unit, name in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= unit:
            return f"{number / unit:.3g} {name}FLOP"
    return f"{number:.3g} FLOP"
