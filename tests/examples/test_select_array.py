"""The array of processes comes to the choice of one process."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TOY
from transformers_emo import ExpertSubset, select_experts

EXAMPLES = Path(__file__).parents[2] / "examples" / "at_scale"


pytestmark = pytest.mark.slow  # each of many processes imports PyTorch


def texts_of(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        shutil.copy(TOY / "documents" / f"{name}.jsonl", folder / f"{name}.jsonl")
    return folder


def expected(name: str) -> list:
    data = TOY / "documents" / f"{name}.jsonl"
    return select_experts(
        TOY, dataset=data, max_texts=4, num_experts=8, method="global", progress=False
    ).experts


def test_processes_with_a_folder_each_choose_as_one(tmp_path):
    texts = texts_of(tmp_path / "texts", "c", "coq")
    command = [sys.executable, EXAMPLES / "select_array.py", TOY, texts, tmp_path / "out"]
    command += ["--experts", "8", "--part", "1", "--max-texts", "4"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    for name in ("c", "coq"):
        found = ExpertSubset.load(tmp_path / "out" / f"{name}.json")
        assert found.experts == expected(name) and found.num_texts == 4


def test_tasks_of_slurm_fill_folders_that_merge(tmp_path):
    """The script itself runs, with the variables that SLURM sets and an `emo` that takes fewer texts."""
    texts = texts_of(tmp_path / "texts", "coq")
    emo = tmp_path / "bin" / "emo"
    emo.parent.mkdir()
    emo.write_text(f'#!/bin/sh\nexec {sys.executable} -m transformers_emo "$@" --max-texts 4 --part 1\n')
    emo.chmod(0o755)
    path = f"{emo.parent}{os.pathsep}{os.environ['PATH']}"
    for task in ("1", "2"):
        array = {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_MAX": "2", "PATH": path}
        script = ["bash", EXAMPLES / "select_array.sbatch", TOY, texts, tmp_path / "out"]
        subprocess.run(list(map(str, script)), check=True, env=os.environ | array, capture_output=True)
    out, scores = tmp_path / "coq.json", tmp_path / "out" / "scores" / "coq"
    merge = ["select", TOY, out, "--experts", "8", "--merge", scores / "1", scores / "2"]
    words = [sys.executable, "-m", "transformers_emo", *merge]
    subprocess.run(list(map(str, words)), check=True, capture_output=True)
    assert ExpertSubset.load(out).experts == expected("coq")
