"""Documents as tokens: their ids, their text, and the classes of their words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from .sources import Document
from .word_classes import WordClasses


@dataclass(frozen=True)
class TokenisedDocument:
    """A document and its tokens.

    Args:
        index (`int`): the document's place in its source, from 0.
        document (`Document`): the document.
        ids (`list[int]`): the ids of its tokens, cut to a window.
        pieces (`list[str]`): the text of the first tokens; put together, it is the document's beginning.
        characters (`list[str]`): the class of characters of these tokens.
        parts_of_speech (`list[str]` or `list[None]`): the part of speech of their words.

    Example: see `tokenise`.
    """

    index: int
    document: Document
    ids: list[int]
    pieces: list[str]
    characters: list[str]
    parts_of_speech: list[str] | list[None]


def tokenise(
    documents: Sequence[tuple[int, Document]],
    tokenizer: PreTrainedTokenizerBase,
    classes: WordClasses,
    *,
    window: int,
    num_described: int,
) -> list[TokenisedDocument]:
    """Cut documents into tokens, and tell what words the first of them belong to.

    Args:
        documents (`Sequence[tuple[int, Document]]`): documents, each with its place in the source.
        tokenizer (`PreTrainedTokenizerBase`): the model's tokenizer, a fast one.
        classes (`WordClasses`): tells the classes of words.
        window (`int`): how many tokens of each document to keep, from its beginning.
        num_described (`int`): how many of them to describe.

    Returns:
        `list[TokenisedDocument]`: those documents that have a token.

    Raises:
        ValueError: if the tokenizer does not say where in the text its tokens are.

    Example:

    ```python
    >>> from transformers import AutoTokenizer
    >>> from transformers_emo.analysis.routing import Document, WordClasses
    >>> from transformers_emo.analysis.routing.tokens import tokenise
    >>> tokenizer = AutoTokenizer.from_pretrained("model_cards/toy-emo")
    >>> documents = [(0, Document("import os, sys", "python"))]
    >>> [one] = tokenise(documents, tokenizer, WordClasses(), window=4, num_described=2)
    >>> one.pieces, len(one.ids)
    (['import', ' os'], 4)

    ```
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not say where in the text its tokens are: give a fast "
            "tokenizer."
        )
    texts = [document.text for _, document in documents]
    encoded = tokenizer(texts, truncation=True, max_length=window, return_offsets_mapping=True)
    found = []
    for (index, document), ids, offsets in zip(
        documents, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        if not ids:
            continue
        spans = _without_overlap(offsets[:num_described])
        found.append(
            TokenisedDocument(
                index,
                document,
                ids,
                [document.text[start:end] for start, end in spans],
                classes.characters(document.text, spans),
                classes.parts_of_speech(document.text, spans, document.domain),
            )
        )
    return found


def _without_overlap(offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Where tokens are in the text. A character of several tokens belongs to the first of them."""
    spans, last = [], 0
    for start, end in offsets:
        start, end = max(start, last), max(end, last)
        spans.append((start, end))
        last = end
    return spans
