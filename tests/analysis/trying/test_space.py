"""The folder of a Space: what it holds, and that it starts."""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import yaml
from conftest import TOY
from transformers_emo.analysis.trying.space import write_space
from transformers_emo.cli import main

EMO_TINY = TOY.parent / "emo-tiny"


def test_a_local_model_is_copied_with_its_library_and_nothing_else(tmp_path):
    told = write_space(
        EMO_TINY, tmp_path / "space", options={"--domain": "python"}, requirement="emo @ file:emo"
    )
    names = sorted(
        p.relative_to(tmp_path / "space").as_posix() for p in (tmp_path / "space").rglob("*.*") if p.is_file()
    )
    kept = [name for name in names if not name.startswith("emo-tiny/subsets/")]
    assert kept == [".gitattributes", "README.md", "app.py", "emo-tiny/config.json",
                    "emo-tiny/generation_config.json",
                    "emo-tiny/model.safetensors", "emo-tiny/tokenizer.json", "emo-tiny/tokenizer_config.json",
                    "requirements.txt"]  # fmt: skip
    assert len(names) - len(kept) == 16
    assert re.search(r"app.py, requirements.txt, README.md and the model, 1[56]\.\d MB$", told)
    assert (tmp_path / "space" / "requirements.txt").read_text() == "emo @ file:emo\n"
    assert "['--domain', 'python']" in (tmp_path / "space" / "app.py").read_text()


def test_the_card_has_the_settings_that_a_space_needs(tmp_path):
    write_space("me/emo", tmp_path / "space")
    head, text = re.fullmatch(
        r"---\n(.*?)---\n\n(.*)", (tmp_path / "space" / "README.md").read_text("utf-8"), re.S
    ).groups()
    card = yaml.safe_load(head)
    assert card | {"sdk": "gradio", "app_file": "app.py", "models": ["me/emo"]} == card
    assert re.fullmatch(r"\d+\.\d+\.\d+", card["sdk_version"]) and len(card["emoji"]) >= 1
    assert "[me/emo](https://huggingface.co/me/emo)" in text
    assert re.fullmatch(
        r"transformers-emo\[demo\]==\S+\n", (tmp_path / "space" / "requirements.txt").read_text()
    )
    assert not (tmp_path / "space" / "emo").exists()
    compile((tmp_path / "space" / "app.py").read_text(), "app.py", "exec")


def test_what_cannot_be_a_space_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        write_space(tmp_path, tmp_path / "space")
    with pytest.raises(ValueError, match="neither a folder nor the name of a repository"):
        write_space("no/such/folder/at/all", tmp_path / "space")
    (tmp_path / "space").mkdir()
    with pytest.raises(FileExistsError):
        write_space(EMO_TINY, tmp_path / "space")
    assert main(["demo", str(EMO_TINY), "--package", "x"]) == 1
    assert "--package 'x' is for a Space: give --space DIR too" in capsys.readouterr().err


@pytest.mark.report
def test_the_app_of_a_space_starts_and_serves_the_page(tmp_path):
    pytest.importorskip("gradio", reason="Gradio is not installed: make test-demo")
    write_space(EMO_TINY, tmp_path / "space")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"GRADIO_SERVER_PORT": str(port), "GRADIO_SERVER_NAME": "127.0.0.1"}
    # Elsewhere than in the folder, as its files must be found from anywhere.
    app = subprocess.Popen(
        [sys.executable, str(tmp_path / "space" / "app.py")],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline, page = time.monotonic() + 120, ""
        while not page and time.monotonic() < deadline and app.poll() is None:
            try:
                page = urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).read().decode()
            except OSError:
                time.sleep(0.3)
        assert "emo-tiny: try its experts" in page, (
            app.stdout.read() if app.poll() is not None else "no answer"
        )
    finally:
        app.terminate()
        app.wait(20)
