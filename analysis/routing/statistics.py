"""Router statistics in one pass: which experts the tokens of each document go to, layer by layer."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ...checkpoints.source_files import LOADED_FILES, SourceFiles, unchanged
from ...checkpoints.writing.durable_files import make_folders
from ...checkpoints.writing.folder_lock import locked_folder
from ...checkpoints.writing.safetensors_writing import floating_dtype
from ...modeling_emo import EmoPreTrainedModel
from ...subsets.choosing.calibration_batches import Batch, Example, check_ids, make_batches
from ...subsets.choosing.hidden_states import HiddenStates
from ...subsets.choosing.layer_passes import pass_full_model
from ...subsets.choosing.layer_sources import Layers
from ...subsets.choosing.model_opening import OpenedModel, open_model
from ...subsets.loading.model_source import check_hub_kwargs
from .folder import RoutingStatistics
from .part_files import require_parquet, texts_of_part, write_part
from .recorder import LayerRecorder, Layout, picks_of, routed_ids
from .sources import Document
from .tokens import TokenisedDocument, tokenise
from .word_classes import WordClasses

PREFIXES = (8, 16, 32, 64, 128, 256)


def router_statistics(
    model: EmoPreTrainedModel | str | os.PathLike,
    documents: Iterable[Document],
    out: str | os.PathLike,
    *,
    process: tuple[int, int] = (0, 1),
    documents_per_part: int = 256,
    window: int | None = None,
    prefixes: Sequence[int] = PREFIXES,
    tokens_per_document: int = 512,
    vectors_per_document: int = 128,
    languages: Mapping[str, str] | None = None,
    batch_size: int = 8,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    hidden_memory: float = 4e9,
    progress: bool = True,
    **hub_kwargs: Any,
) -> RoutingStatistics:
    """Write down which experts the tokens of documents go to, in each layer.

    The documents are taken in parts. For each part the layers run one after the other, without the head. From
    a folder or repository a layer is read when its turn comes, and the whole model is never in memory. A part
    reads each layer once: larger parts read less, and keep more hidden states, in a temporary file beyond
    `hidden_memory`.

    Each part is written as two parquet files when it is done. An interrupted run goes on with the next part.
    Several processes, also on several machines, can share the work: each takes every n-th part, and the parts
    are the same, to the last bit, as if one had made them all.

    Args:
        model (`EmoPreTrainedModel`, `str` or `os.PathLike`): an EMO model, or its folder or repository.
        documents (`Iterable[Document]`): the documents; see `documents_of`. A stream is read once, and never
            held.
        out (`str` or `os.PathLike`): the folder of the parts.
        process (`tuple[int, int]`, defaults to `(0, 1)`): which of how many processes this is, from 0.
        documents_per_part (`int`, defaults to 256): documents in a part.
        window (`int`, *optional*): cut documents to so many tokens; the model's context by default.
        prefixes (`Sequence[int]`): numbers of first tokens for which each document's probabilities are added
            up by themselves.
        tokens_per_document (`int`, defaults to 512): of how many first tokens to keep the picks one by one.
        vectors_per_document (`int`, defaults to 128): of how many of these to keep all probabilities.
        languages (`Mapping[str, str]`, *optional*): the languages of domains whose parts of speech shall be
            told; see `WordClasses`.
        batch_size (`int`, defaults to 8): documents in a batch; fewer where they are long.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): by default the one beside the model.
        dtype (`str` or `torch.dtype`, *optional*): for a folder or repository: what to run in.
        device (`str` or `torch.device`, *optional*): for a folder or repository: where to run.
        hidden_memory (`float`, defaults to 4e9): bytes of hidden states to hold in memory.
        progress (`bool`, defaults to `True`): show progress bars.
        hub_kwargs: `revision`, `token`, `cache_dir` and so on, as for `from_pretrained`.

    Returns:
        `RoutingStatistics`: the folder, for reading. Other processes may still be at work on it.

    Raises:
        ValueError: if a number is out of range, there is no document, or the folder holds statistics of
        another
            model, of other texts or of other settings.
        ImportError: if pyarrow is not installed.
        BlockingIOError: if another run does the same share of the parts in this folder.
        CheckpointError: if a folder or repository does not hold the whole model.

    Example:

    ```python
    >>> from transformers_emo.analysis.routing import documents_of, router_statistics
    >>> documents = documents_of("model_cards/toy-emo/documents", limit=4)
    >>> found = router_statistics("model_cards/toy-emo", documents, tmp_path, window=32, progress=False)
    >>> found.num_documents, found.layers
    (4, [0, 1, 2, 3])

    ```
    """
    require_parquet()
    check_hub_kwargs("router_statistics", hub_kwargs)
    _check_numbers(
        documents_per_part=documents_per_part,
        tokens_per_document=tokens_per_document,
        vectors_per_document=vectors_per_document,
        batch_size=batch_size,
    )
    number, processes = process
    if not 0 <= number < processes:
        raise ValueError(f"`process` is {process}, expected (0, n) to (n - 1, n) for n processes.")
    classes = WordClasses(languages)
    run_in = None if dtype is None else floating_dtype(dtype)
    files = []
    if isinstance(model, str | os.PathLike):
        files = [SourceFiles.of(model, patterns=LOADED_FILES, subfolder=hub_kwargs.get("subfolder"))]
    make_folders(Path(out))
    with unchanged(*files), locked_folder(Path(out) / f".process-{number + 1}-of-{processes}"):
        opened = open_model(model, run_in, device, hub_kwargs)
        window = min(window or opened.config.max_position_embeddings, opened.config.max_position_embeddings)
        settings = {
            "model": opened.place,
            "revision": opened.source.commit,
            "fingerprint": opened.fingerprint(),
            "dtype": None if run_in is None else str(run_in).removeprefix("torch."),
            "layers": {
                str(index): {"experts": routed_ids(layer), "picks": picks_of(layer)}
                for index, layer in enumerate(opened.config.layer_experts)
                if not layer.is_dense
            },
            "documents_per_part": documents_per_part,
            "window": window,
            "prefixes": sorted({int(prefix) for prefix in prefixes if 0 < prefix < window}),
            "tokens_per_document": min(tokens_per_document, window),
            "vectors_per_document": min(vectors_per_document, tokens_per_document, window),
            "languages": classes.languages,
        }
        if not settings["layers"]:
            raise ValueError(
                f"The model {opened.place!r} has no layer with experts: there is no router in it."
            )
        RoutingStatistics.begin(out, settings)
        run = _Run(
            opened,
            out,
            tokenizer or opened.find_tokenizer(),
            classes,
            settings,
            batch_size,
            run_in,
            device,
            hidden_memory,
            progress,
        )
        total = len(documents) if hasattr(documents, "__len__") else None  # type: ignore[arg-type]
        count = 0
        with tqdm(total=total, desc="Documents", unit="doc", disable=not progress) as bar:
            for part, rows in enumerate(_parts(documents, documents_per_part)):
                count += len(rows)
                if part % processes == number:
                    run.do_part(part, rows)
                bar.update(len(rows))
        if not count:
            raise ValueError("There is no document: give at least one whose text is not empty.")
        RoutingStatistics.end(out, count)
    return RoutingStatistics(out)


def _check_numbers(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"`{name}` is {value}, expected at least 1.")


def _parts(documents: Iterable[Document], size: int) -> Iterator[list[tuple[int, Document]]]:
    rows = enumerate(documents)
    while part := list(islice(rows, size)):
        yield part


@dataclass(frozen=True)
class _Run:
    """One run over all parts."""

    opened: OpenedModel
    out: str | os.PathLike
    tokenizer: PreTrainedTokenizerBase
    classes: WordClasses
    settings: dict[str, Any]
    batch_size: int
    dtype: torch.dtype | None
    device: str | torch.device | None
    hidden_memory: float
    progress: bool

    def do_part(self, part: int, rows: list[tuple[int, Document]]) -> None:
        """Run the documents of a part through the model, if that was not done before."""
        texts = _recognised_by(rows)
        done = texts_of_part(self.out, part)
        if done == texts:
            return
        if done is not None:
            raise ValueError(
                f"Part {part} in {os.fspath(self.out)!r} was made of other documents: give the same ones in "
                "the same order, or another folder."
            )
        documents = tokenise(
            rows,
            self.tokenizer,
            self.classes,
            window=self.settings["window"],
            num_described=self.settings["tokens_per_document"],
        )
        examples = [Example(one.ids, [True] * len(one.ids)) for one in documents]
        batches = make_batches(examples, self.batch_size, "token")
        check_ids(batches, self.opened.config.vocab_size)
        recorders = self._recorders(documents, batches)
        if batches:
            token_ids = torch.cat([batch.input_ids.flatten() for batch in batches])
            with self.opened.layers(token_ids, self.dtype, self.device) as layers:
                self._pass(layers, batches, recorders, part)
        written = {index: one for index, one in enumerate(recorders) if one is not None}
        write_part(self.out, part, texts, documents, written)

    def _recorders(
        self, documents: Sequence[TokenisedDocument], batches: Sequence[Batch]
    ) -> list[LayerRecorder | None]:
        layouts, first = [], 0
        for batch in batches:
            row_T, position_T = torch.where(batch.attention_mask)
            layouts.append(Layout(row_T + first, position_T))
            first += len(batch.input_ids)
        return [
            None
            if layer.is_dense
            else LayerRecorder(
                layer,
                layouts,
                [len(one.ids) for one in documents],
                prefixes=self.settings["prefixes"],
                num_picks=self.settings["tokens_per_document"],
                num_vectors=self.settings["vectors_per_document"],
            )
            for layer in self.opened.config.layer_experts
        ]

    def _pass(
        self, layers: Layers, batches: list[Batch], recorders: list[LayerRecorder | None], part: int
    ) -> None:
        total = len(batches) * len(recorders)
        with tqdm(
            total=total, desc=f"Part {part}", unit="batch", leave=False, disable=not self.progress
        ) as bar:
            # A layer in memory costs the same each time. So one batch at a time goes through all layers.
            for group in [[batch] for batch in batches] if layers.in_memory else [batches]:
                pass_full_model(layers, group, list(recorders), HiddenStates(self.hidden_memory), bar)


def _recognised_by(rows: Sequence[tuple[int, Document]]) -> str:
    digest = hashlib.sha256()
    for index, document in rows:
        for field in (str(index), document.domain, document.split, document.text):
            content = field.encode("utf-8", "surrogatepass")
            digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()[:32]
