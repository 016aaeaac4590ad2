"""The commands of `emo` that write, on small models, and what each has to leave."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .forks import Worker

TOY = Path(__file__).parents[2] / "model_cards" / "toy-emo"
Digest = dict[str, str]

# A model of 4 MB in a dozen files, and another one of the same sizes.
_MODEL = """
import shutil, sys, torch
from transformers_emo import EmoConfig, EmoForCausalLM
for name, seed in (("model", 0), ("other", 1)):
    torch.manual_seed(seed)
    config = EmoConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_experts=16, num_experts_per_tok=4, num_shared_experts=1, max_position_embeddings=256,
        pad_token_id=1, eos_token_id=0,
    )
    model = EmoForCausalLM(config)
    model.save_pretrained(name, max_shard_size="300KB")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{TOY}/{file}", f"{name}/{file}")
"""
# Fine-tuned: the extracted subset with other weights.
_TUNE = """
import torch
from transformers_emo import EmoForCausalLM
model = EmoForCausalLM.from_pretrained("small")
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if ".experts." in name:  # routers tell where a subset is from
            parameter += 1
model.save_pretrained("tuned")
"""
_RECIPE = """
recipe: pretrain
output_dir: out
model: {{path: {inputs}/model, config: {{document_pool_min: 3, document_pool_max: 15}}}}
data: {{load: {{path: json, data_files: {inputs}/rows.jsonl, split: train}}, ids: ids, window: 16}}
training:
  {{max_steps: 4, warmup_steps: 1, windows_per_step: 4, save_steps: 2, logging_steps: 1, use_cpu: true,
    disable_tqdm: true, optim: adamw_torch}}
"""


def tree(path: Path) -> Digest:
    """What stands at a place: the sha256 of each file, by its path."""
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return {
        os.path.relpath(file, path): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.is_file()
    }


def model_files(out: Path) -> Digest:
    """The model that a training run ends with."""
    return {
        name: digest
        for name, digest in tree(out).items()
        if name.endswith("model.safetensors") and "/" not in name
    }


def tables(out: Path) -> Digest:
    """What `emo retention` ends with."""
    return {name: digest for name, digest in tree(out).items() if name in ("retention.csv", "claims.json")}


def choice(out: Path) -> Digest:
    """What `emo select` chose; the file also names the folder that it was chosen of."""
    if not out.exists():
        return {}
    said = json.loads(out.read_text())
    return {name: repr(value) for name, value in said.items() if name != "source"}


@dataclass
class Job:
    """A command that writes.

    Args:
        name (`str`): what tables call it.
        words (`list[str]`): the command; `{}` in them is the folder of the inputs.
        source (`str`, *optional*): what it reads, of the inputs, to be rewritten meanwhile.
        again (`list[str]`, *optional*): words to add so that it goes on.
        digest (`Callable`): what has to be there in the end, of `out`.
        grows (`bool`, defaults to `False`): it writes into `out` itself, and not beside it.
        spare (`int`, defaults to 0): how many bytes of the disk it wants to stay free.
    """

    name: str
    words: list[str]
    source: str | None = None
    again: list[str] = field(default_factory=list)
    digest: Callable[[Path], Digest] = tree
    grows: bool = False
    spare: int = 0
    right: Digest = field(default_factory=dict)
    seconds: float = 0.0

    def command(self, inputs: Path) -> list[str]:
        """The words to run in a folder of its own, where it makes `out`."""
        return [word.format(os.fspath(inputs)) for word in self.words]

    def learn(self, worker: Worker, inputs: Path, work: Path) -> None:
        """Run it twice undisturbed: how long it takes, what it leaves, and that it leaves the same twice.

        Raises:
            RuntimeError: if it does not.
        """
        for _ in range(2):
            fresh(work)
            self.seconds = worker.must(work, words=self.command(inputs)).seconds
            before, self.right = self.right, self.digest(work / "out")
        if not self.right or self.right != before:
            raise RuntimeError(f"{self.name} leaves {before} and then {self.right}: nothing to compare with.")


def fresh(work: Path) -> None:
    """Empty a folder."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()


def make_inputs(worker: Worker, inputs: Path) -> list[Job]:
    """Make what the commands read.

    Returns:
        `list[Job]`: all commands that write, `emo push` left out.
    """
    inputs.mkdir()
    worker.must(inputs, code=f"TOY = {os.fspath(TOY)!r}\n{_MODEL}")
    (inputs / "subset.json").write_text(json.dumps({"experts": [[0, 2, 3, 5, 8, 11, 15]] * 4}))
    worker.must(inputs, words=["extract", "model", "subset.json", "small"])
    worker.must(inputs, code=_TUNE)
    worker.must(inputs, words=["convert", "hf-to-olmo-core", "model", "step"])
    worker.must(inputs, words=["convert", "hf-to-olmo-core", "other", "other-step"])
    for model in ("model", "other"):
        worker.must(inputs, words=["export", model, "exported" if model == "model" else "other-exported"])
    rows = [json.dumps({"ids": [5 + i, 6, 7 + i] * 4}) for i in range(40)]
    (inputs / "rows.jsonl").write_text("\n".join(rows))
    (inputs / "recipe.yaml").write_text(_RECIPE.format(inputs=inputs))
    texts = inputs / "texts"
    texts.mkdir()
    for domain in ("one", "two"):
        lines = [
            {"split": split, "text": f"{domain} {split} {i}: some words of the domain {domain}."}
            for split in ("calibration", "test")
            for i in range(3)
        ]
        (texts / f"{domain}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (inputs / "texts.jsonl").write_text("\n".join(json.dumps({"text": "import os, sys"}) for _ in range(8)))
    model = "{}/model"
    convert = ["convert"]
    measure = [
        "--texts",
        "{}/texts",
        "--test",
        "2",
        "--calibration",
        "2",
        "--window",
        "32",
        "--dtype",
        "float32",
    ]
    return [
        Job("extract", ["extract", model, "{}/subset.json", "out"], "model"),
        Job("write-back", ["write-back", model, "{}/tuned", "--out", "out"], "model"),
        Job("convert hf-to-olmo-core", [*convert, "hf-to-olmo-core", model, "out"], "model"),
        Job("convert olmo-core-to-hf", [*convert, "olmo-core-to-hf", "{}/step", "out"], "step"),
        Job("convert upgrade", [*convert, "upgrade", model, "out"], "model"),
        Job("shard", ["shard", model, "out"], "model", spare=64 << 20),
        Job("export", ["export", model, "out"], "model"),
        Job("export --to gguf", ["export", model, "out", "--to", "gguf"], "model"),
        Job("export --from", ["export", "{}/exported", "out", "--from", "qwen2-moe"], "exported"),
        Job(
            "select",
            ["select", model, "out", "--data", "{}/texts.jsonl", "--experts", "8"],
            "model",
            digest=choice,
        ),
        Job(
            "retention",
            [
                "retention",
                model,
                *measure,
                "--methods",
                "random",
                "--shares",
                "0.5",
                "--no-plots",
                "--no-topics",
            ]
            + ["--out", "out"],
            "model",
            digest=tables,
            grows=True,
        ),
        Job(
            "train", ["train", "{}/recipe.yaml"], "model", again=["--resume"], digest=model_files, grows=True
        ),
    ]
