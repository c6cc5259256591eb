"""Many questions behind one reading answer as each does alone; contexts hold what is asked for."""

from dataclasses import replace

import numpy as np
import pytest

from data.tasks.long_prompts import Haystack, Question
from experiments.instruction_squad import ROOM, TOKENS, ask, contexts
from llama_long_utils.evaluation.generation import likelihoods, write
from llama_long_utils.model.arms import load_arm
from llama_long_utils.model.weights import load_tokenizer
from llama_long_utils.paths import REPOSITORY
from llama_long_utils.presets import load_preset


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
