"""Many questions behind one reading answer as each does alone; contexts hold what is asked for."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from data.tasks.long_prompts import Haystack, Question
from experiments.instruction_questions import (
    COUNTED,
    SEEDS,
    SETS,
    TOKENS,
    Context,
    _write,
    ask,
    contexts,
    floors,
    questions,
    recorded_runs,
)
from experiments.instruction_results import (
    FULL,
    PAIRS,
    InstructionResults,
    outcomes,
)
from experiments.question_results import (
    beside_table_9,
    counts,
    floor_of,
    levels,
    origin_of,
    same_trainings,
    trained_and_asked,
)
from llama_long_utils.data.mixture import Mixture
from llama_long_utils.evaluation.generation import likelihoods, write
from llama_long_utils.model.arms import load_arm
from llama_long_utils.model.weights import load_tokenizer
from llama_long_utils.paths import REPOSITORY
from llama_long_utils.presets import load_preset
from llama_long_utils.records import Record, read_published

ROOM = 64  # tokens


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
    made = contexts(haystack, tokenizer, 0, {700: (3, 12), 1500: (1, 9)}, ROOM)
    assert [(one.length, len(one.questions)) for one in made] == [(700, 12)] * 3 + [(1500, 9)]
    for one in made:
        assert one.length - ROOM - 150 < len(one.token_ids) <= one.length - ROOM
        text = tokenizer.decode(one.token_ids[1:])
        assert all(haystack.paragraphs[question.needed[0]] in text for question in one.questions)
        inside = sum(paragraph in text for paragraph in haystack.paragraphs)
        assert len({question.needed for question in one.questions}) == min(inside, len(one.questions))
    assert len({made[number].questions[0].needed for number in range(3)}) == 3


def test_seeds_are_asked_about_other_paragraphs(tokenizer, haystack):
    each = [contexts(haystack, tokenizer, seed, {700: (2, 5)}, ROOM) for seed in range(3)]
    texts = [tokenizer.decode(context.token_ids[1:]).split("\n\n") for made in each for context in made]
    paragraphs = [paragraph for text in texts for paragraph in text if paragraph]
    assert len(paragraphs) == len({*paragraphs}) > 6


def test_where_paragraphs_have_no_order_each_question_brings_all_that_it_needs_and_hides_it(tokenizer, haystack):
    """Questions of two paragraphs far apart, as HotpotQA's: a context of neighbours would hold the half of each."""
    asked = [replace(one, needed=(one.needed[0], (one.needed[0] + 77) % 200)) for one in haystack.questions]
    apart = replace(haystack, questions=asked, in_order=False)
    made = contexts(apart, tokenizer, 0, {1500: (2, 4)}, ROOM)
    for one in made:
        assert len(one.token_ids) <= 1500 - ROOM
        text = tokenizer.decode(one.token_ids[1:])
        assert all(text.count(apart.paragraphs[place]) == 1 for question in one.questions for place in question.needed)
        places = [[text.index(apart.paragraphs[place]) for place in question.needed] for question in one.questions]
        assert len(one.questions) == 4
        assert places != sorted(places)
        assert np.ptp(places, axis=1).max() > 400  # characters: not side by side


def test_the_floor_is_what_one_answer_to_everything_gets():
    asked = [Question(str(n), "?", (answer,), (n,)) for n, answer in enumerate(["no", "no", "yes", "Ann Ruiz"])]
    table = floors(Haystack(["text"] * 4, asked, in_order=False)).set_index("answer")
    assert table.f1.to_dict() == {"no": 0.5, "yes": 0.25}
    assert table.exact["no"] == 0.5
    asked = [replace(asked[3], accepted=("Ann Ruiz", "Ruiz")), *asked[3:], *asked[2:]]
    table = floors(Haystack(["text"] * 4, asked, in_order=False)).set_index("answer")
    assert table.f1["Ann Ruiz"] == 0.75


def test_a_question_behind_a_shared_reading_is_answered_as_alone(tokenizer, haystack):
    model = load_arm(load_preset("tiny"), "extended")
    (context,) = contexts(haystack, tokenizer, 0, {300: (1, 4)}, ROOM)
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


def test_questions_and_their_different_answers_are_counted(tokenizer):
    """At tiny a question quotes a place of its own, so that hardly any answer comes twice."""
    tiny = load_preset("tiny")
    preset = replace(tiny, instruction=replace(tiny.instruction, steps=2, window=1024))
    mixture = Mixture(preset.data, tokenizer, window=1024)
    documents = next(mixture.buffers(preset.training))
    asked, different = questions(preset, tokenizer, documents, "long, loss on prompt", 0)
    assert asked == preset.instruction.steps * 1024 // preset.instruction.tokens_per_question
    assert asked - 2 <= different <= asked


ASKED = {
    seed: [Context(length, torch.zeros(1), [Question(f"{seed}/{n}", "?", ("a",), (n,)) for n in range(20)])
           for length in SETS["squad"].asked]
    for seed in SEEDS
}  # fmt: skip


@pytest.fixture
def results(tmp_path):
    """One arm ahead in F1 by 10 points, no answer of any exact, and a control that has the first seed only."""
    smollm2, of = load_preset("smollm2"), SETS["squad"]
    runs = [("long, loss on prompt, full answers", 0), *((arm, seed) for seed in SEEDS for arm in ("short", "long"))]
    made = {
        (arm, seed): {
            **dict.fromkeys(COUNTED, 7),
            "seconds": {"training": 1.0, "asking": 2.0},
            "answers": [
                {"length": length, "f1": (n + seed) / 60 + 0.1 * (arm == "long"), "exact": 0.0,
                 "log_probability": -2.0, "ended": True}
                for length in of.asked
                for n in range(20)
            ],
        }
        for arm, seed in runs
    }  # fmt: skip
    constant = pd.DataFrame([{"answer": "no", "questions": 20, "f1": 0.05, "exact": 0.05}])
    return InstructionResults(Record(_write(smollm2, tmp_path, of, made, ASKED, constant)), smollm2)


def test_what_was_measured_is_written_with_each_run_in_its_row_and_read_past_the_old_window(results):
    assert results.past == [length for length in SETS["squad"].asked if length > results.preset.base.window]
    assert results.difference("long", "short", "f1") == pytest.approx((10, 10, 10))
    table = trained_and_asked({"SQuAD": results})
    assert list(table.arm) == ["short", "short, long", "short, long, loss on prompt; full answers"]
    assert list(table.seeds) == [3, 3, 1]
    assert list(table.labels) == [7, 7, 7]
    assert [text.split()[0] for text in table["F1, SQuAD"]] == ["17.5", "27.5", "15.8"]
    assert results.in_words("long", "short", "exact") == "both at the floor"
    said = counts({"SQuAD": results})
    assert "SQuAD asks 20 behind 2,048 and 20 behind 9,216 tokens" in said
    assert "At most 0.0 percent" in said
    assert floor_of(results).answer == "no"


def test_a_record_keeps_its_runs_when_others_are_added_and_is_refused_if_it_was_asked_something_else(results):
    path, of = results.record.path, SETS["squad"]
    before, arrays = Record(path).table("runs"), Record(path).arrays
    kept = recorded_runs(path, ASKED)
    assert list(kept) == list(zip(before.arm, before.seed, strict=True))
    again = Record(_write(results.preset, path.parent, of, kept, ASKED, results.record.table("floors")))
    assert again.table("runs").equals(before)
    assert all((again.arrays[name] == values).all() for name, values in arrays.items())
    assert again.content["provenance"]["date"].endswith("and later")
    other = {seed: [replace(one, questions=one.questions[::-1]) for one in part] for seed, part in ASKED.items()}
    with pytest.raises(ValueError, match="was asked other questions behind 2,048 tokens"):
        recorded_runs(path, other)
    assert recorded_runs(path.with_name("none.json"), ASKED) == {}


def test_the_paper_stands_beside_what_was_measured_with_what_that_says_of_its_direction(results):
    table = beside_table_9({"SQuAD": results}, read_published("llama2_long")["table_9"]).set_index("claim")
    assert table["Qasper (Table 9)"]["C10"] == "+3.2"
    assert table["NarrativeQA (Table 9)"]["C11, with it"] == "+10.1"
    assert table["SQuAD"]["C11, without that loss"] == "agrees: +10.0 [+10.0, +10.0]"
    assert table["SQuAD"]["C10"] == "not measured"


def test_a_change_between_arms_is_no_level(results):
    assert [*levels(results).values()] == [False, False]


def test_trainings_of_the_same_arm_and_seed_are_compared(results):
    sets = {"SQuAD": results, "HotpotQA": replace(results, record=Record(results.record.path))}
    assert same_trainings(sets)
    sets["HotpotQA"].__dict__["runs"] = results.runs[:3].assign(labels=8)
    assert not same_trainings(sets)


def test_records_of_several_dates_are_from_the_first_on(results):
    dated = {"SQuAD": results, "HotpotQA": replace(results, record=Record(results.record.path))}
    assert origin_of(dated) == results.record.origin
    for one, date in zip(dated.values(), ("2026-11-28 and later", "2026-11-27"), strict=True):
        content = one.record.content
        one.record.__dict__["content"] = {**content, "provenance": {**content["provenance"], "date": date}}
    assert origin_of(dated) == "recorded by us from 2026-11-27 on"


def test_an_arm_of_one_seed_is_compared_by_the_questions_of_that_seed(results):
    assert results.difference(*PAIRS[FULL], "f1") == pytest.approx((-10, -10, -10))
    assert list(results.record.arrays["questions_2048"][1][:2]) == ["1/0", "1/1"]


def test_pairs_are_counted_by_what_became_of_them():
    rows = [("", "short", 1.0), ("", "normal", 0.8), ("empty", "short", 0.0), ("too general", "normal", 0.5)]
    pairs = pd.DataFrame(rows, columns=["dropped", "kind", "found"]).assign(place=0.0, answer=["a", "b", "", "c"])
    table = outcomes(pairs).set_index("outcome")
    assert table.loc["kept", ["short", "normal"]].tolist() == [1, 1]
    assert table.index[0] == "kept"
    assert table["words found"]["kept"] == pytest.approx(0.9)
    assert table[["short", "normal"]].to_numpy().sum() == 4
