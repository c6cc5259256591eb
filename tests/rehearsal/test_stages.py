"""Instruction and preference tuning as a practitioner starts them, under a real name, with a doll of the model.

Every number is that of preset llama2-7b, the window of 32,768 tokens, too, but for how many steps, rows and questions
there are. Instructions are about one long document.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from copies import copy_of_the_repository
from dolls import make_doll
from forks import forks
from hub_server import serve
from hub_texts import serve_texts

from llama_long_utils.presets import load_preset
from llama_long_utils.stages import Preference

NAME, MODEL = "llama2-7b", "meta-llama/Llama-2-7b-hf"
FEW = "steps = 1\nrows_per_step = 4\nwarmup_steps = 0\n"
LESS = f"""
like = "{NAME}"
[data]
held_out = {{ pg19 = 1 }}
[training]
steps = 1
sequences_per_step = 1
warmup_steps = 0
[instruction]
steps = 1
long_share = 1.0
warmup_steps = 0
[preference]
questions = 8
[preference.reward]
{FEW}[preference.rl]
{FEW}[preference.dpo]
{FEW}"""


@pytest.fixture(scope="module")
def train(tmp_path_factory) -> Iterator:
    """Runs the command for a stage in a copy of the repository; returns its last line and the adapter's card."""
    hub_root, home, repository = (tmp_path_factory.mktemp(name) for name in ("hub", "home", "repository"))
    make_doll(MODEL, hub_root)
    serve_texts(load_preset(NAME), hub_root)
    copy_of_the_repository(repository)
    (repository / "presets" / "few.toml").write_text(LESS, "utf-8")

    def run(stage: str) -> tuple[str, dict]:
        ended = commands.run("llama_long_utils.train", "--preset", "few", "--stage", stage)
        assert ended.returncode == 0, f"{stage}: {ended.stdout[-2000:]}\n{ended.stderr[-3000:]}"
        assert "Loading weights" not in ended.stderr
        last = next(line for line in ended.stdout.splitlines() if " steps" in line)
        said, _, folder = last.rpartition(": ")
        return said, json.loads((Path(folder) / "adapter_card.json").read_text())

    with serve(hub_root, licence={MODEL}, tokens={"mine": {MODEL}}) as hub:
        mine = {"HF_HOME": str(home), "LLAMA_LONG_CACHE": str(home / "cache"), "HF_TOKEN": "mine"}
        environment = {**os.environ, **hub.environment, **mine, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
        with forks(repository, environment, "trl.trainer.dpo_trainer", "trl.trainer.rloo_trainer") as commands:
            yield run


def test_every_stage_runs_from_the_one_before(train):
    preset = load_preset(NAME)
    _, extended = train("extension")
    rope = extended["rope"]
    assert (rope["window"], rope["base"]) == (32_768, 500_000)
    _, instructed = train("sft")
    assert (instructed["base"], instructed["rope"]) == (MODEL, rope)
    assert instructed["training"]["start"] == extended["weights_sha256"]
    assert instructed["training"]["window"] == preset.training.window == 32_768
    assert instructed["training"]["tokens"] > 0.7 * 32_768  # a long document is trained on whole
    for stage, what in (("reward", "loss"), ("rl", "reward"), ("dpo", "loss 0.693")):
        said, card = train(stage)
        assert what in said
        given = card["training"]
        assert (given["stage"], card["rope"], given["start"]) == (stage, rope, instructed["weights_sha256"])
        assert given["window"] == Preference().tokens + Preference().answer_tokens
        assert given["preference"]["tokens"] == 1024
