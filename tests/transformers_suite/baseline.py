"""Run Transformers' own tests on OLMoE and on EMO, and print side by side how many pass.

With `--write`, also store which tests OLMoE passes: EMO must pass those in the ordinary test run.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import pytest

_HERE = Path(__file__).resolve().parent
_MODELS = {
    "OLMoE": ["olmoe_baseline.py::OlmoeCommonTest", "olmoe_baseline.py::OlmoeDistributedTest"],
    "EMO": ["test_emo_common.py::EmoCommonTest", "test_emo_distributed.py::EmoDistributedTest"],
}
_OUTCOMES = ("passed", "failed", "skipped")


class _Recorder:
    """Pytest plugin: what became of each test, and which mixin it comes from."""

    def __init__(self):
        self.outcome: dict[str, str] = {}
        self.mixin: dict[str, str] = {}

    def pytest_itemcollected(self, item):
        # Subclasses hold wrapped copies of an inherited test: the class furthest up is where it comes from.
        owners = [base for base in item.cls.__mro__ if item.name in vars(base)] if item.cls else []
        if owners:
            self.mixin[item.name] = owners[-1].__name__

    def pytest_runtest_logreport(self, report):
        # Reports come from setup, call, teardown and every subtest: one failure, or else one skip, decides.
        name = report.nodeid.rpartition("::")[2]
        if report.failed:
            self.outcome[name] = "failed"
        elif report.skipped:
            self.outcome[name] = "failed" if self.outcome.get(name) == "failed" else "skipped"
        else:
            self.outcome.setdefault(name, "passed")

    def passed(self) -> set[str]:
        return {name for name, outcome in self.outcome.items() if outcome == "passed"}

    def counts(self, mixin: str) -> str:
        count = Counter(outcome for name, outcome in self.outcome.items() if self.mixin[name] == mixin)
        return " ".join(f"{count[outcome]:8}" for outcome in _OUTCOMES)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="store the names of the tests that OLMoE passes")
    parser.add_argument("--common", action="store_true", help="leave out the tests that start several ranks")
    arguments = parser.parse_args()

    recorders = {}
    for model, files in _MODELS.items():
        recorders[model] = _Recorder()
        paths = [str(_HERE / file) for file in (files[:1] if arguments.common else files)]
        pytest.main(["-q", "-W", "ignore", "-p", "no:cacheprovider", *paths], plugins=[recorders[model]])
    olmoe, emo = recorders["OLMoE"], recorders["EMO"]

    print(f"\n{'':26} {'OLMoE':^26}  {'EMO':^26}")
    print(f"{'':26} " + "  ".join(" ".join(f"{outcome:>8}" for outcome in _OUTCOMES) for _ in recorders))
    for mixin in sorted(set(olmoe.mixin.values()) | set(emo.mixin.values())):
        print(f"{mixin:26} {olmoe.counts(mixin)}  {emo.counts(mixin)}")
    print(f"{'all':26} {len(olmoe.passed()):8} {'':17}  {len(emo.passed()):8}")
    lost = sorted(olmoe.passed() - emo.passed())
    print("Passed by OLMoE and not by EMO:", ", ".join(lost) or "none")

    if arguments.write:
        from transformers_suite.suite import write_olmoe_passes  # `tests` is on the path since pytest ran

        write_olmoe_passes(olmoe.passed())
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
