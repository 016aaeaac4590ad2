"""`EmoTokenizer`: the ids of `tokenizer.json`, whatever a repository calls its class."""

import copy
import json
import pickle
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer
from transformers_emo import EmoTokenizer

TOY = Path(__file__).parents[1] / "model_cards" / "toy-emo"
TEXT = "foo();\n\nIn 1234567 it'S  \r\n\n  don't\té́ 日本 🙂 e\u0301"
# How the released tokenizer splits text before merging: digits by threes, line ends with the signs before.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def released_like():
    """A small tokenizer that splits as the released one does, with its special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    documents = (TOY / "documents" / "c.jsonl").read_text(encoding="utf-8").splitlines()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([json.loads(line)["text"] for line in documents], trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|fim_prefix|>", "<|pad|>"])
    return tokenizer


@pytest.fixture
def repository(released_like, tmp_path):
    """Write a released-like repository whose `tokenizer_config.json` holds what is given."""

    def write(**config):
        shutil.copy(TOY / "config.json", tmp_path)
        released_like.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return tmp_path

    return write


@pytest.fixture(scope="module")
def toy():
    return EmoTokenizer.from_pretrained(TOY)


@pytest.mark.parametrize(
    "name",
    [
        "GPT2Tokenizer",
        "GPT2TokenizerFast",
        "PreTrainedTokenizerFast",
        "TokenizersBackend",
        "LlamaTokenizerFast",
        "Qwen2Tokenizer",
        "EmoTokenizer",
        None,
    ],
)
def test_auto_tokenizer_gives_the_ids_of_the_file_whatever_the_class_is_called(
    repository, released_like, name
):
    tokenizer = AutoTokenizer.from_pretrained(repository(**({"tokenizer_class": name} if name else {})))
    # Transformers 5.22 keeps a class of its own for this name; the ids are those of the file all the same.
    assert type(tokenizer) is EmoTokenizer or name == "LlamaTokenizerFast"
    assert tokenizer(TEXT)["input_ids"] == released_like.encode(TEXT).ids
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (
        "<|endoftext|>",
        "<|pad|>",
        None,
    )
    assert len(tokenizer) == released_like.get_vocab_size()


def test_the_toy_repository_loads_with_its_own_special_tokens(toy):
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    assert type(tokenizer) is EmoTokenizer
    assert (tokenizer.eos_token_id, tokenizer.pad_token, tokenizer.bos_token) == (0, None, None)
    assert len(tokenizer) == 4096  # a default that the vocabulary lacks is not added to it


def test_what_the_repository_says_of_special_tokens_wins(repository):
    tokenizer = EmoTokenizer.from_pretrained(repository(eos_token="<|fim_prefix|>", pad_token=None))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|fim_prefix|>", None)


def test_a_call_appends_nothing_and_adding_eos_is_explicit(repository):
    folder = repository()
    plain = EmoTokenizer.from_pretrained(folder)
    ending = EmoTokenizer.from_pretrained(folder, add_eos_token=True)
    ids = plain(TEXT)["input_ids"]
    assert plain.eos_token_id not in ids
    assert plain([TEXT, "a"], padding=True)["input_ids"][0] == ids
    assert ending(TEXT)["input_ids"] == ids + [plain.eos_token_id]


def test_documents_end_with_eos_and_hold_no_other(toy):
    texts = ["One document.", "A page that quotes <eos> and goes on.", ""]
    documents = toy.encode_documents(texts)
    assert [ids[-1] for ids in documents] == [0, 0, 0]
    assert all(0 not in ids[:-1] for ids in documents)
    assert [toy.decode(ids[:-1]) for ids in documents] == texts
    assert documents[0][:-1] == toy(texts[0])["input_ids"]
    assert toy("<eos>")["input_ids"] == [0]  # a prompt may still hold special tokens
    assert toy.encode_documents(iter(())) == []
    assert toy.encode_documents("One document.") == documents[:1]


def test_half_a_surrogate_pair_is_a_replaced_character(toy):
    found = toy.encode_documents(["a \ud83d b", "\ud83d\ude00", "plain"])
    assert found == toy.encode_documents(["a \ufffd b", "\U0001f600", "plain"])


def test_documents_need_an_eos_token(toy):
    tokenizer = copy.deepcopy(toy)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="set `tokenizer.eos_token`"):
        tokenizer.encode_documents(["text"])


@given(st.text())
def test_decoding_gives_the_text_back(toy, text):
    assert toy.decode(toy(text)["input_ids"]) == text
    assert toy.decode(toy.encode_documents([text])[0][:-1]) == text


@given(
    st.lists(
        st.sampled_from(["e\u0301", "日本", "🙂\u200d", "\r\n", "\x00", "  ", "1234", ".\n", "It's"])
    ).map("".join)
)
def test_decoding_gives_mixed_text_back_with_the_released_split(released_like, text):
    tokenizer = EmoTokenizer(tokenizer_object=released_like)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_saving_and_loading_keeps_the_ids(repository, tmp_path):
    tokenizer = EmoTokenizer.from_pretrained(repository(tokenizer_class="GPT2Tokenizer"))
    tokenizer.save_pretrained(tmp_path / "saved")
    # Without the model's config beside it Transformers goes by the name of the class, as other tools do.
    plain = AutoTokenizer.from_pretrained(tmp_path / "saved")
    again = EmoTokenizer.from_pretrained(tmp_path / "saved")
    name = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert name == "PreTrainedTokenizerFast"
    for other in (plain, again, pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        assert other(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
        assert (other.eos_token_id, other.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_a_new_vocabulary_can_be_trained(toy):
    tokenizer = toy.train_new_from_iterator([["some text to learn from"] * 20], vocab_size=300)
    assert type(tokenizer) is EmoTokenizer
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT
    assert tokenizer.eos_token == "<eos>"


def test_without_the_file_the_error_names_it(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(ValueError, match="no `tokenizer.json` in"):
        EmoTokenizer.from_pretrained(tmp_path)
