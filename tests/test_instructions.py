"""Questions about documents, the sequences made of them, and answers scored to the letter."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from conftest import new_llama, training_sequences
from experiments.instruction_answers import ROOM, answers, held_out_dialogues, written
from llama_long_utils.data.documents import Document, tokenize_documents
from llama_long_utils.data.instructions import (
    MARK,
    Dialogue,
    Question,
    generated_dialogues,
    instruction_sequences,
    join_dialogues,
    quotation_dialogue,
    quotations,
)
from llama_long_utils.evaluation.generation import write
from llama_long_utils.evaluation.perplexity import token_nll
from llama_long_utils.model.weights import load_tokenizer
from llama_long_utils.paths import REPOSITORY
from llama_long_utils.records import write_record
from llama_long_utils.stages import Instruction

SETTINGS = Instruction(steps=6, long_share=0.5, short_window=256, tokens_per_question=128)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(REPOSITORY / "data" / "tiny-llama")


@pytest.fixture(scope="module")
def documents(tokenizer):
    generator = np.random.default_rng(0)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    texts = []
    for number in range(3):
        words = ["".join(generator.choice(syllables, 2)) for _ in range(1500)]
        words = [word + (", " if generator.random() < 0.2 else " ") for word in words]
        texts.append(Document("mine", str(number), "".join(words)))
    return tokenize_documents(texts, tokenizer)


def test_a_quotation_asks_for_words_that_stand_behind_it_once_in_the_document(tokenizer, documents):
    dialogue = quotations(documents[0].part(0, 900), tokenizer, 8, SETTINGS, np.random.default_rng(0))
    text = tokenizer.decode(dialogue.token_ids[1:])
    assert len(dialogue.questions) == 8
    for question in dialogue.questions:
        cue = question.text.removeprefix("\n\nQ: ")
        assert text.count(cue) == 1
        assert text[text.index(cue) + len(cue) :].startswith(question.answer)
        assert MARK.search(question.answer).end() == len(question.answer)
        assert len(cue.split()) == SETTINGS.quoted_words
        assert SETTINGS.answer_words[0] <= len(question.answer.split()) <= SETTINGS.answer_words[1]
        assert question.place == pytest.approx(text.index(cue) / len(text))


def test_questions_are_about_all_of_the_document(tokenizer, documents):
    dialogue = quotations(documents[0], tokenizer, 60, SETTINGS, np.random.default_rng(1))
    places = [question.place for question in dialogue.questions]
    assert min(places) < 0.2
    assert max(places) > 0.8


def test_a_document_is_cut_so_that_its_questions_stay(tokenizer, documents):
    for tokens in (256, 1024):
        dialogue = quotation_dialogue(documents, tokenizer, tokens, SETTINGS, np.random.default_rng(0))
        sequence = join_dialogues([dialogue], tokenizer, loss_on_prompt=False)
        assert len(dialogue.questions) == tokens // 128
        assert 0.7 * tokens < len(sequence.input_ids) <= tokens
        assert sequence.input_ids[-1] == tokenizer.eos_token_id


def test_only_answers_and_their_eos_are_trained_on_or_the_prompt_too(tokenizer):
    document = np.array([0, 5, 6, 7], np.int64)
    dialogue = Dialogue("mine/a", document, [Question("\n\nQ: two", " three.", 0.5)])
    ((question, answer),) = dialogue.turns(tokenizer)
    plain, whole = (join_dialogues([dialogue] * 2, tokenizer, loss_on_prompt=loss) for loss in (False, True))
    one = np.concatenate([document, question, answer])
    assert plain.input_ids.tolist() == [*one, *one]
    assert plain.completion_mask.tolist() == [*[0] * (len(document) + len(question)), *[1] * len(answer)] * 2
    assert whole.completion_mask.tolist() == [0, *[1] * (len(one) - 1)] * 2  # but BOS
    assert answer[-1] == tokenizer.eos_token_id
    assert plain.label_tokens == 2 * len(answer)


def test_shares_and_lengths_of_sequences(tokenizer, documents):
    settings = dataclasses.replace(SETTINGS, long_share=1 / 3, text_share=1 / 3, loss_on_prompt=False)
    texts = training_sequences(documents, 1024, 2, padding_id=1, seed=0)
    sequences = instruction_sequences(documents, tokenizer, settings, 1024, texts=texts)
    begins = [int((one.input_ids == tokenizer.bos_token_id).sum()) for one in sequences]
    assert sorted(begins)[-2:] == [4, 4]  # short documents, side by side
    assert sum(one.label_tokens > 900 for one in sequences) == 2  # plain text, all of it
    assert all(len(one.input_ids) <= 1024 for one in sequences)
    again = instruction_sequences(documents, tokenizer, settings, 1024, texts=texts)
    assert all((one.input_ids == other.input_ids).all() for one, other in zip(sequences, again, strict=True))
    questions = [int((one.input_ids == tokenizer.eos_token_id).sum()) for one in sequences if one.label_tokens < 900]
    assert max(questions) == 8  # for each token as many on short documents as on a long one,
    assert min(questions) >= 7  # but one that would not fit is left out


def test_shares_that_fill_all_sequences_make_no_more_than_there_are_steps(tokenizer, documents):
    settings = dataclasses.replace(SETTINGS, steps=3, sequences_per_step=1, long_share=0.5, text_share=0.5)
    texts = training_sequences(documents, 1024, 3, padding_id=1, seed=0)
    assert len(instruction_sequences(documents, tokenizer, settings, 1024, texts=texts)) == 3


def test_a_document_that_is_too_short_is_refused_in_words(tokenizer, documents):
    with pytest.raises(ValueError, match=r"no document has .* tokens for 64 questions in a window of 8,192"):
        quotation_dialogue(documents, tokenizer, 8192, SETTINGS, np.random.default_rng(0))


def test_shares_above_one_are_refused():
    with pytest.raises(ValueError, match="more than all sequences"):
        Instruction(long_share=0.7, text_share=0.5)


@pytest.fixture(scope="module")
def model():
    return new_llama(seed=0, vocab_size=2048, max_position_embeddings=512).eval()


def test_an_answer_is_exact_if_greedy_decoding_writes_it_and_stops(model, tokenizer, documents):
    """What the model writes by itself is made the answer: with EOS where it would go on, only the words are right."""
    ids = documents[0].token_ids[:100].astype(np.int64)
    first = Question("\n\nQ: bada", "", 0.1)
    ((asked, _),) = Dialogue("mine/0", ids, [first]).turns(tokenizer)
    (written,) = write(model, tokenizer, [np.concatenate([ids, asked])], tokens=4)
    told, other = dataclasses.replace(first, answer=written), dataclasses.replace(first, answer=" tatata")
    rows = answers(model, tokenizer, [Dialogue("mine/0", ids, [told, other])])
    assert rows.words.tolist() == [True, False]
    assert not rows.exact.any()
    (_, answer), _ = Dialogue("mine/0", ids, [told, other]).turns(tokenizer)
    both = torch.from_numpy(np.concatenate([ids, asked, answer]))[None]
    with torch.no_grad():
        plain = model(input_ids=both).logits[0, -len(answer) - 1 : -1].log_softmax(-1)
    expected = plain.gather(-1, both[0, -len(answer) :, None]).mean()
    assert rows.log_probability[0] == pytest.approx(float(expected), abs=1e-4)
    stops = model.get_output_embeddings().weight.data
    kept = stops.clone()
    stops[tokenizer.eos_token_id] = 100 * stops[answer[0]]  # EOS is the likeliest where the answer's first token was
    silent = dataclasses.replace(first, answer="")
    assert answers(model, tokenizer, [Dialogue("mine/0", ids, [silent, told])]).exact.tolist() == [True, False]
    stops.copy_(kept)


def test_questions_do_not_see_each_other(model, tokenizer, documents):
    asked = quotations(documents[1].part(0, 300), tokenizer, 4, SETTINGS, np.random.default_rng(0))
    together = answers(model, tokenizer, [asked])
    one_by_one = [
        answers(model, tokenizer, [dataclasses.replace(asked, questions=[question])]) for question in asked.questions
    ]
    found = [float(rows.log_probability[0]) for rows in one_by_one]
    np.testing.assert_allclose(together.log_probability, found, atol=1e-5)


def test_a_model_with_a_short_window_reads_the_end_of_a_document(model, tokenizer, documents):
    asked = quotations(documents[1].part(0, 400), tokenizer, 4, SETTINGS, np.random.default_rng(0))
    ids = np.concatenate([asked.token_ids[:1], asked.token_ids[-(200 - ROOM - 1) :]])
    cut = answers(model, tokenizer, [asked], window=200)
    np.testing.assert_allclose(
        cut.log_probability,
        answers(model, tokenizer, [dataclasses.replace(asked, token_ids=ids)]).log_probability,
        atol=1e-6,
    )


def test_shorter_lengths_are_asked_in_what_was_read_of_the_longest(model, tokenizer, documents, monkeypatch):
    options = {"questions": 3, "seed": 0}
    asked = held_out_dialogues([[documents[0]], [documents[1]]], tokenizer, SETTINGS, [256, 384], **options)
    read, nll = [], {}
    original = model.model.forward

    def counting(*arguments, **given):
        read.append(given["input_ids"].shape[1])
        return original(*arguments, **given)

    with monkeypatch.context() as patch:
        patch.setattr(model.model, "forward", counting)
        together = answers(model, tokenizer, asked, nll=nll)
    assert [tokens for tokens in read if tokens > 100] == [384 - ROOM] * 2
    alone = pd.concat([answers(model, tokenizer, [dialogue]) for dialogue in asked])
    np.testing.assert_allclose(together.log_probability, alone.log_probability, atol=1e-5)
    assert together.length.tolist() == [384] * 3 + [256] * 3 + [384] * 3 + [256] * 3
    expected = token_nll(model, documents[0], 384 - ROOM)
    np.testing.assert_allclose(nll["mine/0"], expected, atol=1e-5)


def test_what_is_written_after_each_question_needs_one_reading(model, tokenizer, documents, monkeypatch):
    asked = quotations(documents[1].part(0, 300), tokenizer, 4, SETTINGS, np.random.default_rng(0))
    prompts = [np.concatenate([asked.token_ids, question]) for question, _ in asked.turns(tokenizer)[:3]]
    expected = [write(model, tokenizer, [prompt], tokens=6)[0].split("\n")[0] for prompt in prompts]
    read, original = [], model.model.forward

    def counting(*arguments, **given):
        read.append(given["input_ids"].shape[1])
        return original(*arguments, **given)

    with monkeypatch.context() as patch:
        patch.setattr(model.model, "forward", counting)
        assert written(model, tokenizer, asked, questions=3, tokens=6) == expected
    assert len([tokens for tokens in read if tokens >= 300]) == 1
    assert len(set(expected)) == 3


def test_held_out_questions_fill_the_length_and_are_the_same_each_time(tokenizer, documents):
    stretches = [[document] for document in documents]
    options = {"questions": 3, "seed": 0}
    one, again = (held_out_dialogues(stretches, tokenizer, SETTINGS, [256, 512], **options) for _ in range(2))
    assert [len(dialogue.token_ids) + ROOM for dialogue in one] == [512, 256] * 3
    assert [dialogue.questions for dialogue in one] == [dialogue.questions for dialogue in again]
    for dialogue in one:
        for question, answer in dialogue.turns(tokenizer):
            assert len(dialogue.token_ids) + len(question) + len(answer) <= 512


def test_texts_without_anything_to_ask_for_are_refused(tokenizer):
    plain = tokenize_documents([Document("mine", "0", "word " * 3000)], tokenizer)
    with pytest.raises(ValueError, match="no words to quote"):
        instruction_sequences(plain, tokenizer, dataclasses.replace(SETTINGS, loss_on_prompt=False), 1024)


@pytest.fixture
def generated(tmp_path, tokenizer, documents):
    """A record of six pairs about a document, at places that grow, and one that was dropped; and one about another."""
    text = tokenizer.decode(documents[1].token_ids[1:-1], clean_up_tokenization_spaces=False)
    rows = []
    for number in range(7):
        start = text.index(" ", 100 + 1200 * number) + 1
        row = {"document": "mine/1", "place": start / len(text), "chunk": text[start : start + 200], "kind": "short"}
        rows.append(
            {**row, "question": f"Which {number}?", "answer": f"answer {number}", "dropped": "empty" * (number == 3)}
        )
    rows.append({**rows[0], "document": "another/1", "question": "Which other?"})
    write_record(
        tmp_path, "pairs", preset="tiny", question="?", tables={"pairs": pd.DataFrame(rows)}, seeds={}, seconds=0.0
    )
    return tmp_path / "pairs.json"


@pytest.mark.parametrize("tokens", [256, 1200, 4000])
def test_of_a_generated_set_a_document_holds_the_chunks_that_its_questions_ask_about(
    tokenizer, documents, generated, tokens
):
    table = pd.DataFrame(pd.read_json(generated, typ="series")["tables"]["pairs"])
    settings = dataclasses.replace(SETTINGS, questions=str(generated), tokens_per_question=250)
    make, seen, many = generated_dialogues(settings.questions), set(), set()
    for seed in range(12):
        dialogue = make(documents, tokenizer, tokens, settings, np.random.default_rng(seed))
        assert dialogue.document == "mine/1"
        parts = [dialogue.token_ids, *(part for turn in dialogue.turns(tokenizer) for part in turn)]
        assert tokens / 2 < sum(map(len, parts)) <= tokens or len(dialogue.token_ids) == documents[1].tokens
        text = tokenizer.decode(dialogue.token_ids[1:], clean_up_tokenization_spaces=False)
        for question in dialogue.questions:
            number = int(question.answer.split()[-1])
            assert (question.text, question.kind) == (f" Q: Which {number}?, A:", "short")
            assert table.chunk[number] in text
            seen.add(number)
        many.add(len(dialogue.questions))
    assert seen == {0, 1, 2, 4, 5, 6}
    assert max(many) == {256: 1, 1200: 2, 4000: 5}[tokens]


def test_a_generated_set_makes_long_and_short_sequences_and_none_is_refused(tokenizer, documents, generated, tmp_path):
    settings = dataclasses.replace(SETTINGS, questions=str(generated))
    made = instruction_sequences(documents, tokenizer, settings, 1024)
    assert sum(b"answer" in tokenizer.decode(one.input_ids).encode() for one in made) == len(made)
    absent = dataclasses.replace(SETTINGS, questions=str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=r"there is no record .*none\.json; write one with"):
        instruction_sequences(documents, tokenizer, absent, 1024)
    with pytest.raises(ValueError, match="none of its 7 pairs is about a document of this preset"):
        instruction_sequences(documents[:1], tokenizer, settings, 1024)
