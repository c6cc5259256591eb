"""A run that is killed, disturbed or attacked ends in the same adapter and merged model, byte for byte, or in a line.

Every run is a process of its own, forked from a server that has imported the libraries (a start costs a tenth of a
second instead of ten), and gets a real SIGKILL. The model is a doll of two layers; folders have spaces and other
scripts in their names.
"""

import dataclasses
import functools
import gc
import hashlib
import importlib
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llama_long_utils.model.weights import locate_base
from llama_long_utils.paths import REPOSITORY
from llama_long_utils.presets import load_preset
from llama_long_utils.records import read_record, write_record
from llama_long_utils.settings import Preset
from llama_long_utils.training.adapter import train_adapter
from tools.merge import merge_adapter

STEPS, EVERY = 6, 2  # checkpoints after 2, 4 and 6, of which two are kept
WINDOW = 128
SECONDS = 120  # after which a run hangs


@dataclass(frozen=True)
class Kill:
    """SIGKILL at the `call`-th call of a function that has `about` in its arguments.

    `when` is "before", "after", or "half": after a file was written, of which only the first half is left.
    """

    function: str
    call: int = 1
    when: str = "before"
    about: str = ""

    def install(self) -> None:
        module, _, name = self.function.partition(":")
        *path, last = name.split(".")
        owner = functools.reduce(getattr, path, importlib.import_module(module))
        original, calls = getattr(owner, last), 0

        @functools.wraps(original)
        def killing(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += self.about in repr([*arguments, *options.values()])
            if calls < self.call:
                return original(*arguments, **options)
            if self.when != "before":
                original(*arguments, **options)
            if self.when == "half":
                texts = [str(value) for value in [*arguments, *options.values()] if isinstance(value, str | Path)]
                (file,) = [text for text in texts if os.path.isfile(text)]
                os.truncate(file, os.path.getsize(file) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(owner, last, killing)


WEIGHTS, TRAINER, ADAPTERS = "peft.peft_model:safe_save_file", "transformers:Trainer", "llama_long_utils.model.adapters"
MOMENTS = {
    "before the base is loaded": Kill("llama_long_utils.training.adapter:load_base"),
    "after LoRA was added": Kill("llama_long_utils.training.adapter:add_lora", when="after"),
    "in the first step": Kill(f"{TRAINER}.training_step"),
    "after the first checkpoint": Kill(f"{TRAINER}.training_step", 3),
    "after the second checkpoint": Kill(f"{TRAINER}.training_step", 6, "after"),
    "in the weights of the first checkpoint": Kill(WEIGHTS, 1, "half"),
    "in the weights of the second": Kill(WEIGHTS, 2, "half"),
    "in the weights of the last": Kill(WEIGHTS, 3, "half"),
    "in an optimizer's state": Kill("torch:save", 2, "half", "optimizer.pt"),
    "in a scheduler's state": Kill("torch:save", 2, "half", "scheduler.pt"),
    "in random states": Kill("torch:save", 2, "half", "rng_state"),
    "in the Trainer's state": Kill("transformers.trainer_callback:TrainerState.save_to_json", 2, "half"),
    "before a checkpoint is sealed": Kill("llama_long_utils.training.trainer:write_atomically", 2),
    "before an old checkpoint is removed": Kill("shutil:rmtree", 1, "before", "checkpoint-"),
    "after training": Kill("llama_long_utils.training.adapter:save_adapter"),
    "in the adapter's weights": Kill(WEIGHTS, 4, "half"),
    "in the adapter's card": Kill("pathlib:Path.write_text", 1, "half", "adapter_card.json"),
    "before the adapter is in its place": Kill("pathlib:Path.replace", 1, "before", "/adapter')"),
    "after the adapter was put in its place": Kill("pathlib:Path.replace", 1, "after", "/adapter')"),
    "before the log is written": Kill("llama_long_utils.cache:write_atomically"),
    "before merging": Kill(f"{ADAPTERS}:load_adapter"),
    "in the merged weights": Kill("transformers.modeling_utils:safe_save_file", 1, "half"),
    "before the merged model's tokenizer": Kill("shutil:copy", 1, "before", "tokenizer"),
}


STEPS_LEFT = {  # at most; elsewhere all of them
    "after the first checkpoint": STEPS - EVERY,
    "after the second checkpoint": STEPS - 2 * EVERY,
    "in the weights of the second": STEPS - EVERY,
    "in the weights of the last": STEPS - 2 * EVERY,
    "before a checkpoint is sealed": STEPS - EVERY,
    "after training": 0,
    "in the adapter's weights": 0,
    "before merging": 0,
}


def train_and_merge(preset: Preset) -> None:
    trained = train_adapter(preset)
    merge_adapter(trained.folder, locate_base(preset), preset.run_folder / "merged", dtype=preset.base.dtype)
    losses = [(row["step"], row["tokens"], row["loss"], row["grad_norm"]) for row in trained.log]
    (preset.run_folder / "losses.json").write_text(json.dumps(losses))


def in_process(output: Path, kill: Kill | None, action: Callable[..., None], arguments: tuple) -> None:
    """What a forked process does; an error ends it with status 1 and is the last line of its output."""
    gc.freeze()  # the server's objects are never garbage: looking through them takes a second
    with output.open("w") as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
    if kill:
        kill.install()
    try:
        action(*arguments)
    except Exception as error:
        print(f"error: {type(error).__name__}: {error}", flush=True)
        sys.exit(1)


class Doll:
    """A doll's preset, and runs of it in folders of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        base, texts = folder / "Bäse der Puppe", folder / "文本 with spaces"
        words = (REPOSITORY / "README.md").read_text().split()
        texts.mkdir(parents=True)
        for number in range(6):
            (texts / f"tëxt {number}.txt").write_text(" ".join(words[number * 400 : number * 400 + 400]))
        tokenizer = REPOSITORY / "data" / "tiny-llama"
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=json.loads((tokenizer / "config.json").read_text())["vocab_size"],
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        )
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(base)
        for file in tokenizer.glob("tokenizer*"):
            shutil.copy(file, base)
        tiny = load_preset("tiny")
        training = {"window": WINDOW, "reach": WINDOW, "steps": STEPS, "checkpoint_every": EVERY, "warmup_steps": 1}
        self.preset = dataclasses.replace(
            tiny,
            base=dataclasses.replace(tiny.base, source=str(base), window=64, head_dim=32),
            extension=dataclasses.replace(tiny.extension, window=WINDOW),
            data=dataclasses.replace(tiny.data, sources=[str(texts)], held_out={str(texts): 1}, minimum_characters=500),
            training=dataclasses.replace(tiny.training, **training),
        )
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload(
            [
                "llama_long_utils.training.adapter",
                "transformers.trainer",
                "peft.peft_model",
                "torch._dynamo",
                "test_kills",
            ]
        )

    def named(self, name: str, folder: Path | None = None) -> Preset:
        """The preset whose runs write to a folder: an absolute name leads out of runs/."""
        return dataclasses.replace(self.preset, name=str((folder or self.folder) / name))

    def start(self, action: Callable[..., None], *arguments: Any, kill: Kill | None = None) -> tuple[Any, Path]:
        output = self.folder / f"output {len(list(self.folder.glob('output *')))}"
        output.touch()
        process = self.processes.Process(target=in_process, args=(output, kill, action, arguments))
        process.start()
        return process, output

    def run(self, action: Callable[..., None], *arguments: Any, kill: Kill | None = None) -> tuple[int, str]:
        """Exit status and output."""
        return self.end(*self.start(action, *arguments, kill=kill))

    @staticmethod
    def end(process: Any, output: Path) -> tuple[int, str]:
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
        return process.exitcode, output.read_text()


def results(preset: Preset) -> dict[str, str]:
    """SHA-256 of every file of the adapter and the merged model, and of the losses."""
    (trained,) = preset.run_folder.glob("training/*/adapter")
    files = [*sorted(trained.iterdir()), *sorted((preset.run_folder / "merged").iterdir())]
    files.append(preset.run_folder / "losses.json")
    return {f"{file.parent.name}/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest() for file in files[:-1]} | {
        "losses": files[-1].read_text()
    }


@pytest.fixture(scope="module")
def doll(tmp_path_factory) -> Iterator[Doll]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("Läufe 中文 and spaces")
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)  # the server imports this file
        patch.setenv("LLAMA_LONG_CACHE", str(folder / "cache"))
        yield Doll(folder)


@pytest.fixture(scope="module")
def expected(doll) -> dict[str, str]:
    """What a run gives that nothing disturbs."""
    preset = doll.named("undisturbed")
    status, output = doll.run(train_and_merge, preset)
    assert status == 0, output
    return results(preset)


def test_two_undisturbed_runs_are_equal(doll, expected):
    preset = doll.named("undisturbed, too")
    assert doll.run(train_and_merge, preset)[0] == 0
    assert results(preset) == expected
    assert {"adapter/adapter_model.safetensors", "merged/model.safetensors", "losses"} < set(expected)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_ends_in_the_same_files(doll, expected, moment):
    preset = doll.named(moment)
    status, output = doll.run(train_and_merge, preset, kill=MOMENTS[moment])
    assert status == -signal.SIGKILL, output
    too_many = Kill(f"{TRAINER}.training_step", STEPS_LEFT.get(moment, STEPS) + 1)
    status, output = doll.run(train_and_merge, preset, kill=too_many)
    assert status == 0, output
    assert results(preset) == expected


def test_a_run_killed_again_and_again_ends_in_the_same_files(doll, expected):
    preset = doll.named("again and again")
    kills = [Kill(f"{TRAINER}.training_step"), Kill(f"{TRAINER}.training_step", 3)]
    kills += [Kill(WEIGHTS, 1, "half", about) for about in ("checkpoint-4", "checkpoint-6", "adapter")]
    for kill in [*kills, MOMENTS["in the merged weights"]]:
        status, output = doll.run(train_and_merge, preset, kill=kill)
        assert status == -signal.SIGKILL, output
    assert doll.run(train_and_merge, preset)[0] == 0
    assert results(preset) == expected


def test_a_run_killed_while_it_imports_has_written_nothing(tmp_path):
    """Watched from inside, as notebooks that are executed meanwhile write to runs/, too."""
    code = f"""
import os, sys

def watch(event, arguments):
    if event in ("open", "os.mkdir") and str(arguments[0]).startswith({str(REPOSITORY / "runs")!r}):
        os._exit(1)
    if event == "import" and arguments[0] == "peft":
        os.kill(os.getpid(), 9)

sys.addaudithook(watch)
import llama_long_utils.training.adapter
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def write_one_record(folder: Path, question: str) -> None:
    write_record(folder, "01_rope_explained", preset="tiny", question=question, tables={}, seeds={}, seconds=1.0)


@pytest.mark.parametrize("when", ["before", "half"])
def test_a_record_is_the_old_one_or_the_new_one(doll, when):
    folder = doll.folder / f"record {when}"
    assert doll.run(write_one_record, folder, "Old?")[0] == 0
    kill = Kill("pathlib:Path.write_bytes", 1, when, "01_rope_explained")
    assert doll.run(write_one_record, folder, "New?", kill=kill)[0] == -signal.SIGKILL
    assert read_record(folder / "01_rope_explained.json")["question"] == "Old?"
    assert doll.run(write_one_record, folder, "New?")[0] == 0
    assert read_record(folder / "01_rope_explained.json")["question"] == "New?"


def test_two_runs_at_once_in_one_folder(doll, expected):
    """One trains. The other waits, reads the result or says that it is there: nothing is torn."""
    preset = doll.named("two at once")
    both = [doll.start(train_and_merge, preset) for _ in range(2)]
    ended = [doll.end(*one) for one in both]
    assert 0 in [status for status, _ in ended], ended
    for status, output in ended:
        assert status == 0 or "another process is training in" in output.splitlines()[-1]
    assert doll.run(train_and_merge, preset)[0] == 0
    assert results(preset) == expected


# Files that are not what they were


@pytest.mark.parametrize("left", [0, 100, -1])
def test_a_truncated_adapter_is_made_again(doll, expected, left):
    preset = doll.named(f"truncated {left}")
    assert doll.run(train_and_merge, preset)[0] == 0
    (weights,) = preset.run_folder.glob("training/*/adapter/adapter_model.safetensors")
    os.truncate(weights, left if left >= 0 else weights.stat().st_size - 1)
    status, output = doll.run(train_and_merge, preset)
    assert status == 0, output
    assert "the adapter is made again" in output
    assert results(preset) == expected


@pytest.mark.parametrize("left", [0, 100, -1])
def test_a_truncated_base_is_refused(doll, left):
    base = doll.folder / f"truncated base {left}"
    shutil.copytree(doll.preset.base.source, base)
    weights = base / "model.safetensors"
    os.truncate(weights, left if left >= 0 else weights.stat().st_size - 1)
    preset = doll.named(f"on a truncated base {left}")
    preset = dataclasses.replace(preset, base=dataclasses.replace(preset.base, source=str(base)))
    status, output = doll.run(train_and_merge, preset)
    assert status == 1
    assert "model.safetensors is truncated or corrupt" in output.splitlines()[-1]
    assert not preset.run_folder.exists()


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.file,))


def test_the_malicious_pickle_works(tmp_path):
    pickle.loads(pickle.dumps(Malicious(tmp_path / "made")))
    torch.save(Malicious(tmp_path / "made too"), tmp_path / "saved")
    torch.load(tmp_path / "saved", weights_only=False)
    assert (tmp_path / "made").exists()
    assert (tmp_path / "made too").exists()


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "adapter_model.bin"]
)
def test_pickles_in_checkpoints_are_not_executed(doll, expected, name, sealed):
    preset = doll.named(f"{name} {sealed}")
    assert doll.run(train_and_merge, preset, kill=MOMENTS["after the second checkpoint"])[0] == -signal.SIGKILL
    (checkpoint,) = preset.run_folder.glob("training/*/checkpoint-4")
    made = doll.folder / f"made by {name} {sealed}"
    torch.save({"state": Malicious(made)}, checkpoint / name)
    if name == "adapter_model.bin":
        (checkpoint / "adapter_model.safetensors").unlink()
    if sealed:  # whoever puts a file there can write its checksum, too
        files = [file for file in checkpoint.iterdir() if file.name != "checksums.json"]
        sums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        (checkpoint / "checksums.json").write_text(json.dumps(sums))
    status, output = doll.run(train_and_merge, preset)
    assert not made.exists()
    if status == 0:
        assert results(preset) == expected
    else:
        assert sealed, output
        assert "Weights only load failed" in output or "adapter_model.safetensors" in output


# A full disk


@pytest.mark.parametrize("share", [0.1, 0.4, 0.95])
def test_a_full_disk_that_has_grown(doll, expected, share, tmp_path):
    """The disk holds a share of what a run leaves: it is full in the first checkpoint, later, or in merging."""
    files = [file for file in doll.named("undisturbed").run_folder.rglob("*") if file.is_file()]
    room = int(share * sum(file.stat().st_size for file in files))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        preset = doll.named("run", tmp_path)
        status, output = doll.run(train_and_merge, preset)
        assert status == 1, output
        assert re.search("No space left on device|disk .* is full", output.splitlines()[-1]), output
        subprocess.run(["mount", "-o", "remount,size=64m", str(tmp_path)], check=True)
        status, output = doll.run(train_and_merge, preset)
        assert status == 0, output
        assert results(preset) == expected
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# Code in parameters


@pytest.mark.parametrize(
    "value",
    [
        "tiny\"; open({made!r}, 'w') #",
        "tiny'\nopen({made!r}, 'w')\n'",
        "__import__('pathlib').Path({made!r}).touch()",
        "tiny\\",
        '"""\nopen({made!r}, "w")\n"""',
    ],
)
def test_a_text_given_to_papermill_stays_a_text(value, tmp_path):
    given = value.format(made=str(tmp_path / "made"))
    source, written = REPOSITORY / "notebooks" / "01_rope_explained.ipynb", tmp_path / "written.ipynb"
    papermill.execute_notebook(source, written, {"preset": given}, prepare_only=True)
    cells = nbformat.read(written, as_version=4).cells
    (injected,) = [cell for cell in cells if "injected-parameters" in cell.metadata.get("tags", [])]
    names: dict[str, Any] = {}
    exec(injected.source, names)
    assert names["preset"] == given
    assert not (tmp_path / "made").exists()
    with pytest.raises(ValueError, match="unknown preset"):
        load_preset(given)


def test_yaml_parameters_run_no_code(tmp_path):
    made, source = tmp_path / "made", REPOSITORY / "notebooks" / "01_rope_explained.ipynb"
    parameters = f"preset: !!python/object/apply:os.system ['touch {made}']"
    command = [sys.executable, "-m", "papermill", "--prepare-only", str(source), str(tmp_path / "out.ipynb")]
    done = subprocess.run([*command, "-y", parameters], capture_output=True, text=True)
    assert done.returncode != 0
    assert "could not determine a constructor" in done.stderr
    assert not made.exists()
