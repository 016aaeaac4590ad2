"""Calibration text: what experts are chosen on, and which of its tokens count.

A `CalibrationText` says where the text is from and how it is read. `calibration_batches` makes batches of it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from itertools import chain, islice
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ...checkpoints.hub.names import folder_or_repo
from ...configuration import EmoConfig
from ..validation import is_id
from .calibration_batches import Batch, check_ids, doubling, encode, make_batches, ready_batches
from .rows import read_column

_TOKENS = ("all", "prompt", "answer")
_WEIGHTS = ("token", "text")


@dataclass(frozen=True, eq=False)
class CalibrationText:
    """The text that experts are chosen on: texts, a dataset or token ids, and how they are read.

    It checks itself when it is made: before a model is opened. `select_experts` makes one of its arguments,
    and takes one in place of `texts`.

    Args:
        texts (`Iterable` or `str`, *optional*): texts, or chats (lists of messages with `role` and
            `content`), several or one. A generator is read at once, an open text file line by line. Rows of a
            dataset are taken as `dataset`.
        answers (`Iterable[str]` or `str`, *optional*): an answer to each text. It is encoded by itself and
            follows its text.
        dataset (iterable of `dict`, `str` or `os.PathLike`, *optional*): rows that hold the texts, such as a
            `datasets.Dataset`, also a streamed one; or a JSONL file, by its path or open. Instead of `texts`.
            What can be read only once is kept, for the next choice.
        column (`str`, defaults to `"text"`): the dataset's column of texts or chats.
        answer_column (`str`, *optional*): the dataset's column of answers.
        max_texts (`int`, *optional*): take only the first so many texts.
        input_ids (*optional*): batches (B, S) of token ids, lists or tensors, several or one. Instead of
            texts.
        attention_mask (*optional*): a mask (B, S) for each of these batches, 0 for padding.
        labels (*optional*): labels (B, S) for each of these batches, -100 for a token that is no answer.
        tokens (`str`, defaults to `"all"`): which tokens count: `"all"`, `"prompt"` or `"answer"`. Answers,
            labels or the roles in a chat tell them apart. The model reads all tokens in any case.
        weight_by (`str`, defaults to `"token"`): `"token"`: every token counts the same; `"text"`: every text
            does.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): for the texts; that of the model by default.
        max_length (`int`, *optional*): cut texts to so many tokens: prompts with answers and chats on the
            left, other texts on the right. The model's context by default.
        batch_size (`int`, defaults to 8): texts in one batch; fewer where they are long.

    Raises:
        ValueError: if a setting is unknown or out of range, more than one kind of text is given, something is
            given that belongs to another kind, or batches differ in shape.

    Example:

    ```python
    >>> from transformers_emo import select_experts
    >>> from transformers_emo.subsets.choosing.calibration import CalibrationText
    >>> sums = CalibrationText(["1+1=", "1+2="], answers=["2", "3"], tokens="answer")
    >>> select_experts("model_cards/toy-emo", sums, 8, progress=False).num_tokens
    2

    ```
    """

    texts: Iterable | str | None = None
    _: KW_ONLY
    answers: Iterable[str] | str | None = None
    dataset: Iterable[dict] | str | os.PathLike | None = None
    column: str = "text"
    answer_column: str | None = None
    max_texts: int | None = None
    input_ids: Any = None
    attention_mask: Any = None
    labels: Any = None
    tokens: str = "all"
    weight_by: str = "token"
    tokenizer: PreTrainedTokenizerBase | None = None
    max_length: int | None = None
    batch_size: int = 8

    def __post_init__(self):
        self._check_settings()
        self._check_sources()
        self._take_rows()
        if self.texts is not None:
            texts = _several("texts", self.texts, self.max_texts)
            answers = None if self.answers is None else _several("answers", self.answers, self.max_texts)
            self._check_texts(texts, answers)
            object.__setattr__(self, "texts", texts)
            object.__setattr__(self, "answers", answers)
        if self.input_ids is not None:
            self._check_ids()

    @classmethod
    def of(cls, texts: Any, **settings: Any) -> CalibrationText:
        """The calibration text that the arguments of `select_experts` describe.

        Args:
            texts: a `CalibrationText`, which is returned, or texts as for the class.
            settings: as for the class.

        Raises:
            ValueError: as for the class; or if settings are given in addition to a `CalibrationText`.

        Example:

        ```python
        >>> from transformers_emo.subsets.choosing.calibration import CalibrationText
        >>> CalibrationText.of("import os", max_length=64).texts
        ['import os']

        ```
        """
        if not isinstance(texts, cls):
            return cls(texts, **settings)
        defaults = {field.name: field.default for field in fields(cls)}
        for name, value in settings.items():
            default = defaults[name]
            if value is not default and (default is None or value != default):
                raise ValueError(
                    f"`{name}` is given in addition to a `CalibrationText`: give it to that instead."
                )
        return texts

    @classmethod
    def of_documents(cls, documents: Sequence[torch.Tensor], batch_size: int = 8) -> CalibrationText:
        """Documents that are token ids already, padded into batches.

        Args:
            documents (`Sequence[torch.Tensor]`): the token ids (S,) of each document.
            batch_size (`int`, defaults to 8): documents in one batch.

        Raises:
            ValueError: if a document is not (S,), or the batch size is below 1.

        Example:

        ```python
        >>> import torch
        >>> from transformers_emo.subsets.choosing.calibration import CalibrationText
        >>> documents = [torch.tensor([5, 6, 7]), torch.tensor([8])]
        >>> CalibrationText.of_documents(documents).attention_mask
        [tensor([[1, 1, 1],
                [1, 0, 0]])]

        ```
        """
        if not is_id(batch_size) or batch_size < 1:
            raise ValueError(f"`batch_size` is {batch_size!r}, expected an integer from 1.")
        wrong = next((ids for ids in documents if ids.dim() != 1), None)
        if wrong is not None:
            raise ValueError(f"A document is of shape {tuple(wrong.shape)}, expected (S,): its token ids.")
        groups = [documents[start : start + batch_size] for start in range(0, len(documents), batch_size)]
        return cls(
            input_ids=[pad_sequence(list(group), batch_first=True) for group in groups],
            attention_mask=[
                pad_sequence([torch.ones_like(ids) for ids in group], batch_first=True) for group in groups
            ],
        )

    @property
    def is_given(self) -> bool:
        """Whether there is any text. A choice at random needs none."""
        return any(source is not None for source in (self.texts, self.dataset, self.input_ids))

    def batches(
        self,
        config: EmoConfig,
        find_tokenizer: Callable[[], PreTrainedTokenizerBase],
        *,
        in_parts: bool = False,
        may_be_empty: bool = False,
        progress: bool = False,
    ) -> list[list[Batch]]:
        """Read the text and make batches of it.

        Args:
            config (`EmoConfig`): that of the model which will read them.
            find_tokenizer (`Callable`): gives the model's tokenizer; called only if it is needed.
            in_parts (`bool`, defaults to `False`): cut the text into parts of 1, 1, 2, 4, 8 ... texts or
                ready batches.
            may_be_empty (`bool`, defaults to `False`): that no token counts is no error.
            progress (`bool`, defaults to `False`): show a progress bar while a dataset is read.

        Returns:
            `list[list[Batch]]`: the batches of each part; of one part by default.

        Raises:
            ValueError: if no token counts, a token is unknown to the model, a row of the dataset lacks a
                column, or there is no tokenizer.
            OSError: if the file of the dataset cannot be read.

        Example:

        ```python
        >>> from transformers import AutoTokenizer
        >>> from transformers_emo import EmoConfig
        >>> from transformers_emo.subsets.choosing.calibration import CalibrationText
        >>> toy = "model_cards/toy-emo"
        >>> [[batch]] = CalibrationText(["1+1=2", "1"]).batches(
        ...     EmoConfig.from_pretrained(toy), lambda: AutoTokenizer.from_pretrained(toy)
        ... )
        >>> batch.attention_mask.sum(-1).tolist()
        [5, 1]

        ```
        """
        if self.dataset is not None:
            return self._read_dataset(progress).batches(config, find_tokenizer, in_parts=in_parts)
        if self.input_ids is not None:
            ready = ready_batches(
                self.input_ids, self.attention_mask, self.labels, self.tokens, self.weight_by
            )
            parts = doubling(ready) if in_parts else [ready]
        else:
            examples = encode(
                list(self.texts or []),
                None if self.answers is None else list(self.answers),
                self.tokenizer or find_tokenizer(),
                self.tokens,
                self.max_length or config.max_position_embeddings,
            )
            parts = [
                make_batches(part, self.batch_size, self.weight_by)
                for part in (doubling(examples) if in_parts else [examples])
            ]
        batches = [batch for part in parts for batch in part]
        if not may_be_empty and not any(batch.weight.any() for batch in batches):
            raise ValueError(
                "There is no calibration token: give at least one text that is not empty. (A generator or a "
                "stream can be read only once: make a list of it, or a new one.)"
            )
        check_ids(batches, config.vocab_size)
        return parts

    def _read_dataset(self, progress: bool) -> CalibrationText:
        """The same with the texts of the dataset."""
        columns = [self.column] if self.answer_column is None else [self.column, self.answer_column]
        dataset = () if self.dataset is None else self.dataset
        texts, *answers = read_column(dataset, columns, self.max_texts, progress=progress)
        if isinstance(dataset, Iterator):  # now used up
            rows = zip(texts, *answers, strict=True)
            object.__setattr__(self, "dataset", [dict(zip(columns, row, strict=True)) for row in rows])
        return replace(
            self, texts=texts, answers=answers[0] if answers else None, dataset=None, answer_column=None
        )

    def _check_settings(self) -> None:
        for name, value, known in (
            ("tokens", self.tokens, _TOKENS),
            ("weight_by", self.weight_by, _WEIGHTS),
        ):
            if value not in known:
                raise ValueError(f"Unknown {name} {value!r}, expected one of {', '.join(known)}.")
        for name in ("max_texts", "max_length", "batch_size"):
            count = getattr(self, name)
            if count is not None and (not is_id(count) or count < 1):
                raise ValueError(f"`{name}` is {count!r}, expected an integer from 1.")

    def _check_sources(self) -> None:
        for name, owner in (
            ("answers", "texts"),
            ("answer_column", "dataset"),
            ("attention_mask", "input_ids"),
            ("labels", "input_ids"),
        ):
            if getattr(self, name) is not None and getattr(self, owner) is None:
                raise ValueError(
                    f"`{name}` goes with `{owner}`, which is not given: leave it out, or give both."
                )
        given = [name for name in ("texts", "dataset", "input_ids") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(
                "Give either calibration `texts`, a `dataset` or ready `input_ids`: "
                f"there are {' and '.join(f'`{name}`' for name in given)}."
            )

    def _take_rows(self) -> None:
        """Take rows of a dataset that were given as texts for the dataset that they are."""
        if self.texts is None or isinstance(self.texts, str | Mapping):
            return
        try:
            rows = iter(self.texts)
        except TypeError as error:
            given: Any = self.texts
            is_path = isinstance(given, os.PathLike)
            hint = f": give a file as `dataset={os.fspath(given)!r}`" if is_path else ""
            raise ValueError(
                f"`texts` is a {type(self.texts).__name__}, expected texts, or chats (lists of messages)"
                f"{hint}."
            ) from error
        if isinstance(self.texts, io.TextIOBase):
            rows = (line.rstrip("\r\n") for line in rows)
        first = list(islice(rows, 1))
        is_row = bool(first) and isinstance(first[0], Mapping) and "role" not in first[0]
        if isinstance(self.texts, Iterator):
            object.__setattr__(self, "texts", chain(first, rows))
        if is_row:
            if self.answers is not None:
                raise ValueError(
                    f"`texts` holds rows with the columns {sorted(map(str, first[0]))}: name the column of "
                    "the answers by `answer_column`, in place of `answers`."
                )
            object.__setattr__(self, "dataset", self.texts)
            object.__setattr__(self, "texts", None)

    def _check_texts(self, texts: list, answers: list | None) -> None:
        wrong = next((text for text in texts if not isinstance(text, str) and not _is_chat(text)), None)
        is_chat = {not isinstance(text, str) for text in texts}
        if wrong is not None or len(is_chat) > 1:
            kind = "texts and chats mixed" if wrong is None else f"a {type(wrong).__name__}"
            raise ValueError(f"`texts` holds {kind}: expected texts, or chats (lists of messages) only.")
        if answers is not None:
            if True in is_chat or len(answers) != len(texts) or not all(isinstance(a, str) for a in answers):
                raise ValueError(
                    f"`answers` has {len(answers)} entries for {len(texts)} texts: expected one text for "
                    "each prompt, and none for chats."
                )
        elif self.tokens != "all" and False in is_chat:
            raise ValueError(
                f"`tokens` is {self.tokens!r}: give `answers`, chats or `labels` to tell them apart."
            )

    def _check_ids(self) -> None:
        """Make tensors of the ready batches, which have to fit each other."""
        ids = _as_batches("input_ids", self.input_ids)
        object.__setattr__(self, "input_ids", ids)
        for name in ("attention_mask", "labels"):
            if getattr(self, name) is None:
                continue
            others = _as_batches(name, getattr(self, name))
            if [batch.shape for batch in ids] != [other.shape for other in others]:
                raise ValueError(
                    f"`input_ids` has batches of shape {[tuple(b.shape) for b in ids]} and `{name}` of shape "
                    f"{[tuple(o.shape) for o in others]}: expected the same."
                )
            object.__setattr__(self, name, others)
        if self.tokens != "all" and self.labels is None:
            raise ValueError(
                f"`tokens` is {self.tokens!r}: give `labels` too, to tell prompts and answers apart."
            )


def _several(name: str, texts: Iterable | str, limit: int | None) -> list:
    """Texts or chats, of several or of one, and at most so many."""
    if isinstance(texts, Mapping):
        raise ValueError(
            f"`{name}` is a {type(texts).__name__} with {sorted(map(str, texts))}, expected texts, or chats "
            "(lists of messages): name the part of it that holds them."
        )
    if isinstance(texts, str):
        return [texts]
    first = next(iter(texts), None) if isinstance(texts, Sequence) else None
    if isinstance(first, dict) and all(isinstance(message, dict) for message in texts):
        return [texts]  # the messages of one chat
    several = list(islice(texts, limit))
    if several and all(isinstance(message, dict) for message in several):
        several = [several + list(texts)] if isinstance(texts, Iterator) else [list(texts)]
    return several


def _is_chat(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(message, dict) for message in value)


def _as_batches(name: str, value: Any) -> list[torch.Tensor]:
    """Tensors (B, S), from lists or tensors of several batches or of one."""
    value = [value] if isinstance(value, torch.Tensor) and value.dim() == 2 else value
    try:
        batches = [torch.as_tensor(batch).cpu() for batch in value]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"`{name}` holds no batches of numbers ({error}): give tensors (B, S), or lists of rows that are "
            "equally long."
        ) from error
    wrong = next((batch for batch in batches if batch.dim() not in (1, 2)), None)
    if wrong is not None:
        raise ValueError(
            f"`{name}` has a batch of shape {tuple(wrong.shape)}, expected (B, S): put the ids of one text "
            "in a list of their own."
        )
    return [torch.atleast_2d(batch) for batch in batches]


def tokenizer_of(source: str | os.PathLike | None, **hub_kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model.

    Args:
        source (`str` or `os.PathLike`, *optional*): folder or Hub repository of the model.
        hub_kwargs: `revision`, `token`, `cache_dir` and so on, as for `from_pretrained`.

    Raises:
        ValueError: if there is none.

    Example:

    ```python
    >>> from transformers_emo.subsets.choosing.calibration import tokenizer_of
    >>> tokenizer_of("model_cards/toy-emo").decode([5])
    '%'

    ```
    """
    if not source:
        raise ValueError("The model was not loaded from anywhere: give the `tokenizer` too.")
    try:
        with folder_or_repo(source):
            return AutoTokenizer.from_pretrained(source, **hub_kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"There is no tokenizer in {os.fspath(source)} ({error}): give the `tokenizer` too."
        ) from error
