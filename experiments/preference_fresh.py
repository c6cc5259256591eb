"""The arm that met both aims, once more, and one more try: each tested once, on seeds and questions of no choice.

Of twelve arms "slow dpo with text" met both aims, and its settings had been chosen on a seed that was tested. Its test,
written before it was run: it passes if sampled answers are preferred to the instruction-tuned model's, interval above
one half over seeds and questions, and unread long documents cost at most 0.02 nat a token more, every seed's interval:
what the twelve arms were held to. Expected were about 0.59 and 0.016 nat. It won, and one seed cost more: it failed.

So five other settings were tried, on the study's seeds, its first twelve documents and questions of their own: more
text, a larger step, and DPO with a mean over tokens in place of their sum (TRL's "sigmoid_norm", beta 25 times as
large, for answers have about 25 tokens). "text 0.7, rate 4e-4" was chosen: of those that cost nothing it won most.

Written before its own test, which is the same: other seeds, questions and stretches of documents. Expected are about
0.6, and a cost near -0.01 nat, every seed's interval below 0.02. It is refuted as the first one was. A cost below zero
says that the text repairs what instruction tuning had lost, not that preferences help reading. Against the answer cut
to the same length no win is expected. Nothing is tuned afterwards.

It passed, one seed barely; on the study's documents, at other places, that seed costs more than 0.02.
"""

import itertools
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from experiments.preference import DOCUMENTS, SEEDS, load_policy, wins
from experiments.preference_answers import begun
from experiments.preference_controls import Controls, WithText
from experiments.race_results import wider
from llama_long_utils.cache import Cache
from llama_long_utils.data.documents import TokenizedDocument
from llama_long_utils.data.mixture import Mixture
from llama_long_utils.evaluation.perplexity import paired_difference, random_stretches, token_nll
from llama_long_utils.evaluation.statistics import SEED, mean_interval
from llama_long_utils.model.weights import load_tokenizer, locate_base, weights_sha256
from llama_long_utils.records import device_name, package_versions, write_record
from llama_long_utils.settings import Preset
from llama_long_utils.training.comparisons import Asked, ask, compare, sample_answers

SLUG = "10_fresh_seeds"
FIRST = "slow dpo with text"
TRIED = {
    "text 1, rate 2e-4": WithText(1.0, 2e-4),
    "text 1, rate 4e-4": WithText(1.0, 4e-4),
    "text 0.5, rate 4e-4": WithText(0.5, 4e-4),
    "text 0.5, rate 4e-4, mean over tokens": WithText(0.5, 4e-4, "sigmoid_norm", 2.5),
    (CHOSEN := "text 0.7, rate 4e-4"): WithText(0.7, 4e-4),
}
TESTED = 128  # held-out questions
VERSION = 1  # of what is measured


@dataclass(frozen=True)
class Trial:
    """What arms are measured on."""

    seeds: Sequence[int]
    questions: int  # the seed of their places
    stretches: int  # the seed of the documents' places
    documents: int | None = None  # only the first ones
    decodings: Sequence[str] = ("sampled", "greedy")


CHOICE = Trial(SEEDS, 1000, 0, DOCUMENTS, ("sampled",))
TESTS = {FIRST: Trial(range(3, 8), 2000, 0), CHOSEN: Trial(range(8, 15), 3000, 1)}


def run_fresh(preset: Preset, adapter: Path, out: Path) -> Path:
    """Write the record 10_fresh_seeds of a preset; what was measured lies in runs/PRESET/preference."""
    began, study = time.perf_counter(), Study(preset, adapter)
    parts = {"choice": [study.measure(arm, CHOICE) for arm in TRIED]}
    parts["test"] = [study.measure(arm, trial) for arm, trial in TESTS.items()]
    return write_record(
        out,
        SLUG,
        preset=preset.name,
        question="Is an arm that keeps long context and is preferred so again, on seeds of no choice?",
        tables={
            name.removeprefix("test_"): pd.concat([one[table] for one in parts[part]])
            for part, table in itertools.product(parts, ("wins", "answers", "nll"))
            for name in [f"{part}_{table}"]
        },
        seeds={arm: list(trial.seeds) for arm, trial in {"choice": CHOICE, **TESTS}.items()} | {"bootstrap": SEED},
        seconds=time.perf_counter() - began,
        provenance={
            "command": f"python -m experiments preference --fresh --preset {preset.name}",
            "device": f"{device_name()}, {preset.base.dtype}",
            "versions": {"python": platform.python_version(), **package_versions(), "trl": version("trl")},
        },
    )


class Study:
    """What every arm trains and is measured on."""

    def __init__(self, preset: Preset, adapter: Path) -> None:
        self.preset, self.adapter, self.tokenizer = preset, adapter, load_tokenizer(locate_base(preset))
        mixture = Mixture(preset.data, self.tokenizer)
        self.documents = [one for source in mixture.sources for one in mixture.training(source)]
        self.held_out, self.start = mixture.held_out(), load_policy(preset, adapter)
        inputs = {"start": weights_sha256(adapter), "base": weights_sha256(locate_base(preset))}
        self.cache = Cache(preset.run_folder / "preference", VERSION, {**inputs, "device": device_name()})

    def measure(self, arm: str, trial: Trial) -> dict[str, pd.DataFrame]:
        """`wins`, means of `answers` by seed, and `costs_of` as `nll`, of an arm trained with each seed."""
        test = ask(self.held_out, self.tokenizer, self.preset, TESTED, trial.questions)
        window, rows, costs = self.preset.extension.window, [], {}
        stretches = random_stretches(self.held_out, window, at_most=1, seed=trial.stretches)
        cuts = [cut for (cut,) in stretches][: trial.documents]
        for seed in trial.seeds:
            settings = replace(self.preset.preference, seed=seed)
            cache = replace(self.cache, inputs={**self.cache.inputs, "settings": settings})
            trained = self.train(arm, replace(self.preset, preference=settings), cache)
            for name, folder in (("sft", self.adapter), (arm, trained)):
                policy = self.start if name == "sft" else load_policy(self.preset, folder)
                for decoding in trial.decodings:
                    temperature = settings.temperature if decoding == "sampled" else 0.0
                    options = {"seed": 100 + seed, "temperature": temperature}
                    prompts = [one.prompt for one in test]
                    write = partial(sample_answers, policy, self.tokenizer, prompts, settings, **options)
                    options |= {"policy": weights_sha256(folder), "questions": trial.questions, "tested": TESTED}
                    found = cache.value("fresh", write, **options)
                    rows += described(found, test, self.tokenizer, arm=name, seed=seed, decoding=decoding)
                plain = replace(cache, inputs={"device": device_name(), "adapter": weights_sha256(folder)})
                costs[name, seed] = list(read(policy, cuts, plain))
            print(f"{arm}, seed {seed}", flush=True)
        table, numbers = pd.DataFrame(rows).assign(step=0), ["gold", "length", "ended", "words_right"]
        answers = table.groupby(["arm", "seed", "decoding"], sort=False)[numbers].mean().reset_index()
        read_by_seed = costs_of(self.preset, costs, arm, trial.seeds)
        return {"wins": wins(table, test), "answers": answers.assign(test=arm), "nll": read_by_seed}

    def train(self, arm: str, preset: Preset, cache: Cache) -> Path:
        """The adapter of an arm, trained on comparisons of its own seed."""
        settings, start = preset.preference, self.start
        asked = ask(self.documents, self.tokenizer, preset, settings.questions, settings.seed)
        prompts, each = [one.prompt for one in asked for _ in range(settings.answers)], settings.answers
        write = partial(sample_answers, start, self.tokenizer, prompts, settings, seed=settings.seed)
        written = cache.value("written", write)
        pairs = compare(asked, [written[first : first + each] for first in range(0, len(written), each)], settings)
        controls = Controls(preset, asked, pairs[: len(pairs) * 7 // 8], None, self.documents)
        if arm in TRIED:
            return controls.train_with_text(TRIED[arm], self.adapter, name=f"{arm}, {settings.seed}").folder
        return controls.train(arm, self.adapter).folder


def described(
    found: Sequence[list[int]], test: Sequence[Asked], tokenizer: PreTrainedTokenizerBase, **labels: Any
) -> Iterator[dict[str, Any]]:
    """One row for each answer: gold, tokens, length, and whether it has ended and begins with all right words."""
    for number, (question, answer) in enumerate(zip(test, found, strict=True)):
        ended, right = float(answer[-1] == tokenizer.eos_token_id), begun(question.answer[:-1], answer) == 1
        yield {**labels, "question": number, "gold": question.gold(answer), "tokens": answer, "length": len(answer)} | {
            "ended": ended,
            "words_right": float(right),
        }


def read(policy: PeftModel, cuts: Sequence[TokenizedDocument], cache: Cache) -> Iterator[np.ndarray]:
    """NLL in nats by token, shape (1, tokens), of each document."""
    for cut in cuts:
        yield cache.arrays(cut.name, lambda c=cut: {"nll": token_nll(policy, c)}, ids=cut.token_ids)["nll"][None]


def costs_of(
    preset: Preset, read: dict[tuple[str, int], list[np.ndarray]], arm: str, seeds: Sequence[int]
) -> pd.DataFrame:
    """NLL minus the instruction-tuned model's, nats a token, by seed; of the row of all seeds `seed` is missing.

    `unread`: of the documents that no arm was chosen on, or of those that they were. A seed's interval is
    a bootstrap over documents. That of all seeds is one over documents, each the mean of its seeds, or Student's t over
    seeds, whichever is wider.
    """
    options = {"bootstrap_samples": preset.evaluation.bootstrap_samples, "seed": preset.evaluation.seed}
    rows = []
    count = len(read["sft", seeds[0]])
    for unread, part in ((True, slice(DOCUMENTS, None)), (False, slice(DOCUMENTS)))[count <= DOCUMENTS :]:
        changes = []
        for seed in seeds:
            own, before = read[arm, seed][part], read["sft", seed][part]
            nll, low, high = paired_difference(own, before, 1, preset.extension.window, **options)
            rows.append({"unread": unread, "seed": seed, "nll": nll, "low": low, "high": high, "documents": len(own)})
            changes.append([float((after - one).mean(dtype=float)) for after, one in zip(own, before, strict=True)])
        means = pd.DataFrame(changes, index=seeds)
        low, high = wider(*mean_interval(means.mean().to_numpy()), means.mean(axis=1))
        whole = {"unread": unread, "seed": None, "nll": means.to_numpy().mean(), "low": low, "high": high}
        rows.append({**whole, "documents": means.shape[1]})
    return pd.DataFrame(rows).assign(arm=arm).astype({"seed": "Int64"})
