"""Get the tests that Transformers ships in its source distribution, for the installed version.

A wheel has no tests, so they are downloaded once and kept under `build/`, which git ignores.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers

CACHE = Path(__file__).resolve().parents[2] / "build" / "transformers-tests"


def fetch_tests(version: str = transformers.__version__, *, cache: Path = CACHE) -> Path:
    """The folder with Transformers' tests, downloaded if it is not there yet.

    Safe to interrupt and to run twice at once: everything is made in a temporary folder beside the final one.

    Args:
        version (`str`): release of Transformers; the installed one by default.
        cache (`Path`): where the tests of each version are kept.

    Returns:
        `Path`: folder with `test_modeling_common.py` and the rest.

    Raises:
        RuntimeError: if the source distribution cannot be downloaded or has no such tests; says what to do.
    """
    target = cache / version
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        tests = _unpack(_download(version, Path(folder)), Path(folder))
        # `test_configuration_common` executes the `__init__.py` beside it, which the distribution leaves out.
        (tests / "__init__.py").touch()
        try:
            os.rename(tests, target)
        except OSError:
            if not target.is_dir():  # else another process was faster, and its copy is as good
                raise
    return target


def _download(version: str, folder: Path) -> Path:
    requirement = f"transformers=={version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", "transformers", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    found = sorted(folder.glob("transformers-*.tar.gz"))
    if done.returncode != 0 or not found:
        raise RuntimeError(
            f"Could not download the source distribution of {requirement}, whose tests this suite runs:\n"
            f"{done.stderr.strip()}\n"
            "Run once with a network (the tests are then kept under `build/`), or leave this suite out with "
            "`pytest --ignore tests/transformers_suite`."
        )
    return found[0]


def _unpack(archive: Path, folder: Path) -> Path:
    """Unpack only `tests/` of the archive, and return that folder."""
    root = archive.name.removesuffix(".tar.gz")
    with tarfile.open(archive) as tar:
        members = [member for member in tar.getmembers() if member.name.startswith(f"{root}/tests/")]
        if not any(member.name == f"{root}/tests/test_modeling_common.py" for member in members):
            raise RuntimeError(
                f"{archive.name} has no `tests/test_modeling_common.py`: has the layout changed?"
            )
        tar.extractall(folder, members=members, filter="data")
    return folder / root / "tests"


if __name__ == "__main__":
    print(fetch_tests())
