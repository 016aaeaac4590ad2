"""All files that `emo retention` writes to its folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .claims import claims, claims_text
from .files import write_text
from .measurements import Retention
from .pictures.plots import plot_domains, plot_retention, plot_topics
from .retention import SHARES
from .tables import markdown, write_csv
from .topics import TopicCosine


def write_report(
    retention: Retention,
    out: str | os.PathLike,
    *,
    baseline: str | None = None,
    shares: Sequence[float] = SHARES,
    topics: Mapping[str, TopicCosine] | None = None,
    plots: bool = True,
) -> str:
    """Write the curve as tables and pictures, and the paper's claims in numbers.

    The files are `retention.csv`, `retention.md`, `retention.png`, `retention_domains.png` and `claims.json`.
    With topics there is also `topics.png`, and their cosines are in `claims.json`.

    Args:
        retention (`Retention`): the measurements.
        out (`str` or `os.PathLike`): the folder.
        baseline (`str`, *optional*): the model that the others are compared with; see `claims`.
        shares (`Sequence[float]`): the columns of the tables; see `markdown`.
        topics (`Mapping[str, TopicCosine]`, *optional*): from `topic_cosine`, by the models' names.
        plots (`bool`, defaults to `True`): draw pictures.

    Returns:
        `str`: the table of mean losses and the claims, as markdown.

    Raises:
        ValueError: if there is no such baseline.
        ImportError: if pictures are asked for and matplotlib is not installed.

    Example:

    ```python
    >>> from transformers_emo.analysis import Measurement, Retention, write_report
    >>> retention = Retention([
    ...     Measurement("emo", "python", "full", 1.0, 32, None, [6.0, 3.0], [1, 1], [2, 1]),
    ...     Measurement("emo", "python", "global", 0.5, 16, 0, [7.0, 3.5], [1, 1], [2, 1]),
    ... ])
    >>> summary = write_report(retention, tmp_path, plots=False)
    >>> sorted(path.name for path in tmp_path.iterdir())
    ['claims.json', 'retention.csv', 'retention.md']

    ```
    """
    out = Path(out)
    found: dict[str, Any] = claims(retention, baseline=baseline)
    said = claims_text(found)
    for name, topic in (topics or {}).items():
        found.setdefault("topic_cosine", {})[name] = {
            "mean": topic.mean,
            "domains": topic.domains,
            "matrix": [[round(value, 6) for value in row] for row in topic.cosine_MM.tolist()],
        }
        said += f"\n- {name}, cosine between the routing of two domains: {topic.mean:.3f} in the mean."
    tables = markdown(retention, shares)
    if topics:
        found["notes"]["topic_cosine"] = "of the domains' mean routed probabilities, all layers concatenated"
    write_csv(retention, out / "retention.csv")
    write_text(out / "claims.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
    write_text(out / "retention.md", f"# Retention\n\n{tables}\n## In numbers\n\n{said}\n")
    if plots:
        plot_retention(retention, out / "retention.png")
        plot_domains(retention, out / "retention_domains.png")
        if topics:
            plot_topics(topics, out / "topics.png")
    return f"{tables.split('## Next-token')[0].rstrip()}\n\n{said}"
