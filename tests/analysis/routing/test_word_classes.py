"""The classes of words that tokens belong to."""

import pytest
from conftest import TOY
from transformers import AutoTokenizer
from transformers_emo.analysis.routing import Document, WordClasses
from transformers_emo.analysis.routing.tokens import tokenise


def spans_of(text, *tokens):
    spans, start = [], 0
    for token in tokens:
        assert text.startswith(token, start)
        spans.append((start, start + len(token)))
        start += len(token)
    return spans


@pytest.mark.parametrize(
    ("text", "tokens", "classes"),
    [
        ("Der Hund", ["D", "er", " Hund"], ["latin, capital", "latin, inside a word", "latin, capital"]),
        ("a_b 1 + 2\n", ["a", "_", "b", " 1", " +", " 2", "\n"],
         ["latin", "punctuation", "latin, inside a word", "number", "punctuation", "number", "space"]),
        ("Привет", ["При", "вет"], ["cyrillic, capital", "cyrillic, inside a word"]),
        ("日本語のテスト", ["日本", "語", "の", "テスト"], ["cjk", "cjk", "hiragana", "katakana"]),
    ],
)  # fmt: skip
def test_characters(text, tokens, classes):
    assert WordClasses().characters(text, spans_of(text, *tokens)) == classes


@pytest.mark.parametrize(
    ("language", "text", "classes"),
    [
        ("en", "The old man walked home", ["determiner", "adjective", "noun", "verb", "adverb"]),
        ("de", "Der Hund läuft durch Berlin", ["determiner", "noun", "verb", "preposition", "proper noun"]),
        ("nl", "De hond loopt snel", ["determiner", "noun", "verb", "adjective"]),
    ],
)
def test_parts_of_speech(language, text, classes):
    first, *others = text.split(" ")
    spans = spans_of(text, first, *(f" {word}" for word in others))
    assert WordClasses({"news": language}).parts_of_speech(text, spans, "news") == classes


def test_every_token_of_a_word_has_its_class():
    text = "She  translated it."
    spans = spans_of(text, "She", " ", " trans", "lated", " it", ".")
    found = WordClasses({"news": "en"}).parts_of_speech(text, spans, "news")
    assert found == ["pronoun", "space", "verb", "verb", "pronoun", "punctuation"]


def test_long_texts_without_ends_of_sentences_are_tagged_whole():
    text = "the dog " * 300
    spans = [(place, place + 4) for place in range(0, len(text), 4)]
    found = WordClasses({"news": "en"}).parts_of_speech(text, spans, "news")
    assert len(found) == 600 and set(found) == {"determiner", "noun"}


def test_other_domains_have_no_part_of_speech_and_other_languages_are_refused():
    assert WordClasses({"news": "en"}).parts_of_speech("ein Hund", [(0, 3)], "german") == [None]
    with pytest.raises(ValueError, match="no tagger for the language 'fr' of 'french'"):
        WordClasses({"french": "fr"})


def test_pieces_make_up_the_text_also_where_a_character_has_several_tokens():
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    text = "x = '日本語'  # ünï 🙂\n"
    [one] = tokenise([(3, Document(text, "python"))], tokenizer, WordClasses(), window=99, num_described=99)
    assert "".join(one.pieces) == text
    assert len(one.pieces) == len(one.ids) == len(one.characters) == len(one.parts_of_speech)
