"""Choosing experts by scores that several runs collected."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from ...configuration import EmoConfig
from ..choosing.choice import Choice, check_num_experts
from ..choosing.scores import new_score
from ..expert_subset import ExpertSubset
from .folder import SelectionStatistics

# What runs may differ in: where the model was, and how the text was cut.
_MAY_DIFFER = ("model", "texts_per_part", "batch_size")


def merged_subsets(
    folders: Sequence[str | os.PathLike], num_experts: Sequence[int], *, budget: str = "uniform"
) -> list[ExpertSubset]:
    """Choose experts by the scores of all parts in some folders, as if one run had read all texts.

    Folders that processes filled for the same texts (`process=(0, 4)` and so on) complete each other. Folders
    of different texts add up. Parts are added in their order, whatever the order of the folders.

    Args:
        folders (`Sequence[str | os.PathLike]`): what `collect_statistics` wrote.
        num_experts (`Sequence[int]`): experts to keep in a layer, for each subset.
        budget (`str`, defaults to `"uniform"`): as for `select_experts`.

    Returns:
        `list[ExpertSubset]`: one subset for each number.

    Raises:
        ValueError: if a folder holds no scores, they are of different models or settings, a part is missing,
            texts would count twice, or no token counts.
        SubsetError: if a layer has fewer experts than asked for.

    Example: see `collect_statistics`.
    """
    if not folders:
        raise ValueError("There are no folders of scores to merge: name at least one.")
    if budget not in ("uniform", "mass"):
        raise ValueError(f"Unknown budget {budget!r}, expected one of uniform, mass.")
    found = [SelectionStatistics(folder) for folder in folders]
    first = found[0]
    for other in found[1:]:
        if difference := first.differs(other.settings, ignored=_MAY_DIFFER):
            raise ValueError(
                f"{os.fspath(first.folder)!r} and {os.fspath(other.folder)!r} cannot be merged: the first "
                f"has {difference} in the second. Merge scores of one model and one method."
            )
    parts = _parts(found)
    config = EmoConfig.from_dict(first.settings["config"])
    method = first.settings["method"]
    scores = [new_score(method, layer) for layer in config.layer_experts]
    num_texts = num_tokens = 0
    for folder, part in parts:
        sums = folder.read(part)
        sums.add_to(scores)
        num_texts += sums.num_texts
        num_tokens += sums.num_tokens
    if not num_tokens:
        raise ValueError("There is no calibration token in these folders: collect scores of other texts.")
    excluded = [set(ids) for ids in first.settings["excluded"]]
    sizes = list(num_experts)
    choice = Choice(
        config, method, budget, sizes, first.settings["model"], first.settings["revision"], excluded
    )
    check_num_experts(config, sizes, choice.excluded)
    results = [None if score is None else score.result() for score in scores]
    subsets = choice.of_scores(results, num_texts=num_texts, num_tokens=num_tokens)
    return [replace(subset, fingerprint=first.settings["fingerprint"]) for subset in subsets]


def _parts(found: Sequence[SelectionStatistics]) -> list[tuple[SelectionStatistics, int]]:
    """Where each part is, in the order in which they are added; nothing twice and nothing missing."""
    by_texts: dict[str, list[SelectionStatistics]] = {}
    for folder in found:
        alike = by_texts.setdefault(folder.texts, [])
        if alike and alike[0].num_parts != folder.num_parts:
            raise ValueError(
                f"{os.fspath(alike[0].folder)!r} and {os.fspath(folder.folder)!r} are of the same texts, in "
                f"{alike[0].num_parts} and {folder.num_parts} parts, and would count twice: leave one out."
            )
        alike.append(folder)
    places: list[tuple[int, str, SelectionStatistics]] = []
    for texts, folders in by_texts.items():
        num_parts = folders[0].num_parts
        here: dict[int, SelectionStatistics] = {}
        for folder in folders:
            for part in folder.done():
                if part in here and here[part].folder.resolve() == folder.folder.resolve():
                    raise ValueError(f"{os.fspath(folder.folder)!r} is named twice: name each folder once.")
                if part in here:
                    raise ValueError(
                        f"Part {part} of the same texts is in {os.fspath(here[part].folder)!r} and in "
                        f"{os.fspath(folder.folder)!r}, and would count twice: leave one folder out."
                    )
                here[part] = folder
        missing = [part for part in range(num_parts) if part not in here]
        if missing:
            names = ", ".join(repr(os.fspath(folder.folder)) for folder in folders)
            raise ValueError(
                f"{len(missing)} of {num_parts} parts are missing in {names}, such as part {missing[0]}: run "
                "the processes that did not finish again, or name their folders too."
            )
        places += [(part, texts, folder) for part, folder in here.items()]
    return [(folder, part) for part, _, folder in sorted(places, key=lambda place: place[:2])]
