"""Collecting scores of experts, part by part of the text."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ...checkpoints.source_files import LOADED_FILES, SourceFiles, unchanged
from ...checkpoints.writing.durable_files import make_folders
from ...checkpoints.writing.folder_lock import locked_folder
from ...checkpoints.writing.safetensors_writing import floating_dtype
from ...modeling_emo import EmoPreTrainedModel
from ..choosing.calibration import CalibrationText
from ..choosing.hidden_states import HiddenStates
from ..choosing.layer_passes import pass_full_model
from ..choosing.model_opening import OpenedModel, open_model
from ..choosing.scores import ExpertOutput, new_score
from ..loading.model_source import check_hub_kwargs
from .folder import PartSums, SelectionStatistics
from .pieces import add_to_digest, pieces_of, recognised_by

METHODS = ("global", "easy_ep", "reap")


def collect_statistics(
    model: EmoPreTrainedModel | str | os.PathLike,
    texts: CalibrationText | Iterable | str,
    out: str | os.PathLike,
    *,
    method: str = "global",
    texts_per_part: int = 256,
    process: tuple[int, int] = (0, 1),
    exclude_experts: Any = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    hidden_memory: float = 4e9,
    progress: bool = True,
    **hub_kwargs: Any,
) -> SelectionStatistics:
    """Write down the scores of experts, part by part of the text, for choosing experts later.

    Each part is written when it is done. A run that was killed goes on with the next part, and gives the same
    files. Several processes can share the parts, in one folder or in one each; `merged_subsets` adds them up.
    It adds parts in their order. So the choice is the same to the last bit for any number of processes, and
    for any number of interruptions. The text is read and encoded part by part, and never held.

    `"layerwise"` cannot do that: it chooses the experts of a layer by all texts, before it goes on.

    Args:
        model (`EmoPreTrainedModel`, `str` or `os.PathLike`): as for `select_experts`.
        texts (`CalibrationText`, `Iterable` or `str`): the texts and how they are read. A `dataset` of a
            `CalibrationText` is read row by row.
        out (`str` or `os.PathLike`): the folder of the parts.
        method (`str`, defaults to `"global"`): `"global"`, `"easy_ep"` or `"reap"`.
        texts_per_part (`int`, defaults to 256): texts (or ready batches) in a part. For each part every layer
            is read once.
        process (`tuple[int, int]`, defaults to `(0, 1)`): which of how many processes this is, from 0. It
            does every n-th part.
        exclude_experts, dtype, device, hidden_memory, hub_kwargs: as for `select_experts`.
        progress (`bool`, defaults to `True`): show a progress bar.

    Returns:
        `SelectionStatistics`: the folder. Other processes may still be at work on it.

    Raises:
        ValueError: if a number is out of range, the method is unknown or cannot be collected, there is no
            text, or the folder holds scores of another model, of other texts or of other settings.
        BlockingIOError: if another run does the same share of the parts in this folder.
        CheckpointError: if a folder or repository does not hold the whole model, or changes meanwhile.

    Example:

    ```python
    >>> from transformers_emo.subsets.collecting import collect_statistics, merged_subsets
    >>> texts = ["import os", "def main():", "x = 1"]
    >>> for number in range(2):
    ...     _ = collect_statistics("model_cards/toy-emo", texts, tmp_path, texts_per_part=1,
    ...                            process=(number, 2), progress=False)
    >>> [subset] = merged_subsets([tmp_path], [8])
    >>> subset.num_texts, len(subset.experts[0])
    (3, 8)

    ```
    """
    check_hub_kwargs("collect_statistics", hub_kwargs)
    _check(method, texts_per_part, process, hidden_memory)
    calibration = CalibrationText.of(texts)
    if not calibration.is_given:
        raise ValueError("There is no calibration text: give texts, a `dataset` or ready `input_ids`.")
    run_in = None if dtype is None else floating_dtype(dtype)
    files = []
    if isinstance(model, str | os.PathLike):
        files = [SourceFiles.of(model, patterns=LOADED_FILES, subfolder=hub_kwargs.get("subfolder"))]
    number, processes = process
    make_folders(Path(out))
    with unchanged(*files), locked_folder(Path(out) / f".process-{number + 1}-of-{processes}"):
        opened = open_model(model, run_in, device, hub_kwargs)
        excluded = opened.excluded(exclude_experts, reads_weights=True)
        folder = SelectionStatistics.begin(
            out,
            {
                "model": opened.place,
                "revision": opened.source.commit,
                "fingerprint": opened.fingerprint(),
                "config": _shape(opened),
                "method": method,
                "excluded": [sorted(ids) for ids in excluded],
                "dtype": None if run_in is None else str(run_in).removeprefix("torch."),
                "texts_per_part": texts_per_part,
                "max_length": calibration.max_length,
                "tokens": calibration.tokens,
                "weight_by": calibration.weight_by,
                "batch_size": calibration.batch_size,
            },
        )
        run = _Run(opened, folder, method, run_in, device, hidden_memory)
        digest, parts = hashlib.sha256(), 0
        with tqdm(desc="Parts of the text", unit="part", disable=not progress) as bar:
            for part, piece in enumerate(pieces_of(calibration, texts_per_part)):
                recognised = recognised_by(piece)
                add_to_digest(digest, piece)
                if part % processes == number:
                    run.do_part(part, piece, recognised)
                parts += 1
                bar.update()
        if not parts:
            raise ValueError("There is no calibration text: give at least one text that is not empty.")
        folder.end(parts, digest.hexdigest()[:32])
    return folder


def _check(method: str, texts_per_part: int, process: tuple[int, int], hidden_memory: float) -> None:
    if method not in METHODS:
        hint = ""
        if method == "layerwise":
            hint = (
                " 'layerwise' chooses each layer by all texts before it goes on to the next, so no part of "
                "the texts can be scored by itself."
            )
        raise ValueError(
            f"Scores by {method!r} cannot be collected: choose one of {', '.join(METHODS)}.{hint}"
        )
    if not isinstance(texts_per_part, int) or texts_per_part < 1:
        raise ValueError(f"`texts_per_part` is {texts_per_part!r}, expected a whole number from 1.")
    number, processes = process
    if not 0 <= number < processes:
        raise ValueError(f"`process` is {process}, expected (0, n) to (n - 1, n) for n processes.")
    if not hidden_memory >= 0:
        raise ValueError(f"`hidden_memory` is {hidden_memory!r}, expected bytes, from 0.")


def _shape(opened: OpenedModel) -> dict[str, Any]:
    """The config as JSON data, without what says where the model is."""
    config = json.loads(opened.config.to_json_string(use_diff=False))
    return {name: config[name] for name in config if name not in ("_name_or_path", "transformers_version")}


@dataclass(frozen=True)
class _Run:
    """One run over all parts of a process."""

    opened: OpenedModel
    folder: SelectionStatistics
    method: str
    dtype: torch.dtype | None
    device: str | torch.device | None
    hidden_memory: float

    def do_part(self, part: int, piece: CalibrationText, recognised: str) -> None:
        """Score the texts of a part, if that was not done before."""
        done = self.folder.texts_of(part)
        if done == recognised:
            return
        if done is not None:
            raise ValueError(
                f"Part {part} in {os.fspath(self.folder.folder)!r} was made of other texts: give the same "
                "ones in the same order, or another folder."
            )
        config = self.opened.config
        [batches] = piece.batches(config, self.opened.find_tokenizer, may_be_empty=True)
        scores = [new_score(self.method, layer) for layer in config.layer_experts]
        if batches:
            token_ids = torch.cat([batch.input_ids.flatten() for batch in batches])
            with (
                self.opened.layers(token_ids, self.dtype, self.device) as layers,
                tqdm(disable=True) as bar,
            ):
                # A layer in memory costs the same each time. So one batch at a time goes through all layers.
                for group in [[batch] for batch in batches] if layers.in_memory else [batches]:
                    pass_full_model(layers, group, scores, HiddenStates(self.hidden_memory), bar)
        sums: dict[int, torch.Tensor] = {}
        weights: dict[int, torch.Tensor] = {}
        for index, score in enumerate(scores):
            if score is None:
                continue
            sums[index] = score.sum_E
            if isinstance(score, ExpertOutput):
                weights[index] = score.weight_E
            else:
                weights[index] = torch.tensor([score.weight], dtype=torch.float64)
        counted = [batch.weight > 0 for batch in batches]
        self.folder.write(
            part,
            PartSums(
                texts=recognised,
                num_texts=sum(int(counts_BS.any(-1).sum()) for counts_BS in counted),
                num_tokens=sum(int(counts_BS.sum()) for counts_BS in counted),
                sums=sums,
                weights=weights,
            ),
        )
