"""`emo run`: what it starts, what it refuses, and what the processes that it starts find."""

import json
import os
import signal
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from transformers_emo import cli
from transformers_emo.commands.run import _STARTUP
from transformers_emo.run_target import find_target
from transformers_emo.subsets.loading.choice.run_choice import RunChoice

ROOT = Path(__file__).parents[3]
TINY = str(ROOT / "model_cards" / "emo-tiny")
EMO_RUN = [sys.executable, "-m", "transformers_emo", "run"]


def run(*words, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([*EMO_RUN, *words], capture_output=True, text=True, timeout=300, **kwargs)


def make_script(path: Path, first_line: str, code: str = "") -> str:
    path.write_text(f"{first_line}\n{code}")
    path.chmod(0o755)
    return str(path)


@pytest.fixture(scope="module")
def other_environment(tmp_path_factory) -> Path:
    """A Python that has no transformers-emo."""
    folder = tmp_path_factory.mktemp("other")
    venv.create(folder, with_pip=False)
    return folder / "bin" / "python"


@pytest.fixture
def started(monkeypatch) -> list:
    """What would have been started, in place of starting it."""
    calls: list = []
    monkeypatch.setattr(os, "execve", lambda *call: calls.append(call))
    return calls


def test_the_program_has_the_words_the_input_and_the_exit_status(tmp_path):
    code = "import sys; print(sys.argv[1:], sys.stdin.read()); sys.exit(7)"
    script = make_script(tmp_path / "tool", f"#!{sys.executable}", code)
    words = ["--model", "hf", "--", "--document-pool", "3", "-m"]
    for dashes in ([], ["--"]):
        result = run(*dashes, script, *words, input="typed")
        assert (result.returncode, result.stdout, result.stderr) == (7, f"{words} typed\n", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_the_program(number):
    # The tests may run in the background, where Ctrl-C is ignored.
    code = "import signal, time; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "print('ready', flush=True); time.sleep(300)"
    with subprocess.Popen(
        [*EMO_RUN, "python", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as program:
        assert program.stdout.readline() == b"ready\n"
        program.send_signal(number)
        assert program.wait(60) == -number  # to a shell, 128 more than the number


def test_processes_know_emo_and_keep_what_else_python_starts_with(tmp_path, other_environment):
    (tmp_path / "sitecustomize.py").write_text("import builtins\nbuiltins.chained = __name__\n")
    (tmp_path / "beside.py").write_text("")
    code = (
        "import beside, builtins, json, subprocess, sys\n"
        "def alone(*words):\n"
        "    return subprocess.run([*words, '-c', 'print(1)'], stdout=-1, stderr=-2).stdout.decode()\n"
        "print(json.dumps([builtins.chained, sys.modules['sitecustomize'].__file__, sys.path,\n"
        "    sorted({'transformers_emo', 'transformers', 'torch'} & sys.modules.keys()),\n"
        "    alone(sys.executable, '-I'), alone(sys.executable, '-S'), alone(sys.argv[1])]))\n"
    )
    program = tmp_path / "program.py"
    program.write_text(code)
    result = run(str(program), str(other_environment), env=os.environ | {"PYTHONPATH": str(tmp_path)})
    chained, file, path, modules, *alone = json.loads(result.stdout)
    assert (chained, file) == ("sitecustomize", str(tmp_path / "sitecustomize.py"))
    assert str(_STARTUP) not in path and str(tmp_path) in path
    assert modules == ["transformers_emo"]  # what loads no model pays for no more
    assert alone == ["1\n"] * 3 and result.stderr == ""


WORKERS = """
import json, multiprocessing, sys
import transformers
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

def load(path, **choice):
    return AutoModelForCausalLM.from_pretrained(path, **choice).config.num_experts

if __name__ == "__main__":
    tiny, gpt2 = sys.argv[1:]
    GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1)).save_pretrained(gpt2)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        in_worker = pool.apply(load, (tiny,))
    named = [getattr(transformers, transformers.AutoConfig.from_pretrained(tiny).architectures[0]).__name__]
    import transformers.models.flex_olmo.modeling_flex_olmo  # makes the module `transformers` anew
    named.append(sys.modules["transformers"].EmoForCausalLM.__name__)
    print(json.dumps([in_worker, load(tiny, expert_subset="coq", exclude_experts={0: [1]}), named,
        AutoModelForCausalLM.from_pretrained(gpt2).config.n_layer]))
"""


def test_models_are_loaded_with_the_choice_in_workers_too(tmp_path):
    (tmp_path / "work.py").write_text(WORKERS)
    result = run("--expert-subset", "python", "--document-pool", "8", "work.py", TINY, "gpt2", cwd=tmp_path)
    in_worker, own, named, other = json.loads(result.stdout)
    assert (in_worker, own, named, other) == (16, 16, ["EmoForCausalLM"] * 2, 1)
    told = [line for line in result.stderr.splitlines() if line.startswith("emo run: ")]
    pools = ", in document pools of 8 routed experts"
    assert told == [
        f"emo run: {TINY}: experts of subset 'python' (16 of 64 a layer){pools}",
        f"emo run: {TINY}: experts that the program itself chooses (16 of 64 a layer), not those of "
        f"`--expert-subset python --document-pool 8`{pools}",
    ]


def test_a_run_that_loads_no_model_says_so():
    result = run("--exclude", "3:17,40", "--exclude", "1:2", "python", "-c", "import os; os.fork()")
    assert result.returncode == 0 and result.stderr.count("\n") == 1
    assert "no EMO model was loaded with `--exclude 3:17,40 --exclude 1:2`" in result.stderr


def test_a_run_that_ends_with_an_error_says_nothing_more():
    result = run("--exclude", "3:17,40", "python", "-c", "raise OSError('no such model')")
    assert result.returncode == 1 and "no such model" in result.stderr
    assert "no EMO model was loaded" not in result.stderr


def test_another_python_does_not_lose_the_choice_unnoticed(tmp_path, other_environment):
    """It has no package to keep to the choice; that matters only if it loads models."""
    (tmp_path / "transformers.py").write_text("print('imported')")
    code = "import transformers"
    environment = {"PYTHONPATH": f"{_STARTUP}{os.pathsep}{tmp_path}"}
    for choice, imports in ({}, True), (RunChoice(expert_subset="a").variables(), False):
        result = subprocess.run(
            [other_environment, "-c", code], env=environment | choice, capture_output=True, text=True
        )
        assert ("imported" in result.stdout) == imports == (result.returncode == 0)
    assert "has no transformers-emo" in result.stderr


def test_python_files_and_modules_run_in_this_python(tmp_path, monkeypatch):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__main__.py").write_text("")
    (tmp_path / "script.py").write_text("")
    monkeypatch.chdir(tmp_path)
    for words in ["script.py", "--flag"], ["package"], ["-m", "package", "-x"]:
        assert find_target(words).arguments == [sys.executable, *words]


def test_a_console_script_without_a_file_runs_by_its_entry_point(tmp_path, monkeypatch):
    information = tmp_path / "toy-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Name: toy\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[console_scripts]\ntoy-tool = toy:main\n")
    (tmp_path / "toy.py").write_text("import sys\ndef main():\n    print(sys.argv)\n    return 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    arguments = find_target(["toy-tool", "--flag"]).arguments
    result = subprocess.run(arguments, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (3, "['toy-tool', '--flag']\n")
    with pytest.raises(ValueError, match="no command 'toy-tol'.* Did you mean `emo run toy-tool`"):
        find_target(["toy-tol"])


def test_first_lines_that_lead_to_this_python(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{tmp_path}")
    own = Path(sys.executable)
    lines = [f"#!{own}", f"#!/usr/bin/env {own.name}", f"#!/usr/bin/env -S {own.name} -u"]
    lines.append(f"#!/bin/sh\n'''exec' \"{own}\" \"$0\" \"$@\"\n' '''")
    for number, line in enumerate(lines):
        name = f"toy-tool-{number}"
        script = make_script(tmp_path / name, line)
        target = find_target([name, "--flag"])
        assert target.arguments == [script, "--flag"] and os.path.samefile(target.python, own)
    beside = "#!/bin/sh\n'''exec' \"$(dirname -- \"$(realpath -- \"$0\")\")\"/'python' \"$0\" \"$@\"\n' '''"
    (tmp_path / "python").symlink_to(own.resolve())
    script = make_script(tmp_path / "moved", beside)
    with pytest.raises(ValueError, match=f"runs in another environment, that of {tmp_path}/python"):
        find_target([script])


@pytest.mark.parametrize(
    ("first_line", "message"),
    [
        ("#!/bin/bash", "is a script for /bin/bash: `emo run` starts Python programs"),
        ("#!/usr/bin/env node", "is a script for .*node"),
        ("\x7fELF", "is a compiled program"),
        ("import sys", "does not say which program runs it"),
        ("#!/nowhere/python3", "runs in /nowhere/python3, which does not start"),
    ],
)
def test_what_is_no_python_program_is_refused(tmp_path, first_line, message):
    with pytest.raises(ValueError, match=message):
        find_target([make_script(tmp_path / "tool", first_line)])


def test_tools_of_other_environments_are_refused(tmp_path, other_environment):
    script = make_script(tmp_path / "tool", f"#!{other_environment}")
    for words in [script], [str(other_environment), "-c", "pass"]:
        with pytest.raises(ValueError, match="runs in another environment.*has no transformers-emo"):
            find_target(words)
    site = next(other_environment.parents[1].glob("lib/python*/site-packages"))
    (site / "transformers_emo.py").write_text("")
    try:
        with pytest.raises(ValueError, match="with a transformers-emo of its own"):
            find_target([script])
    finally:
        (site / "transformers_emo.py").unlink()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "No command"),
        (["--"], "No command"),
        (["-m"], "-m needs the name of a module"),
        (["--", "-c", "pass"], "'-c' is no command"),
        (["no-such-tool"], "There is no command 'no-such-tool'"),
        (["json"], "Did you mean `emo run -m json`"),
        (["./no-such-tool"], "There is no file './no-such-tool'"),
    ],
)
def test_words_that_start_nothing_are_refused_in_one_line(capsys, started, words, message):
    assert cli.main(["run", *words]) == 1
    error = capsys.readouterr().err
    assert error.startswith("emo run: ") and message in error and error.count("\n") == 1 and not started


@pytest.mark.parametrize(
    ("options", "cut_off"),
    [
        (["-I", "-c", "pass"], "-I"),
        (["-uE", "x.py"], "-E"),
        (["-X", "dev", "-S"], "-S"),
        (["-Wignore", "-c", "pass", "-I"], None),
        (["-m", "tool", "-S"], None),
        (["x.py", "-I"], None),
        (["--check-hash-based-pycs", "never", "-I"], "-I"),
    ],
)
def test_a_python_that_ignores_the_environment_is_told_of(capsys, started, options, cut_off):
    assert find_target(["python", *options]).cut_off == cut_off
    assert cli.main(["run", "python", *options]) == 0
    assert ("EMO will not be registered" in capsys.readouterr().err) == (cut_off is not None)
    assert cli.main(["run", "--document-pool", "8", "python", *options]) == (cut_off is not None)
    assert len(started) == 1 + (cut_off is None)


def test_pythonpath_stays_and_gains_no_empty_part(monkeypatch, started):
    monkeypatch.setenv("EMO_RUN", "of an outer run")
    for before, after in ("", ""), ("/a:/b", ":/a:/b"), (f"{_STARTUP}:/a", ":/a"):
        monkeypatch.setenv("PYTHONPATH", before)
        assert cli.main(["run", "python"]) == 0
        environment = started.pop()[2]
        assert environment["PYTHONPATH"] == f"{_STARTUP}{after}" and "EMO_RUN" not in environment


def test_files_of_a_choice_hold_wherever_the_program_goes(monkeypatch, started):
    monkeypatch.chdir(TINY)
    words = ["--expert-subset", "subsets/coq.json", "--exclude", "subsets/go.json", "python"]
    assert cli.main(["run", *words]) == 0
    choice = RunChoice.read(started[0][2])
    assert choice.expert_subset == f"{TINY}/subsets/coq.json"
    assert choice.exclude_experts == f"{TINY}/subsets/go.json"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--expert-subset", "nope"], "There is no expert subset 'nope'"),
        (["--expert-subset", "no/such.json"], "There is no file 'no/such.json'"),
        (["--expert-subset", "README.md"], "README.md"),
        (["--exclude", "3:99"], "Layer 3 has no expert 99"),
        (["--exclude", "3:17", "--exclude", "coq"], "expected LAYER:ID,ID"),
        (["--document-pool", "64"], "`document_pool` is 64"),
        (["--expert-subset", "coq", "--document-pool", "16"], "`document_pool` is 16"),
    ],
)
def test_a_choice_that_cannot_be_is_refused_before_the_program_starts(capsys, started, options, message):
    assert cli.main(["run", *options, "--", "python", "-c", "", f"pretrained={TINY},dtype=float32"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("emo run: ") and message in error and error.count("\n") == 1 and not started


@pytest.mark.parametrize("words", [[f"--output_dir={TINY}"], ["--output_dir", TINY], ["me/emo", TINY], []])
def test_models_that_need_not_be_the_one_to_load_decide_nothing(started, words):
    assert cli.main(["run", "--expert-subset", "nope", "python", *words]) == 0
    assert len(started) == 1


def test_a_pool_that_is_no_number_is_refused(capsys, started):
    for size in ("0", "-1", "x"):
        assert cli.main(["run", f"--document-pool={size}", "python"]) == 2
        assert "expected an integer from 1" in capsys.readouterr().err
