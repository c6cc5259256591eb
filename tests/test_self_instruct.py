"""Self-instruct with what a chat model might write; and with a model that cannot chat."""

import dataclasses

import numpy as np
import pytest

from conftest import new_llama
from experiments.self_instruct import Pair, chunks, judged, parsed, quality, self_instruct
from llama_long_utils.data.documents import Document
from llama_long_utils.evaluation.generation import write
from llama_long_utils.model.weights import load_tokenizer
from llama_long_utils.paths import REPOSITORY

CHUNK = "The ferry crosses the Ebro at noon. Its captain, Amalia Ruiz, has steered it since 1911."
SHORT = Pair("mine/a", 0.25, CHUNK, "short")
GOOD = "<question>Who steers the Ebro ferry?</question>\n<answer>Amalia Ruiz</answer>"


def test_a_tagged_pair_is_kept():
    pair = parsed(SHORT, f"Here it is:\n{GOOD}")
    assert (pair.question, pair.answer, pair.dropped) == ("Who steers the Ebro ferry?", "Amalia Ruiz", "")
    assert pair.found == 1.0


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("Who steers the ferry? Amalia Ruiz.", "no tags"),
        ("<question>Who steers it?</question> <answer>Amalia", "no tags"),
        ("<question> </question><answer>Amalia Ruiz</answer>", "empty"),
        ("<question>Who?</question><answer>the answer</answer>", "empty"),
        (f"<question>Who?</question><answer>{'Amalia Ruiz ' * 5}</answer>", "answer too long"),
        ("<question>Who is named in the passage?</question><answer>Amalia Ruiz</answer>", "speaks of the passage"),
        ("<question>Who steers it?</question><answer>Captain Nemo himself</answer>", "answer not in the text"),
    ],
)
def test_what_cannot_be_used_is_dropped_with_its_reason(written, reason):
    assert parsed(SHORT, written).dropped == reason


def test_a_normal_answer_may_be_longer():
    written = f"<question>Who?</question><answer>{'Amalia Ruiz ' * 5}</answer>"
    assert parsed(dataclasses.replace(SHORT, kind="normal"), written).dropped == ""


def test_the_critic_has_to_say_yes():
    verdicts = {"<verdict>yes</verdict>": "", "<verdict> No </verdict>": "critic said no", "Yes": "critic said nothing"}
    for written, dropped in verdicts.items():
        assert judged(SHORT, written).dropped == dropped


def test_duplicates_are_dropped_and_only_what_is_left_is_judged():
    asked, judgements = [SHORT] * 4, []

    def chat(prompts, tokens):
        if tokens > 20:
            return [GOOD, GOOD.replace("?", " ?"), "nothing", GOOD.replace("Ebro ferry", "ferry")]
        judgements.extend(prompts)
        return ["<verdict>yes</verdict>", "<verdict>no</verdict>"]

    pairs = self_instruct(asked, chat)
    assert [pair.dropped for pair in pairs] == ["", "duplicate", "no tags", "critic said no"]
    assert len(judgements) == 2
    assert all(CHUNK in prompt and "Amalia Ruiz" in prompt for prompt in judgements)
    table = quality(pairs).set_index("outcome")
    assert table.index[0] == "kept"
    assert table.pairs.sum() == 4
    assert table.words_found["kept"] == 1.0


def test_chunks_are_whole_paragraphs_of_different_documents_half_of_them_for_short_answers():
    paragraphs = [f"Paragraph {number} says something. " * 12 for number in range(30)]
    documents = [Document("mine", str(number), "\n\n".join(paragraphs)) for number in range(6)]
    found = chunks(documents, 6, seed=0, window=9000)
    assert len({pair.document for pair in found}) == 6
    assert [pair.kind for pair in found] == ["short", "normal"] * 3
    for pair in found:
        assert all(part.strip() in [one.strip() for one in paragraphs] for part in pair.chunk.split("\n\n"))
        assert 0 <= pair.place * len(documents[0].text) < 9000
    assert chunks(documents, 6, seed=0, window=9000) == found
    with pytest.raises(ValueError, match="only 6 documents"):
        chunks(documents, 7, seed=0, window=9000)


def test_a_model_that_cannot_chat_yields_nothing():
    tokenizer = load_tokenizer(REPOSITORY / "data" / "tiny-llama")
    model = new_llama(seed=0, vocab_size=2048, max_position_embeddings=512).eval()

    def chat(prompts, tokens):
        ids = [np.array(tokenizer(prompt)["input_ids"], np.int64) for prompt in prompts]
        return write(model, tokenizer, ids, tokens=8)

    assert {pair.dropped for pair in self_instruct([SHORT] * 2, chat)} == {"no tags"}
