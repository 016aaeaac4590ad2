"""The tools themselves, started from a shell by `emo run`: `make test-tools`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TOY
from transformers import AutoTokenizer
from transformers_emo.analysis import encode_documents

TINY = TOY.parent / "emo-tiny"
EMO = str(Path(sys.executable).with_name("emo"))


@pytest.fixture(scope="session")
def tool_environment(tmp_path_factory) -> dict[str, str]:
    """No hub, no caches but those of these tests, one thread."""
    home = str(tmp_path_factory.mktemp("home"))
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HOME": home,
        "OMP_NUM_THREADS": "1",
    }
    return os.environ | quiet | {"TQDM_DISABLE": "1", "COLUMNS": "200"}


@pytest.fixture
def emo_run(tool_environment, tmp_path):
    """Start a tool in a folder of its own; what `emo run` itself says comes with its output."""

    def run(*words, status: int = 0) -> tuple[str, list[str]]:
        result = subprocess.run(
            [EMO, "run", *map(str, words)],
            cwd=tmp_path,
            env=tool_environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert result.returncode == status, result.stdout + result.stderr
        said = [line for line in result.stderr.splitlines() if line.startswith("emo run: ")]
        return result.stdout, said

    return run


@pytest.fixture(scope="session")
def documents() -> list[dict[str, str]]:
    """Beginnings of a few documents in Python: the first token, the rest, and a prompt."""
    lines = (TINY / "documents" / "python.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"][:500] for line in lines[:6]]
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    firsts = [tokenizer.decode(ids[:1]) for ids in encode_documents(tokenizer, texts, window=512)]
    # lm_eval moves spaces from the end of a prompt to what follows.
    return [
        {"text": text, "beginning": first, "rest": text[len(first) :], "prompt": text[:120].rstrip()}
        for text, first in zip(texts, firsts, strict=True)
        if first.strip() == first
    ]
