import dataclasses

import numpy as np
import pytest
import torch
from recipe import FOLDER

from conftest import new_llama
from llama_long_utils.documents import Document, TokenizedDocument, tokenize_documents
from llama_long_utils.models import load_tokenizer
from llama_long_utils.presets import load_preset
from llama_long_utils.retrieval import answers, first_sentence_items, rouge_l

SETTINGS = dataclasses.replace(load_preset("tiny").retrieval, answer_tokens=24, documents=3)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(FOLDER)


@pytest.fixture(scope="module")
def texts(tokenizer):
    def text(number):
        sentence = "The people of town {n} in year {y} have sent their greetings to the Congress of the States. "
        return "".join(sentence.format(n=number, y=year) for year in range(200))

    return tokenize_documents([Document("mine", str(n), text(n)) for n in range(5)], tokenizer, cache=None)


@pytest.mark.parametrize("length", [128, 512])
def test_prompt_holds_the_sentence_once_and_then_its_first_words(texts, tokenizer, length):
    items = first_sentence_items(texts, tokenizer, length, SETTINGS, seed=0)
    assert len(items) == 3
    for item in items:
        assert len(item.prompt) == length - SETTINGS.answer_tokens
        assert item.prompt[0] == tokenizer.bos_token_id
        passage, _, cue = tokenizer.decode(item.prompt[1:]).rpartition("\n\n")
        assert passage.startswith(f"{cue} {item.answer}")
        assert passage.count(item.answer) == 1
        assert len(cue.split()) == SETTINGS.cue_words


def test_same_seed_asks_for_the_same_sentences_at_every_length(texts, tokenizer):
    short, long = (first_sentence_items(texts, tokenizer, length, SETTINGS, seed=0) for length in (128, 512))
    assert [item.answer for item in short] == [item.answer for item in long]
    other = first_sentence_items(texts, tokenizer, 128, SETTINGS, seed=1)
    assert [item.answer for item in short] != [item.answer for item in other]


def test_texts_that_are_too_short_are_refused(texts, tokenizer):
    with pytest.raises(ValueError, match="no document holds a sentence of 10 to 18 words with 100,000 tokens"):
        first_sentence_items(texts, tokenizer, 100_000, SETTINGS, seed=0)


def test_answers_are_greedy_and_cut_at_their_room(texts, tokenizer):
    model = new_llama(seed=0, vocab_size=2048, max_position_embeddings=512).eval()
    items = first_sentence_items(texts, tokenizer, 128, SETTINGS, seed=0)
    together = answers(model, tokenizer, items, SETTINGS)
    alone = answers(model, tokenizer, items, dataclasses.replace(SETTINGS, prompts_at_once=1))
    assert together == alone
    ids = torch.from_numpy(items[0].prompt)[None]
    for _ in range(3):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    assert together[0].startswith(tokenizer.decode(ids[0, -3:], skip_special_tokens=True)[:5])


@pytest.mark.parametrize(
    ("written", "score"),
    [
        ("police killed the gunman", 100.0),
        ("Police, killed the GUNMAN! and more", 100.0),  # cut to as many words as the answer has
        ("police kill the gunman", 75.0),  # Lin (2004), section 3: 3 of 4 words in order
        ("the gunman kill police", 50.0),
        ("nothing", 0.0),
        ("", 0.0),
    ],
)
def test_rouge_l_is_lin_s(written, score):
    assert rouge_l("police killed the gunman", written) == pytest.approx(score)


def test_documents_are_token_ids(texts):
    assert all(isinstance(text, TokenizedDocument) and text.token_ids.dtype == np.int32 for text in texts)
