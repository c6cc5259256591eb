"""The guards: what a stored notebook must be, and that nbval would notice if it were wrong."""

import os
import re
import subprocess
import sys

import nbformat
import numpy as np
import papermill
import pytest
from nbclient import NotebookClient

from llama_long_utils.notebooks import check, finding
from llama_long_utils.paths import REPOSITORY
from tools.kernels import forked
from tools.readme import write_generated
from tools.sequence import FOLDER, SEQUENCE, delivered

NAMES = [notebook.slug for notebook in delivered()]


def read(notebook):
    return nbformat.read(notebook.path, as_version=4)


@pytest.fixture(params=delivered(), ids=NAMES)
def notebook(request):
    return read(request.param)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def compares_text(cell):
    """Whether nbval has a text of this cell to compare (the repr of a display object is none)."""
    for output in cell.outputs:
        if output.output_type == "stream" and output.name == "stdout":
            return True
        text = output.get("data", {}).get("text/plain", "")
        if "text/markdown" in output.get("data", {}) or (text and not text.startswith("<")):
            return True
    return False


def test_delivered_notebooks_are_the_files_there_are():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES
    assert {"01_rope_explained", "03_long_documents", "05_finetune_qlora", "06_perplexity_by_position"} <= set(NAMES)


def test_notebooks_are_short_on_average():
    """Loading, caching, drawing and recording are one call each: what is left is the idea."""
    lines = [sum(len(cell.source.splitlines()) for cell in code(read(notebook))) for notebook in delivered()]
    assert np.mean(lines) <= 170, dict(zip(NAMES, lines, strict=True))


def test_every_cell_was_run_once_in_order(notebook):
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))


def test_stored_outputs_are_clean(notebook):
    text = nbformat.writes(notebook)
    assert len(text.encode()) <= 500_000
    for cell in code(notebook):
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", cell.source
    without_images = re.sub(r'"image/png": "[^"]*"', "", text)
    assert not re.search(r"/(home|root|tmp|work|Users)/", without_images)
    assert not re.search(r"\b\d+(\.\d+)? ?(s|sec|seconds|it/s)\b", "".join(map(stdout, code(notebook))))


def stdout(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def test_code_that_a_notebook_shows_is_todays(notebook):
    package = {line for path in REPOSITORY.glob("llama_long_utils/**/*.py") for line in path.read_text().splitlines()}
    shown = "".join(stdout(cell) for cell in code(notebook) if "inspect.getsource(" in cell.source)
    assert not [line for line in re.findall(r"(?m)^(?:def |class |@|    ).*", shown) if line not in package]


def test_nbval_compares_at_least_60_percent_of_the_cells(notebook):
    cells = code(notebook)
    ignored = [cell for cell in cells if "nbval-ignore-output" in cell.metadata.get("tags", [])]
    assert len(ignored) <= 1
    assert not [cell for cell in cells if "nbval-skip" in cell.metadata.get("tags", []) or "NBVAL_" in cell.source]
    compared = [cell for cell in cells if compares_text(cell) and cell not in ignored]
    assert len(compared) >= 0.6 * len(cells), f"{len(compared)} of {len(cells)}"


def test_parameters_come_first_one_commented_literal_a_line(notebook):
    parameters = [cell for cell in code(notebook) if "parameters" in cell.metadata.get("tags", [])]
    assert parameters == code(notebook)[:1]
    assert all(line.count("=") == 1 and "#" in line for line in parameters[0].source.splitlines())


def test_last_cell_concludes_and_no_output_times_the_machine(notebook):
    for heading in ("**Exercises**", "**References**"):
        assert heading in notebook.cells[-1].source
    assert any("## What we have now" in cell.source for cell in notebook.cells[-3:])
    assert not re.search(r"\b\d+(\.\d+)? ?(s|sec|seconds|it/s)\b", "".join(map(stdout, code(notebook))))


def test_figures_have_a_caption_and_alt_text(notebook):
    for cell in code(notebook):
        images = [output for output in cell.outputs if "image/png" in output.get("data", {})]
        written = [output.data["text/markdown"] for output in cell.outputs if "text/markdown" in output.get("data", {})]
        captions = [text for text in written if re.match(r"\*\*Figure \d+\.\d+\.\*\* ", text)]
        assert len(images) == len(captions)
        assert all(image.metadata["image/png"]["alt"] for image in images)


def test_every_figure_in_a_notebook_is_committed():
    shown = {
        match
        for notebook in delivered()
        for cell in code(nbformat.read(notebook.path, as_version=4))
        for match in re.findall(r'"(\d\d_\w+)",\s*"\d+\.\d+"', cell.source)  # a slug and a figure's number
    }
    assert shown == {path.stem for path in (REPOSITORY / "figures").glob("*.png")}


def test_links_index_and_results_are_in_step():
    assert write_generated(check=True) == []


def test_links_work_wherever_jupyterlab_was_started(notebook):
    """Started in notebooks/, it shows nothing above: links go to notebooks beside this one, or to the web."""
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    targets = set(re.findall(r"\]\(([^)\s]+)\)", prose))
    assert [one for one in targets if not one.startswith("https://") and one.removesuffix(".ipynb") not in NAMES] == []


def test_planned_notebooks_are_not_linked():
    readme = (REPOSITORY / "README.md").read_text()
    for planned in SEQUENCE:
        assert (f"notebooks/{planned.slug}.ipynb" in readme) == (planned.slug in NAMES)


def test_check_can_fail(capsys):
    check("one is one", True)
    assert capsys.readouterr().out == "holds: one is one\n"
    with pytest.raises(AssertionError, match="does not hold: one is two"):
        check("one is two", False)
    finding("one is two", False)
    assert capsys.readouterr().out == "does not hold: one is two\n"


def test_the_control_works_where_somebody_watches_and_starts_on_a_setting_that_shows_something(tmp_path):
    """Executed in a kernel as JupyterLab starts it, where the notebook with a control takes its other branch."""
    with_control = [one for one in delivered() if "headless()" in one.path.read_text("utf-8")]
    # Notebook 10 shows its panel to people; tests/browser drives it.
    assert [one.slug for one in with_control] == ["02_rope_scaling", "10_preference_tuning"]
    notebook = nbformat.read(with_control[0].path, as_version=4)
    elsewhere = "from pathlib import Path\nfrom llama_long_utils import settings\n"
    elsewhere += f"settings.REPOSITORY = Path({str(tmp_path)!r})"
    moving = """
first = {**common, **control.kwargs, "window": control.kwargs["factor"] * original_window}
scaling = Scaling(**{name: value for name, value in first.items() if name != "factor"})
slower = plain / rope.rotation(scaling, scaling.window)[0]
assert slower.max() > 2 * slower.min(), "it starts on a flat line"
assert new_angle_share(plain / slower).max() > 0.05, "it starts where no angle is new"
picture, drawn = figures / "02_one_setting.png", 0
for chosen in control.children[:3]:
    for option in reversed(chosen.options):
        value = option[1] if isinstance(option, tuple) else option
        if value != chosen.value:
            picture.unlink()
            chosen.value = value
            assert picture.is_file(), f"{chosen.description} = {value} draws nothing"
            drawn += 1
print(drawn, "settings drawn")
"""
    notebook.cells = [nbformat.v4.new_code_cell(elsewhere), *notebook.cells, nbformat.v4.new_code_cell(moving)]
    environment = {**os.environ, "JPY_SESSION_NAME": "02_rope_scaling.ipynb"}
    with forked():
        NotebookClient(notebook, timeout=300).execute(env=environment, cwd=str(FOLDER))  # a reply was lost once
    settings = stdout(notebook.cells[-1]).split()
    assert int(settings[0]) >= 15


def head_of_first_notebook(folder, cells=8):
    """The first cells of notebook 1, stored outputs included, as a notebook of their own."""
    notebook = nbformat.read(FOLDER / "01_rope_explained.ipynb", as_version=4)
    notebook.cells = notebook.cells[:cells]
    path = folder / "head.ipynb"
    nbformat.write(notebook, path)
    return path, notebook


def test_papermill_takes_a_parameter_and_refuses_a_misspelt_one_from_both_folders(tmp_path):
    path, _ = head_of_first_notebook(tmp_path, cells=5)
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", str(path), str(tmp_path / "out.ipynb")]
    done = subprocess.run([*command, "-p", "preset", "tiny"], cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    taken = {"parameters": {"preset": "tiny"}, "cwd": REPOSITORY, "progress_bar": False}
    with forked():
        papermill.execute_notebook(path, tmp_path / "out.ipynb", **taken)
        for folder in (REPOSITORY, FOLDER):
            options = {"parameters": {"presett": "tiny"}, "cwd": folder, "progress_bar": False}
            with pytest.raises(papermill.PapermillExecutionError, match="unknown parameter 'presett'"):
                papermill.execute_notebook(path, tmp_path / "out.ipynb", **options)


def test_mutation_of_one_stored_number_fails(tmp_path, capsys):
    path, notebook = head_of_first_notebook(tmp_path)
    number = next(o for cell in code(notebook) for o in cell.outputs if re.search(r"\d", o.get("text", "")))
    number["text"] = re.sub(r"\d", lambda match: str((int(match[0]) + 1) % 10), number["text"], count=1)
    nbformat.write(notebook, path)
    options = ["--nbval", "--nbval-current-env", "-q", "-s", "--confcutdir", str(tmp_path), "--rootdir", str(tmp_path)]
    for plugin in ("cacheprovider", "faulthandler", "hypothesispytest", "xdist"):
        options += ["-p", f"no:{plugin}"]
    assert pytest.main([*options, str(path)]) == 1
    said = capsys.readouterr().out
    assert f"1 failed, {len(code(notebook)) - 1} passed" in said  # all others are as they are stored


def test_check_lines_do_not_depend_on_order_or_address(notebook):
    for cell in code(notebook):
        assert not re.search(r"0x[0-9a-f]{6,}|\{'.*'\}", stdout(cell))
