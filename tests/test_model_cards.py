"""What each folder of `model_cards` says in one place is what it says in another."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from transformers_emo import EmoConfig

FOLDERS = sorted(
    path.parent for path in Path(__file__).parents[1].glob("model_cards/*/tokenizer_config.json")
)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_tokenizer_is_the_model_s(folder):
    tokenizer, config = AutoTokenizer.from_pretrained(folder), EmoConfig.from_pretrained(folder)
    assert tokenizer.model_max_length == config.max_position_embeddings
    assert len(tokenizer) <= config.vocab_size
    assert tokenizer.eos_token_id == config.eos_token_id
    assert tokenizer.pad_token_id == config.pad_token_id
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"context {config.max_position_embeddings}" in card.replace("\n", " ")
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"].startswith(
        "PreTrained"
    )


def test_there_are_models():
    assert {folder.name for folder in FOLDERS} >= {"emo-tiny", "std-tiny", "toy-emo"}
