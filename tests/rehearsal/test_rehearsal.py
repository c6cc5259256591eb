"""The run that a practitioner starts, from the hub to the last notebook, with dolls under the models' names.

The preset is llama2-7b in all but how much is trained and evaluated: its names on the hub, licence, mixture of streams,
window of 32,768 tokens, RoPE, LoRA and memory savings. The dolls have every number of the real configuration but width
and depth.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from copies import copy_of_the_repository
from dolls import make_doll
from hub_server import serve
from hub_texts import serve_texts

from llama_long_utils.presets import load_preset

MODEL = "meta-llama/Llama-2-7b-hf"
TOKEN = "of somebody who has accepted the licence"
REHEARSAL = """
like = "llama2-7b"
[training]
steps = 1
sequences_per_step = 1
checkpoint_every = 1
warmup_steps = 0
[evaluation]
copied_documents = 1
[retrieval]
documents = 1
[retrieval.tasks]
questions = 2
depths = [0.5]
"""
NOTEBOOKS = {  # and the parameters that make them short
    "03": {},
    "05": {},
    "06": {},
    "07": {"questions": "2"},
    "08": {"items": "2"},
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    make_doll(MODEL, root)
    serve_texts(load_preset("llama2-7b"), root)
    with serve(root, licence={MODEL}, tokens={TOKEN: {MODEL}, "of somebody else": set()}) as hub:
        yield hub


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A copy with the preset "rehearsal": one held-out book."""
    copy = copy_of_the_repository(tmp_path_factory.mktemp("repository"))
    text = (copy / "presets" / "llama2-7b.toml").read_text("utf-8")
    data = re.search(r"^\[data\]$.*?(?=^\[lora\])", text, re.MULTILINE | re.DOTALL)[0]
    fewer, changes = re.subn(r"held_out = \{ pg19 = \d+ \}", "held_out = { pg19 = 1 }", data)
    assert changes == 1
    (copy / "presets" / "rehearsal.toml").write_text(REHEARSAL + fewer, "utf-8")
    return copy


@pytest.fixture(scope="module")
def environment(hub, repository, tmp_path_factory):
    home = str(tmp_path_factory.mktemp("home"))
    mine = {"HF_HOME": home, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": str(os.cpu_count())}
    return {**os.environ, **hub.environment, **mine, "LLAMA_LONG_CACHE": str(repository / "data" / "cache")}


def run(repository: Path, environment: dict[str, str], *command: str, token: str | None = TOKEN):
    variables = environment | ({"HF_TOKEN": token} if token else {})
    given = [sys.executable, "-m", *command]
    return subprocess.run(given, cwd=repository, env=variables, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "its licence asks who you are"),
        ("of nobody", "the hub does not know this token"),
        ("of somebody else", "this token's owner has not accepted its licence"),
    ],
)
def test_without_access_one_line_says_what_to_do(repository, environment, token, message):
    ended = run(repository, environment, "llama_long_utils.train", "--preset", "llama2-7b", token=token)
    assert ended.returncode == 1
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert f"cannot get the model '{MODEL}'" in line
    assert message in line
    assert "Traceback" not in ended.stderr


def test_the_whole_chain_runs_at_the_real_window(hub, repository, environment):
    hub.losses += ["model-00001*", "data-train-0.parquet"]  # the connection is lost once for each
    for number, parameters in NOTEBOOKS.items():
        options = [part for name, value in parameters.items() for part in ("-p", name, value)]
        ended = run(repository, environment, "tools.run", "--preset", "rehearsal", "--only", number, *options)
        assert ended.returncode == 0, f"{number}: {ended.stdout[-2000:]}\n{ended.stderr[-3000:]}"
    assert hub.losses == []
    assert not [file for file in hub.downloads(MODEL) if "consolidated" in file or file.endswith(".md")]
    runs = repository / "runs" / "rehearsal"
    (card,) = runs.glob("training/*/adapter/adapter_card.json")
    content = json.loads(card.read_text())
    assert content["base"] == MODEL
    assert (content["rope"]["window"], content["rope"]["base"]) == (32_768, 500_000)
    assert content["training"]["window"] == 32_768
    assert content["training"]["tokens"] > 0.9 * 32_768
    records = {path.stem[:2] for path in runs.glob("records/*.json")}
    assert records >= {"05", "06", "07", "08"}


def test_a_data_set_whose_licence_was_not_accepted_is_named(hub, repository, environment, tmp_path):
    hub.licence.add("emozilla/pg19")
    anew = environment | {"HF_HOME": str(tmp_path / "home"), "LLAMA_LONG_CACHE": str(tmp_path / "cache")}
    ended = run(repository, anew, "llama_long_utils.train", "--preset", "llama2-7b")
    hub.licence.remove("emozilla/pg19")
    assert ended.returncode == 1
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert "cannot get the data set 'emozilla/pg19': this token's owner has not accepted its licence" in line
    assert "Traceback" not in ended.stderr
