import subprocess
import sys

import numpy as np
import pytest
import torch

from experiments.dose import STEPS, Arm, load, plan_of, ways_of
from experiments.dose_questions import ROOM, Haystack, Question, ask
from experiments.dose_record import SLUG
from experiments.dose_texts import SHINGLE, shingles
from llama_long_utils.data.documents import TokenizedDocument
from llama_long_utils.data.packing import join_pieces, skip_positions
from llama_long_utils.evaluation.perplexity import token_nll
from llama_long_utils.model.adapters import add_lora
from llama_long_utils.model.arms import load_arm
from llama_long_utils.paths import REPOSITORY, RESULTS
from llama_long_utils.presets import load_preset
from llama_long_utils.records import read_record, read_table


@pytest.fixture(scope="module")
def preset():
    return load_preset("tiny")


def document(tokens, seed=0):
    ids = np.random.default_rng(seed).integers(3, 2000, tokens).astype(np.int32)
    return TokenizedDocument("random", str(seed), ids)


def dose(*options):
    command = [sys.executable, "-W", "ignore", "-m", "experiments", "dose", *options]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


def test_the_whole_experiment_runs_as_a_doll_on_a_cpu(tmp_path):
    options = ("--device", "cpu", "--doll", "--seconds", "9999", "--out", str(tmp_path / "dose"))
    done = dose(*options)
    assert done.returncode == 0, done.stderr
    record = read_record(tmp_path / "dose" / f"{SLUG}.json")
    assert {name: set(rows[0]) for name, rows in record["tables"].items()} == {
        name: set(rows[0])
        for name, rows in read_record(RESULTS / "smollm2" / f"{SLUG}.json")["tables"].items()
        if name != "left_out"
    }
    trained = {(row["arm"], row["tokens"]) for row in record["tables"]["arms"]}
    assert trained == {("full2k-s0", 4096), ("full2k-s0", 8192), ("pose128-s0", 4096), ("control512-s0", 4096)}
    assert {row["weights"] for row in record["tables"]["full_minus_windows"]} == {"nf4", "bf16"}
    assert "control512-s0-4096/window" in {row["second"] for row in record["tables"]["differences"]}
    again = dose(*options)
    assert again.returncode == 1
    assert "holds results of an earlier run: name another folder with --out" in again.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so_before_it_reads_anything(tmp_path):
    done = dose("--out", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("error: there is no CUDA device here: use --device cpu")
    done = dose("--doll", "--record", "--out", str(tmp_path))
    assert done.stderr == "error: a doll's numbers are no record: leave out --record or --doll\n"


def test_at_smollm2_the_ways_and_doses_are_those_of_the_record():
    ways = ways_of(load_preset("smollm2"))
    table = read_table(RESULTS / "smollm2" / f"{SLUG}.json", "arms")
    recorded = {(row.arm, row.window, row.reach, row.rope_base) for row in table.itertuples()}
    assert recorded <= {(way.label, way.window, way.reach, way.rope.base) for way in ways.values()}
    assert {steps * 16_384 for steps in STEPS} == set(table.tokens)
    assert {key for key, _, _ in plan_of(STEPS, doll=False)} == set(ways)


def test_weights_rounded_once_read_as_4_bit_weights_do(preset):
    text = document(256)
    unpacked = token_nll(load(preset, preset.base_rope, four_bit=True), text)
    in_4_bits = token_nll(load_arm(preset, "base"), text)
    in_16_bits = token_nll(load(preset, preset.base_rope, four_bit=False), text)
    assert np.abs(unpacked - in_4_bits).max() < 1e-3
    assert np.abs(unpacked - in_16_bits).max() > 0.05


def test_questions_behind_one_reading_are_scored_as_prompts_of_their_own(preset):
    model = load_arm(preset, "rope_base_only")
    text = document(700).token_ids.astype(np.int64)
    asked = [Question("key", 0, 0.5, [5, 6, 7], [8, 9]), Question("copy", 1, 0.0, text[9:21].tolist(), [3, 4, 11])]
    rows = ask(model, Haystack(700 + ROOM, 0, text, asked))
    for row, question in zip(rows, asked, strict=True):
        for place, before in ((6, text), (8, [])):  # behind the text, and alone
            ids = np.array([*before, *question.cue, *question.answer], dtype=np.int32)
            nll = token_nll(model, TokenizedDocument("", "", ids))[-len(question.answer) :]
            assert row[place] == pytest.approx(-nll.mean(), abs=2e-3)


def test_after_a_branch_the_trunk_goes_on_as_if_there_had_been_none(preset):
    """The weights, the optimizer's moments and its step: losses of later steps are the same to the bit."""
    sequences = skip_positions([join_pieces([document(128, n).token_ids], 128, 0) for n in range(6)], 512, seed=0)

    def losses(branch):
        model = add_lora(load(preset, preset.extended_rope, four_bit=True), preset.lora, seed=0)
        arm = Arm(None, model, sequences, 1, None)
        arm.optimizer = torch.optim.AdamW(arm.trained(), lr=0.0)
        found = [arm.step(number, 1e-3) for number in range(2)]
        if branch:
            saved = arm.snapshot()
            changed = [arm.step(number, 1e-2) for number in (2, 3)]
            assert changed[1] != arm.step(3, 0.0)
            arm.restore(saved)
        return found + [arm.step(number, 1e-3) for number in range(2, 6)]

    assert losses(branch=True) == losses(branch=False)


def test_equal_stretches_have_equal_hashes_wherever_they_stand():
    sentence = "The quick brown fox jumps over the lazy dog, and then it sleeps. "
    text = sentence + "Something else stands between the two of them. " + sentence
    found = shingles(text)
    raw = text.encode()
    stretches = [raw[place : place + SHINGLE] for place in range(len(raw) - SHINGLE + 1)]
    assert len(found) == len(stretches)
    assert len(set(found.tolist())) == len(set(stretches)) < len(stretches)
    assert (shingles(text.replace(" ", "\n  "))[:20] == found[:20]).all()
    assert len(shingles("short")) == 0


def test_help_and_wrong_numbers_answer_without_torch():
    code = "import sys; sys.argv = ['x', 'dose', '--seconds', 'inf']\nfrom experiments import __main__ as m\n"
    code += "try: m.arguments()\nexcept SystemExit as end: print(end.code, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.split() == ["2", "False"]
    assert "'inf' is no time: give seconds above 0" in done.stderr
