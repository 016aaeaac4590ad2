"""Importing the package is all it takes, once or twice."""

import subprocess
import sys

import transformers_emo
from transformers_emo.registration import register


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_import_registers_every_auto_class():
    names = run(
        "import transformers as t, transformers_emo as e\n"
        "classes = (t.AutoModel, t.AutoModelForCausalLM, t.AutoModelForSequenceClassification,\n"
        "           t.AutoModelForTokenClassification)\n"
        "print([c._model_mapping[e.EmoConfig].__name__ for c in classes])\n"
        "print(type(t.AutoConfig.for_model('emo')).__name__)"
    )
    assert names.splitlines() == [
        "['EmoModel', 'EmoForCausalLM', 'EmoForSequenceClassification', 'EmoForTokenClassification']",
        "EmoConfig",
    ]


def test_registering_again_changes_nothing():
    register()
    register()


def test_public_names_are_there():
    assert all(hasattr(transformers_emo, name) for name in transformers_emo.__all__)
