"""Experts by layer as a picture for a web page, and the domains of a request as bars.

Colours are names of CSS classes: `page.css` gives them for light and for dark pages.

Shape suffixes: L layers, E experts of the root model.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

import torch

from ...subsets.monitoring.domain_usage import RequestUsage

_LEVELS = 6
_CELL, _ROW, _GAP = 10, 18, 4  # units of the picture


def heat_map(picks_LE: torch.Tensor, last_LE: torch.Tensor, held: Sequence[Sequence[int]]) -> str:
    """A row a layer and a cell an expert: the darker, the more often picked.

    Args:
        picks_LE (`torch.Tensor`): (L, E) how often each expert was picked.
        last_LE (`torch.Tensor`): (L, E) the same for the last token, whose cells get a frame.
        held (`Sequence[Sequence[int]]`): for each layer the routed experts in memory. The others have
            no cell.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.analysis.trying.heat_map import heat_map
    >>> picks = torch.tensor([[0.0, 3.0, 1.0]])
    >>> heat_map(picks, torch.tensor([[0.0, 0.0, 1.0]]), [[0, 1, 2]]).count("<rect")
    3

    ```
    """
    width = picks_LE.shape[1] * _CELL
    layers = [layer for layer, ids in enumerate(held) if ids]
    step = _ROW + _GAP
    empty, cells, frames = [], [], []
    for row, layer in enumerate(layers):
        picks, last = picks_LE[layer].tolist(), last_LE[layer].tolist()
        most, top = max(1.0, *picks), row * step + _GAP / 2
        for expert in held[layer]:
            left, count = expert * _CELL, int(picks[expert])
            if not count:
                empty.append(f"M{left + 1} {top:g}h{_CELL - 2}v{_ROW}h-{_CELL - 2}z")
                continue
            level = 1 + min(_LEVELS - 1, int((count - 1) / most * _LEVELS))
            told = f"layer {layer}, expert {expert}: {count} {'pick' if count == 1 else 'picks'}"
            cells.append(
                f'<rect class="c{level}" x="{left + 1}" y="{top:g}" width="{_CELL - 2}" height="{_ROW}">'
                f"<title>{told}</title></rect>"
            )
            if last[expert]:
                frames.append(
                    f'<rect class="now" x="{left + 1}" y="{top:g}" width="{_CELL - 2}" height="{_ROW}"/>'
                )
    height = len(layers) * step
    names = "".join(f"<span>layer {layer}</span>" for layer in layers)
    total = int(picks_LE.sum())
    told = f"Experts by layer: {total} picks by {int((picks_LE > 0).sum())} experts."
    scale = "".join(f'<i style="background: var(--emo-{level})"></i>' for level in range(1, _LEVELS + 1))
    return (
        f'<div class="emo"><div class="map"><div class="names">{names}</div><div class="wide">'
        f'<svg role="img" aria-label="{told}" viewBox="0 0 {width} {height}" preserveAspectRatio="none" '
        f'style="height: {height}px; min-width: {picks_LE.shape[1] * 5}px">'
        f'<path class="c0" d="{"".join(empty)}"/>{"".join(cells)}{"".join(frames)}</svg></div></div>'
        f'<div class="legend"><span class="scale">{scale} few to many picks</span>'
        '<span><i style="border: 2px solid var(--emo-now)"></i>the last token</span>'
        '<span><i style="background: var(--emo-0)"></i>in memory, not picked</span></div></div>'
    )


def domain_bars(usage: RequestUsage | None, *, num_domains: int = 6) -> str:
    """How much of a request's routing went to each domain, beside what chance would give.

    Args:
        usage (`RequestUsage`, *optional*): of the request; `None` if the model has no library of domains.
        num_domains (`int`, defaults to 6): how many to show.

    Example:

    ```python
    >>> from transformers_emo.analysis.trying.heat_map import domain_bars
    >>> from transformers_emo.subsets import DomainShare, RequestUsage
    >>> "50 %" in domain_bars(RequestUsage(3, {"math": DomainShare(0.5, 0.25)}, []))
    True

    ```
    """
    if usage is None:
        return '<div class="emo soft">The model has no library of domains (subsets/*.json beside it).</div>'
    rows = "".join(
        f"<span>{html.escape(name)}</span>"
        f'<span class="bar" role="img" aria-label="{share.share:.0%}, by chance {share.by_chance:.0%}">'
        f'<b style="width: {100 * min(1, share.share):.1f}%"></b>'
        f'<u style="left: {100 * share.by_chance:.1f}%"></u></span>'
        f"<span>{100 * share.share:.0f} %</span>"
        for name, share in list(usage.domains.items())[:num_domains]
    )
    return (
        f'<div class="emo"><div class="bars">{rows}</div><div class="legend"><span>'
        '<i style="background: var(--emo-3)"></i>share of the routing that its experts got</span>'
        '<span><i style="background: var(--emo-now); width: 2px"></i>by chance</span></div></div>'
    )
