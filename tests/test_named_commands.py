"""Every command that a page of this repository names exists and takes the options it is given there. Nothing is run."""

import argparse
import json
import re
import runpy
import shlex
import sys
from importlib.util import find_spec

import pytest

from llama_long_utils.paths import REPOSITORY
from tools.sequence import delivered

PAGES = ("README.md", "CONTRIBUTING.md", "data/README.md", "data/tiny-llama/README.md", "Makefile")
OURS = r"-m (?P<module>(?:llama_long_utils|experiments|tools)[\w.]*)(?P<words>[^`#|\n]*)"
QUOTED = re.compile(rf"`[^`\n]*?{OURS}`")
ON_A_LINE = re.compile(rf"(?m)^[\s!-]*(?:\S+=\S* )*\S*(?:python|torchrun)\b[^`\n]*? {OURS}(?:#.*)?$")
STANDS_FOR = {"SEED": "0", "N": "2", "FILE": "file", "FOLDER": "folder", "NAME": "tiny", "GIB": "24"}
FILLED = {"$(BIN)/": "", "$(PRESET)": "tiny", "$(WORKERS)": "2", "{settings.name}": "tiny", "{preset.name}": "tiny"}


def pages():
    """The texts by name: pages, presets, cells of notebooks, and code, whose messages and docstrings name commands."""
    for name in PAGES:
        yield name, (REPOSITORY / name).read_text("utf-8")
    for pattern in ("presets/*.toml*", "llama_long_utils/**/*.py", "experiments/*.py", "tools/**/*.py", "data/tasks/*"):
        for path in sorted(REPOSITORY.glob(pattern)):
            if path.is_file():
                yield str(path.relative_to(REPOSITORY)), path.read_text("utf-8")
    for notebook in delivered():
        cells = json.loads(notebook.path.read_bytes())["cells"]
        yield notebook.path.name, "\n".join("".join(cell["source"]) for cell in cells)


def named_commands():
    """(page, module, words), each command once."""
    found = {}
    for page, text in pages():
        for name, value in FILLED.items():
            text = text.replace(name, value)
        for pattern in (QUOTED,) if page.endswith(".py") else (QUOTED, ON_A_LINE):
            for match in pattern.finditer(text):
                found.setdefault((match["module"], match["words"].strip(" \\")), page)
    return [(page, *command) for command, page in found.items() if not re.search("[{]|--help", command[1])]


def file_of(module):
    """What `python -m` executes."""
    spec = find_spec(module)
    return (find_spec(f"{module}.__main__") if spec.submodule_search_locations else spec).origin


class Taken(BaseException):
    """The options are known, and what the command does was not begun."""


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize(("page", "module", "words"), named_commands())
def test_a_command_takes_the_options_that_a_page_gives_it(page, module, words, monkeypatch, capsys):
    whole = argparse.ArgumentParser.parse_args

    def parse(parser, *given):
        whole(parser, *given)
        raise Taken

    words = [STANDS_FOR.get(word, word) for word in shlex.split(words)]
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(sys, "argv", ["command", *words])
    try:
        runpy.run_path(file_of(module), run_name="__main__")  # as a module pytest's own loader has `tools`
        raise AssertionError(f"{page}: python -m {module} looks at no options")
    except Taken:
        pass
    except SystemExit:  # named without its options
        said = capsys.readouterr().err
        assert not words and "the following arguments are required" in said, f"{page}: {module} {words}: {said}"


def test_commands_of_all_kinds_are_found():
    found = {(module, words) for _, module, words in named_commands()}
    some = {
        ("tools.run", "--preset mine --only 06"),
        ("tools.lock", ""),
        ("experiments", "dose --prepare FILE --texts second"),
    }
    assert len(found) >= 35 and some <= found


def test_targets_of_make_that_a_page_names_are_there():
    makefile = (REPOSITORY / "Makefile").read_text("utf-8")
    targets = {name for line in re.findall(r"(?m)^\.PHONY: (.*)$", makefile) for name in line.split()}
    for page, text in pages():
        if not page.endswith(".py"):
            named = re.findall(r"(?m)(?:`|^|echo \")make ([a-z-]+)", text)
            assert set(named) <= targets, page
