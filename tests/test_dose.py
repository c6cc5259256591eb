import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

import experiments.dose
from experiments import __main__ as command
from experiments import dose_settings
from experiments.dose import Arm, load, run_dose
from experiments.dose_inputs import Inputs, join_neighbours, load_inputs, save_inputs
from experiments.dose_questions import ROOM, Haystack, Question, ask
from experiments.dose_record import BIN, SECOND_SLUG, SLUG, Readings, write_dose_record
from experiments.dose_settings import read_doses, ways_of
from experiments.dose_texts import SHINGLE, shingles
from experiments.task_requests import Request, answer, collect, score, write_task_record
from llama_long_utils import presets
from llama_long_utils.data.documents import TokenizedDocument
from llama_long_utils.data.packing import join_pieces, skip_positions
from llama_long_utils.evaluation.benchmarks import measure
from llama_long_utils.evaluation.generation import write
from llama_long_utils.evaluation.perplexity import token_nll
from llama_long_utils.model.adapters import add_lora
from llama_long_utils.model.arms import load_arm
from llama_long_utils.model.weights import load_tokenizer
from llama_long_utils.paths import PRESETS, REPOSITORY, RESULTS
from llama_long_utils.presets import load_preset
from llama_long_utils.records import Record, read_arrays, read_record, write_arrays


@pytest.fixture(scope="module")
def preset():
    return load_preset("tiny")


def document(tokens, seed=0):
    ids = np.random.default_rng(seed).integers(3, 2000, tokens).astype(np.int32)
    return TokenizedDocument("random", str(seed), ids)


def dose(*options):
    command = [sys.executable, "-W", "ignore", "-m", "experiments", "dose", *options]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


def test_the_whole_experiment_runs_as_a_doll_on_a_cpu(tmp_path, monkeypatch):
    """At half of the preset's window, which all lengths follow; texts are asked behind as far as that."""
    text = (PRESETS / "tiny.toml").read_text("utf-8")
    assert text.count("window = 4096") == 1
    (tmp_path / "tiny.toml").write_text(text.replace("window = 4096", "window = 2048"))
    monkeypatch.setattr(presets, "PRESETS", tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    asked_up_to = dataclasses.replace(read_doses("tiny"), asked=(256, 512, 1024))
    monkeypatch.setattr(dose_settings, "read_doses", lambda _preset: asked_up_to)
    options = ["--device", "cpu", "--doll", "--seconds", "9999", "--out", str(tmp_path / "dose")]
    monkeypatch.setattr(sys, "argv", ["experiments", "dose", *options])
    command.run(command.arguments())
    record = read_record(tmp_path / "dose" / f"{SLUG}.json")
    assert {name: set(rows[0]) for name, rows in record["tables"].items()} == {
        name: set(rows[0])
        for name, rows in read_record(RESULTS / "smollm2" / f"{SLUG}.json")["tables"].items()
        if name != "left_out"
    }
    trained = {(row["arm"], row["tokens"]) for row in record["tables"]["arms"]}
    assert trained == {("full1k-s0", 2048), ("full1k-s0", 4096), ("pose128-s0", 2048), ("control512-s0", 2048)}
    assert {row["weights"] for row in record["tables"]["full_minus_windows"]} == {"nf4", "bf16"}
    assert "control512-s0-2048/window" in {row["second"] for row in record["tables"]["differences"]}
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
    done = dose("--texts", "second", "--device", "cpu", "--out", str(tmp_path))
    assert done.stderr.startswith("error: the second set of texts is for adapters that are trained already")


def test_at_smollm2_the_ways_and_doses_are_those_of_the_record():
    ways = ways_of(load_preset("smollm2"), read_doses("smollm2").other_bases)
    table = Record(RESULTS / "smollm2" / f"{SLUG}.json").table("arms")
    recorded = {(row.arm, row.window, row.reach, row.rope_base) for row in table.itertuples()}
    assert recorded <= {(way.label, way.window, way.reach, way.rope.base) for way in ways.values()}
    stages = read_doses("smollm2").stages
    assert {(ways[way].label, steps * 16_384) for way, steps in stages} >= set(
        zip(table.arm, table.tokens, strict=True)
    )
    assert {way for way, _ in stages} == set(ways)


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
    sequences = [join_pieces([document(128, n).token_ids], 128, 0) for n in range(6)]
    sequences = list(skip_positions(sequences, 512, seed=0))

    def losses(branch):
        model = add_lora(load(preset, preset.extended_rope, four_bit=True), preset.lora, seed=0)
        arm = Arm(None, model, sequences, 1, None)
        arm.optimizer = torch.optim.AdamW(arm.trained(), lr=0.0)
        found = [arm.step(number, 1e-3, 4096) for number in range(2)]
        if branch:
            saved = arm.snapshot()
            changed = [arm.step(number, 1e-2, 4096) for number in (2, 3)]
            assert changed[1] != arm.step(3, 0.0, 4096)
            arm.restore(saved)
        return found + [arm.step(number, 1e-3, 4096) for number in range(2, 6)]

    assert losses(branch=True) == losses(branch=False)


def test_an_interrupted_dose_goes_on_to_the_same_numbers(preset, tmp_path, monkeypatch):
    """Interrupted in the trunk, in the branch and while reading: adapters, losses and readings equal to the bit."""
    preset = dataclasses.replace(preset, extension=dataclasses.replace(preset.extension, window=1024))
    doses = dataclasses.replace(read_doses("tiny"), asked=(256,), stages=(("pose", 10),))
    stack = Haystack(200, 0, document(200, 5).token_ids.astype(np.int64), [Question("key", 0, 0.5, [5, 6, 7], [8, 9])])
    inputs = Inputs([document(1500, n) for n in range(3)], [document(1024, n) for n in (7, 8)], [], [stack] * 2, [])
    monkeypatch.setattr(experiments.dose, "KEEP_EVERY", 0.0)
    monkeypatch.setattr(experiments.dose, "write_dose_record", lambda *_arguments, **_options: None)

    def run(folder, stop_at=None):
        calls = iter(range(100))

        def until(function):
            def call(*arguments):
                if next(calls) == stop_at:
                    raise KeyboardInterrupt
                return function(*arguments)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(Arm, "step", until(Arm.step))
            patch.setattr(experiments.dose, "token_nll", until(token_nll))
            run_dose(preset, doses, inputs, folder, seconds=9e9, bases=False, sixteen_bit=False)
        return next(calls)

    assert run(tmp_path / "whole") == 12  # ten steps, and two texts with full context
    for stop_at in (3, 6, 2):  # after 3 of 8, after 9, while reading the last text
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts", stop_at)
    assert run(tmp_path / "parts") == 1
    whole, parts = (read_arrays(tmp_path / name / "nll.npz") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all((whole[name] == parts[name]).all() for name in whole)
    (file,) = (tmp_path / "whole").glob("adapter-*.safetensors")
    assert file.read_bytes() == (tmp_path / "parts" / file.name).read_bytes()
    timed = ("at", "seconds", "seconds_per_step", "tokens_per_second", "peak_gib")
    lines = [(tmp_path / name / "results.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    first, second = ([{k: v for k, v in json.loads(line).items() if k not in timed} for line in of] for of in lines)
    assert first == second


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


def test_tasks_answered_from_a_file_score_as_those_asked_directly(preset):
    """Likelihoods and a written answer, through the file of a machine that has no harness."""
    tokenizer = load_tokenizer(preset.base.source)
    direct = measure(preset, ["truthfulqa_mc1"], arms=["base"])
    requests = collect(preset, ["truthfulqa_mc1"], tokenizer)
    answers = answer(load_arm(preset, "base"), tokenizer, requests, tokens_at_once=4096)
    found = score(preset, ["truthfulqa_mc1"], {"base": json.loads(json.dumps(answers))}, tokenizer)
    assert len(found) == 100
    pd.testing.assert_frame_equal(found, direct, rtol=0, atol=1e-4)


def test_answers_of_a_run_become_the_record_of_the_tasks(preset, tmp_path):
    """Each pair of arms that answered a task is in the record, with the largest dose of whole sequences as extended."""
    tokenizer, name, random = load_tokenizer(preset.base.source), "truthfulqa_mc1", np.random.default_rng(0)
    requests = collect(preset, [name], tokenizer)
    arms = ["base", "base-nf4", "yarn-nf4", "full2k-s0-4096", "full2k-s0-40960"]
    answers = {arm: {request.key: [-float(cost), False, 2] for request, cost in
                     zip(requests, random.random(len(requests)), strict=True)} for arm in arms}  # fmt: skip
    for arm, given in answers.items():
        (tmp_path / f"answers-{arm}.json").write_text(json.dumps(given))
    (tmp_path / "results.jsonl").write_text(json.dumps({"kind": "tasks", "seconds": 2.5}) + "\n")
    path = write_task_record(preset, tmp_path, tmp_path / "record", [name])
    deltas = Record(path).table("deltas").query("metric == 'accuracy'").set_index("pair")
    assert set(deltas.index) == {"base -> extended", "base -> yarn", "base_16_bit -> base", "base_16_bit -> extended"}
    assert read_record(path)["provenance"]["seconds"] == 2.5
    expected = score(preset, [name], {"extended": answers["full2k-s0-40960"]}, tokenizer)
    assert deltas.after["base -> extended"] == pytest.approx(expected.accuracy.mean())


def test_a_prompt_from_a_file_is_continued_up_to_its_stop_text(preset):
    tokenizer = load_tokenizer(preset.base.source)
    prompts = [request for request in collect(preset, ["gsm8k"], tokenizer) if request.tokens]
    assert (len(prompts), {request.tokens for request in prompts}) == (100, {256})
    short = dataclasses.replace(prompts[0], tokens=12, stops=(" the",))
    model = load_arm(preset, "base")
    expected = write(model, tokenizer, [np.array(short.context)], tokens=12, stops=[" the"])
    assert answer(model, tokenizer, [short], tokens_at_once=4096) == {short.key: expected}


def test_inputs_come_out_of_the_file_as_they_went_in(tmp_path, preset):
    stack = Haystack(64, 0, np.arange(24), [Question("key", 1, 0.5, [1, 2], [3])])
    given = Inputs([document(40)], [document(30, 1)], [{"kind": "random"}], [stack], [Request("t", "k", [1], [2, 3])])
    save_inputs(given, tmp_path / "inputs.npz")
    found = load_inputs(tmp_path / "inputs.npz")
    assert (found.about, found.requests) == (given.about, given.requests)
    assert found.haystacks[0].questions == stack.questions
    for one, other in ((found.training[0], given.training[0]), (found.texts[0], given.texts[0])):
        assert (one.source, one.name, one.token_ids.tolist()) == (other.source, other.name, other.token_ids.tolist())
    assert found.haystacks[0].prefix.tolist() == stack.prefix.tolist()


def test_short_documents_are_joined_within_their_source_and_none_is_lost():
    kinds = [("a", 50), ("a", 60), ("b", 20), ("a", 30), ("b", 130), ("b", 10), ("c", 90)]
    documents = [TokenizedDocument(kind, str(n), np.full(size, n)) for n, (kind, size) in enumerate(kinds)]
    joined = join_neighbours(documents, 100)
    assert [(row.source, row.tokens) for row in joined] == [("a", 140), ("b", 160)]  # c has too little
    assert joined[0].name == "0 and 2 more"
    assert list(dict.fromkeys(joined[1].token_ids.tolist())) == [2, 4, 5]


def test_long_sequences_are_recomputed_and_short_ones_accumulated_with_the_same_gradients(preset):
    sequences = [join_pieces([document(128, n).token_ids], 128, 0) for n in range(4)]

    def gradients(tokens_at_once, recompute):
        model = add_lora(load(preset, preset.extended_rope, four_bit=True), preset.lora, seed=0).train()
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        arm = Arm(None, model, sequences, 4, None)
        arm.optimizer = torch.optim.SGD(arm.trained(), lr=1.0)
        before = [weight.detach().clone() for weight in arm.trained()]
        loss = arm.step(0, 1.0, tokens_at_once)
        return loss, torch.cat([(old - new).flatten() for old, new in zip(before, arm.trained(), strict=True)])

    loss, together = gradients(4096, recompute=False)
    for options in ((128, False), (256, True)):
        other, parts = gradients(*options)
        assert other == pytest.approx(loss, rel=1e-5)
        assert (parts - together).norm() < 1e-4 * together.norm()


def test_runs_that_read_other_texts_make_no_record_together(tmp_path):
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        row = {"kind": "start", "heldout": [{"sha256_of_ids": str(number)}], "texts": [128], "window": 64}
        (tmp_path / str(number) / "results.jsonl").write_text(json.dumps(row) + "\n")
        write_arrays(tmp_path / str(number) / "nll.npz", {})
    with pytest.raises(ValueError, match="the runs read other texts"):
        write_dose_record([tmp_path / "0", tmp_path / "1"], tmp_path, preset="tiny")


def test_the_second_set_of_texts_has_a_record_of_its_own(tmp_path):
    for suffix in (".json", ".npz"):
        shutil.copy(RESULTS / "smollm2" / f"{SECOND_SLUG}{suffix}", tmp_path)
    written = write_dose_record([tmp_path], tmp_path / "again", preset="smollm2")
    assert written.stem == SECOND_SLUG
    again, before = (read_record(folder / f"{SECOND_SLUG}.json")["tables"] for folder in (written.parent, tmp_path))
    assert again["differences"] == before["differences"]


def test_a_stage_that_there_is_not_is_refused_before_anything_is_read():
    done = dose("--stages", "ful:20")
    assert done.returncode == 1
    assert done.stderr.startswith("error: 'ful:20' is no stage: give WAY:STEPS, as full:20")
    done = dose("--preset", "llama2-7b")
    assert done.stderr.startswith("error: experiments/dose.toml has no numbers for the preset 'llama2-7b'")


def test_places_where_a_window_has_seen_most_of_its_length_are_the_last_of_each_half_window():
    """A window of 1,024 that slides by 512: from position 512 on, place p has seen 512 + p mod 512 tokens."""
    nats = np.arange(32, dtype=np.float32)[None] * BIN  # a token of bin n costs n
    readings = Readings({"arm-1/full": nats}, np.array([4096]), ["random"], window=1024)
    assert readings.bucket("arm-1/full", 2048, 4096)[0] == pytest.approx(np.arange(16, 32).mean())
    assert readings.bucket("arm-1/full", 2048, 4096, 0.875)[0] == pytest.approx(np.mean([19, 23, 27, 31]))
