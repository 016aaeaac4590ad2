"""What kind of word a token belongs to: its part of speech, and what characters it is made of.

Parts of speech are told by HanTa (https://github.com/wartaal/HanTa), which brings its models for English,
German and Dutch with it. Text in other languages and code have the class of their characters only.
"""

from __future__ import annotations

import importlib
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from ...imports.optional_packages import require

_MODELS = {"en": "morphmodel_en.pgz", "de": "morphmodel_ger.pgz", "nl": "morphmodel_dutch.pgz"}
# The taggers' own tags by their beginnings; the first that fits counts.
_CLASSES = {
    "en": "NP=proper noun|NN=noun|AJ=adjective|AV=adverb|V=verb|AT=determiner|DT=determiner|DPS=determiner|"
    "PNP=pronoun|PNI=pronoun|PNQ=pronoun|PNX=pronoun|EX=pronoun|PR=preposition|TO=preposition|CJ=conjunction|"
    "CRD=number|ORD=number|PU=punctuation|XX=particle|POS=particle|ITJ=interjection",
    "de": "NE=proper noun|NN=noun|ADJ=adjective|ADV=adverb|PROAV=adverb|PWAV=adverb|V=verb|ART=determiner|"
    "PDAT=determiner|PIAT=determiner|PPOSAT=determiner|PRELAT=determiner|PWAT=determiner|AP=preposition|"
    "KO=conjunction|CARD=number|$=punctuation|PTK=particle|ITJ=interjection|P=pronoun",
    "nl": "N(eigen=proper noun|N(=noun|ADJ=adjective|BW=adverb|WW=verb|LID=determiner|VNW=pronoun|"
    "VZ=preposition|VG=conjunction|TW=number|LET=punctuation|TSW=interjection",
}
_WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")
_BEYOND = 200  # characters behind the last token that are read, so that its sentence is tagged whole
_SENTENCE_WORDS = 60  # the most words that are tagged together: the tagger takes long sentences as a whole


class WordClasses:
    """Tells the classes of a text's tokens.

    Args:
        languages (`Mapping[str, str]`, *optional*): the language of the documents of a domain, `"en"`, `"de"`
            or `"nl"`, by the domain's name. Tokens of other domains have no part of speech.

    Raises:
        ValueError: if there is no tagger for a language.
        ImportError: if there are languages, and HanTa is not installed.

    Example:

    ```python
    >>> from transformers_emo.analysis.routing import WordClasses
    >>> classes = WordClasses()
    >>> classes.characters("Hi 42!", [(0, 1), (1, 2), (2, 5), (5, 6)])
    ['latin, capital', 'latin, inside a word', 'number', 'punctuation']

    ```
    """

    def __init__(self, languages: Mapping[str, str] | None = None):
        self.languages = dict(languages or {})
        for domain, language in self.languages.items():
            if language not in _MODELS:
                raise ValueError(
                    f"There is no tagger for the language {language!r} of {domain!r}: expected one of "
                    f"{', '.join(_MODELS)}. Leave the domain out."
                )
            _tagger(language)

    def characters(self, text: str, spans: Sequence[tuple[int, int]]) -> list[str]:
        """The class of characters of each token: script, place in the word, numbers, punctuation or space.

        Args:
            text (`str`): the document.
            spans (`Sequence[tuple[int, int]]`): where each token begins and ends in it.

        Example: see `WordClasses`.
        """
        return [_characters_of(text, start, end) for start, end in spans]

    def parts_of_speech(
        self, text: str, spans: Sequence[tuple[int, int]], domain: str
    ) -> list[str] | list[None]:
        """The part of speech of the word that each token belongs to.

        Args:
            text (`str`): the document.
            spans (`Sequence[tuple[int, int]]`): where each token begins and ends in it.
            domain (`str`): the document's domain.

        Returns:
            `list`: a name for each token; `None` for all if the domain's language is not known.

        Example:

        ```python
        >>> from transformers_emo.analysis.routing import WordClasses
        >>> spans = [(0, 3), (3, 7), (7, 11), (11, 14), (14, 15)]
        >>> WordClasses({"fables": "en"}).parts_of_speech("The man walked.", spans, "fables")
        ['determiner', 'noun', 'verb', 'verb', 'punctuation']

        ```
        """
        language = self.languages.get(domain)
        if language is None:
            return [None] * len(spans)
        words = list(_tagged(text[: spans[-1][1] + _BEYOND] if spans else "", language))
        found: list[str] = []
        place = 0
        for start, end in spans:
            while start < end and text[start].isspace():  # the space before a word is part of its token
                start += 1
            while place < len(words) and words[place][1] <= start:
                place += 1
            in_word = place < len(words) and words[place][0] < end
            found.append(words[place][2] if in_word else "space" if start >= end else "other")
        return found


def _tagged(text: str, language: str) -> Iterator[tuple[int, int, str]]:
    """Where each word begins and ends, and its part of speech."""
    sentence: list[re.Match] = []
    for word in [*_WORD.finditer(text), None]:
        if word is not None:
            sentence.append(word)
            if word.group() not in ".!?" and len(sentence) < _SENTENCE_WORDS:
                continue
        tags = _tagger(language).tag_sent([one.group() for one in sentence]) if sentence else []
        for one, (_, _, tag) in zip(sentence, tags, strict=True):
            yield one.start(), one.end(), _class_of(tag, language)
        sentence = []


@lru_cache(maxsize=len(_MODELS))
def _tagger(language: str) -> Any:
    require("Parts of speech need", "HanTa")
    module = importlib.import_module("HanTa.HanoverTagger")
    return module.HanoverTagger(_MODELS[language])


@lru_cache(maxsize=4096)
def _class_of(tag: str, language: str) -> str:
    pairs = (pair.split("=") for pair in _CLASSES[language].split("|"))
    return next((name for beginning, name in pairs if tag.startswith(beginning)), "other")


def _characters_of(text: str, start: int, end: int) -> str:
    token = text[start:end].strip()
    if not token:
        return "space"
    letter = next((c for c in token if c.isalpha()), None)
    if letter is not None:
        first = text.index(token, start)
        inside = token[0].isalnum() and first > 0 and (text[first - 1].isalnum() or text[first - 1] == "_")
        script = _script(letter)
        if inside and script not in ("cjk", "hiragana", "katakana"):  # which put no spaces between words
            return f"{script}, inside a word"
        return f"{script}, capital" if letter.isupper() else script
    return "number" if any(c.isdigit() for c in token) else "punctuation"


@lru_cache(maxsize=4096)
def _script(letter: str) -> str:
    return unicodedata.name(letter, "other").split()[0].split("-")[0].lower()
