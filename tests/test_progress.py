"""Who sees how far a long cell is: a person a bar, the runner a line, a stored output nothing."""

import os
import sys

import nbformat
from nbclient import NotebookClient

from llama_long_utils import progress

CELL = """
import time
from llama_long_utils.progress import progress_bar, track

print("before")
for _ in track(range(5), "first"):
    time.sleep(0.3)
try:
    with progress_bar("interrupted", 10, already=4) as done:
        done(6)
        raise KeyboardInterrupt
except KeyboardInterrupt:
    print("after")
"""


def outputs(cell, variables):
    """What a cell leaves in its notebook, run in a kernel with these environment variables, and what it showed."""
    shown = []

    class Recording(NotebookClient):
        def process_message(self, message, *arguments):
            if message["msg_type"] in ("display_data", "update_display_data"):
                shown.append(message["content"]["data"])
            return super().process_message(message, *arguments)

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    client = Recording(notebook, kernel_name="python3")
    client.execute(env={**os.environ, **variables}, cwd=os.getcwd())
    return notebook.cells[0].outputs, shown


def test_a_person_sees_one_bar_with_the_time_left_that_leaves_its_place_empty():
    left, shown = outputs(CELL, {"JPY_SESSION_NAME": "notebook.ipynb"})
    texts = [data["text/html"].split("</progress> ")[1] for data in shown if data]
    assert texts[0] == "first: 0%"
    assert "about 0:00:01 left" in " ".join(texts)
    assert "interrupted: 40%" in texts
    assert all("<progress" in data["text/html"] for data in shown if data)
    assert "".join(output.text for output in left if output.output_type == "stream") == "before\nafter\n"
    assert [output.data for output in left if output.output_type != "stream"] == [{}]


def test_a_headless_kernel_leaves_nothing_and_tells_the_runner(tmp_path):
    left, shown = outputs(CELL, {})
    assert (shown, "".join(output.text for output in left)) == ([], "before\nafter\n")
    file = tmp_path / "progress"
    file.touch()
    cell = "from llama_long_utils.progress import *\nwith progress_bar('training', 4) as done:\n    "
    variables = {progress.FILE: str(file), "JPY_SESSION_NAME": "of the notebook that started the run"}
    left, shown = outputs(f"{cell}print(open({str(file)!r}).read())", variables)
    assert (shown, left[0].text) == ([], "training: 0%\n")
    assert file.read_text() == ""


def test_a_command_prints_a_line_only_when_it_takes_long(capsys, monkeypatch):
    assert list(progress.track("ab", "short")) == ["a", "b"]
    assert capsys.readouterr().out == ""
    monkeypatch.setitem(progress.PAUSE, "line", -1.0)
    with progress.progress_bar("reading", 8, already=2) as done:
        done(6)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "reading: 25%"
    assert second.startswith("reading: 75%, about 0:00:0")


def test_only_kernels_that_nobody_watches_are_headless():
    cell = "from llama_long_utils.progress import headless; print(headless())"
    assert "ipykernel.kernelapp" not in sys.modules or progress.headless()
    for variables, expected in (
        ({}, "True\n"),  # papermill, nbval, nbconvert
        ({"JPY_SESSION_NAME": "notebook.ipynb"}, "False\n"),  # Jupyter server
    ):
        (left,), _ = outputs(cell, variables)
        assert left.text == expected
    (left,), _ = outputs("import os\ndel os.environ['JPY_PARENT_PID']\n" + cell, {})  # as VS Code starts them
    assert left.text == "False\n"
