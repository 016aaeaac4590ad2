"""The retention curve as CSV and as markdown."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence

from .files import write_text
from .measurements import FULL, Retention, experts_at

COLUMNS = (
    *("model", "domain", "method", "share", "num_experts", "seed"),
    *("loss", "loss_error", "accuracy", "tokens", "documents"),
)


def write_csv(retention: Retention, path: str | os.PathLike) -> None:
    """Write one row for each model, domain, method, share and seed.

    `loss` is in nats per token, `loss_error` is its standard error over documents, and `accuracy` is the
    share of tokens that were predicted correctly. The full model is the method `full`, which has no seed.

    Args:
        retention (`Retention`): the measurements.
        path (`str` or `os.PathLike`): the file. It is replaced if it exists.

    Example:

    ```python
    >>> from transformers_emo.analysis import Measurement, Retention, write_csv
    >>> full = Measurement("emo", "python", "full", 1.0, 32, None, [6.0, 3.0], [1, 1], [2, 1])
    >>> write_csv(Retention([full]), tmp_path / "retention.csv")
    >>> print((tmp_path / "retention.csv").read_text().splitlines()[1])
    emo,python,full,1,32,,3.000000,0.000000,0.666667,3,2

    ```
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for m in retention.measurements:
        error = m.loss_error
        writer.writerow(
            [
                *(
                    m.model,
                    m.domain,
                    m.method,
                    f"{m.share:g}",
                    m.num_experts,
                    "" if m.seed is None else m.seed,
                ),
                f"{m.mean_loss:.6f}",
                "" if error is None else f"{error:.6f}",
                f"{m.accuracy:.6f}",
                *(sum(m.tokens), len(m.tokens)),
            ]
        )
    write_text(path, text.getvalue())


def markdown(retention: Retention, shares: Sequence[float] | None = None) -> str:
    """The curve as tables: mean loss and accuracy for each method, and the loss in each domain.

    Args:
        retention (`Retention`): the measurements.
        shares (`Sequence[float]`, *optional*): the columns; by default the shares that were measured. A note
            names the shares that a model cannot have, and those at which a token takes fewer experts than in
            the full model.

    Returns:
        `str`: markdown.

    Example:

    ```python
    >>> from transformers_emo.analysis import Measurement, Retention, markdown
    >>> full = Measurement("emo", "python", "full", 1.0, 32, None, [6.0, 3.0], [1, 1], [2, 1])
    >>> print(markdown(Retention([full])).splitlines()[0])
    ## Mean test loss (nats per token)

    ```
    """
    columns = sorted({1.0, *(shares or retention.shares)}, reverse=True)
    head = [f"{100 * share:g} %" for share in columns]
    some = next(iter(retention.measurements))
    documents = {m.domain: len(m.tokens) for m in retention.measurements if m.model == some.model}
    tokens = {m.domain: sum(m.tokens) for m in retention.measurements if m.model == some.model}
    error = (
        f"± is the standard deviation over {retention.num_seeds} seeds, which draw calibration documents."
        if retention.num_seeds > 1
        else "± is the standard error over documents."
    )
    lines = [
        "## Mean test loss (nats per token)",
        "",
        f"Mean over {len(documents)} domains of {sum(documents.values()):,} test documents, "
        f"{sum(tokens.values()):,} tokens. In brackets the rise over all experts. {error}",
        "",
        *table(["model", "chosen by", *head], _loss_rows(retention, columns)),
        *_small_shares(retention, columns),
        "",
        "## Next-token accuracy",
        "",
        *table(["model", "chosen by", *head], _accuracy_rows(retention, columns)),
    ]
    for method in retention.methods:
        rows = []
        for domain in retention.domains:
            part = Retention([m for m in retention.measurements if m.domain == domain])
            for model in part.models:
                if method not in retention.methods_of(model):
                    continue
                cells = [_cell(part.loss(model, method, share), "{:.3f}") for share in columns]
                rows.append([domain, model, *cells])
        lines += ["", f"## Test loss by domain, experts chosen by {method}", ""]
        lines += table(["domain", "model", *head], rows)
    return "\n".join(lines) + "\n"


def _loss_rows(retention: Retention, columns: Sequence[float]) -> list[list[str]]:
    rows = []
    for model in retention.models:
        kept = [retention.num_experts(model, share) for share in columns]
        rows.append([model, "*experts kept*", *("–" if k is None else str(k) for k in kept)])
        full = retention.loss(model, FULL, 1.0)
        for method in retention.methods_of(model):
            row = [model, method]
            for share in columns:
                loss, error = retention.loss(model, method, share), retention.loss_error(model, method, share)
                cell = _cell(loss, "{:.3f}")
                if loss is not None and error is not None:
                    cell += f" ± {error:.3f}"
                if loss is not None and full is not None and share < 1:
                    cell += f" ({loss - full:+.3f})"
                row.append(cell)
            rows.append(row)
    return rows


def _small_shares(retention: Retention, columns: Sequence[float]) -> list[str]:
    """The notes on shares that a model cannot have, and on those at which a token takes fewer experts."""
    said = []
    for model in retention.models:
        available, least, taken = retention.layer_size(model)
        numbers = {f"{100 * share:g} %": experts_at(share, available, least) for share in columns}
        impossible = [share for share, number in numbers.items() if number is None]
        if impossible:
            named = ", ".join(impossible)
            said.append(
                f"{model} has no {named} of its {available} experts: a subset keeps at least {least}."
            )
        fewer = [share for share, number in numbers.items() if number is not None and number < taken]
        if fewer:
            said.append(f"At {', '.join(fewer)} a token of {model} takes all that are kept, not {taken}.")
    return ["", *said] if said else []


def _accuracy_rows(retention: Retention, columns: Sequence[float]) -> list[list[str]]:
    rows = []
    for model in retention.models:
        for method in retention.methods_of(model):
            values = [retention.accuracy(model, method, share) for share in columns]
            rows.append([model, method, *("–" if v is None else f"{100 * v:.1f} %" for v in values)])
    return rows


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A markdown table, line by line.

    Args:
        head (`Sequence[str]`): the columns' titles.
        rows (`Sequence[Sequence[str]]`): the cells.

    Example:

    ```python
    >>> from transformers_emo.analysis.tables import table
    >>> table(["a", "b"], [["1", "2"]])
    ['| a | b |', '|---|---|', '| 1 | 2 |']

    ```
    """
    return [
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
