"""The ablation of instruction tuning: its arms, their synthetic contexts, and how its record is read."""

import numpy as np
import pandas as pd
import pytest
import torch

from experiments.instruction import ARMS, AnswerWeight, Diluted, noted_dialogue, synthetic_dialogue
from experiments.instruction_results import LOOKS, InstructionResults
from llama_long_utils.data.instructions import join_dialogues
from llama_long_utils.data.mixture import Mixture
from llama_long_utils.model.arms import load_arm
from llama_long_utils.model.loss import patch_loss
from llama_long_utils.model.weights import load_tokenizer
from llama_long_utils.paths import REPOSITORY
from llama_long_utils.presets import load_preset
from llama_long_utils.records import Record, read_published, write_arrays, write_record

TINY = load_preset("tiny")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(REPOSITORY / "data" / "tiny-llama")


@pytest.fixture(scope="module")
def documents(tokenizer):
    mixture = Mixture(TINY.data, tokenizer)
    documents = next(mixture.buffers(TINY.training))
    return documents


def test_every_arm_has_a_look_and_its_row_of_table_9_is_published():
    assert {*ARMS} == {*LOOKS}
    rows = read_published("llama2_long")["table_9"]["rows"]
    assert [row for *_, row in LOOKS.values() if row] == list(rows)


@torch.no_grad()
def test_answers_weigh_as_alone_beside_a_loss_on_the_prompt_and_diluted_as_within_it(tokenizer, documents):
    dialogue = noted_dialogue(documents, tokenizer, 1024, TINY.instruction, np.random.default_rng(0))
    read, alone = (join_dialogues([dialogue], tokenizer, loss_on_prompt=loss) for loss in (True, False))
    model, ids = load_arm(TINY, "extended"), torch.from_numpy(read.input_ids)[None]
    scores = model(input_ids=ids).logits.float().log_softmax(-1)[0, :-1]
    nll, answer = -scores.gather(-1, ids[0, 1:, None])[:, 0], torch.from_numpy(alone.completion_mask[1:] == 1)
    patch_loss(model)

    def loss(trainer, sequence):
        labels = torch.where(torch.from_numpy(sequence.completion_mask == 1)[None], ids, -100)
        inputs = {"input_ids": ids, "labels": labels}
        return float(trainer.__new__(trainer).compute_loss(model, inputs))  # without what it trains

    mean = float(model(input_ids=ids, labels=ids).loss)  # what the plain loss on the prompt is
    prompt, diluted = (float(nll[part].sum()) / len(nll) for part in (~answer, answer))
    assert mean == pytest.approx(prompt + diluted, rel=1e-4)
    assert loss(AnswerWeight, read) == pytest.approx(prompt + float(nll[answer].mean()), rel=1e-4)
    assert loss(Diluted, alone) == pytest.approx(diluted, rel=1e-4)


def test_a_synthetic_context_holds_what_all_of_its_questions_ask_for(tokenizer, documents):
    dialogue = synthetic_dialogue(documents, tokenizer, 4096, TINY.instruction, np.random.default_rng(0))
    text = tokenizer.decode(dialogue.token_ids[1:])
    for question in dialogue.questions:
        cue = question.text.removeprefix("\n\nQ: ")
        place = text.index(cue + question.answer) / len(text)
        assert place == pytest.approx(question.place, abs=0.15)
    assert (dialogue.token_ids == tokenizer.bos_token_id).sum() == 1
    tokens = len(dialogue.token_ids) + sum(len(part) for turn in dialogue.turns(tokenizer) for part in turn)
    assert 3500 < tokens <= 4096
    assert len(dialogue.questions) == 16


@pytest.fixture
def results(tmp_path):
    """A record of two arms, two seeds and nine documents, the second arm 10 points ahead in all of them."""
    runs = pd.DataFrame([{"arm": arm, "seed": seed, "labels": 1} for seed in (0, 1) for arm in ("short", "long")])
    generator = np.random.default_rng(0)
    arrays = {"documents": np.array([f"mine/{n}" for n in range(9)])}
    for length in (512, 1024, 4096):
        base = generator.uniform(0.2, 0.6, (2, 9)).repeat(2, axis=0)
        arrays[f"exact_{length}"] = base + 0.1 * (runs.arm == "long").to_numpy()[:, None]
    arrays["nats"] = generator.uniform(50, 60, (4, 9, 2))
    arrays["tokens"] = np.full((9, 2), 20)
    answers = pd.DataFrame([{"arm": "long", "seed": 0, "length": n, "exact": 0.5} for n in (512, 1024, 4096)])
    buckets = [(1, 512), (512, 4096)]
    nll = [
        {"arm": row.arm, "seed": row.seed, "position_low": low, "position_high": high, "nll": 2.5}
        for row in runs.itertuples()
        for low, high in buckets
    ]
    write_arrays(tmp_path / "one.npz", arrays)
    tables = {"answers": answers, "runs": runs, "nll_by_position": pd.DataFrame(nll)}
    path = write_record(tmp_path, "one", preset="tiny", question="?", tables=tables, seeds={}, seconds=1.0)
    return InstructionResults(Record(path), TINY)


def test_differences_are_paired_by_document_and_seed_over_lengths_past_the_old_window(results):
    assert results.past == [1024, 4096]
    value, low, high = results.difference("long", "short")
    assert (value, low, high) == pytest.approx((10, 10, 10))
    alone = results.mean(results.scores("long", results.past))
    assert alone[1] < alone[0] < alone[2]


def test_a_difference_that_seeds_disagree_on_is_not_distinguished_from_zero_however_well_documents_agree(results):
    changes = np.repeat([[1.0], [2.0], [9.0]], 9, axis=1)
    value, low, _ = results.mean(changes)
    assert low >= 1
    wide = results.contrast(changes)
    assert wide[0] == value == pytest.approx(4)
    assert wide[1] == pytest.approx(4 - 4.3027 * np.sqrt(19 / 3), abs=1e-3)  # t of 2 degrees of freedom, variance 19
    assert results.contrast(changes[:1]) == results.mean(changes[:1])  # one seed has no spread


def test_ended_is_the_share_of_right_words_that_stop(results):
    for length in results.past:
        results.record.arrays[f"words_{length}"] = 2 * results.record.arrays[f"exact_{length}"]
    assert results.ended("long") == pytest.approx(50)


def test_nll_is_of_the_buckets_asked_for(results):
    rows = np.flatnonzero(results.runs.arm == "long")
    expected = results.record.arrays["nats"][rows][..., 1] / 20
    np.testing.assert_allclose(results.nll("long", 512, 4096), expected)


def test_what_was_measured_is_written_with_each_run_in_its_row(tmp_path):
    from experiments.instruction import _write

    documents, lengths, edges = ["mine/a", "mine/b"], [512, 1024], [1, 512, 4096]
    runs = [("short", 0), ("chat base", 0), ("short", 1)]
    measured = []
    for number, (arm, _) in enumerate(runs):
        rows = [
            {"document": document, "length": length, "place": 0.5, "exact": bool(number), "words": True,
             "log_probability": -1.0}
            for document in documents
            for length in lengths
        ]  # fmt: skip
        nats = [[100.0 + number, 200.0]] * 2 if arm == "short" else []
        tokens = [[50, 100]] * 2 if arm == "short" else []
        answers = pd.DataFrame(rows).to_dict("list")
        measured.append({"labels": 7, "answers": answers, "nats": nats, "tokens": tokens})
    record = Record(_write(TINY, tmp_path, runs, measured, lengths, edges, documents))
    assert record.arrays["exact_512"].tolist() == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]
    assert len(record.table("answers")) == len(runs) * len(lengths)
    nll = record.table("nll_by_position")
    assert {*nll.arm} == {"short"}  # the base in its own window was not read
    assert nll.nll.tolist() == [2.0, 2.0, 2.04, 2.0]
    assert record.arrays["nats"].shape == (2, 2, 2)
