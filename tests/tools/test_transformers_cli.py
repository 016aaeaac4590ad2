"""`transformers serve` answers as the model does, and `transformers chat` talks to it."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import TOY
from transformers import AutoTokenizer
from transformers_emo import EmoForCausalLM

pytestmark = pytest.mark.tools
TINY = TOY.parent / "emo-tiny"
EMO = str(Path(sys.executable).with_name("emo"))
PROMPT = "def main("
TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """emo-tiny, which is not made for chats, with a template for them."""
    folder = tmp_path_factory.mktemp("chat") / "emo-tiny"
    shutil.copytree(TINY, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return str(folder)


@contextmanager
def served(environment, options, model, log):
    """`transformers serve` on this machine alone: its address, while the context is open."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [EMO, "run", *options, "--", "transformers", "serve", model, "--device", "cpu"]
    with open(log, "w") as output:
        server = subprocess.Popen(
            [*words, "--host", "127.0.0.1", "--port", str(port)],
            env=environment,
            stdout=output,
            stderr=output,
        )
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10)
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(120)


def asked(address: str, path: str, **body) -> dict:
    request = urllib.request.Request(
        f"{address}/v1/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)["choices"][0]


@pytest.mark.parametrize(
    ("options", "loaded", "generated"),
    [
        ([], {}, {}),
        (["--expert-subset", "python"], {"expert_subset": "python"}, {}),
        (["--document-pool", "8"], {}, {"document_pool": 8}),
    ],
    ids=["full", "subset", "pools"],
)
def test_serve_and_chat_answer_as_generate_does(
    tmp_path, tool_environment, chat_model, options, loaded, generated
):
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    model = EmoForCausalLM.from_pretrained(chat_model, **loaded)

    def expected(text: str, new: int) -> str:
        prompt = tokenizer(text, return_tensors="pt")
        out = model.generate(**prompt, max_new_tokens=new, do_sample=False, **generated)[0]
        return tokenizer.decode(out[prompt["input_ids"].shape[1] :], skip_special_tokens=True)

    log = tmp_path / "serve.log"
    with served(tool_environment, options, chat_model, log) as address:
        answer = asked(address, "completions", model=chat_model, prompt=PROMPT, max_tokens=24)
        assert answer["text"] == expected(PROMPT, 24)
        messages = [{"role": "user", "content": PROMPT}]
        answer = asked(address, "chat/completions", model=chat_model, messages=messages, max_tokens=24)
        assert answer["message"]["content"] == expected(f"{PROMPT}\n", 24)
        words = ["transformers", "chat", chat_model, address, "max_new_tokens=8", "do_sample=False"]
        # Offline, its client would not even talk to this machine.
        chat = subprocess.run(
            [EMO, "run", *words],
            input=f"{PROMPT}\nn\n!exit\n",  # no, do not go on behind the last token
            cwd=tmp_path,
            env=tool_environment | {"HF_HUB_OFFLINE": "0"},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert chat.returncode == 0, chat.stdout + chat.stderr
    for word in expected(f"{PROMPT}\n", 8).split():
        assert word in chat.stdout
    assert ("emo run: " in log.read_text()) == bool(options)
