"""The retention curve as data of a page."""

from __future__ import annotations

from typing import Any

from ..claims import cliff
from ..measurements import Retention

CLIFF = 0.1  # nats per token above the full model: where the cliff is marked


def curves(retention: Retention | None) -> dict[str, Any] | None:
    """The curves of all models and methods, in the mean over domains and for each domain, with the cliff.

    Args:
        retention (`Retention`, *optional*): the measurements.

    Returns:
        `dict[str, Any]`, *optional*: JSON data: `domains`, the first of which is the mean of all, and for
        each
            `model` and `method` the `points` by domain, each with `share`, `experts`, `loss`, `error` and
            `rise`, and the `cliff`, the share at which the mean loss has risen by `rise` nats. `None` without
            measurements.

    Example:

    ```python
    >>> from transformers_emo.analysis import Measurement, Retention
    >>> from transformers_emo.analysis.page.curves import curves
    >>> retention = Retention([
    ...     Measurement("emo", "python", method, share, int(32 * share), None, [loss], [0], [1])
    ...     for method, share, loss in (("full", 1.0, 2.0), ("global", 0.5, 2.0), ("global", 0.25, 2.4))
    ... ])
    >>> found = curves(retention)
    >>> found["curves"][0]["model"], [point["rise"] for point in found["curves"][0]["points"]["python"]]
    ('emo', [0.0, 0.0, 0.4])

    ```
    """
    if retention is None:
        return None
    mean = f"mean of {len(retention.domains)} domains"
    by_domain = {mean: retention}
    for domain in retention.domains:
        by_domain[domain] = Retention([m for m in retention.measurements if m.domain == domain])
    found = []
    for model in retention.models:
        for method in retention.methods_of(model):
            points = {name: _points(part, model, method) for name, part in by_domain.items()}
            if len(points[mean]) > 1 and points[mean][0]["share"] == 1:
                at = cliff(retention, model, method, CLIFF)
                found.append({"model": model, "method": method, "points": points, "cliff": at})
    return {"domains": list(by_domain), "curves": found, "rise": CLIFF}


def _points(retention: Retention, model: str, method: str) -> list[dict[str, Any]]:
    full = retention.loss(model, method, 1.0)
    points = []
    for share in retention.shares:
        loss = retention.loss(model, method, share)
        if loss is None:
            continue
        points.append(
            {
                "share": share,
                "experts": retention.num_experts(model, share),
                "loss": round(loss, 4),
                "error": round(retention.loss_error(model, method, share) or 0.0, 4),
                "rise": None if full is None else round(loss - full, 4),
            }
        )
    return points
