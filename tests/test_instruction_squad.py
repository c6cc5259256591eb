"""Many questions behind one reading answer as each does alone; contexts hold what is asked for."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from data.tasks.long_prompts import Haystack, Question
from experiments.instruction_results import InstructionResults, outcomes, squad_tables
from experiments.instruction_squad import ASKED, ROOM, TOKENS, _write, ask, contexts
from llama_long_utils.evaluation.generation import likelihoods, write
from llama_long_utils.model.arms import load_arm
from llama_long_utils.model.weights import load_tokenizer
from llama_long_utils.paths import REPOSITORY
from llama_long_utils.presets import load_preset
from llama_long_utils.records import Record


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(REPOSITORY / "data" / "tiny-llama")


@pytest.fixture(scope="module")
def haystack():
    """Paragraphs that each name a ferry and its captain."""
    paragraphs = [
        f"The ferry {number} crosses the river at noon. " * 6 + f"Its captain is {number} Ruiz."
        for number in range(200)
    ]
    questions = [
        Question(str(n), f"Who is the captain of ferry {n}?", (f"{n} Ruiz", "Ruiz"), (n,)) for n in range(200)
    ] * 5
    return Haystack(paragraphs, questions, in_order=True)


def test_a_context_holds_what_is_asked_for_and_every_paragraph_once_before_any_twice(tokenizer, haystack):
    made = contexts(haystack, tokenizer, {700: (3, 12), 1500: (1, 9)})
    assert [(one.length, len(one.questions)) for one in made] == [(700, 12)] * 3 + [(1500, 9)]
    for one in made:
        assert one.length - ROOM - 150 < len(one.token_ids) <= one.length - ROOM
        text = tokenizer.decode(one.token_ids[1:])
        assert all(haystack.paragraphs[question.needed[0]] in text for question in one.questions)
        inside = sum(paragraph in text for paragraph in haystack.paragraphs)
        assert len({question.needed for question in one.questions}) == min(inside, len(one.questions))
    assert len({made[number].questions[0].needed for number in range(3)}) == 3


def test_a_question_behind_a_shared_reading_is_answered_as_alone(tokenizer, haystack):
    model = load_arm(load_preset("tiny"), "extended")
    (context,) = contexts(haystack, tokenizer, {300: (1, 4)})
    texts = ["Who is the captain?", "In the beginning God", "My fellow citizens", "Enter two gentlemen. O, my lord"]
    context.questions[:] = [replace(one, text=text) for one, text in zip(context.questions, texts, strict=True)]
    cues = [tokenizer(f" Q: {one.text}, A:", add_special_tokens=False)["input_ids"] for one in context.questions]
    prompts = [np.array([*context.token_ids.tolist(), *cue], np.int64) for cue in cues]
    written = write(model, tokenizer, prompts, tokens=TOKENS, stops=["\n", " Q:"])
    assert len({*written}) > 1
    asked = [replace(one, accepted=(text,)) for one, text in zip(context.questions, written, strict=True)]
    found = ask(model, tokenizer, replace(context, questions=asked))
    assert [one["exact"] for one in found] == [1.0] * len(found)
    answers = [tokenizer(f" {text}", add_special_tokens=False)["input_ids"] for text in written]
    alone = likelihoods(model, list(zip([prompt.tolist() for prompt in prompts], answers, strict=True)))
    expected = [total / tokens for total, _, tokens in alone]
    assert [one["log_probability"] for one in found] == pytest.approx(expected, abs=1e-4)


def test_what_was_measured_is_written_with_each_run_in_its_row_and_read_past_the_old_window(tmp_path):
    smollm2, questions = load_preset("smollm2"), [(length, f"q{n}") for length in ASKED for n in range(20)]
    made = []
    for gain in (0.0, 0.1):
        rows = [
            {"length": length, "f1": n / 40 + gain, "exact": 0.0, "log_probability": -2.0, "ended": True}
            for length in ASKED
            for n in range(20)
        ]
        made.append({"labels": 7, "seconds": {"training": 1.0, "asking": 2.0}, "answers": rows})
    runs = [("short", 0), ("long", 0)]
    results = InstructionResults(Record(_write(smollm2, tmp_path, runs, made, questions)), smollm2)
    assert results.past == [length for length in ASKED if length > smollm2.base.window]
    assert results.difference("long", "short", "f1") == pytest.approx((10, 10, 10))
    scores, changes = squad_tables(results)
    assert list(scores.arm) == ["short", "short, long"]
    assert list(scores.labels) == [7, 7]
    assert list(changes.difference) == ["long minus short"]
    assert changes["F1, 2,048"][0] == "+10.0 [+10.0, +10.0]"
    assert scores["log-probability, 10,240"][1] == "-2.00 [-2.00, -2.00]"


def test_pairs_are_counted_by_what_became_of_them():
    rows = [("", "short", 1.0), ("", "normal", 0.8), ("empty", "short", 0.0), ("too general", "normal", 0.5)]
    pairs = pd.DataFrame(rows, columns=["dropped", "kind", "found"]).assign(place=0.0, answer=["a", "b", "", "c"])
    table = outcomes(pairs).set_index("outcome")
    assert table.loc["kept", ["short", "normal"]].tolist() == [1, 1]
    assert table.index[0] == "kept"
    assert table["words found"]["kept"] == pytest.approx(0.9)
    assert table[["short", "normal"]].to_numpy().sum() == 4
