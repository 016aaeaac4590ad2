"""`emo select` with scores that are collected in parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .analysis.routing import read_share


def collected(
    model: str,
    folders: Sequence[str],
    statistics: str | None,
    text: Mapping[str, Any],
    experts: Sequence[int],
    *,
    method: str,
    budget: str,
    part: int | None,
    process: str | None,
    exclude: Any,
    hub: Mapping[str, Any],
    run: Mapping[str, Any],
) -> Any:
    """Collect scores, or take those of folders, and choose by them.

    Args:
        model (`str`): folder or Hub repository.
        folders (`Sequence[str]`): those of `--merge`.
        statistics (`str`, *optional*): that of `--statistics`.
        text (`Mapping[str, Any]`): arguments of `CalibrationText`.
        experts (`Sequence[int]`): experts a layer.
        method, budget, part, process, exclude: the command's options.
        hub, run: arguments of `collect_statistics`.

    Returns:
        `list[ExpertSubset]`; or what to tell, if other processes are not done yet.

    Raises:
        ValueError: if folders do not go together, or are of another model.

    Example: see `emo select`.
    """
    from transformers_emo.subsets.choosing.calibration import CalibrationText
    from transformers_emo.subsets.collecting import collect_statistics, merged_subsets

    if statistics is not None:
        number, processes = (0, 1) if process is None else read_share(process)
        parts: dict[str, Any] = {} if part is None else {"texts_per_part": part}
        found = collect_statistics(
            model,
            CalibrationText(**text),
            statistics,
            method=method,
            process=(number, processes),
            exclude_experts=exclude,
            **parts,
            **run,
            **hub,
        )
        folders = [statistics]
        if missing := found.missing():
            done = found.num_parts - len(missing)
            return (
                f"{statistics}: {done} of {found.num_parts} parts are done; the process that does the "
                "last one chooses, or --merge with the folders of all"
            )
    else:
        _check_model(model, folders, hub)
    return merged_subsets(folders, experts, budget=budget)


def _check_model(model: str, folders: Sequence[str], hub: Mapping[str, Any]) -> None:
    """Check that scores are of this model, as far as its signs tell."""
    from transformers_emo.subsets.choosing.model_opening import open_model
    from transformers_emo.subsets.collecting import SelectionStatistics
    from transformers_emo.subsets.fingerprint import differing_signs

    here = open_model(model, None, None, dict(hub)).fingerprint()
    for folder in folders:
        reason = differing_signs(SelectionStatistics(folder).settings.get("fingerprint"), here)
        if reason is not None:
            raise ValueError(f"The scores in {folder!r} are not of the model {model}: {reason}. Name theirs.")
