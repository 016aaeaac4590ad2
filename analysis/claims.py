"""The paper's claims as numbers: what removing experts costs a model, beside another (paper section 5).

Shape suffix: W resamplings of the documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .measurements import FULL, Retention

_RISES = (0.05, 0.1, 0.25, 0.5)


def cliff(retention: Retention, model: str, method: str, rise: float) -> float | None:
    """The share of experts at which a model's mean loss has risen by a given amount.

    Between two measured shares the loss is interpolated, linearly in the logarithm of the share; the first
    crossing on the way down counts.

    Args:
        retention (`Retention`): what was measured.
        model (`str`): the model's name.
        method (`str`): how its experts were chosen.
        rise (`float`): nats per token above the full model.

    Returns:
        `float`, *optional*: the share; `None` if the loss has not risen so far at the smallest measured share.

    Raises:
        ValueError: if the rise is not positive, or the full model or this method was not measured.

    Example:

    ```python
    >>> from transformers_emo.analysis import Measurement, Retention, cliff
    >>> losses = {("full", 1.0): 2.0, ("global", 0.5): 2.0, ("global", 0.25): 2.4}
    >>> retention = Retention([
    ...     Measurement("emo", "python", method, share, int(32 * share), None, [loss], [0], [1])
    ...     for (method, share), loss in losses.items()
    ... ])
    >>> round(cliff(retention, "emo", "global", 0.2), 4)  # half-way between a half and a quarter
    0.3536

    ```
    """
    if not rise > 0:
        raise ValueError(f"The rise is {rise!r} nats, expected more than 0.")
    points = [
        (share, loss)
        for share in retention.shares
        if (loss := retention.loss(model, method, share)) is not None
    ]
    if len(points) < 2 or points[0][0] < 1:
        raise ValueError(f"The full model {model!r} and its subsets by {method!r} were not both measured.")
    limit = points[0][1] + rise
    for (above, before), (below, after) in zip(points, points[1:], strict=False):
        if after >= limit:
            return float(above * (below / above) ** ((limit - before) / (after - before)))
    return None


def claims(
    retention: Retention,
    *,
    baseline: str | None = None,
    shares: Sequence[float] = (0.25, 0.125),
    rises: Sequence[float] = _RISES,
    num_resamplings: int = 1000,
) -> dict[str, Any]:
    """What the curve says, in numbers.

    Args:
        retention (`Retention`): what was measured.
        baseline (`str`, *optional*): the model beside which the others stand, for example the standard
            mixture of experts trained alike.
        shares (`Sequence[float]`): where to compare.
        rises (`Sequence[float]`): nats per token that make a cliff.
        num_resamplings (`int`, defaults to 1000): of the documents, for the intervals.

    Returns:
        `dict[str, Any]`: JSON data. `models`: for each its full loss and accuracy and, by method, the rise of
        the mean loss at each share, its ratio to the rise of random experts and the cliffs; `against`: for
        each model but the baseline the gap of the full models and, by method, the ratio of the rises. `notes`
        says what each is. Intervals are 95 % of the bootstrap over documents, the same documents for all
        models and choices.

    Raises:
        ValueError: if there is no such baseline.

    Example:

    ```python
    >>> from transformers_emo.analysis import Measurement, Retention, claims
    >>> losses = {"emo": (2.1, 2.2), "standard": (2.0, 3.0)}
    >>> retention = Retention([
    ...     Measurement(model, "python", method, share, int(32 * share), None, [loss], [0], [1])
    ...     for model, pair in losses.items()
    ...     for loss, method, share in zip(pair, ("full", "global"), (1.0, 0.25))
    ... ])
    >>> against = claims(retention, baseline="standard")["against"]["emo"]
    >>> round(against["full_gap"]["value"], 3), round(against["rise_ratio"]["global"]["0.25"]["value"], 3)
    (0.05, 0.1)

    ```
    """
    if baseline is not None and baseline not in retention.models:
        raise ValueError(
            f"There is no model {baseline!r} to compare with, expected one of {retention.models}."
        )

    def rise_W(model: str, method: str, share: float) -> np.ndarray | None:
        """The rise and, after it, the same under resampling, (1 + W,)."""
        parts = [
            _resampled(retention, model, m, s, num_resamplings) for m, s in ((method, share), (FULL, 1.0))
        ]
        return None if parts[0] is None or parts[1] is None else parts[0] - parts[1]

    by_model: dict[str, Any] = {}
    for model in retention.models:
        found: dict[str, Any] = {
            "full_loss": retention.loss(model, FULL, 1.0),
            "full_accuracy": retention.accuracy(model, FULL, 1.0),
            "methods": {},
        }
        for method in retention.methods:
            numbers: dict[str, Any] = {"rise": {}, "rise_over_random": {}}
            for share in shares:
                rise, random = rise_W(model, method, share), rise_W(model, "random", share)
                if rise is not None:
                    numbers["rise"][f"{share:g}"] = _interval(rise)
                if rise is not None and random is not None and method != "random":
                    numbers["rise_over_random"][f"{share:g}"] = _ratio(rise, random)
            measured = any(
                retention.loss(model, method, share) is not None for share in retention.shares if share < 1
            )
            if found["full_loss"] is not None and measured:
                numbers["cliff"] = {f"{rise:g}": cliff(retention, model, method, rise) for rise in rises}
            found["methods"][method] = numbers
        by_model[model] = found

    against: dict[str, Any] = {}
    for model in retention.models if baseline is not None else ():
        if model == baseline:
            continue
        ours, theirs = (_resampled(retention, name, FULL, 1.0, num_resamplings) for name in (model, baseline))
        compared: dict[str, Any] = {"baseline": baseline, "rise_ratio": {}}
        if ours is not None and theirs is not None:
            compared["full_gap"] = _interval(ours / theirs - 1)
        for method in retention.methods:
            ratios = {}
            for share in shares:
                ours, theirs = rise_W(model, method, share), rise_W(baseline, method, share)
                if ours is not None and theirs is not None:
                    ratios[f"{share:g}"] = _ratio(ours, theirs)
            compared["rise_ratio"][method] = ratios
        against[model] = compared
    return {
        "models": by_model,
        "against": against,
        "notes": {
            "rise": "mean loss above that of the full model, nats per token",
            "cliff": "share of experts at which the mean loss has risen by so many nats, linear in the logarithm "
            "of the share between measured shares; null if not even at the smallest measured share",
            "full_gap": "mean loss of the full model over that of the full baseline, less 1",
            "rise_ratio": "rise of the model over the rise of the baseline; null where the latter may be none",
            "rise_over_random": "rise over that of random experts; null where the latter may be none",
            "interval": f"95 % of {num_resamplings} resamplings of the documents",
        },
    }


def claims_text(found: dict[str, Any]) -> str:
    """The claims as markdown lines.

    Args:
        found (`dict[str, Any]`): from `claims`.

    Returns:
        `str`: markdown.

    Example:

    ```python
    >>> from transformers_emo.analysis import Measurement, Retention, claims, claims_text
    >>> full = Measurement("emo", "python", "full", 1.0, 32, None, [6.0, 3.0], [1, 1], [2, 1])
    >>> print(claims_text(claims(Retention([full]))))
    - emo: full model 3.000 nats per token, accuracy 66.7 %.

    ```
    """
    lines = []
    for model, numbers in found["models"].items():
        if numbers["full_loss"] is not None:
            lines.append(
                f"- {model}: full model {numbers['full_loss']:.3f} nats per token, accuracy "
                f"{100 * numbers['full_accuracy']:.1f} %."
            )
        for method, by in numbers["methods"].items():
            for share, rise in by["rise"].items():
                line = f"- {model}, {method}, {_percent(share)} of the experts: {_signed(rise)} nats"
                over = by["rise_over_random"].get(share)
                lines.append(line + (f", {over['value']:.3f} of what random experts cost." if over else "."))
            if "cliff" in by:
                places = "; ".join(
                    f"+{rise} at {'no measured share' if share is None else f'{100 * share:.1f} %'}"
                    for rise, share in by["cliff"].items()
                )
                lines.append(
                    f"- {model}, {method}, where the loss has risen (interpolated in log share): {places}."
                )
    for model, compared in found["against"].items():
        baseline = compared["baseline"]
        if "full_gap" in compared:
            gap = {name: 100 * value for name, value in compared["full_gap"].items()}
            lines.append(f"- {model} against {baseline}, full models: {_signed(gap, '.1f')} %.")
        for method, ratios in compared["rise_ratio"].items():
            for share, ratio in ratios.items():
                if ratio is None:
                    continue
                value = ratio["value"]
                times = f" (1/{1 / value:.1f})" if value > 0 else ""
                lines.append(
                    f"- {model} against {baseline}, {method}, {_percent(share)}: the loss rises by {value:.3f}{times} "
                    f"of what {baseline}'s does [{ratio['low']:.3f}, {ratio['high']:.3f}]."
                )
    return "\n".join(lines)


def _resampled(retention: Retention, model: str, method: str, share: float, num: int) -> np.ndarray | None:
    """The mean loss and, after it, the same under resampling, (1 + W,)."""
    loss = retention.loss(model, method, share)
    if loss is None:
        return None
    return np.concatenate([[loss], retention.resampled_loss(model, method, share, num=num)])


def _interval(values: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return {"value": float(values[0]), "low": float(low), "high": float(high)}


def _ratio(rises: np.ndarray, others: np.ndarray) -> dict[str, float] | None:
    """`None` where the other rise may be none at all: a ratio to it says nothing."""
    return None if (others <= 0).any() else _interval(rises / others)


def _signed(interval: dict[str, Any], form: str = ".3f") -> str:
    value, low, high = (interval[name] for name in ("value", "low", "high"))
    return f"{value:+{form}} [{low:+{form}}, {high:+{form}}]"


def _percent(share: str) -> str:
    return f"{100 * float(share):g} %"
