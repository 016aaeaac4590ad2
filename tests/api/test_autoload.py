"""Programs that never import the package load EMO: PyTorch brings it."""

import importlib
import json
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import transformers_emo_autoload
from conftest import TOY
from transformers_emo_autoload import when_complete

ROOT = Path(__file__).parents[2]
CONFIG = f"print(type(AutoConfig.from_pretrained({str(TOY)!r})).__name__)"
PROGRAMS = {
    "config": f"from transformers import AutoConfig; {CONFIG}",
    "after torch": f"import torch; from transformers import AutoConfig; {CONFIG}",
    "after transformers": f"import transformers, torch; from transformers import AutoConfig; {CONFIG}",
    "models first": f"from transformers import AutoModelForCausalLM, AutoConfig; {CONFIG}",
    "tokenizers first": f"from transformers import AutoTokenizer, AutoConfig; {CONFIG}",
    "behind a finder of another age": "import sys; "
    "sys.meta_path.insert(0, type('Old', (), {'find_module': lambda *words: None})()); import torch; "
    f"from transformers import AutoConfig; {CONFIG}",
    "pipelines first": f"from transformers import pipeline, AutoConfig; {CONFIG}",
}


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    """In a Python of its own, which starts as that of any tool."""
    import os

    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=300,
    )


def test_it_is_an_entry_point_of_what_is_installed():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    (entry,) = entry_points(group="torch.backends", name="transformers_emo")
    assert declared == {"torch.backends": {entry.name: entry.value}}
    assert entry.load() is transformers_emo_autoload.autoload


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_auto_classes_know_it_in_every_order(program):
    done = run(PROGRAMS[program])
    assert done.returncode == 0 and done.stdout.strip() == "EmoConfig", done.stderr


def test_threads_that_import_at_once_do_not_wait_for_each_other():
    """Python holds a lock for all while a finder looks for a module: nothing may be imported there."""
    tests = Path(__file__).parents[1]
    done = run(
        f"import torch, sys; sys.path.append({str(tests)!r}); import import_order as o; o.all_at_once()"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("switch", ["EMO_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"])
def test_it_can_be_switched_off(switch):
    done = run(PROGRAMS["after torch"], **{switch: "0"})
    # toy-emo's config names the classes of the package, for tools that ask there.
    assert done.returncode == 1 and "contains custom code" in done.stderr


def test_importing_torch_imports_nothing_of_it():
    code = "import torch, sys; print([name for name in sys.modules if name.startswith('transformers')])"
    assert run(code).stdout.strip() == "['transformers_emo_autoload']"


def test_tools_find_its_classes_in_transformers():
    code = "import transformers; from transformers import AutoConfig\n"
    code += "print(transformers.EmoForCausalLM.__name__)"
    assert run(code).stdout.strip() == "EmoForCausalLM"


def test_a_version_that_does_not_fit_breaks_no_program():
    """The installed Transformers may be one that EMO does not know; most programs do not use EMO."""
    code = (
        "import transformers.models.auto.auto_factory as f\n"
        "from transformers import AutoModel, AutoConfig, AutoTokenizer\n"
        "import transformers_emo.imports.transformers_versions as v\n"
        "print(AutoConfig.for_model('llama').model_type)"
    )
    broken = (
        "import sys, torch, transformers_emo.imports.transformers_versions as v\n"
        "import transformers_emo_autoload as a\n"
        "a.has_imported_emo = True\n"
        "def fail(user): raise ImportError('gone: ' + user)\n"
        "import transformers_emo.registration as r; r.check_names = fail\n"
    )
    done = run(broken + code)
    assert done.returncode == 0 and done.stdout.strip() == "llama", done.stderr
    assert "EMO is not registered with Transformers: gone: auto models" in done.stderr


def test_several_may_wait_for_one_import(tmp_path, monkeypatch):
    (tmp_path / "slow_toy.py").write_text(
        "import sys, transformers_emo_autoload as a\n"
        "module = sys.modules[__name__]\n"
        "seen = []\n"
        "for count in (1, 2):\n"
        "    a.when_complete(module, lambda m, count=count: seen.append((count, m.value)))\n"
        "assert seen == []\n"
        "value = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("slow_toy")
    assert module.seen == [(1, 3), (2, 3)]
    when_complete(module, lambda m: m.seen.append("at once"))
    assert module.seen[-1] == "at once" and type(module.__spec__) is importlib.machinery.ModuleSpec
    sys.modules.pop("slow_toy")


def test_nothing_is_run_for_an_import_that_fails(tmp_path, monkeypatch):
    (tmp_path / "bad_toy.py").write_text(
        "import sys, transformers_emo_autoload as a\n"
        "a.when_complete(sys.modules[__name__], lambda module: sys.modules.pop('json'))\n"
        "raise RuntimeError('its own error')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match="its own error"):
        importlib.import_module("bad_toy")
    assert "json" in sys.modules


def test_transformers_serve_answers_a_chat(tmp_path):
    """As it is started from a shell: nothing of it imports the package."""
    shutil.copytree(TOY, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    )
    for name in ("fastapi", "uvicorn", "pydantic", "openai"):  # `transformers[serving]`
        pytest.importorskip(name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = str(Path(sys.executable).with_name("transformers"))
    words = [command, "serve", str(tmp_path), "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    log = tmp_path.parent / "serve.log"
    with open(log, "w") as output:
        server = subprocess.Popen(words, stdout=output, stderr=output)
    try:
        for _ in range(240):
            assert server.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10)
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        body = {"model": str(tmp_path), "messages": [{"role": "user", "content": "x ="}], "max_tokens": 4}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            assert json.load(answer)["choices"][0]["message"]["content"], log.read_text()
    finally:
        server.terminate()
        server.wait(60)
