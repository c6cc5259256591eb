"""The measurements as a workflow: steps side by side, and a kill that loses only what ran."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from copies import copy_of_the_repository

from experiments.race import ZERO_SHOT, Arm, arm_record
from llama_long_utils import presets
from llama_long_utils.model.weights import locate_base, weights_sha256
from llama_long_utils.paths import REPOSITORY
from llama_long_utils.records import Record

SNAKEMAKE = Path(sys.executable).with_name("snakemake")
SMALLER = {  # what a doll's arms have of tiny's
    "window = 4096 ": "window = 1024 ",
    "answer_tokens = 32\ndocuments = 24 ": "answer_tokens = 1\ndocuments = 1 ",
    "held_out = { sotu = 18, shakespeare = 6 }": "held_out = { sotu = 2 }",
}
pytestmark = pytest.mark.skipif(not SNAKEMAKE.exists(), reason="pip install '.[workflow]' brings Snakemake")


@pytest.fixture
def repository(tmp_path):
    """A copy with a preset "doll"."""
    copy = copy_of_the_repository(tmp_path / "copy")
    text = (copy / "presets" / "tiny.toml").read_text("utf-8")
    for number, smaller in SMALLER.items():
        assert text.count(number) == 1
        text = text.replace(number, smaller)
    (copy / "presets" / "doll.toml").write_text(text, "utf-8")
    return copy


def arms_of(name: str, repository: Path) -> list[str]:
    """The records of the untrained arms of PI and ABF, which the workflow would write, as seen from a copy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(presets, "PRESETS", repository / "presets")
        preset = presets.load_preset(name)
    base = weights_sha256(locate_base(preset))
    paths = [arm_record(preset, Arm(method, ZERO_SHOT, 0), base) for method in ("pi", "abf")]
    return [str(path.relative_to(REPOSITORY)) for path in paths]


def test_arms_run_as_steps_and_a_kill_loses_only_the_one_that_ran(repository):
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    targets = arms_of("doll", repository)
    command = [str(SNAKEMAKE), "-s", "experiments/Snakefile", "--cores", "1", "--config", "preset=doll"]
    first, second = (repository / target for target in targets)

    log = repository / "log"
    with log.open("w") as written:
        started = subprocess.Popen(
            [*command, "--", *targets], cwd=repository, env=environment, start_new_session=True, stderr=written
        )
        while "1 of 2 steps" not in log.read_text():
            assert started.poll() is None, log.read_text()
            time.sleep(0.2)
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()
    done, lost = (first, second) if first.exists() else (second, first)
    assert not lost.exists()
    measured = done.stat().st_mtime_ns

    again = subprocess.run(
        [*command, "--", *targets], cwd=repository, env=environment, capture_output=True, text=True, check=True
    )
    assert again.stdout.split() == [str(lost)]
    assert done.stat().st_mtime_ns == measured
    assert Record(lost).table("nll").nats.gt(0).all()
    shutil.rmtree(repository)
