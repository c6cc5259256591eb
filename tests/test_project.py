import ast
import graphlib
import re
import shutil
import subprocess
import sys

import yaml
from packaging.version import Version

from llama_long_utils.paths import REPOSITORY
from tools import lock


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


def test_a_fresh_clone_is_installed_and_its_corpora_are_fetched_once_whatever_is_made(tmp_path):
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(REPOSITORY / name, tmp_path)
    for goal in ("install", "data", "test"):
        done = subprocess.run(["make", "-n", goal], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert [done.stdout.count(part) for part in ("-m venv", "data.sources")] == [1, 1], goal
    said = subprocess.run(["make", "help"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "make install " in said


def test_ruff_is_clean():
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "."], cwd=REPOSITORY, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout


def test_repository_is_small_and_holds_no_pickle():
    files = tracked()
    # Today 56: adapters 35 (the 1.5B model's has 18, SmolLM2's of rank 16 has 9), the tiny model 8, records 8. Their
    # arrays are packed by LZMA, which `numpy.load` reads: an eighth less than what it writes itself.
    assert sum(path.stat().st_size for path in files) <= 56 * 2**20
    assert not [path for path in files if path.suffix in {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}]


def test_no_tracked_file_holds_a_path_of_this_machine():
    for path in tracked():
        assert str(REPOSITORY).encode() not in path.read_bytes(), path


def test_links_of_pages_lead_to_files_and_headings():
    for page in (path for path in tracked() if path.suffix == ".md"):
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
            name, _, anchor = target.partition("#")
            other = page.parent / name if name else page
            assert target.startswith("https://") or other.exists(), f"{page.name}: {target}"
            headings = re.findall(r"(?m)^#+ (.+)$", other.read_text("utf-8")) if anchor and other.is_file() else []
            there = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert target.startswith("https://") or not anchor or anchor in there, f"{page.name}: {target}"


PACKAGE = REPOSITORY / "llama_long_utils"
# Lowest first. A file imports from its own layer and those below it.
LAYERS = (
    ("paths", "progress", "commands"),
    ("stages",),
    ("settings",),
    ("presets", "rope", "records", "cache", "figures"),
    ("data",),
    ("model",),
    ("training",),
    ("evaluation",),
    ("notebooks", "plan", "train"),
    ("new_preset",),
)


def imports_of(path):
    """Modules of the package that a file imports, functions' own imports included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llama_long_utils"):
            for name in node.names:
                inside = PACKAGE.parent.joinpath(*node.module.split("."), f"{name.name}.py")
                yield f"{node.module}.{name.name}" if inside.is_file() else node.module


def modules():
    """Every file of the package, by the name it is imported under."""
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    return {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in files}


def test_imports_go_downwards_only():
    layer = {name: number for number, names in enumerate(LAYERS) for name in names}
    for name, path in modules().items():
        own = layer[name.split(".")[1]]
        above = [other for other in imports_of(path) if layer[other.split(".")[1]] > own]
        assert not above, f"{name} imports {above} from a layer above its own"


def test_no_two_files_need_each_other():
    needed = {name: set(imports_of(path)) for name, path in modules().items()}
    graphlib.TopologicalSorter(needed).prepare()  # raises CycleError


def test_every_file_has_one_subject_that_its_docstring_names():
    for name, path in modules().items():
        text = path.read_text()
        assert text.startswith('"""'), name
        assert len(text.splitlines()) <= 400, name
    assert sum(len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")) <= 8053


def test_default_branch_of_the_code_trusts_no_remote_code():
    for path in PACKAGE.rglob("*.py"):
        assert not re.search(r"trust_remote_code(?!=False)|allow_pickle=True|torch\.load", path.read_text()), path.name
