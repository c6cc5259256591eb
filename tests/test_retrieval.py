import dataclasses
import re

import numpy as np
import pandas as pd
import pytest
import torch

from conftest import functions_of, new_llama
from experiments.tiny_llama import FOLDER
from llama_long_utils.cache import Cache
from llama_long_utils.data.documents import Document, tokenize_documents
from llama_long_utils.evaluation import retrieval_items
from llama_long_utils.evaluation.generation import write
from llama_long_utils.evaluation.retrieval import (
    _wrote,
    replies,
    rouge_l,
    score,
)
from llama_long_utils.evaluation.retrieval_items import (
    PLANTED,
    SENTENCE,
    TASKS,
    first_sentence_items,
    make_items,
    planted_items,
    sentence_ends,
)
from llama_long_utils.model.weights import load_tokenizer
from llama_long_utils.presets import load_preset

NOTEBOOK = functions_of("07_long_range_retrieval")
SETTINGS = dataclasses.replace(load_preset("tiny").retrieval, answer_tokens=24, documents=3)


def with_tasks(**changes):
    return dataclasses.replace(SETTINGS, tasks=dataclasses.replace(SETTINGS.tasks, **changes))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(FOLDER)


@pytest.fixture(scope="module")
def texts(tokenizer):
    def text(number):
        sentence = "The people of town {n} in year {y} have sent their greetings to the Congress of the States. "
        return "".join(sentence.format(n=number, y=year) for year in range(200))

    return tokenize_documents([Document("mine", str(n), text(n)) for n in range(5)], tokenizer)


@pytest.fixture(scope="module")
def model():
    return new_llama(seed=0, vocab_size=2048, max_position_embeddings=512).eval()


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


@pytest.mark.parametrize("sentence", ["Émile lut une page.", "Ήταν μία ημέρα ακόμη.", "Жили они там долго."])
def test_sentences_begin_with_capitals_of_other_alphabets_too(sentence):
    assert [found[0] for found in SENTENCE.finditer(f"x. {sentence} y. z")] == [sentence]


def test_same_seed_asks_for_the_same_sentences_at_every_length(texts, tokenizer):
    short, long = (first_sentence_items(texts, tokenizer, length, SETTINGS, seed=0) for length in (128, 512))
    assert [item.answer for item in short] == [item.answer for item in long]
    other = first_sentence_items(texts, tokenizer, 128, SETTINGS, seed=1)
    assert [item.answer for item in short] != [item.answer for item in other]


def test_a_sentence_whose_cue_ends_within_a_token_gives_way_to_another(texts, tokenizer, monkeypatch):
    """Qwen's tokenizer has a token for a comma and a line break."""
    plain, asked = retrieval_items._question_and_answer, []

    def first_fails(*arguments):
        asked.append(arguments)
        if len(asked) == 1:
            raise ValueError("one token for both")
        return plain(*arguments)

    before = first_sentence_items(texts, tokenizer, 128, SETTINGS, seed=0, exact=True)
    monkeypatch.setattr(retrieval_items, "_question_and_answer", first_fails)
    items = first_sentence_items(texts, tokenizer, 128, SETTINGS, seed=0, exact=True)
    assert [item.document for item in items] == [item.document for item in before]
    assert [item.answer == other.answer for item, other in zip(items, before, strict=True)] == [False, True, True]


def test_texts_that_are_too_short_are_refused(texts, tokenizer):
    with pytest.raises(ValueError, match="no document holds a sentence of 10 to 18 words with 100,000 tokens"):
        first_sentence_items(texts, tokenizer, 100_000, SETTINGS, seed=0)


def test_a_sentence_with_too_little_text_after_it_leaves_the_place_to_another(tokenizer):
    sentence = "The people of town {n} have sent their greetings to the Congress of the States. "
    dense = "0 1 2 3 4 5 6 7 8 9 " * 40 + "end. "
    thin = "the people of the States and the Congress of the people, " * 20 + "end. "
    text = "end. " + "".join(sentence.format(n=n) + (dense if n < 4 else thin) for n in range(16))
    (document,) = tokenize_documents([Document("mine", "one", text)], tokenizer)
    settings = dataclasses.replace(SETTINGS, lengths=[document.tokens // 2])
    for seed in range(8):
        (item,) = first_sentence_items([document], tokenizer, *settings.lengths, settings, seed=seed)
        assert item.length <= document.tokens // 2


def greedy_by_hand(model, prompt, count):
    """The likeliest token after all before it, `count` times, each by a pass over the whole text."""
    ids = torch.from_numpy(prompt)[None]
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(prompt) :].tolist()


def test_writing_is_greedy_and_the_same_together_and_alone_as_text_and_as_ids(texts, tokenizer, model):
    prompts = [item.prompt for item in first_sentence_items(texts, tokenizer, 128, SETTINGS, seed=0)]
    prompts.append(prompts[0][:50])  # a shorter one, padded
    together = write(model, tokenizer, prompts, tokens=12)
    assert together == [tokenizer.decode(greedy_by_hand(model, prompt, 12)) for prompt in prompts]
    assert together == write(model, tokenizer, prompts, tokens=12, tokens_at_once=1)
    assert together == write(model, tokenizer, [tokenizer.decode(prompt[1:]) for prompt in prompts], tokens=12)


def test_writing_ends_before_a_stop_text_and_at_eos(texts, tokenizer, model):
    prompts = [item.prompt for item in first_sentence_items(texts, tokenizer, 128, SETTINGS, seed=0)]
    (whole, *_) = write(model, tokenizer, prompts, tokens=12)
    stop = whole[5:8]
    assert write(model, tokenizer, prompts[:1], tokens=12, stops=[stop]) == [whole.partition(stop)[0]]
    across = tokenizer.decode(prompts[0])[-2:] + whole[:2]  # begins in the prompt
    assert across not in whole
    assert write(model, tokenizer, prompts[:1], tokens=12, stops=[across]) == [whole]
    eos, model.generation_config.eos_token_id = (
        model.generation_config.eos_token_id,
        greedy_by_hand(model, prompts[0], 3)[-1],
    )
    try:
        (cut,) = write(model, tokenizer, prompts[:1], tokens=12)
    finally:
        model.generation_config.eos_token_id = eos
    assert whole.startswith(cut)
    assert 0 < len(cut) < len(whole)


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


def planted(task, texts, tokenizer, length=256, settings=SETTINGS, questions=5, seed=0):
    return planted_items(task, texts, tokenizer, length, settings, questions=questions, seed=seed)


@pytest.mark.parametrize("length", [256, 512])
def test_first_sentence_fills_the_length_exactly_with_the_answer_as_it_stands_in_the_text(texts, tokenizer, length):
    items = first_sentence_items(texts, tokenizer, length, SETTINGS, seed=0, exact=True)
    for item in items:
        assert len(item.prompt) + len(item.answer_ids) == length
        assert tokenizer.decode(item.answer_ids).split() == item.answer.split()
        windows = np.lib.stride_tricks.sliding_window_view(item.prompt, len(item.answer_ids))
        assert (windows == item.answer_ids).all(axis=1).sum() == 1
    with_room = first_sentence_items(texts, tokenizer, length, SETTINGS, seed=0)
    assert [item.answer for item in items] == [item.answer for item in with_room]


@pytest.mark.parametrize("task", PLANTED)
@pytest.mark.parametrize("length", [256, 512])
def test_prompt_and_answer_have_exactly_the_length_asked_for(texts, tokenizer, task, length):
    items = planted(task, texts, tokenizer, length)
    assert len(items) == 5 * (len(SETTINGS.tasks.depths) if task == "needle" else 1)
    for item in items:
        assert len(item.prompt) + len(item.answer_ids) == length
        assert item.prompt[0] == tokenizer.bos_token_id
        assert tokenizer.bos_token_id not in item.prompt[1:]
        assert tokenizer.decode(item.answer_ids) == f" {item.answer}"


@pytest.mark.parametrize("task", PLANTED)
def test_answer_stands_in_its_statement_and_nowhere_else(texts, tokenizer, task):
    for item in planted(task, texts, tokenizer, 512):
        text = tokenizer.decode(item.prompt[1:])
        assert text.count(item.answer.rstrip(".")) == 1
        before, _, cue = text.rpartition("\n\n")
        if task == "variables":  # the cue asks for the last variable, the number is the first one's
            assert re.search(rf"Here \w+ is {re.escape(item.answer)}", before)
        else:
            assert before.count(f"{cue} {item.answer}") == 1


@pytest.mark.parametrize("task", PLANTED)
def test_questions_are_the_same_at_every_length_and_for_a_seed(texts, tokenizer, task):
    short, again, long = (planted(task, texts, tokenizer, length) for length in (256, 256, 512))
    assert all((one.prompt == two.prompt).all() for one, two in zip(short, again, strict=True))
    assert [item.answer for item in short] == [item.answer for item in long]
    assert [item.document for item in short] == [item.document for item in long]
    assert [item.answer for item in planted(task, texts, tokenizer, seed=1)] != [item.answer for item in short]


def test_needle_stands_at_the_end_of_the_sentence_nearest_to_its_depth(texts, tokenizer):
    items = planted("needle", texts, tokenizer, 512, questions=2)
    assert [item.depth for item in items] == SETTINGS.tasks.depths * 2
    for needle in (items[:5], items[5:]):  # the same needle in the same text, whatever its depth
        assert {(item.number, item.answer, item.document) for item in needle} == {
            (needle[0].number, needle[0].answer, needle[0].document)
        }
    assert items[0].answer != items[5].answer
    for item in items:
        cue = tokenizer.decode(item.prompt).rpartition("\n\n")[2]
        needle = np.array(tokenizer(f"\n\n{cue} {item.answer}\n\n", add_special_tokens=False)["input_ids"])
        windows = np.lib.stride_tricks.sliding_window_view(item.prompt, len(needle))
        (first,) = np.flatnonzero((windows == needle).all(axis=1))
        ending = len(tokenizer(f"\n\n{cue}", add_special_tokens=False)["input_ids"])
        text = np.concatenate([item.prompt[1:first], item.prompt[first + len(needle) : len(item.prompt) - ending]])
        assert (first - 1) / len(text) == pytest.approx(item.place)
        ends = sentence_ends(tokenizer, text)
        assert first - 1 in ends
        assert abs(first - 1 - item.depth * len(text)) == np.abs(ends - item.depth * len(text)).min()
    assert {item.place for item in items if item.depth in (0, 1)} == {0, 1}


def test_depths_of_the_other_tasks_are_spread(texts, tokenizer):
    few, many = (planted("passkey", texts, tokenizer, questions=questions) for questions in (3, 8))
    assert all((one.prompt == two.prompt).all() for one, two in zip(few, many[:3], strict=True))
    depths = np.sort([0, *(item.depth for item in many), 1])
    assert np.diff(depths).max() < 0.25


def test_distractors_have_other_keys_and_other_values(texts, tokenizer):
    for item in planted("multi_key", texts, tokenizer, 512):
        text = tokenizer.decode(item.prompt[1:])
        found = dict(re.findall(r"The key to the gate of (\w+) is ([\w ]+)\.", text))
        assert len(found) == len(set(found.values())) == SETTINGS.tasks.keys
        asked = re.search(r"The key to the gate of (\w+) is$", text)[1]
        assert f"{found.pop(asked)}." == item.answer
        assert sorted(item.others) == sorted(f"{number}." for number in found.values())


@pytest.mark.parametrize("hops", [0, 1, 3])
def test_chains_of_variables_resolve_to_the_answer(texts, tokenizer, hops):
    for item in planted("variables", texts, tokenizer, 512, with_tasks(hops=hops)):
        *lines, example, question = tokenizer.decode(item.prompt[1:]).split("\n\n")
        values = dict(
            re.fullmatch(r"Here (\w+) is ([\w ]+)\.", line).groups() for line in lines if line.startswith("Here ")
        )
        assert len(values) == hops + 1
        value = re.fullmatch(r"So (\w+) is", question)[1]
        for _ in range(hops + 1):
            value = values[value]
        assert f"{value}." == item.answer
        assert len(set(item.answer[:-1].split())) == 5
        assert example.endswith(item.others[0])
        assert len(re.findall("Here ", example)) == hops + 1


@pytest.mark.parametrize("task", PLANTED)
def test_one_pass_equals_full_logits_and_plain_greedy_decoding(texts, tokenizer, model, task):
    items = planted(task, texts, tokenizer)
    for item in items[:2]:
        (reply,) = replies(model, [item], generate=True)
        count = len(item.answer_ids)
        ids = torch.from_numpy(np.concatenate([item.prompt, item.answer_ids]))[None]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, -count - 1 : -1]
        expected = logits.log_softmax(-1)[torch.arange(count), torch.from_numpy(item.answer_ids)]
        np.testing.assert_allclose(reply.log_probabilities, expected.numpy(), atol=1e-5)
        assert reply.likeliest.tolist() == (logits.argmax(-1).numpy() == item.answer_ids).tolist()
        assert reply.written.tolist() == greedy_by_hand(model, item.prompt, count)


def scored(model, tokenizer, items, settings, folder):
    return score(model, tokenizer, items, settings, Cache(folder, 1))


def test_items_scored_together_score_as_alone(texts, tokenizer, model, tmp_path):
    items = [item for task in PLANTED for item in planted(task, texts, tokenizer, questions=4)]
    assert len({len(item.answer_ids) for item in items}) > 3  # answers of several lengths in one pass
    together = scored(model, tokenizer, items, SETTINGS, tmp_path)
    alone = scored(model, tokenizer, items, dataclasses.replace(SETTINGS, prompts_at_once=1), tmp_path / "alone")
    np.testing.assert_allclose(together.log_probability, alone.log_probability, atol=1e-5)
    assert together.written.tolist() == alone.written.tolist()
    assert together.answer.tolist() == [item.answer for item in items]


def test_interrupted_scoring_asks_only_what_is_missing_and_gives_the_same_rows(texts, tokenizer, model, tmp_path):
    items, settings = planted("passkey", texts, tokenizer), dataclasses.replace(SETTINGS, prompts_at_once=1)
    expected = scored(model, tokenizer, items, settings, tmp_path / "whole")

    class Interrupted(Exception):
        pass

    def interrupt(_module, _arguments, options):
        seen.append(options["input_ids"].shape[1])
        if sum(length > 1 for length in seen) > 2:
            raise Interrupted

    seen: list[int] = []
    hook = model.model.register_forward_pre_hook(interrupt, with_kwargs=True)
    with pytest.raises(Interrupted):
        scored(model, tokenizer, items, settings, tmp_path)
    hook.remove()
    seen.clear()
    hook = model.model.register_forward_pre_hook(
        lambda _module, _arguments, options: seen.append(options["input_ids"].shape[1]), with_kwargs=True
    )
    again = scored(model, tokenizer, items, settings, tmp_path)
    hook.remove()
    assert sum(length > 1 for length in seen) == 3
    pd.testing.assert_frame_equal(again, expected, check_exact=True)


def test_logits_exist_at_the_answer_only_and_no_keys_are_kept_without_generation(texts, tokenizer, model):
    (item,) = planted("passkey", texts, tokenizer, questions=1)
    seen = []
    hooks = [
        model.lm_head.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].shape[1])),
        model.model.register_forward_hook(
            lambda _module, _arguments, options, output: seen.append(output.past_key_values), with_kwargs=True
        ),
    ]
    replies(model, [item], generate=False)
    for hook in hooks:
        hook.remove()
    assert seen == [None, len(item.answer_ids)]


def test_beyond_generate_up_to_only_probabilities_are_scored(texts, tokenizer, model, tmp_path):
    settings = with_tasks(generate_up_to=255)
    rows = scored(model, tokenizer, planted("passkey", texts, tokenizer), settings, tmp_path).assign(arm="base")
    assert rows.rouge_l.isna().all()
    assert rows.probability.between(0, 1).all()
    assert NOTEBOOK.effective_length(rows, 0.5) == 0


def answers(scores, depths=None):
    """Exact answers: items x lengths, at the depth of each item."""
    table = [
        (256 * 2**column, number, (depths or range(len(scores)))[number], value)
        for number, values in enumerate(scores)
        for column, value in enumerate(values)
    ]
    return pd.DataFrame(table, columns=["length", "number", "depth", "exact"])


@pytest.mark.parametrize(
    ("scores", "tokens"),
    [
        ([[1, 1, 1], [1, 0, 0]], 1024),
        ([[1, 0, 1], [1, 0, 1]], 256),  # a late recovery does not count
        ([[0, 1, 1], [0, 1, 1]], 0),
        ([[1, 1, np.nan], [1, 1, np.nan]], 512),  # nothing was generated there
    ],
)
def test_effective_length_ends_where_the_score_first_falls_below_the_threshold(scores, tokens):
    assert NOTEBOOK.effective_length(answers(scores), 0.5) == tokens


def test_effective_length_is_that_of_the_worst_depth():
    ends = [answers([[1, 1, 1]] * 3, [depth] * 3) for depth in (0.0, 1.0)]
    rows = pd.concat([*ends, answers([[1, 0, 0]] * 3, [0.5] * 3)])
    assert rows.groupby("length").exact.mean().min() > 0.5
    assert NOTEBOOK.effective_length(rows, 0.5) == 256


def test_rouge_l_by_chance_is_that_of_other_questions_answers():
    same = {"arm": "base", "task": "needle", "rouge_l": 50.0}
    rows = pd.DataFrame(
        [
            {**same, "length": 256, "number": 0, "answer": "a red hat", "written": "a red bell"},
            {**same, "length": 256, "number": 1, "answer": "a new bell", "written": "the house"},
            {**same, "length": 512, "number": 0, "answer": "a red hat", "written": "the people"},
            {**same, "length": 512, "number": 2, "answer": "no", "written": None, "rouge_l": np.nan},
        ]
    )
    assert NOTEBOOK.rouge_l_by_chance(rows).tolist() == pytest.approx([200 / 3, 0, np.nan, np.nan], nan_ok=True)


def test_what_was_written_instead_is_told_apart(texts, tokenizer, model):
    (item,) = planted("multi_key", texts, tokenizer, questions=1)
    for text, kind in ((item.answer, "answer"), (item.others[1], "other"), ("the people", "else"), ("", "else")):
        assert _wrote(item, f" {text}") == kind


def test_every_task_is_asked_at_every_length_as_often_as_asked_for(texts, tokenizer):
    settings = dataclasses.replace(SETTINGS, lengths=[128, 256])
    items = make_items(texts, tokenizer, settings, questions=2, seed=0)
    assert list(items) == [(task, length) for length in (128, 256) for task in TASKS]
    assert {len(group) for (task, _), group in items.items() if task != "needle"} == {2}
    for (task, length), group in items.items():
        assert {(item.task, item.length) for item in group} == {(task, length)}


def test_bad_settings_are_one_clear_error(texts, tokenizer, model):
    with pytest.raises(ValueError, match=r"unknown task 'pass': use one of \['passkey', 'needle'"):
        planted("pass", texts, tokenizer)
    with pytest.raises(ValueError, match=r"length = 64 is too short for task 'multi_key'.*ask at \d+ tokens or more"):
        planted("multi_key", texts, tokenizer, 64)
    with pytest.raises(ValueError, match=r"no document has 100,000 tokens for task 'needle'.*ask at shorter lengths"):
        planted("needle", texts, tokenizer, 100_000)
    one, other = planted("passkey", texts, tokenizer, 256, questions=1), planted("passkey", texts, tokenizer, 512)
    with pytest.raises(ValueError, match="group them"):
        replies(model, [*one, other[0]], generate=False)
