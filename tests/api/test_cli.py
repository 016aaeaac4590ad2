"""The command `emo`: what holds for all its commands."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import GOLDENS, TOY
from huggingface_hub import CommitInfo
from transformers_emo import EmoConfig, ExpertSubset, cli, subsets
from transformers_emo.checkpoints.hub.part_cache import PartialFile, part_folder, write_about
from typer.main import get_command


def test_errors_are_one_line(capsys, tmp_path):
    (tmp_path / "bad.yaml").write_text("a: [1\nb: 2")  # of which the parser says much
    for file in ("no-such-file.yaml", str(tmp_path / "bad.yaml")):
        assert cli.main(["train", file]) == 1
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.count("\n") == 1
        assert printed.err.startswith("emo train: ") and file in printed.err


def test_where_an_error_comes_from_can_be_seen():
    with pytest.raises(FileNotFoundError):
        cli.main(["--traceback", "train", "no-such-file.yaml"])


def test_it_is_a_module_too():
    command = [sys.executable, "-m", "transformers_emo", "train", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "--resume" in result.stdout


STEP, DOCUMENTS = str(GOLDENS / "D_olmo_core_checkpoint" / "step10"), str(TOY / "documents")
PRETRAIN = str(TOY.parents[1] / "examples" / "recipes" / "pretrain.yaml")
TAKES_FOLDERS = [
    ["push", "{}", "me/repo"],
    ["convert", "olmo-core-to-hf", "{}", "out"],
    ["convert", "olmo-core-to-hf", STEP, "out", "--tokenizer", "{}"],
    ["convert", "hf-to-olmo-core", "{}", "out"],
    ["convert", "hf-to-olmo-core", str(TOY), "out", "--original", "{}"],
    ["retention", str(TOY), "--texts", "{}", "--out", "out"],
    ["cache", "--cache-dir", "{}"],
]
TAKES_REPOSITORIES = [
    ["extract", "{}", "math.json", "out"],
    ["shard", "{}", "out"],
    ["convert", "upgrade", "{}", "out"],
    ["write-back", "{}", str(TOY), "--out", "out"],
    ["write-back", str(TOY), "{}", "--out", "out"],
    ["select", "{}", "math.json", "--text", "2 + 2"],
    ["select", str(TOY), "math.json", "--text", "2 + 2", "--tokenizer", "{}"],
    ["train", PRETRAIN, "--set", "model.path={}"],
    ["train", PRETRAIN, "--set", "model.tokenizer={}"],
    ["retention", "{}", "--texts", DOCUMENTS, "--out", "out"],
]
TAKES_FILES = [
    ["train", "{}"],
    ["train", PRETRAIN, "--set", "data.load.data_files={}"],
    ["select", str(TOY), "math.json", "--data", "{}"],
]


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys):
    """What a command says that is given a path, and that makes nothing."""
    monkeypatch.chdir(tmp_path)
    Path("model_cards").symlink_to(TOY.parent)  # for the recipe

    def refuse(words, path):
        assert cli.main([word.format(path) for word in words]) == 1
        assert not Path("math.json").exists() and not Path("out", "config.json").exists()
        return capsys.readouterr().err

    return refuse


@pytest.mark.parametrize("words", TAKES_FOLDERS, ids=" ".join)
def test_a_folder_that_is_not_there_is_named(words, refusal, tmp_path):
    assert f"There is no folder 'no/such' (seen from {tmp_path})" in refusal(words, "no/such")


@pytest.mark.parametrize("words", TAKES_REPOSITORIES, ids=" ".join)
def test_what_is_neither_a_folder_nor_a_repository_is_named_as_both(words, refusal, tmp_path):
    said = refusal(words, "no/such")
    assert f"There is no folder 'no/such' (seen from {tmp_path}), and as a Hub repository it cannot" in said
    said = refusal(words, "./no/such")
    assert (
        "There is no folder './no/such' (seen from" in said and "Hub repository cannot have this name" in said
    )


@pytest.mark.parametrize("words", TAKES_FILES, ids=" ".join)
def test_a_file_that_is_not_there_is_named(words, refusal):
    assert "no/such" in refusal(words, "no/such")


def test_a_file_is_not_taken_for_a_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["push", str(tmp_path / "file"), "me/repo"]) == 1
    assert "file' is a file, expected a folder" in capsys.readouterr().err


# What the command took before it was built on Typer, written down from its `argparse` parsers: each option
# with a value, and what the command then works with.
OLD_WORDS = {
    "train": (
        "r.yaml --set a=1 --set b=x --resume --revision r --token k --cache-dir c",
        {
            "recipe": "r.yaml",
            "set": [("a", 1), ("b", "x")],
            "resume": True,
            "revision": "r",
            "token": "k",
            "cache_dir": "c",
        },
    ),
    "run": (
        "--expert-subset s --exclude 3:1 --exclude 4:2 --document-pool 8 tool --flag -- -m",
        {
            "expert_subset": "s",
            "exclude": ["3:1", "4:2"],
            "document_pool": 8,
            "words": ["tool", "--flag", "--", "-m"],
        },
    ),
    "run -m": ("-m trl sft --help", {"words": ["-m", "trl", "sft", "--help"]}),
    "run --": ("-- python -c pass", {"words": ["python", "-c", "pass"]}),
    "select": (
        "me/emo out.json",
        {"experts": [16], "method": "layerwise", "budget": "uniform", "text": None},
    ),
    "select of texts": (
        "me/emo out-{}.json --text a --text b --answer c --answer d --max-length 9 --tokens answer "
        "--weight-by text --settle 0.9 --experts 4 8 --method global --budget mass --exclude 0:1 "
        "--exclude 1:2 --dtype float32 --device cpu --batch-size 2 --hidden-memory 1GB "
        "--tokenizer t --revision r --token k --cache-dir c --max-texts 3",
        {
            "model": "me/emo",
            "out": "out-{}.json",
            "text": ["a", "b"],
            "answer": ["c", "d"],
            "max_length": 9,
            "tokens": "answer",
            "weight_by": "text",
            "settle": 0.9,
            "experts": [4, 8],
            "method": "global",
            "budget": "mass",
            "exclude": ["0:1", "1:2"],
            "dtype": "float32",
            "device": "cpu",
            "batch_size": 2,
            "hidden_memory": "1GB",
            "tokenizer": "t",
            "revision": "r",
            "token": "k",
            "cache_dir": "c",
            "max_texts": 3,
        },
    ),
    "select of a file": (
        "me/emo o --data f --dataset d --dataset-config c --split s --column q --answer-column a --seed 3",
        {
            "data": "f",
            "dataset": "d",
            "dataset_config": "c",
            "split": "s",
            "column": "q",
            "answer_column": "a",
            "seed": 3,
        },
    ),
    "extract": (
        "m s o --max-shard-size 1MB --dtype bfloat16 --revision r --token k --cache-dir c",
        {
            "model": "m",
            "subset": "s",
            "out": "o",
            "max_shard_size": "1MB",
            "dtype": "bfloat16",
            "revision": "r",
            "token": "k",
            "cache_dir": "c",
        },
    ),
    "extract by default": ("m s o", {"max_shard_size": "5GB", "dtype": None, "revision": None}),
    "write-back": (
        "f t1 t2 --out o --what all --weight 0.5 --no-root-check --revision r --token k --cache-dir c",
        {
            "full": "f",
            "tuned": ["t1", "t2"],
            "out": "o",
            "what": "all",
            "weight": 0.5,
            "no_root_check": True,
            "revision": "r",
            "token": "k",
            "cache_dir": "c",
        },
    ),
    "write-back by default": ("f t --out o", {"what": "routed", "weight": 1.0, "no_root_check": False}),
    "convert olmo-core-to-hf": (
        "s o --dtype float16 --max-shard-size 1GB --tokenizer t --verify",
        {
            "step": "s",
            "out": "o",
            "dtype": "float16",
            "max_shard_size": "1GB",
            "tokenizer": "t",
            "verify": True,
        },
    ),
    "convert olmo-core-to-hf by default": (
        "s o",
        {"dtype": "float32", "max_shard_size": "5GB", "tokenizer": None, "verify": False},
    ),
    "convert hf-to-olmo-core": (
        "m o --original s --set a=1 --verify",
        {"model": "m", "out": "o", "original": "s", "set": [("a", 1)], "verify": True},
    ),
    "convert upgrade": (
        "r o --set a=1 --link --revision r --token k --cache-dir c",
        {
            "repo": "r",
            "out": "o",
            "set": [("a", 1)],
            "link": True,
            "revision": "r",
            "token": "k",
            "cache_dir": "c",
        },
    ),
    "shard": (
        "m o --experts-per-file 4 --revision r --token k --cache-dir c",
        {"model": "m", "out": "o", "experts_per_file": 4, "revision": "r", "token": "k", "cache_dir": "c"},
    ),
    "shard by default": ("m o", {"experts_per_file": 1}),
    "push": (
        "f me/r --private --revision b --token k",
        {"folder": "f", "repo": "me/r", "private": True, "revision": "b", "token": "k"},
    ),
    "push by default": ("f me/r", {"private": None}),
    "cache": ("", {"action": "list", "repo": None, "cache_dir": None}),
    "cache clear": ("me/emo --cache-dir c", {"action": "clear", "repo": "me/emo", "cache_dir": "c"}),
    "retention": (
        "a b=c --texts t --out o --baseline b --domains x y --methods global reap --shares 0.5 0.25 "
        "--seeds 2 --calibration 4 --test 5 --window 6 --batch-tokens 7 --dtype d --device e "
        "--no-topics --no-plots --revision r --token k --cache-dir c",
        {
            "models": ["a", "b=c"],
            "texts": "t",
            "out": "o",
            "baseline": "b",
            "domains": ["x", "y"],
            "methods": ["global", "reap"],
            "shares": [0.5, 0.25],
            "seeds": 2,
            "calibration": 4,
            "test": 5,
            "window": 6,
            "batch_tokens": 7,
            "dtype": "d",
            "device": "e",
            "no_topics": True,
            "no_plots": True,
            "revision": "r",
            "token": "k",
            "cache_dir": "c",
        },
    ),
    "retention by default": (
        "a --texts t --out o",
        {
            "seeds": 1,
            "calibration": 8,
            "batch_tokens": 2048,
            "domains": None,
            "shares": None,
            "no_plots": False,
        },
    ),
}
NEW = {"help", "json", "module", "usage"}  # `-m` is read with the words behind it
NEW_COMMANDS = {"chat", "demo", "export", "info", "plan", "report", "routing"}
NEW_OPTIONS = {
    "extract": {"bits", "group_size", "zero_points", "head_bits", "calibrate", "max_texts"},
    "select": {"merge", "statistics", "part", "process"},
    "retention": {
        *("tasks", "experts", "include_path", "num_fewshot", "prompts", "limit", "batch_size", "card"),
    },
}


def command_of(name: str):
    """The command that a key of `OLD_WORDS` begins with."""
    command = get_command(cli.app)
    for word in name.split():
        command = getattr(command, "commands", {}).get(word, command)
    return command


@pytest.mark.parametrize("name", OLD_WORDS)
def test_what_commands_took_before_typer_they_take_alike(name):
    words, expected = OLD_WORDS[name]
    first = ["clear"] if name == "cache clear" else []
    params = command_of(name).make_context("emo", [*first, *words.split()]).params
    got = {key: list(value) if isinstance(value, tuple) else value for key, value in params.items()}
    assert {key: None if value == [] else value for key, value in got.items() if key in expected} == expected


def test_the_table_of_old_options_lacks_none():
    described: dict = {}
    for name, (_, expected) in OLD_WORDS.items():
        described.setdefault(command_of(name).name, set()).update(expected)
    commands = dict(get_command(cli.app).commands)
    commands |= commands.pop("convert").commands
    old = commands.keys() - NEW_COMMANDS
    found = {name: {param.name for param in commands[name].params} - NEW for name in old}
    assert {name: options - NEW_OPTIONS.get(name, set()) for name, options in found.items()} == described


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "emo: Missing command. See `emo --help`."),
        ("selct", "emo: No such command 'selct'. Did you mean 'select'? See `emo --help`."),
        (
            "convert upgrad",
            "emo convert: No such command 'upgrad'. Did you mean 'upgrade'? See `emo convert --help`.",
        ),
        (
            "extract a b c --revison x",
            "emo extract: No such option: --revison (Possible options: --json, --revision). See",
        ),
        (
            "run --document-pol 3 x",
            "emo run: No such option: --document-pol (Possible options: --document-pool). See",
        ),
        ("extract a", "emo extract: Missing argument 'subset'. See `emo extract --help`."),
        ("extract a b c d", "emo extract: Got unexpected extra argument(s) (d). See"),
        ("retention a --texts t", "emo retention: Missing option '--out'. See"),
        (
            "retention = --texts t --out o",
            "emo retention: Invalid value: '=' is neither a path nor NAME=PATH",
        ),
        ("cache lst", "emo cache: Invalid value for 'action': 'lst' is not one of 'list', 'clear'. See"),
        (
            "select m o --experts 4 x",
            "emo select: Invalid value for '--experts': Input should be a valid integer",
        ),
        ("select m o --experts 4 x", ", found 'x'. See"),
        (
            "select m o --text --data f",
            "Invalid value for '--text': a value is missing: '--data' is an option. See",
        ),
        (
            "select m o --text",
            "emo select: Invalid value for '--text': a value is missing: it stands last. See",
        ),
    ],
)
def test_words_that_are_no_command_are_told_in_one_line_with_status_2(capsys, words, message):
    assert cli.main(words.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert message in printed.err and printed.err.endswith("--help`.\n")


def test_a_word_like_an_option_can_be_a_value():
    context = command_of("select").make_context("emo", ["m", "o", "--text=--data", "--settle", "-1"])
    assert context.params["text"] == ["--data"] and context.params["settle"] == -1


def test_help_stands_in_groups(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    for words, groups in (
        (["-h"], ["Subsets of experts", "Training and programs", "Checkpoints"]),
        (["select", "-h"], ["Which text", "Which experts", "How it runs", "Hugging Face Hub", "Output"]),
    ):
        assert cli.main(words) == 0
        said = capsys.readouterr().out
        assert all(f"─ {group} ─" in said for group in groups)


def test_an_error_that_nobody_foresaw_is_one_line_and_its_traceback_a_choice(monkeypatch, capsys):
    def broken(*arguments, **settings):
        raise RuntimeError("out of order")

    monkeypatch.setattr(subsets, "extract_subset", broken)
    hook = sys.excepthook
    assert cli.main(["extract", "a", "b", "c"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("emo extract: RuntimeError: out of order.") and said.count("\n") == 1
    with pytest.raises(RuntimeError, match="out of order"):
        cli.main(["--traceback", "extract", "a", "b", "c"])
    assert sys.excepthook is hook  # no box around it, no values of variables in it


def test_files_and_templates_that_break_are_one_line(tmp_path, capsys):
    deep = tmp_path / "deep.yaml"
    deep.write_text("a: " + "[" * 5000)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe")
    for words, part in (
        (["train", str(deep)], "nested too deeply"),
        (["train", str(tmp_path / "bytes.yaml")], "not UTF-8 text"),
        (["train", "nope.yaml"], f"There is no file or folder 'nope.yaml' (seen from {os.getcwd()})"),
        (["train", str(tmp_path)], "it is a folder, expected a file"),
    ):
        assert cli.main(words) == 1
        said = capsys.readouterr().err
        assert part in said and said.count("\n") == 1 and "Errno" not in said


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_can_complete(shell):
    emo = [sys.executable, "-m", "transformers_emo"]
    environment = os.environ | {"_EMO_COMPLETE": f"source_{shell}"}
    script = subprocess.run(emo, env=environment, capture_output=True, text=True, check=True).stdout
    assert "_EMO_COMPLETE=complete_" in script and "emo" in script
    environment = os.environ | {
        "_EMO_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": "emo sel",
        "COMP_CWORD": "1",
        "_TYPER_COMPLETE_ARGS": "emo sel",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    completed = subprocess.run(emo, env=environment, capture_output=True, text=True).stdout
    assert "select" in completed and "extract" not in completed


def test_documentation_comes_from_the_commands_themselves(tmp_path):
    file = tmp_path / "cli.md"
    words = ["transformers_emo.cli", "utils", "docs", "--name", "emo", "--output", str(file)]
    subprocess.run([sys.executable, "-m", "typer", *words], capture_output=True, check=True)
    written = file.read_text()
    assert all(
        f"# `emo {name.partition(' by ')[0]}`" in written for name in ("select", "convert upgrade", "run")
    )
    assert "* `--experts K...`" in written and "[bold]" not in written


# A command that waits where it first does something to a path, and says so.
WAITING = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
event, path, *words = sys.argv[1:]

def wait(name, arguments):
    if name == event and path in map(str, arguments):
        print("there", flush=True)
        time.sleep(300)

sys.addaudithook(wait)
from transformers_emo.cli import main
sys.exit(main(words))
"""


@pytest.mark.parametrize(
    ("words", "event", "path"),
    [
        (["select", str(TOY), "out", "--data", "texts.jsonl"], "open", "texts.jsonl"),
        (["extract", str(TOY), "subset.json", "out"], "os.rename", "out"),
        (["convert", "upgrade", str(TOY), "out"], "os.rename", "out"),
    ],
    ids=["select", "extract", "convert"],
)
def test_ctrl_c_ends_a_command_in_one_line_and_leaves_nothing_half_written(tmp_path, words, event, path):
    (tmp_path / "texts.jsonl").write_text('{"text": "import os"}\n')
    ExpertSubset([[0, 1, 31]] * 4).save(tmp_path / "subset.json")
    command = [sys.executable, "-c", WAITING, event, path, *words]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "there\n", process.stderr.read()
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and said == ""
    assert (
        errors.splitlines()[-1] == f"emo {words[0]}: stopped by Ctrl-C. " + cli._GO_ON[words[0]]
        and "Traceback" not in errors
    )
    assert not (tmp_path / "out").exists()


class TestJson:
    """One object on stdout and nothing else there."""

    @pytest.fixture
    def facts(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        ExpertSubset([[0, 1, 31], [0, 1, 2, 31], [5, 31], [6, 31]]).save("c.json")

        def run(*words):
            assert cli.main([*map(str, words), "--json"]) == 0
            (line,) = capsys.readouterr().out.splitlines()
            return json.loads(line)

        return run

    def test_of_select(self, facts):
        said = facts("select", TOY, "s-{}.json", "--text", "import os", "--experts", "4", "8")
        assert [subset["file"] for subset in said["subsets"]] == ["s-4.json", "s-8.json"]
        for subset in said["subsets"]:
            saved = ExpertSubset.load(subset["file"])
            assert subset["experts"] == saved.experts and subset["num_tokens"] == saved.num_tokens

    def test_of_extract_and_write_back(self, facts):
        assert facts("extract", TOY, "c.json", "small") == {"out": "small", "experts_per_layer": [3, 4, 2, 2]}
        said = facts("write-back", TOY, "small", "small", "--out", "full")
        assert said["out"] == "full" and len(said["written"]) == 7 * 3 and said["averaged"] == said["written"]

    def test_of_conversions(self, facts):
        assert facts("convert", "hf-to-olmo-core", TOY, "step0", "--verify") == {
            "out": "step0",
            "verified": True,
        }
        said = facts("convert", "olmo-core-to-hf", "step0", "hf", "--dtype", "bfloat16")
        assert said == {"out": "hf", "experts_per_layer": [32] * 4, "tokenizer": False, "verified": False}
        assert facts("convert", "upgrade", TOY, "new") == {"out": "new", "experts_per_layer": [32] * 4}

    def test_of_shard(self, facts):
        said = facts("shard", TOY, "sharded", "--experts-per-file", "16")
        assert said["files"] == sorted(path.name for path in Path("sharded").glob("*.safetensors"))

    def test_of_cache(self, facts, tmp_path):
        folder = part_folder(tmp_path / "models--me--emo", "e" * 64)
        write_about(folder, "model.safetensors", "c0ffee", 1000)
        with PartialFile(folder, 1000) as part:
            part.write(10, b"abc")
            part.record(10, 13)
        part = {
            "repo": "me/emo",
            "file": "model.safetensors",
            "commits": ["c0ffee"],
            "size": 1000,
            "present": 3,
        }
        assert facts("cache", "--cache-dir", tmp_path) == {"parts": [part], "present": 3}
        assert facts("cache", "list", "you/emo", "--cache-dir", tmp_path) == {"parts": [], "present": 0}
        assert facts("cache", "clear", "--cache-dir", tmp_path) == {"cleared": 3}

    def test_of_retention(self, facts):
        words = ["--texts", DOCUMENTS, "--domains", "coq", "--test", "1", "--window", "16", "--no-plots"]
        said = facts("retention", TOY, *words, "--methods", "random", "--shares", "0.5", "--out", "out")
        assert said == {"out": "out", "claims": json.loads(Path("out", "claims.json").read_text())}

    def test_of_push(self, facts, monkeypatch):
        commit = CommitInfo("https://hf.co/me/emo/commit/abc", "message", "", oid="abc")
        monkeypatch.setattr(subsets, "push_folder", lambda *arguments, **settings: commit)
        assert facts("push", TOY, "me/emo") == {"url": commit.commit_url, "commit": "abc"}

    def test_what_others_print_goes_to_stderr(self, monkeypatch, capsys):
        def noisy(*arguments, **settings):
            print("a note")
            return EmoConfig.from_pretrained(TOY)

        monkeypatch.setattr(subsets, "extract_subset", noisy)
        assert cli.main(["extract", "a", "b", "c", "--json"]) == 0
        printed = capsys.readouterr()
        assert json.loads(printed.out)["out"] == "c" and printed.err == "a note\n"

    def test_an_error_leaves_stdout_empty(self, capsys):
        assert cli.main(["extract", str(TOY), "no-such-file", "out", "--json"]) == 1
        assert capsys.readouterr().out == ""


def test_ctrl_c_that_python_drops_comes_again(monkeypatch, capsys):
    """As while a process forks: what is raised there is told as ignored, and the command would go on."""

    class Command:
        def main(self, *_, **__):
            class Gone:
                def __del__(self):
                    raise KeyboardInterrupt

            Gone()
            for _ in range(100):
                time.sleep(0.1)

    monkeypatch.setattr(cli, "_command", Command)
    before = signal.signal(signal.SIGINT, signal.default_int_handler), sys.unraisablehook
    try:
        assert cli.main([]) == 130
    finally:
        signal.signal(signal.SIGINT, before[0])
    assert sys.unraisablehook is before[1]
    assert capsys.readouterr().err == "emo: stopped by Ctrl-C.\n"
