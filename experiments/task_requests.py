"""Tasks of the harness asked on another machine: what it would ask a model, as token ids, and the answers given back.

The harness makes its prompts and scores the answers where it is installed; in between lies a file of requests, which a
machine with a GPU answers without harness, data sets or network. See `dose_inputs`.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from llama_long_utils.evaluation.generation import likelihoods, write
from llama_long_utils.model.loss import Model
from llama_long_utils.settings import Preset

if TYPE_CHECKING:  # the machine that answers may have no pandas
    import pandas as pd

WRITTEN_TOGETHER = 8  # times as many tokens of prompts as are read together: each step reads all weights
Answer = list[Any]  # [nats, likeliest, tokens] of a continuation, or [text]


@dataclass(frozen=True)
class Request:
    """A continuation whose likelihood is asked for, or, if `tokens`, a prompt to be continued up to a stop text."""

    task: str
    key: str
    context: list[int]
    continuation: list[int]
    tokens: int = 0
    stops: tuple[str, ...] = ()


def request_key(prompt: str, after: Any) -> str:
    """A short name for a prompt with what is asked about it."""
    return hashlib.sha256(json.dumps([prompt, after], sort_keys=True).encode()).hexdigest()[:16]


def collect(preset: Preset, names: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Request]:
    """Everything that tasks of `data/tasks` ask a model, each request once."""
    if not names:
        return []
    from lm_eval.models.utils import normalize_gen_kwargs

    from llama_long_utils.evaluation.harness import Llama

    found: dict[str, Request] = {}

    class Collecting(Llama):
        def _loglikelihood_tokens(self, requests: list[Any], **_options: Any) -> list[Any]:
            for (prompt, after), context, continuation in requests:
                key = request_key(prompt, after)
                found[key] = Request(self._arm, key, list(context), list(continuation))
            return [(0.0, False, 1)] * len(requests)

        def _write(self, requests: Sequence[Any], **_options: Any) -> list[str]:
            for request in requests:
                (prompt, after), settings = request.args, normalize_gen_kwargs(request.args[1])
                key, stops = request_key(prompt, after), tuple(stop for stop in settings["until"] if stop)
                found[key] = Request(self._arm, key, self.tok_encode(prompt), [], settings["max_gen_toks"], stops)
            return [""] * len(requests)

    for name in names:
        _evaluate(preset, name, Collecting(_no_model, tokenizer, arm=name), score=False)
    return list(found.values())


def answer(
    model: Model, tokenizer: PreTrainedTokenizerBase, requests: Iterable[Request], *, tokens_at_once: int
) -> dict[str, Answer]:
    """The model's answers by key."""
    asked = list(requests)
    read = [request for request in asked if not request.tokens]
    pairs = [(request.context, request.continuation) for request in read]
    found: dict[str, Answer] = {}
    for request, likelihood in zip(read, likelihoods(model, pairs, tokens_at_once=tokens_at_once), strict=True):
        found[request.key] = list(likelihood)
    for options in dict.fromkeys((request.tokens, request.stops) for request in asked if request.tokens):
        group = [request for request in asked if (request.tokens, request.stops) == options]
        prompts = [np.array(request.context) for request in group]
        together = {"tokens_at_once": WRITTEN_TOGETHER * tokens_at_once}
        texts = write(model, tokenizer, prompts, tokens=options[0], stops=options[1], **together)
        found |= {request.key: [text] for request, text in zip(group, texts, strict=True)}
    return found


def score(
    preset: Preset,
    names: Sequence[str],
    answers: dict[str, dict[str, Answer]],
    tokenizer: PreTrainedTokenizerBase,
) -> "pd.DataFrame":
    """What the harness makes of the answers of each arm: items as `benchmarks.measure` returns them."""
    import pandas as pd

    from llama_long_utils.evaluation.benchmarks import logged_items
    from llama_long_utils.evaluation.harness import Llama

    class Answering(Llama):
        given: dict[str, Answer]

        def _loglikelihood_tokens(self, requests: list[Any], **_options: Any) -> list[Any]:
            return [tuple(self.given[request_key(*request[0])]) for request in requests]

        def _write(self, requests: Sequence[Any], **_options: Any) -> list[str]:
            return [self.given[request_key(*request.args)][0] for request in requests]

    measured = []
    for arm, given in answers.items():
        for name in names:
            llama = Answering(_no_model, tokenizer, arm=arm)
            llama.given = given
            samples = _evaluate(preset, name, llama, score=True)
            measured.append(logged_items(name, arm, samples, llama.tokens))
    return pd.concat(measured, ignore_index=True)


def _no_model() -> Model:
    raise RuntimeError("the answers are on file: no model is loaded")


def _evaluate(preset: Preset, name: str, llama: Any, *, score: bool) -> dict[str, list[dict[str, Any]]]:
    import contextlib
    import io

    from lm_eval import evaluate

    from llama_long_utils.evaluation.benchmarks import load_tasks

    tasks = load_tasks([name], {"preset": preset.name, "allow_execution": False})[name]
    if not score:
        for task in tasks.values():
            task.process_results = lambda *_arguments: {}  # programs would run, and there is nothing to score
    with contextlib.redirect_stderr(io.StringIO()):  # bars
        return evaluate(llama, {"tasks": tasks}, bootstrap_iters=0)["samples"]


ARMS = {"base": "base_16_bit", "base-nf4": "base", "yarn-nf4": "yarn"}  # a run's names, and the record's
PAIRS = (("base", "extended"), ("base", "yarn"), ("base_16_bit", "base"), ("base_16_bit", "extended"))


def write_task_record(preset: Preset, run: Path, folder: Path, names: Sequence[str]) -> Path:
    """Write folder/08_benchmark_deltas.json from the answers that a run of the dose experiment left.

    Arms of `ARMS`, and as "extended" whole sequences at the largest dose. A task is compared where both arms answered
    all of it.

    Args:
        names: of tasks in `data/tasks`.
    """
    import pandas as pd

    from llama_long_utils.evaluation.benchmarks import delta_table, write_results
    from llama_long_utils.model.weights import load_tokenizer

    doses = (path.stem.removeprefix("answers-") for path in run.glob("answers-full*-s0-*.json"))
    arms = {**ARMS, max(doses, key=lambda name: int(name.rpartition("-")[2])): "extended"}
    given = {arm: json.loads((run / f"answers-{name}.json").read_text()) for name, arm in arms.items()}
    tokenizer = load_tokenizer(preset.base.source)
    rows = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    scored, deltas = [], []
    for name in names:
        keys = {request.key for request in collect(preset, [name], tokenizer)}
        items = score(preset, [name], {arm: got for arm, got in given.items() if keys <= set(got)}, tokenizer)
        deltas += [delta_table(items, *pair) for pair in PAIRS if {*pair} <= {*items.arm}]
        scored.append(items)
    seconds = sum(row["seconds"] for row in rows if row["kind"] == "tasks")
    items = pd.concat(scored, ignore_index=True)
    return write_results(preset, items, folder, deltas=pd.concat(deltas), seconds=seconds)
