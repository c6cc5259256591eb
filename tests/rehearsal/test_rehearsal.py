"""The run that a practitioner starts, from the hub to the last notebook, with dolls under the models' names.

The presets are the delivered ones in all but how much is trained and evaluated: names on the hub, licences, streams,
windows, RoPE, LoRA and memory savings. The dolls have every number of the real configuration but width and depth.
llama2-7b is asked for sentences at lengths up to just beyond that to which answers are written, half of its window.
It takes 170 CPU seconds. llama3.1-8b took 39 minutes on two cores: a reading of 131,072 tokens takes one core
a minute, and there are fifty.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from copies import copy_of_the_repository
from dolls import make_doll
from forks import Forks, forks
from hub_server import Hub, serve
from hub_texts import serve_texts

from llama_long_utils.presets import load_preset

TOKEN = "of somebody who has accepted the licence"
FEW = """
[training]
steps = 1
sequences_per_step = 1
checkpoint_every = 1
warmup_steps = 0
[retrieval.tasks]
questions = 2
depths = [0.5]
"""
# Notebooks that wait for no other, then those that read the adapter of the fifth; with the parameters of a quick look.
NOTEBOOKS = (
    {"05": {}, "03": {}},
    {"07": {"questions": "2", "rope_base_only": "false"}, "06": {}, "08": {"items": "2"}},
)


@dataclass(frozen=True)
class Rehearsal:
    """A preset, and what is less than in it."""

    preset: str
    model: str
    less: str
    lost: tuple[str, ...]  # files whose connection is lost once
    book_characters: int
    rope_base: float


REHEARSALS = {
    "llama2-7b": Rehearsal(
        "llama2-7b",
        "meta-llama/Llama-2-7b-hf",
        "[data]\nheld_out = { pg19 = 1 }\n[evaluation]\ncopied_documents = 1\n"
        "tokens = 16_384\nfar_tokens = 32_768\n"
        "[retrieval]\ndocuments = 1\nlengths = [1024, 8192, 16_640]",
        ("model-00001*", "data-train-0.parquet"),
        book_characters=400_000,
        rope_base=500_000,
    ),
    "llama3.1-8b": Rehearsal(
        "llama3.1-8b",
        "meta-llama/Llama-3.1-8B",
        "[data]\nheld_out = { pg19 = 1 }\nminimum_characters = 600_000\n"
        "[evaluation]\ncopied_documents = 1\ntokens = 196_608\nseed = 1\n"
        "[retrieval]\ndocuments = 1\nlengths = [1024, 132_096]",
        ("model-00001*", "data-train-0.parquet"),
        book_characters=620_000,
        rope_base=1_900_000,
    ),
}


@pytest.fixture(
    scope="module",
    params=["llama2-7b", pytest.param("llama3.1-8b", marks=pytest.mark.long)],
)
def rehearsal(request) -> Rehearsal:
    return REHEARSALS[request.param]


@pytest.fixture(scope="module")
def hub(rehearsal, tmp_path_factory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    make_doll(rehearsal.model, root)
    serve_texts(load_preset(rehearsal.preset), root, rehearsal.book_characters)
    tokens = {TOKEN: {rehearsal.model}, "of somebody else": set()}
    with serve(root, licence={rehearsal.model}, tokens=tokens) as hub:
        yield hub


@pytest.fixture(scope="module")
def repository(rehearsal, tmp_path_factory) -> Path:
    """A copy with the preset "rehearsal", which has less of it."""
    copy = copy_of_the_repository(tmp_path_factory.mktemp("repository"))
    text = f'like = "{rehearsal.preset}"\n{rehearsal.less}\n{FEW}'
    (copy / "presets" / "rehearsal.toml").write_text(text, "utf-8")
    return copy


@pytest.fixture(scope="module")
def environment(hub, repository, tmp_path_factory) -> dict[str, str]:
    home, cache = (str(tmp_path_factory.mktemp(name)) for name in ("home", "cache"))
    mine = {"HF_HOME": home, "LLAMA_LONG_CACHE": cache, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **hub.environment, **mine}


@pytest.fixture(scope="module")
def commands(repository, environment) -> Iterator[Forks]:
    with forks(repository, environment) as commands:
        yield commands


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ({}, "its licence asks who you are"),
        ({"HF_TOKEN": "of nobody"}, "the hub does not know this token"),
        ({"HF_TOKEN": "of somebody else"}, "this token's owner has not accepted its licence"),
    ],
)
def test_without_access_one_line_says_what_to_do(rehearsal, commands, token, message):
    ended = commands.run("llama_long_utils.train", "--preset", rehearsal.preset, **token)
    assert ended.returncode == 1
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert f"cannot get the model '{rehearsal.model}'" in line
    assert message in line
    assert "Traceback" not in ended.stderr


def test_the_whole_chain_runs_at_the_real_window(rehearsal, hub, repository, commands):
    hub.losses += rehearsal.lost

    def execute(notebook: tuple[str, dict[str, str]]) -> None:
        number, parameters = notebook
        options = [part for name, value in parameters.items() for part in ("-p", name, value)]
        started = time.perf_counter()
        ended = commands.run("tools.run", "--preset", "rehearsal", "--only", number, *options, HF_TOKEN=TOKEN)
        print(f"{rehearsal.preset}, notebook {number}: {time.perf_counter() - started:.0f} s", flush=True)
        assert ended.returncode == 0, f"{number}: {ended.stdout[-2000:]}\n{ended.stderr[-3000:]}"

    for together in NOTEBOOKS:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(execute, together.items()))
    assert hub.losses == []
    assert not [file for file in hub.downloads(rehearsal.model) if "consolidated" in file or file.endswith(".md")]
    runs, preset = repository / "runs" / "rehearsal", load_preset(rehearsal.preset)
    (card,) = runs.glob("training/*/adapter/adapter_card.json")
    content = json.loads(card.read_text())
    assert content["base"] == rehearsal.model
    assert (content["rope"]["window"], content["rope"]["base"]) == (preset.extension.window, rehearsal.rope_base)
    assert (content["training"]["window"], content["training"]["reach"]) == (
        preset.training.window,
        preset.extension.window,
    )
    assert content["training"]["tokens"] > 0.9 * preset.training.window
    records = {path.stem[:2] for path in runs.glob("records/*.json")}
    assert records >= {"05", "06", "07", "08"}


def test_a_data_set_whose_licence_was_not_accepted_is_named(rehearsal, hub, repository, environment, tmp_path):
    hub.licence.add("emozilla/pg19")
    anew = {"HF_HOME": str(tmp_path / "home"), "LLAMA_LONG_CACHE": str(tmp_path / "cache"), "HF_TOKEN": TOKEN}
    command = [sys.executable, "-m", "llama_long_utils.train", "--preset", rehearsal.preset]  # which reads HF_HOME
    ended = subprocess.run(command, cwd=repository, env=environment | anew, capture_output=True, text=True)
    hub.licence.remove("emozilla/pg19")
    assert ended.returncode == 1
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert "cannot get the data set 'emozilla/pg19': this token's owner has not accepted its licence" in line
    assert "Traceback" not in ended.stderr
