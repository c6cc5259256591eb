"""Self-instruct with what a chat model might write; and with a model that cannot chat."""

from dataclasses import replace

import numpy as np
import pytest

from conftest import new_llama
from experiments.self_instruct import Pair, chunks, judged, parsed, quality, self_instruct
from llama_long_utils.data.documents import Document
from llama_long_utils.evaluation.generation import write
from llama_long_utils.model.weights import load_tokenizer
from llama_long_utils.paths import REPOSITORY

CHUNK = "The ferry crosses the Ebro at noon. Its captain, Amalia Ruiz, has steered it since 1911."
SHORT = Pair("mine/a", 0.25, CHUNK, "short", "The ferry crosses.")
NORMAL = replace(SHORT, kind="normal")


def reply(*pairs):
    """What a chat model writes."""
    return "\n".join(f"<question>{question}</question>\n<answer>{answer}</answer>" for question, answer in pairs)


def test_tagged_pairs_are_kept_the_first_as_short_the_second_as_normal():
    written = f"Here: {reply(('Who steers the Ebro ferry?', 'Amalia Ruiz'), ('Since when?', 'since 1911. ' * 5))}"
    first, second = parsed(SHORT, written), parsed(NORMAL, written)
    assert (first.question, first.answer, first.dropped) == ("Who steers the Ebro ferry?", "Amalia Ruiz", "")
    assert (second.question, second.kind, second.dropped, second.found) == ("Since when?", "normal", "", 1.0)
    assert parsed(SHORT, reply(("Since when?", "since 1911. " * 5))).kind == "normal"


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("Who steers the ferry? Amalia Ruiz.", "no tags"),
        ("<question>Who steers it?</question> <answer>Amalia", "no tags"),
        (reply((" ", "Amalia Ruiz")), "empty"),
        (reply(("Who?", "Amalia Ruiz " * 31)), "answer too long"),
        (reply(("Who is named in the passage?", "Amalia Ruiz")), "speaks of the passage"),
        (reply(("What is the main idea of it?", "Amalia Ruiz")), "too general"),
        (reply(("Who steers it?", "Captain Nemo himself")), "answer not in the text"),
    ],
)
def test_what_cannot_be_used_is_dropped_with_its_reason(written, reason):
    assert parsed(SHORT, written).dropped == reason


def test_the_critic_has_to_give_the_same_answer():
    pairs = [replace(pair, answer="Amalia Ruiz since 1911") for pair in (SHORT, NORMAL, SHORT, SHORT)]
    answers = ["Amalia Ruiz", "Captain Nemo", "Not stated."]
    found = judged(pairs, "\n".join(f"<answer>{answer}</answer>" for answer in answers))
    assert [pair.again for pair in found] == [*answers, ""]
    otherwise = "critic: answered otherwise"
    assert [pair.dropped for pair in found] == ["", otherwise, "critic: not stated", otherwise]


def test_duplicates_are_dropped_and_only_what_is_left_is_judged():
    asked = [replace(pair, chunk=CHUNK + more) for more in ("", " ", "  ") for pair in (SHORT, NORMAL)]
    steers, since = ("Who steers the Ebro ferry?", "Amalia Ruiz"), ("Since when?", "She has steered it since 1911.")
    judgements = []

    def chat(conversations, tokens):
        assert all([turn["role"] for turn in one][-1] == "user" for one in conversations)
        if "Answer each" not in conversations[0][-1]["content"]:
            return [reply(steers, since), reply(("who steers the Ebro ferry", "Amalia Ruiz")), "nothing"]
        judgements.extend(conversations)
        return ["1. <answer>Amalia Ruiz</answer> 2. <answer>noon</answer>"]

    pairs = self_instruct(asked, chat)
    no_tags = ["no tags"] * 3
    assert [pair.dropped for pair in pairs] == ["", "critic: answered otherwise", "duplicate", *no_tags]
    ((message,),) = judgements
    assert "Amalia Ruiz" not in message["content"].replace(CHUNK, "")
    assert "1. Who steers the Ebro ferry?\n2. Since when?" in message["content"]
    table = quality(pairs).set_index("outcome")
    assert table.index[0] == "kept"
    assert table.pairs.sum() == 6
    assert table.words_found["kept"] == 1.0


def test_chunks_are_whole_paragraphs_spread_over_long_documents_with_two_pairs_each():
    paragraphs = [f"Paragraph {number} says something about the sea. " * 12 for number in range(30)]
    documents = [Document("mine", str(number), "\n\n".join(paragraphs)) for number in range(6)]
    options = {"seed": 0, "window": 9000, "each": 3}
    found = chunks([*documents, Document("mine", "short", "\n\n".join(paragraphs[:5]))], 18, **options)
    assert [pair.kind for pair in found] == ["short", "normal"] * 18
    assert {pair.document for pair in found} == {f"mine/{number}" for number in range(6)}
    for pair in found:
        assert all(part.strip() in [one.strip() for one in paragraphs] for part in pair.chunk.split("\n\n"))
    places = [pair.place * len(documents[0].text) for pair in found[:6:2]]
    assert places == sorted(places)
    assert places[0] < 3600, "a third of the window and a paragraph"
    assert places[-1] >= 6000
    assert chunks(documents, 4, **options) == chunks(documents, 18, **options)[:8]
    with pytest.raises(ValueError, match="only 18 chunks"):
        chunks(documents, 19, **options)


def test_a_model_that_cannot_chat_yields_nothing():
    tokenizer = load_tokenizer(REPOSITORY / "data" / "tiny-llama")
    model = new_llama(seed=0, vocab_size=2048, max_position_embeddings=512).eval()

    def chat(conversations, tokens):
        ids = [np.array(tokenizer(turns[-1]["content"])["input_ids"], np.int64) for turns in conversations]
        return write(model, tokenizer, ids, tokens=8)

    assert {pair.dropped for pair in self_instruct([SHORT, NORMAL], chat)} == {"no tags"}
