"""Debian and PyPI packages into a cache folder, unpacked, each with its version and checksum."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """A package in the cache: its exact version, its file's SHA-256 and the folder that it was unpacked
    to."""

    kind: str
    name: str
    version: str
    file: str
    sha256: str
    folder: Path


def fetch(specification: str, cache: Path) -> Package:
    """Download and unpack a package, or find it in the cache, where only complete ones stand.

    Args:
        specification: `debian:NAME`, `debian:NAME | OTHER` or `pypi:NAME==VERSION`.
        cache: folder of downloads, made where it is missing.

    Raises:
        ValueError: if the package is unknown, naming it and what to do.
    """
    kind, _, names = specification.partition(":")
    if kind == "debian":
        return _fetch_debian([name.strip() for name in names.split("|")], cache)
    if kind == "pypi":
        return _fetch_pypi(names, cache)
    raise ValueError(f"Unknown kind of package {kind!r} in {specification!r}: expected 'debian:' or 'pypi:'.")


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _run(command: list[str], problem: str, **options) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, **options).stdout
    except FileNotFoundError:
        raise ValueError(f"{problem}: there is no command `{command[0]}` on this machine.") from None
    except subprocess.CalledProcessError as error:
        raise ValueError(f"{problem}: `{' '.join(command)}` said\n{error.stderr.strip()}") from None


def _debian_record(name: str) -> dict[str, str] | None:
    """What apt knows of the version that it would install."""
    environment = os.environ | {"LC_ALL": "C"}
    command = ["apt-cache", "show", "--no-all-versions", name]
    try:
        text = subprocess.run(command, capture_output=True, text=True, env=environment).stdout
    except FileNotFoundError:
        raise ValueError(
            f"Debian package {name!r} cannot be fetched: there is no command `apt-cache`. "
            "Build the corpus on Debian or in a Debian container, or from a data set with `--dataset`."
        ) from None
    record = dict(line.split(": ", 1) for line in text.splitlines() if re.match(r"[A-Z][\w-]*: ", line))
    return record if "Filename" in record else None


def _fetch_debian(names: list[str], cache: Path) -> Package:
    record = next((record for record in map(_debian_record, names) if record), None)
    if record is None:
        raise ValueError(
            f"Debian package {' or '.join(map(repr, names))} is not in this release's package lists: run "
            "`apt-get update`, or name what the release calls it in corpus_parts/domains.py."
        )
    name, version = record["Package"], record["Version"]
    downloads = cache / "debian"
    downloads.mkdir(parents=True, exist_ok=True)
    # As apt names its downloads.
    path = downloads / f"{name}_{version.replace(':', '%3a')}_{record['Architecture']}.deb"
    if not path.exists() or sha256(path) != record["SHA256"]:
        problem = f"Debian package {name!r} {version} could not be downloaded"
        _run(["apt-get", "download", "--quiet", f"{name}={version}"], problem, cwd=downloads)
        if not path.exists() or sha256(path) != record["SHA256"]:
            raise ValueError(
                f"{problem}: {path} has not the checksum of the package lists, {record['SHA256']}."
            )

    def unpack(folder: Path) -> None:
        _run(["dpkg-deb", "--extract", str(path), str(folder)], f"{path} could not be unpacked")

    folder = _unpack_once(cache / "unpacked" / path.stem, unpack)
    return Package("debian", name, version, path.name, record["SHA256"], folder)


def _fetch_pypi(requirement: str, cache: Path) -> Package:
    match = re.fullmatch(r"([\w.-]+)==([\w.]+)", requirement)
    if match is None:
        raise ValueError(f"PyPI package {requirement!r} needs an exact version, as in 'sympy==1.14.0'.")
    name, version = match.groups()
    downloads = cache / "pypi"
    downloads.mkdir(parents=True, exist_ok=True)
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not list(downloads.glob(pattern)):
        # Wheels of pure Python: a source distribution would run its own build code just to be downloaded.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += ["--disable-pip-version-check", "--dest", str(downloads), requirement]
        _run(command, f"PyPI package {requirement!r} could not be downloaded")
    path = next(downloads.glob(pattern))

    def unpack(folder: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder)

    folder = _unpack_once(cache / "unpacked" / path.stem, unpack)
    return Package("pypi", name, version, path.name, sha256(path), folder)


def _unpack_once(folder: Path, unpack) -> Path:
    """Unpack beside and rename, so that a folder of that name is always whole."""
    if not folder.exists():
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        unpack(partial)
        partial.rename(folder)
    return folder
