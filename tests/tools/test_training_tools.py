"""Tools that start others: TRL's command through accelerate's launcher, and workers of `torchrun`."""

import json

import pytest
import torch
from conftest import TOY
from transformers_emo import EmoForCausalLM

pytestmark = pytest.mark.tools
TINY = TOY.parent / "emo-tiny"
PROGRAM = """
import os
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{model}")
open("worker-" + os.environ.get("RANK", "0"), "w").write(str(model.config.num_experts))
"""


def test_trl_fine_tunes_a_subset(tmp_path, emo_run, documents):
    (tmp_path / "data").mkdir()
    rows = "".join(json.dumps({"text": document["text"]}) + "\n" for document in documents)
    (tmp_path / "data" / "train.jsonl").write_text(rows)
    words = ["trl", "sft", "--model_name_or_path", TINY, "--dataset_name", "data", "--output_dir", "out"]
    words += [
        "--max_steps",
        "2",
        "--per_device_train_batch_size",
        "2",
        "--max_length",
        "64",
        "--use_cpu",
        "True",
    ]
    words += ["--bf16", "False", "--learning_rate", "1e-3", "--report_to", "none", "--save_strategy", "no"]
    _, said = emo_run("--expert-subset", "python", "--", *words)
    assert said == [f"emo run: {TINY}: experts of subset 'python' (16 of 64 a layer)"]
    before = EmoForCausalLM.from_pretrained(TINY, expert_subset="python", dtype=torch.float32)
    after = EmoForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert after.config.retained_experts == before.config.retained_experts
    experts = [model.model.layers[0].mlp.experts.down_proj for model in (before, after)]
    assert experts[0].shape == experts[1].shape and not torch.equal(*experts)


@pytest.mark.parametrize(
    "launcher",
    [
        ["torchrun", "--nproc-per-node", "2"],
        ["accelerate", "launch", "--cpu", "--num_processes", "2", "--num_machines", "1"],
    ],
    ids=["torchrun", "accelerate"],
)
def test_every_worker_loads_the_subset_and_one_says_so(tmp_path, emo_run, launcher):
    if launcher[0] == "accelerate":
        launcher = [*launcher, "--mixed_precision", "no", "--dynamo_backend", "no"]
    (tmp_path / "program.py").write_text(PROGRAM.format(model=TINY))
    _, said = emo_run("--expert-subset", "python", "--", *launcher, "program.py")
    assert said == [f"emo run: {TINY}: experts of subset 'python' (16 of 64 a layer)"]
    for rank in "01" if launcher[0] == "torchrun" else "0":
        assert (tmp_path / f"worker-{rank}").read_text() == "16"
