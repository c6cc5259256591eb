"""Writes environment.yml and requirements.lock from pyproject.toml: `make lock`."""

import argparse
import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement

from llama_long_utils.paths import REPOSITORY

# conda-forge builds these against its own CUDA; taking them from PyPI keeps one tested combination.
FROM_PIP = {"accelerate", "bitsandbytes", "datasets", "lm-eval", "peft", "safetensors", "tokenizers", "torch"}
FROM_PIP |= {"transformers", "trl", "vaderSentiment"}


def declared() -> list[Requirement]:
    """What pyproject.toml asks for, tests included."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    return [Requirement(line) for line in [*project["dependencies"], *project["optional-dependencies"]["test"]]]


def environment_file() -> str:
    """Text of environment.yml: conda-forge for what is pure Python or numpy, pip for the torch stack."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    conda = sorted(str(requirement) for requirement in declared() if requirement.name not in FROM_PIP)
    lines = ["# Made from pyproject.toml by `make lock`.", "name: llama-long", "channels:", "  - conda-forge"]
    lines += ["dependencies:", f"  - python{project['requires-python']}", *(f"  - {name}" for name in conda)]
    return "\n".join([*lines, "  - pip:", '      - -e ".[test]"']) + "\n"


def lock_file() -> str:
    """Text of requirements.lock: exact versions, as installed here, of everything that is needed."""
    found: dict[str, str] = {}
    done: set[tuple[str, frozenset[str]]] = set()  # by name and extras: a package is asked for again with others
    waiting = declared()
    while waiting:
        requirement = waiting.pop()
        try:
            package = distribution(requirement.name)
        except PackageNotFoundError:
            continue
        name = _normal(requirement.name)
        if (name, frozenset(requirement.extras)) in done:
            continue
        done.add((name, frozenset(requirement.extras)))
        found[name] = package.version.split("+")[0]
        for line in package.requires or []:
            needed = Requirement(line)
            extras = [{"extra": extra} for extra in requirement.extras] or [{"extra": ""}]
            if needed.marker is None or any(needed.marker.evaluate(extra) for extra in extras):
                waiting.append(needed)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    head = f"# Exact versions tested with Python {version}; made from pyproject.toml by `make lock`.\n"
    return head + "".join(f"{name}=={found[name]}\n" for name in sorted(found))


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    (REPOSITORY / "environment.yml").write_text(environment_file(), "utf-8")
    (REPOSITORY / "requirements.lock").write_text(lock_file(), "utf-8")
