"""The paper's claims as numbers: what removing experts costs a model, compared with another one (section 5).

Shape suffix: W resamplings of the documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .measurements import FULL, Retention
from .tables import table

_RISES = (0.05, 0.1, 0.25, 0.5)


def cliff(retention: Retention, model: str, method: str, rise: float) -> float | None:
    """The share of experts at which a model's mean loss has risen by a given amount.

    Between two measured shares the loss is interpolated, linearly in the logarithm of the share. If the loss
    crosses the limit several times, the crossing at the largest share counts.

    Args:
        retention (`Retention`): the measurements.
        model (`str`): the model's name.
        method (`str`): how its experts were chosen.
        rise (`float`): nats per token above the full model.

    Returns:
        `float`, *optional*: the share; `None` if the loss has not risen so much at the smallest share
            measured.

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
        raise ValueError(f"`rise` is {rise!r} nats, expected a number above 0.")
    points = [
        (share, loss)
        for share in retention.shares
        if (loss := retention.loss(model, method, share)) is not None
    ]
    if len(points) < 2 or points[0][0] < 1:
        raise ValueError(
            f"The full model {model!r} and its subsets by {method!r} were not both measured: measure them "
            "with `measure_retention`."
        )
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
    """The retention curve in numbers.

    Args:
        retention (`Retention`): the measurements.
        baseline (`str`, *optional*): the model that the others are compared with, such as a standard mixture
            of experts that was trained in the same way.
        shares (`Sequence[float]`): the shares of experts at which to compare.
        rises (`Sequence[float]`): the rises of the loss, in nats per token, for which to find a cliff.
        num_resamplings (`int`, defaults to 1000): how often documents are resampled for the intervals.

    Returns:
        `dict[str, Any]`: JSON data. `models` has for each model the loss and accuracy with all experts, and
        by method the rise of the mean loss at each share, its ratio to the rise with random experts, and the
        cliffs. `against` has for each model but the baseline the gap between the full models, and by method
        the ratio of the rises. `notes` explains each number. Intervals hold 95 % of the bootstrap over
        documents. All models and choices see the same resampled documents.

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

    options = {"shares": shares, "num": num_resamplings}
    by_model = {model: _of_model(retention, model, rises=rises, **options) for model in retention.models}
    against = {}
    if baseline is not None:
        others = [model for model in retention.models if model != baseline]
        against = {model: _against(retention, model, baseline, **options) for model in others}
    return {
        "models": by_model,
        "against": against,
        "notes": {
            "rise": "mean loss above that of the full model, nats per token",
            "cliff": "share of experts at which the mean loss has risen by so many nats, linear in the "
            "logarithm of the share between measured shares; null if not even at the smallest measured share",
            "full_gap": "mean loss of the full model over that of the full baseline, less 1",
            "rise_ratio": "rise of the model over that of the baseline; null where the latter may be none",
            "rise_over_random": "rise over that of random experts; null where the latter may be none",
            "interval": f"95 % of {num_resamplings} resamplings of the documents",
        },
    }


def claims_text(found: dict[str, Any]) -> str:
    """The claims as markdown tables.

    Args:
        found (`dict[str, Any]`): from `claims`.

    Returns:
        `str`: markdown.

    Example:

    ```python
    >>> from transformers_emo.analysis import Measurement, Retention, claims, claims_text
    >>> full = Measurement("emo", "python", "full", 1.0, 32, None, [6.0, 3.0], [1, 1], [2, 1])
    >>> half = Measurement("emo", "python", "global", 0.5, 16, 0, [7.0, 5.0], [1, 0], [2, 1])
    >>> print(claims_text(claims(Retention([full, half]), shares=[0.5])).splitlines()[2])
    | emo | global | +1.000 [+0.500, +2.000] | – | 96.6 % | 93.3 % | 84.1 % | 70.7 % |

    ```
    """
    kinds = [numbers for model in found["models"].values() for numbers in model["methods"].values()]
    shares = list(dict.fromkeys(share for numbers in kinds for share in numbers["rise"]))
    rises = list(dict.fromkeys(rise for numbers in kinds for rise in numbers.get("cliff", ())))
    head = ["model", "chosen by"]
    head += [title for share in shares for title in (f"rise at {_percent(share)}", "of random's")]
    rows = []
    for model, numbers in found["models"].items():
        for method, by in numbers["methods"].items():
            row = [model, method]
            for share in shares:
                over = by["rise_over_random"].get(share)
                row += [_signed(by["rise"].get(share)), "–" if over is None else f"{over['value']:.3f}"]
            places = [by.get("cliff", {}).get(rise) for rise in rises]
            rows.append(row + ["–" if place is None else f"{100 * place:.1f} %" for place in places])
    lines = table([*head, *(f"+{rise} at" for rise in rises)], rows)
    for model, compared in found["against"].items():
        baseline = compared["baseline"]
        rows = []
        for method, ratios in compared["rise_ratio"].items():
            cells = [_fraction(ratios.get(share)) for share in shares]
            rows.append([method, *cells])
        gap = {name: 100 * value for name, value in compared.get("full_gap", {}).items()}
        said = f" The loss of the full model is {_signed(gap, '.1f')} % above." if gap else ""
        lines += ["", f"{model} against {baseline}.{said} Its rise as a part of {baseline}'s:", ""]
        lines += table(["chosen by", *(_percent(share) for share in shares)], rows)
    notes = (
        "Rises of the mean loss in nats per token, with 95 % of the bootstrap over documents. Where the loss "
        "has risen by so much is interpolated, linearly in the logarithm of the share (–: not even at the "
        "smallest measured share)."
    )
    return "\n".join([*lines, "", notes])


def _of_model(retention: Retention, model: str, *, shares, rises, num) -> dict[str, Any]:
    full_loss = retention.loss(model, FULL, 1.0)
    methods: dict[str, Any] = {}
    for method in retention.methods_of(model):
        numbers: dict[str, Any] = {"rise": {}, "rise_over_random": {}}
        for share in shares:
            rise = _resampled_rise(retention, model, method, share, num)
            random = _resampled_rise(retention, model, "random", share, num)
            if rise is not None:
                numbers["rise"][f"{share:g}"] = _interval(rise)
            if rise is not None and random is not None and method != "random":
                numbers["rise_over_random"][f"{share:g}"] = _ratio(rise, random)
        smaller = [share for share in retention.shares if share < 1]
        if full_loss is not None and any(retention.loss(model, method, s) is not None for s in smaller):
            numbers["cliff"] = {f"{rise:g}": cliff(retention, model, method, rise) for rise in rises}
        methods[method] = numbers
    return {
        "full_loss": full_loss,
        "full_accuracy": retention.accuracy(model, FULL, 1.0),
        "methods": methods,
    }


def _against(retention: Retention, model: str, baseline: str, *, shares, num) -> dict[str, Any]:
    compared: dict[str, Any] = {"baseline": baseline, "rise_ratio": {}}
    ours, theirs = (_resampled(retention, name, FULL, 1.0, num) for name in (model, baseline))
    if ours is not None and theirs is not None:
        compared["full_gap"] = _interval(ours / theirs - 1)
    for method in retention.methods_of(model):
        ratios = {}
        for share in shares:
            rises = [_resampled_rise(retention, name, method, share, num) for name in (model, baseline)]
            if rises[0] is not None and rises[1] is not None:
                ratios[f"{share:g}"] = _ratio(rises[0], rises[1])
        compared["rise_ratio"][method] = ratios
    return compared


def _resampled_rise(
    retention: Retention, model: str, method: str, share: float, num: int
) -> np.ndarray | None:
    """The rise over the full model, followed by the rise in each resampling, (1 + W,)."""
    subset, full = (_resampled(retention, model, m, s, num) for m, s in ((method, share), (FULL, 1.0)))
    return None if subset is None or full is None else subset - full


def _resampled(retention: Retention, model: str, method: str, share: float, num: int) -> np.ndarray | None:
    """The mean loss, followed by the mean loss in each resampling, (1 + W,)."""
    loss = retention.loss(model, method, share)
    if loss is None:
        return None
    return np.concatenate([[loss], retention.resampled_loss(model, method, share, num=num)])


def _interval(values: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return {"value": float(values[0]), "low": float(low), "high": float(high)}


def _ratio(rises: np.ndarray, others: np.ndarray) -> dict[str, float] | None:
    """`None` if the other rise may be zero or less: a ratio to it means nothing."""
    return None if (others <= 0).any() else _interval(rises / others)


def _signed(interval: dict[str, float] | None, form: str = ".3f") -> str:
    if interval is None:
        return "–"
    value, low, high = (interval[name] for name in ("value", "low", "high"))
    return f"{value:+{form}} [{low:+{form}}, {high:+{form}}]"


def _fraction(ratio: dict[str, float] | None) -> str:
    if ratio is None:
        return "–"
    fraction = f"1/{1 / ratio['value']:.1f}: " if 0 < ratio["value"] < 1 else ""
    return f"{fraction}{ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"


def _percent(share: str) -> str:
    return f"{100 * float(share):g} %"
