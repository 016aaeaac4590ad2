import importlib
import os
import re
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

runner = importlib.import_module("run")

GOOD = '''"""Something is fast.

    python benchmarks/good.py

Claim: the new way takes
half the time. Bar: is not read here.

Bar: at most 0.5.
"""
import sys


def main():
    print("0.50  new / old  (1 ms / 2 ms, 3 MB | 4 MB)")
    print(sys.argv[1:])


# "--quick", "--folder"
main()
'''
BAD = '''"""It fails."""


def main():
    print("0.75 (0.70)  first")
    raise SystemExit(3)


main()
'''
HELPER = '"""No benchmark."""\n\n\ndef helper():\n    pass\n'


@pytest.fixture
def scripts(tmp_path):
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    for name, text in (("good", GOOD), ("bad", BAD), ("helper", HELPER)):
        (folder / f"{name}.py").write_text(text)
    return folder


def test_every_benchmark_is_found_with_its_claim(scripts):
    found = runner.find_scripts(scripts)
    assert list(found) == ["bad", "good"]
    assert found["good"].claim == "the new way takes half the time. Bar: is not read here."
    assert found["good"].bar == "at most 0.5."
    assert found["good"].options == {"--quick", "--folder"}
    assert (found["bad"].claim, found["bad"].bar, found["bad"].options) == ("It fails.", None, frozenset())


def test_benchmarks_of_this_project_say_what_they_claim():
    found = runner.find_scripts(runner.HERE)
    assert {"experts", "loading", "quantised"} <= set(found)
    assert "run" not in found
    for path in runner.HERE.glob("*.py"):
        assert f"python benchmarks/{path.name}" in path.read_text() or path.stem not in found


def test_a_script_gets_the_options_it_takes(scripts):
    found = runner.find_scripts(scripts)
    folder = Path("there")
    good = runner.command_of(found["good"], quick=True, folder=folder)
    assert good[2:] == ["--quick", "--folder", "there"]
    own = runner.command_of(found["good"], quick=False, folder=folder, extra=["--folder", "elsewhere"])
    assert own[2:] == ["--folder", "elsewhere"]
    assert runner.command_of(found["bad"], quick=True, folder=folder)[2:] == []


def test_a_failure_is_told_and_the_others_run(scripts, capfd):
    assert runner.main([], scripts) == 1
    text = (scripts / "RESULTS.md").read_text()
    sections = runner.split_sections(text)
    assert list(sections) == ["bad", "good"]
    assert "**Failed** with status 3" in sections["bad"]
    assert "| 0.75 (0.70) | first |" in sections["bad"]
    assert "**Bar:** at most 0.5." in sections["good"]
    assert "| 0.50 | new / old  (1 ms / 2 ms, 3 MB \\| 4 MB) |" in sections["good"]
    assert "0.50  new / old" in capfd.readouterr().out
    assert "processor" in text and "instruction sets" in text
    assert re.search(r"\*\d{4}-\d\d-\d\d; Python 3[^;]*PyTorch[^;]*Transformers[^;]*;", sections["good"])


def test_a_selection_replaces_its_own_sections_only(scripts):
    assert runner.main(["good"], scripts) == 0
    results = scripts / "RESULTS.md"
    old = runner.split_sections(results.read_text())["good"]
    edited = results.read_text().replace(old, "old numbers") + "\n## gone\n\nof a script that is no more\n"
    results.write_text(edited)
    assert runner.main(["bad"], scripts) == 1
    sections = runner.split_sections(results.read_text())
    assert sections["good"] == "old numbers"
    assert list(sections) == ["bad", "good"]
    assert runner.main(["good", "--pass", "good=--llama 'a b'"], scripts) == 0
    again = runner.split_sections(results.read_text())
    assert again["bad"] == sections["bad"]
    assert "'--llama', 'a b'" in again["good"]


@pytest.mark.parametrize("arguments", [["nothing"], ["--pass", "good"], ["--pass", "nothing=--quick"]])
def test_what_is_not_there_is_refused_before_anything_runs(scripts, arguments, capsys):
    with pytest.raises(SystemExit):
        runner.main(arguments, scripts)
    assert "good" in capsys.readouterr().err
    assert not (scripts / "RESULTS.md").exists()


def test_interruption_leaves_what_was_there_and_no_process(scripts):
    results = scripts / "RESULTS.md"
    assert runner.main(["good"], scripts) == 0
    before = results.read_bytes()
    waiting = scripts / "waits.py"
    waiting.write_text(
        "def main():\n    import os, time\n    print('pid', os.getpid())\n    time.sleep(600)\n\n\nmain()\n"
    )
    # A test run in the background of a shell ignores interruptions, and so would its children.
    command = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        f"import sys; sys.path.insert(0, {str(runner.HERE)!r}); import run; from pathlib import Path; "
        f"run.main(['waits'], Path({str(scripts)!r}))"
    )
    with subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE, text=True) as process:
        pid = next(int(line.split()[1]) for line in process.stdout if line.startswith("pid"))
        process.send_signal(2)
        try:
            process.wait(60)
        finally:
            process.kill()
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            break
        time.sleep(0.05)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert results.read_bytes() == before
    assert [path.name for path in scripts.iterdir() if path.name.startswith(".RESULTS")] == []


def test_a_file_is_whole_or_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "RESULTS.md"
    runner.write_whole(path, "old")
    assert stat.S_IMODE(path.stat().st_mode) == 0o644

    def broken(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="no space"):
        runner.write_whole(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_tables_are_of_ratios_and_all_else_stays_as_it_is():
    lines = [
        "2 layers",
        "0.50  a / b",
        "0.25 (0.20)  c / d",
        "",
        "experts   files",
        "      1     125   1.000",
    ]
    assert runner.render_lines(lines).split("\n") == [
        "    2 layers",
        "",
        "| ratio | |",
        "|---|---|",
        "| 0.50 | a / b |",
        "| 0.25 (0.20) | c / d |",
        "",
        "    experts   files",
        "          1     125   1.000",
    ]


LINES = st.lists(
    st.text(st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="\u2028\u2029\x85"))
)
NAMES = st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True)


@given(st.dictionaries(NAMES, LINES, max_size=4), LINES)
def test_sections_come_back_whatever_scripts_print(printed, more):
    sections = {name: runner.render_lines(lines) for name, lines in printed.items()}
    text = runner.join_sections(runner.render_lines(more), sections)
    back = runner.split_sections(text)
    assert {name: section.strip() for name, section in back.items()} == {
        name: section.strip() for name, section in sections.items()
    }


@given(LINES)
def test_no_line_is_lost(lines):
    rendered = runner.render_lines(lines)
    for line in lines:
        row = runner.ROW.fullmatch(line.strip())
        assert (row["what"].replace("|", "\\|") if row else line.strip()) in rendered


def test_results_do_not_say_where_things_lie(scripts, tmp_path):
    outcome = runner.run([sys.executable, str(scripts / "good.py"), "--folder", str(tmp_path / "model")])
    assert outcome.command.endswith("good.py --folder model") and str(tmp_path) not in outcome.command
