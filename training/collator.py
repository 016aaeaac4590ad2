"""`DocumentCollator` makes batches of packed windows and says which document each token belongs to.

Shape suffixes: B windows, S tokens of the longest one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..configuration import EmoConfig
from ..modeling_emo.pools.segments import segments_from_eos, segments_from_positions

_PADDING = -1  # the document of padding
_COLUMNS = {"input_ids", "labels", "document_ids", "seq_lengths", "position_ids", "attention_mask"}


class DocumentCollator:
    """Stacks windows into batches for EMO; a `data_collator` for `Trainer`.

    A window may say where its documents begin, in `document_ids` (W,) or in `seq_lengths`, the lengths of its
    documents. Otherwise `config.document_boundaries` decides: by default every EOS opens a segment. Set
    `remove_unused_columns=False`: `Trainer` removes columns that are not in the model's signature, and these
    two are not.

    Labels are a window's own `labels`, or its ids, also across the ends of documents. Windows that are
    shorter than others are padded on the right; padding has attention mask 0, label -100 and a document of
    its own, -1.

    Args:
        config (`EmoConfig`): the model's.
        window (`int`, *optional*): pad every batch to so many tokens, for shapes that never change.

    Raises:
        ValueError: on a call: if a window is longer than `window`, its columns differ in length, an id is
            not in the model's vocabulary, or documents cannot be told apart.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.training import DocumentCollator
    >>> collate = DocumentCollator(EmoConfig(eos_token_id=1))
    >>> batch = collate([{"input_ids": [5, 6, 1, 7]}, {"input_ids": [8, 1]}])
    >>> batch["document_ids"].tolist(), batch["labels"].tolist()
    ([[0, 0, 1, 1], [0, 1, -1, -1]], [[5, 6, 1, 7], [8, 1, -100, -100]])
    >>> batch["attention_mask"].tolist()
    [[1, 1, 1, 1], [1, 1, 0, 0]]

    ```
    """

    def __init__(self, config: EmoConfig, *, window: int | None = None):
        self.config = config
        self.window = window

    def __call__(self, windows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch.

        Args:
            windows (`Sequence[Mapping]`): each with `input_ids` (W,), and any of `labels`, `document_ids`,
                `seq_lengths`, `position_ids` and `attention_mask`: lists, arrays or tensors.

        Returns:
            `dict[str, torch.Tensor]`: `input_ids`, `labels`, `document_ids`, and `position_ids` where given,
            all (B, S) int64; `attention_mask` (B, S) int64 where `window` is given or something is padding.
        """
        rows = [self._row(window) for window in windows]
        batch = {
            # Any id can stand for padding: nothing attends to it, and it is no target.
            "input_ids": self._stack(rows, "input_ids", self.config.pad_token_id or 0),
            "labels": self._stack(rows, "labels", -100),
            "document_ids": self._stack(rows, "document_ids", _PADDING),
        }
        if any("position_ids" in row for row in rows):
            batch["position_ids"] = self._stack(rows, "position_ids", 0)
        self._check_ids(batch)
        mask = self._stack(rows, "attention_mask", 0)
        # Attention is fastest without a mask. But accelerate joins batches by the keys of the first, so the
        # mask is always there when padding is expected.
        if self.window is not None or not mask.all():
            batch["attention_mask"] = mask
        return batch

    def _check_ids(self, batch: dict[str, torch.Tensor]) -> None:
        """Refuse ids outside the vocabulary: on an accelerator they end in an error that names nothing."""
        lowest, highest = (int(value) for value in batch["input_ids"].aminmax())
        highest = max(highest, int(batch["labels"].max()))
        if lowest < 0 or highest >= self.config.vocab_size:
            raise ValueError(
                f"A batch holds ids from {lowest} to {highest}, and the model has those from 0 to "
                f"{self.config.vocab_size - 1}: encode the data with the model's own tokenizer."
            )

    def _row(self, window: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """One window's tensors, each (W,)."""
        row = {name: torch.as_tensor(value).long() for name, value in window.items() if name in _COLUMNS}
        ids = row["input_ids"]
        row.setdefault("labels", ids)
        mask = row.setdefault("attention_mask", torch.ones_like(ids))
        if "document_ids" not in row:
            row["document_ids"] = self._segments(row)
        row.pop("seq_lengths", None)
        for name, value in row.items():
            if value.shape != ids.shape:
                raise ValueError(
                    f"A window has {len(ids)} `input_ids` and `{name}` of shape {tuple(value.shape)}: "
                    f"expected ({len(ids)},). Give one value for each token."
                )
        # A window may come padded. Its padding is no target and joins no document either.
        row["labels"] = row["labels"].where(mask.bool(), -100)
        row["document_ids"] = row["document_ids"].where(mask.bool(), _PADDING)
        return row

    def _segments(self, row: dict[str, torch.Tensor]) -> torch.Tensor:
        """The document of each token, from `seq_lengths` or by the rule of the config."""
        ids, convention = row["input_ids"], self.config.document_boundaries
        if "seq_lengths" in row:
            lengths = row["seq_lengths"]
            if lengths.sum() != len(ids):
                raise ValueError(
                    f"The `seq_lengths` of a window add up to {int(lengths.sum())}, expected its {len(ids)} "
                    "tokens: correct the lengths, or remove the column."
                )
            return torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        if convention == "position_ids":
            if "position_ids" not in row:
                raise ValueError(
                    "`config.document_boundaries` is 'position_ids', and a window has none: add the column, "
                    "or tell documents apart by 'eos'."
                )
            return segments_from_positions(row["position_ids"][None])[0]
        if self.config.eos_token_id is None:
            raise ValueError(
                "Documents are told apart by EOS tokens, and `config.eos_token_id` is not set: set it, or "
                "give the column `document_ids`."
            )
        return segments_from_eos(ids[None], self.config.eos_token_id, eos_opens=convention == "eos")[0]

    def _stack(self, rows: list[dict[str, torch.Tensor]], name: str, padding: int) -> torch.Tensor:
        if missing := sum(name not in row for row in rows):
            raise ValueError(
                f"{missing} of {len(rows)} windows have no `{name}`, the others do: give it to all "
                "or to none."
            )
        stacked = pad_sequence([row[name] for row in rows], batch_first=True, padding_value=padding)
        if self.window is None:
            return stacked
        if stacked.shape[1] > self.window:
            raise ValueError(
                f"A window has {stacked.shape[1]} tokens, more than the collator's `window` of {self.window}"
                ": give the collator a larger one, or make shorter windows."
            )
        return torch.nn.functional.pad(stacked, (0, self.window - stacked.shape[1]), value=padding)
