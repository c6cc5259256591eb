import re
import subprocess
import sys

import lock
import yaml
from packaging.version import Version

from llama_long_utils.documents import REPOSITORY


def tracked():
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    return [REPOSITORY / line for line in listed.splitlines() if (REPOSITORY / line).is_file()]


def test_environment_file_is_made_from_pyproject():
    assert (REPOSITORY / "environment.yml").read_text() == lock.environment_file()
    parsed = yaml.safe_load(lock.environment_file())
    assert parsed["channels"] == ["conda-forge"]
    assert parsed["dependencies"][-1] == {"pip": ['-e ".[test]"']}


def test_lock_has_an_exact_allowed_version_of_everything_declared():
    lines = [line for line in (REPOSITORY / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    locked = dict(line.split("==") for line in lines)
    for requirement in lock.declared():
        assert requirement.specifier.contains(Version(locked[requirement.name.lower()])), requirement


def test_ruff_is_clean():
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "."], cwd=REPOSITORY, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout


def test_repository_is_small_and_holds_no_pickle():
    files = tracked()
    assert sum(path.stat().st_size for path in files) <= 25 * 2**20
    assert not [path for path in files if path.suffix in {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}]


def test_no_tracked_file_holds_a_path_of_this_machine():
    for path in tracked():
        assert str(REPOSITORY).encode() not in path.read_bytes(), path


def test_helper_module_is_flat_and_documented():
    modules = sorted((REPOSITORY / "llama_long_utils").rglob("*.py"))
    assert all(path.parent.name == "llama_long_utils" for path in modules)
    assert len(modules) <= 18
    for path in modules:
        if path.name != "__init__.py":
            assert path.read_text().startswith('"""'), path.name


def test_default_branch_of_the_code_trusts_no_remote_code():
    for path in (REPOSITORY / "llama_long_utils").glob("*.py"):
        assert not re.search(r"trust_remote_code|allow_pickle=True|torch\.load", path.read_text()), path.name
