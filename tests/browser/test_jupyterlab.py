"""What a reader meets in JupyterLab, in headless Chromium: Run All, bars, the control, the panel, links, interrupting.

Run by `make test-browser`; skipped where there is no Chromium. The notebooks are copies in the folder in which the
server was started, and what they write stays in a temporary folder.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import nbformat
import pytest

from llama_long_utils.paths import PRESETS, REPOSITORY
from tools.sequence import FOLDER

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make test-browser does it")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium: on Debian and Ubuntu, apt-get install chromium")

STEPS = 6  # of notebook 5, with a checkpoint after every second one
PATIENCE = 240_000

STARTUP = """
from pathlib import Path
from llama_long_utils import paths
paths.PRESETS = Path({home!r}) / "presets"
from llama_long_utils import settings
settings.REPOSITORY = Path({home!r})
"""
# In the page. `expose_app_in_browser` gives the application; the notebook that is open is its current widget.
PANEL = "window.jupyterapp.shell.currentWidget"
RUN_ALL = f"""() => {{
  window.bars = new Set(); window.finished = false;
  new MutationObserver(() => document.querySelectorAll('.jp-OutputArea progress').forEach(
    bar => window.bars.add(bar.parentElement.textContent.trim())
  )).observe(document.body, {{childList: true, subtree: true}});
  {PANEL}.context.ready.then(() => {PANEL}.sessionContext.ready)
    .then(() => window.jupyterapp.commands.execute('notebook:run-all-cells')).then(() => {{ window.finished = true; }});
}}"""

# Whether the control shows a picture that it did not show before.
NEW_PICTURE = """() => {
  const source = document.querySelector('.widget-interact img, .widget-output img')?.src;
  const before = window.seen.size;
  return source && window.seen.add(source).size > before;
}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where JupyterLab is started: copies of the notebooks, notebook 5 with few steps."""
    folder = tmp_path_factory.mktemp("lab")
    for path in FOLDER.glob("*.ipynb"):
        shutil.copy(path, folder)
    path = folder / "05_finetune_qlora.ipynb"
    short = nbformat.read(path, as_version=4)
    parameters = next(cell for cell in short.cells if "parameters" in cell.metadata.get("tags", []))
    assert "training_steps = None" in parameters.source
    parameters.source = parameters.source.replace("training_steps = None", f"training_steps = {STEPS}")
    nbformat.write(short, path)
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Variables with which a kernel writes to a temporary folder, and JupyterLab knows nothing of its user."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(PRESETS, home / "presets")
    tiny = (home / "presets" / "tiny.toml").read_text("utf-8")
    for number, replaced in (("checkpoint_every = 25", "checkpoint_every = 2"), ("window = 4096", "window = 1024")):
        assert tiny.count(number) == 1
        tiny = tiny.replace(number, replaced)  # all lengths follow the extension's window
    (home / "presets" / "tiny.toml").write_text(tiny, "utf-8")
    startup = home / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "folders.py").write_text(STARTUP.format(home=str(home)), "utf-8")
    folders = ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR"), ("SETTINGS_DIR", "WORKSPACES_DIR")
    own = {
        f"{program}_{name}" for program, names in zip(("JUPYTER", "JUPYTERLAB"), folders, strict=True) for name in names
    }
    variables = {name: str(home / name) for name in own} | {"IPYTHONDIR": str(home / "ipython")}
    return {**os.environ, **variables, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "2"}


@pytest.fixture(scope="module")
def address(folder, environment, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "server"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.root_dir={folder}"]
    command += ["--ServerApp.port=0", "--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True"]
    command += ["--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with log.open("w") as written, subprocess.Popen(command, env=environment, stderr=written, cwd=folder) as server:
        found = None
        while not found:
            assert server.poll() is None, log.read_text()
            time.sleep(0.2)
            found = re.search(r"http://localhost:\d+/lab", log.read_text())
        yield found[0]
        server.terminate()


@pytest.fixture(scope="module")
def page(address):
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(60_000)
        yield page
        browser.close()


def open_notebook(page, address, slug):
    page.goto(f"{address}/tree/{slug}.ipynb?reset")
    page.wait_for_function(f"window.jupyterapp && {PANEL}?.context?.path === '{slug}.ipynb'")
    page.wait_for_function(f"{PANEL}.sessionContext.session?.kernel?.status === 'idle'")


def run_all(page):
    page.evaluate(RUN_ALL)


def finish(page, slug):
    """Wait until every cell was run, close its kernel; return the saved notebook and the texts of the bars."""
    page.wait_for_function("window.finished", timeout=PATIENCE)
    page.evaluate(f"{PANEL}.context.save()")
    bars = page.evaluate("[...window.bars]")
    assert page.locator(".jp-OutputArea progress").count() == 0, "a bar stayed"
    return bars


def outputs(page):
    """The outputs of the open notebook as JSON; cells that are out of sight are not in the page."""
    return page.evaluate(f"JSON.stringify([...{PANEL}.content.model.cells].map(cell => cell.toJSON().outputs))")


def saved(folder, slug):
    notebook = nbformat.read(folder / f"{slug}.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    counts = [cell.execution_count for cell in code]
    assert counts == list(range(counts[0], counts[0] + len(code)))
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    return notebook


def shut_down(page):
    page.evaluate(f"{PANEL}.sessionContext.shutdown()")


def nbval(path, environment):
    """pytest on one notebook with the project's flags, as `make test` has them."""
    options = ["--nbval", "--nbval-current-env", "--nbval-sanitize-with", str(REPOSITORY / "tests/nbval_sanitize.cfg")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    command += ["-c", str(REPOSITORY / "pyproject.toml"), "--rootdir", str(path.parent), "-p", "conftest", str(path)]
    return subprocess.run(command, cwd=path.parent, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("slug", ["01_rope_explained", "03_long_documents"])
def test_run_all_and_save_gives_a_clean_notebook(page, address, folder, slug):
    open_notebook(page, address, slug)
    run_all(page)
    finish(page, slug)
    saved(folder, slug)
    shut_down(page)


def test_the_control_of_notebook_2_starts_and_moves(page, address, folder):
    open_notebook(page, address, "02_rope_scaling")
    run_all(page)
    finish(page, "02_rope_scaling")
    saved(folder, "02_rope_scaling")
    method, base = (page.locator(".jp-OutputArea .widget-dropdown select").nth(number) for number in (0, 1))
    assert (method.input_value(), base.input_value()) == ("abf", "100,000")
    page.evaluate("window.seen = new Set()")
    for choice in ("abf", "pi", "yarn", "longrope"):
        method.select_option(choice)
        page.wait_for_function(NEW_PICTURE)
    assert page.get_by_text("Error displaying widget").count() == 0
    shut_down(page)


PANEL_CELL = """
from pathlib import Path
from experiments.panel import Pair, Panel, Votes

pairs = [Pair(f"question {n}", f"good {n}", f"bad {n}", "rival") for n in range(6)]
panel = Panel(pairs, Votes(Path("votes.jsonl")))
panel.widget
"""


def test_a_person_votes_with_mouse_and_keyboard_and_goes_on_where_the_panel_was_closed(page, address, folder):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(PANEL_CELL)])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / "panel.ipynb")
    sides = []

    def votes():
        return [json.loads(line) for line in (folder / "votes.jsonl").read_text().splitlines()]

    def vote(do):
        """Prefer the good answer, by what `do` does with a number from 0 (left) to 2 (right)."""
        left, asked = cell.locator(".widget-html-content").nth(2).inner_text(), status.inner_text()
        sides.append(left)
        do(0 if "good" in left else 2)
        playwright.expect(status).not_to_have_text(asked)

    def by_tab(side):
        buttons.first.focus()
        for _ in range(side):
            page.keyboard.press("Tab")
        page.keyboard.press("Space")

    cell = page.locator(".jp-OutputArea")
    name, keys = cell.get_by_placeholder("then Enter"), cell.get_by_placeholder("or type 1, 2 or 3 here")
    buttons, status = cell.locator("button.widget-button"), cell.locator(".widget-html-content").first
    open_notebook(page, address, "panel")
    for opened in (0, 1):
        run_all(page)
        page.wait_for_function("window.finished", timeout=PATIENCE)
        name.fill("Ada")
        name.press("Enter")
        playwright.expect(status).to_have_text(f"{3 * opened} of 6 done.")
        playwright.expect(keys).to_be_focused()
        vote(lambda side: page.keyboard.press(str(side + 1)))  # the box has the focus, before and after
        playwright.expect(keys).to_have_value("")
        vote(lambda side: buttons.nth(side).click())
        vote(by_tab)
        assert len(votes()) == 3 * (opened + 1)
    assert {vote["verdict"] for vote in votes()} == {"win"}
    assert len({vote["pair"] for vote in votes()}) == 6
    assert len({text.split()[0] for text in sides}) == 2, "one model is always on one side"
    playwright.expect(status).to_have_text("6 of 6 done. Thank you.")
    playwright.expect(keys).to_be_hidden()
    shut_down(page)


def test_links_work_where_the_server_was_started_in_the_folder_of_the_notebooks(page, address, folder):
    open_notebook(page, address, "02_rope_scaling")
    page.evaluate(f"{PANEL}.content.scrollToItem({PANEL}.content.widgets.length - 1)")
    page.get_by_role("link", name="Long documents").last.click()
    page.wait_for_function(f"{PANEL}?.context?.path === '03_long_documents.ipynb'")


def test_notebook_5_shows_a_bar_resumes_when_it_was_interrupted_and_compares_once_saved(
    page, address, folder, environment
):
    slug = "05_finetune_qlora"
    open_notebook(page, address, slug)
    run_all(page)
    third_step = (
        "[...window.bars].some(text => /training: [5-9]\\d%/.test(text))"  # the second one's checkpoint is whole
    )
    page.wait_for_function(third_step, timeout=PATIENCE)
    page.evaluate("window.jupyterapp.commands.execute('notebook:interrupt-kernel')")
    page.wait_for_function("window.finished", timeout=PATIENCE)
    playwright.expect(page.locator(".jp-OutputArea progress")).to_have_count(0)
    assert "KeyboardInterrupt" in outputs(page)
    run_all(page)
    bars = finish(page, slug)
    # It may hit the writing of a checkpoint: the bar says that it is passed over, no stored output does.
    broken = r"(; checkpoint-\d of abf-\w+ is not whole and is passed over: [^;]+)?"
    resumed = rf"training, which was interrupted after step [24]{broken}: \d+%, about [\d:]+ left"
    assert any(re.fullmatch(resumed, text) for text in bars), bars
    saved(folder, slug)
    shut_down(page)
    compared = nbval(folder / f"{slug}.ipynb", environment)
    assert compared.returncode == 0, compared.stdout
