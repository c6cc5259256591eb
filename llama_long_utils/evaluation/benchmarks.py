"""Short and long tasks before and after an extension, compared item by item.

Tasks are those of `data/tasks`, whose questions lie inside packages on PyPI, and all that lm-evaluation-harness has,
whose data come from the hub. The harness makes the prompts and asks the model (`evaluation.harness`). Ours are the
metrics that tell small changes, and the paired comparison.
"""

import contextlib
import io
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from lm_eval import evaluate
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from llama_long_utils.cache import Cache
from llama_long_utils.evaluation.harness import Llama, check_kind, check_lengths
from llama_long_utils.evaluation.statistics import SEED, mean_interval, paired_accuracy, paired_mean, share_interval
from llama_long_utils.evaluation.task_files import HUB, TASKS, check_names, is_ours
from llama_long_utils.model.arms import arm_inputs, load_arm
from llama_long_utils.model.loss import Model
from llama_long_utils.model.weights import load_tokenizer, locate_base
from llama_long_utils.presets import closest
from llama_long_utils.records import write_record
from llama_long_utils.settings import Preset

SLUG = "08_benchmark_deltas"
KEYS = ["task", "length", "arm", "item", "asked", "written"]  # columns that are no metrics
ANSWERS = 4  # raised by hand when the code that asks a model changes: kept answers are then asked again
BINARY = {"accuracy", "accuracy_per_character", "exact_match", "passed", "acc", "acc_norm"}  # mostly 0 or 1 for an item


def measure(
    preset: Preset,
    names: Sequence[str],
    *,
    arms: Sequence[str] = ("base", "extended"),
    items: int | None = None,
    long_count: int = 50,
    lengths: Sequence[int] = (),
    adapter: str = "",
    allow_execution: bool = False,
    folder: Path = TASKS,
) -> pd.DataFrame:
    """One row for each item, as `logged_items` has it, of tasks on arms.

    Every answer is kept in runs/PRESET/benchmarks as soon as it is given, and a stopped run goes on from there. What is
    unknown, does not fit or cannot be had is refused before a model is loaded.

    `names` are of tasks in `folder`, or of tasks and groups of the harness ("hub:mmlu" where both have one). Of each,
    `items` are asked, evenly spread; None: all of a short task, `long_count` of a long one per length. `lengths` are
    tokens of long prompts; empty: the preset's up to `generate_up_to`. `allow_execution` runs written programs without
    bubblewrap, too, and those of the harness' own tasks.
    """
    check_names(names, folder)
    for name, number in (("items", items), ("long_count", long_count)):
        if number is not None and number < 1:
            raise ValueError(f"{name} = {number}: use at least 1")
    base = locate_base(preset)
    tokenizer, window, asked = load_tokenizer(base), preset.extension.window, preset.retrieval
    inputs = {arm: arm_inputs(preset, arm, adapter=adapter) for arm in arms}
    metadata = {
        "tokenizer": str(base),
        "preset": preset.name,
        "max_seq_lengths": list(lengths or (n for n in asked.lengths if n <= asked.tasks.generate_up_to)),
        "count": items or long_count,
        "allow_execution": allow_execution,
    }
    tasks = load_tasks(names, metadata, folder)
    leaves = {leaf: task for group in tasks.values() for leaf, task in group.items()}
    for leaf, task in leaves.items():
        if getattr(task, "UNSAFE_CODE", False) and not allow_execution:
            raise ValueError(f"{leaf} runs written programs without a sandbox: accept that with allow_execution")
        check_kind(task)
    chosen = {leaf: spread(task.eval_docs, items) for leaf, task in leaves.items()} if items else None
    options = {"samples": chosen, "bootstrap_iters": 0, "confirm_run_unsafe_code": allow_execution}
    measured = []
    for arm in arms:

        def load(arm: str = arm) -> Model:
            for task in leaves.values():
                check_lengths(task.instances, tokenizer, window)
            return load_arm(preset, arm, adapter=adapter)

        llama = Llama(load, tokenizer, Cache(preset.run_folder / "benchmarks", ANSWERS, inputs[arm]), arm)
        with contextlib.redirect_stderr(io.StringIO()):  # bars: the cache prints how far it is
            samples = evaluate(llama, {"tasks": leaves}, **options)["samples"]
        for name, group in tasks.items():
            own = {leaf for leaf, task in group.items() if getattr(task.config, "process_results", None)}
            measured.append(logged_items(name, arm, {leaf: samples[leaf] for leaf in group}, llama.tokens, own))
    return pd.concat(measured, ignore_index=True)


def load_tasks(names: Sequence[str], metadata: dict[str, Any], folder: Path = TASKS) -> dict[str, dict[str, Task]]:
    """Tasks of the harness by name given and own name: a group has several.

    `metadata` is for tasks that make their items: `max_seq_lengths`, `tokenizer`, and what ours need besides.
    RuntimeError if a package or a data set cannot be had, ValueError if it does not hold what it should.
    """
    ours = TaskManager(include_path=str(folder), include_defaults=False, metadata=metadata)
    theirs: TaskManager | None = None
    tasks = {}
    for name in names:
        if is_ours(name, folder):
            if name not in ours.all_tasks:
                raise ValueError(f"{folder / name}.yaml is not YAML or does not describe the task {name!r}")
            tasks[name] = ours.load([name])["tasks"]
            continue
        theirs = theirs or TaskManager(metadata=metadata)
        try:
            tasks[name] = theirs.load([name.removeprefix(HUB)])["tasks"]
        except Exception as error:
            what, near = f"{type(error).__name__}: {error}".splitlines()[0], closest(name, [*ours.all_tasks])
            raise RuntimeError(f"the harness could not load {name!r} ({what}); most tasks need the hub{near}") from None
    for group in tasks.values():
        for task in group.values():
            task.set_fewshot_seed(SEED)
    return tasks


def spread(docs: Iterable[dict[str, Any]], count: int) -> list[int]:
    """Numbers of `count` items, evenly spread over those of each length; all where there are fewer."""
    by_length: dict[int, list[int]] = {}
    for number, doc in enumerate(docs):
        by_length.setdefault(doc.get("max_length", 0), []).append(number)
    chosen = set()
    for numbers in by_length.values():
        places = np.linspace(0, len(numbers) - 1, min(count, len(numbers))).round()
        chosen |= {numbers[int(place)] for place in places}
    return sorted(chosen)


def logged_items(
    name: str,
    arm: str,
    samples: dict[str, list[dict[str, Any]]],
    tokens: Mapping[tuple[str, str], int],
    own_scores: Collection[str] = (),
) -> pd.DataFrame:
    """One row for each item, from what the harness logged of one task or group.

    Columns: task, length (tokens of the prompts; 0: of no given length), arm, item (its name), asked (a hash of prompt
    and right answer), written (text, if any was written), and one for each metric. `samples` are by the harness' own
    name of a task, one for each of its filters; `tokens` those of each (prompt, continuation) that was read. Tasks in
    `own_scores` have a rule of their own, such as several right choices: theirs are the metrics then.
    """
    rows = []
    for leaf, logged in samples.items():
        by_item: dict[int, list[dict[str, Any]]] = {}
        for sample in logged:
            by_item.setdefault(sample["doc_id"], []).append(sample)
        for number, item in by_item.items():
            first, length = item[0], item[0]["doc"].get("max_length", 0)
            named = first["doc"].get("name") or f"{leaf}/{number}"
            row = {"task": name, "length": length, "arm": arm, "item": named}
            asked = first["prompt_hash"] + first["target_hash"]
            scored = [{**one, "target": None} for one in item] if leaf in own_scores else item
            rows.append({**row, "asked": asked, **_metrics(scored, str(length), tokens)})
    return pd.DataFrame(rows)


def _metrics(item: list[dict[str, Any]], length: str, tokens: Mapping[tuple[str, str], int]) -> dict[str, Any]:
    asked, target = item[0]["arguments"], item[0]["target"]
    metrics: dict[str, Any] = {}
    read = []
    for text, (answer, *_) in zip(asked, item[0]["resps"], strict=True):
        if isinstance(answer, dict):
            metrics |= answer
        elif isinstance(answer, str):
            metrics["written"] = answer
        else:
            read.append((-answer[0], tokens[text]))
    if len(read) == len(asked) > 1 and isinstance(target, int) and len({prompt for prompt, _ in asked}) == 1:
        return choice_metrics(*np.array(read).T, [len(choice.strip()) for _, choice in asked], target)
    if len(read) == 1:
        metrics["answer_nll"] = read[0][0] / read[0][1]
    for sample in item:
        suffix = "" if sample["filter"] == "none" else f" ({sample['filter']})"
        # RULER names its one metric by the length, and gives -1 for the lengths of other items.
        names = [length] if length in sample["metrics"] else sample["metrics"]
        for name in names:
            if isinstance(sample[name], int | float):
                metrics[f"{'score' if name == length else name}{suffix}"] = float(sample[name])
    return metrics


def choice_metrics(costs: np.ndarray, tokens: Sequence[int], characters: Sequence[int], right: int) -> dict[str, float]:
    """Whether the right choice is the likeliest, in total and per character; its NLL per token, and its contrast.

    `costs` are NLL of the choices in nats, `right` is the right one's number; a tie is wrong. `contrast` is how far its
    NLL per token is below the others' mean: what makes all of them cheaper cancels out. Letters, of one character each,
    have no accuracy per character.
    """
    per_token, per_character = costs / np.array(tokens), costs / np.array(characters)
    metrics = {"accuracy": float(costs[right] < np.delete(costs, right).min())}
    if max(characters) > 1:
        metrics["accuracy_per_character"] = float(per_character[right] < np.delete(per_character, right).min())
    contrast = float(np.delete(per_token, right).mean() - per_token[right])
    return {**metrics, "answer_nll": float(per_token[right]), "contrast": contrast}


def _is_binary(metric: str, *values: np.ndarray) -> bool:
    return metric.partition(" (")[0] in BINARY and bool(np.isin(values, (0, 1)).all())  # in brackets: a filter's name


def score_table(items: pd.DataFrame) -> pd.DataFrame:
    """Every score of every arm. Intervals: 95%, exact (Clopper-Pearson) for shares, bootstrap over items for means.

    Columns: task, length (tokens, 0: short), arm, metric, items, value, low, high (NaN below 8 items).
    """
    rows = []
    for names, part in items.groupby(["task", "length", "arm"], sort=False):
        for metric, values in _metrics_of(part):
            binary, total = _is_binary(metric, values), len(values)
            bounds = share_interval(int(values.sum()), total) if binary else mean_interval(values)
            rows.append((*names, metric, total, values.mean(), *bounds))
    return pd.DataFrame(rows, columns=["task", "length", "arm", "metric", "items", "value", "low", "high"])


def delta_table(items: pd.DataFrame, before: str = "base", after: str = "extended") -> pd.DataFrame:
    """Every metric of one arm minus another's, paired: `paired_accuracy` for right and wrong, else `paired_mean`.

    Columns: task, length, pair, metric, items, before, after, difference, low, high, discordant, p (the last two NaN
    for means). ValueError if an arm is missing, the arms were asked other items, or no item has a number of both.
    """
    rows = []
    for (task, length), part in items.groupby(["task", "length"], sort=False):
        first, second = (part[part.arm == arm] for arm in (before, after))
        if first.empty or second.empty:
            raise ValueError(f"{task}: arms {before!r} and {after!r} must both be measured")
        if list(first.asked) != list(second.asked):
            raise ValueError(f"{task}: {before!r} and {after!r} were asked other items, measure them together")
        entry = {"task": task, "length": length, "pair": f"{before} -> {after}"}
        for metric in dict.fromkeys(name for arm in (first, second) for name, _ in _metrics_of(arm)):
            pairs = np.array([first[metric], second[metric]], dtype=float)
            one, other = pairs[:, ~np.isnan(pairs).any(axis=0)]  # of items that both arms have
            if not len(one):
                raise ValueError(f"{task}: no item has a number for {metric!r} of both {before!r} and {after!r}")
            found = (paired_accuracy if _is_binary(metric, one, other) else paired_mean)(one, other)
            rows.append({**entry, "metric": metric, "items": len(one), **asdict(found)})
    return pd.DataFrame(rows)


def _metrics_of(part: pd.DataFrame) -> Iterator[tuple[str, np.ndarray]]:
    """Name and values of each metric that items of one task and arm have."""
    for name, column in part.drop(columns=KEYS, errors="ignore").items():
        if column.notna().any():
            yield str(name), column.dropna().to_numpy(float)


def item_arrays(items: pd.DataFrame) -> dict[str, np.ndarray]:
    """Every item's score: `TASK_LENGTH_items` (names), `TASK_LENGTH_ARM_METRIC`, `TASK_LENGTH_ARM_written` (texts)."""
    arrays: dict[str, np.ndarray] = {}
    for (task, length, arm), part in items.groupby(["task", "length", "arm"], sort=False):
        start = f"{task}_{length}"
        arrays[f"{start}_items"] = part["item"].to_numpy(str)
        arrays |= {f"{start}_{arm}_{metric}": values.astype(np.float32) for metric, values in _metrics_of(part)}
        if "written" in part and part.written.notna().any():
            arrays[f"{start}_{arm}_written"] = part.written.to_numpy(str)
    return arrays


def write_results(
    preset: Preset, items: pd.DataFrame, folder: Path, *, deltas: pd.DataFrame | None = None, **options: Any
) -> Path:
    """Write folder/08_benchmark_deltas.json, with `options` of `write_record`, and beside it `item_arrays` as .npz.

    `deltas` are of `delta_table`; None: extended minus base.
    """
    return write_record(
        folder,
        SLUG,
        preset=preset.name,
        question="What does the extension do to short and long tasks?",
        tables={"deltas": delta_table(items) if deltas is None else deltas, "scores": score_table(items)},
        seeds={"items": SEED, "bootstrap": SEED, "split": preset.data.split_seed},
        arrays=item_arrays(items),
        **options,
    )
