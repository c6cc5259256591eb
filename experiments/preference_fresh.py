"""The one arm that kept long context and was preferred, once more: on seeds, questions and documents of no choice.

Of twelve arms "slow dpo with text" met both aims, and its settings had been chosen on a seed that was tested. Here they
are unchanged. Seeds for comparisons, training and sampling are new; so are the questions, of other random places, and
the documents that are read. The documents of before are read, too, for comparison.

Written before it was run. It passes if sampled answers are preferred to the instruction-tuned model's, interval above
one half over seeds and questions, and unread long documents cost at most 0.02 nat a token more, every seed's interval:
what the twelve arms were held to. It fails otherwise. Expected are about 0.59 and 0.016 nat, so it may fail in the
second. Against the answer cut to the same length no win is expected. Nothing is tuned afterwards.
"""

import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from experiments.preference import DOCUMENTS, load_policy, wider, wins
from experiments.preference_answers import begun
from experiments.preference_controls import Controls
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
ARM = "slow dpo with text"
FRESH = (3, 4, 5, 6, 7)
TESTED = 128  # held-out questions
QUESTIONS = 2000  # the seed of their places
VERSION = 1  # of what is measured


def run_fresh(preset: Preset, adapter: Path, out: Path, seeds: Sequence[int] = FRESH) -> Path:
    """Write the record 10_fresh_seeds of a preset; what was measured lies in runs/PRESET/preference."""
    began, tokenizer = time.perf_counter(), load_tokenizer(locate_base(preset))
    mixture = Mixture(preset.data, tokenizer)
    documents = [one for source in mixture.sources for one in mixture.training(source)]
    held_out = mixture.held_out()
    mixture.workers.close()
    test = ask(held_out, tokenizer, preset, TESTED, QUESTIONS)
    cuts = [cut for (cut,) in random_stretches(held_out, preset.extension.window, at_most=1, seed=0)]
    key = {"start": weights_sha256(adapter), "device": device_name(), "base": weights_sha256(locate_base(preset))}
    start, rows, costs = load_policy(preset, adapter), [], {}
    for seed in seeds:
        seeded = replace(preset, preference=(settings := replace(preset.preference, seed=seed)))
        cache = Cache(preset.run_folder / "preference", VERSION, {**key, "settings": settings})
        asked = ask(documents, tokenizer, seeded, settings.questions, seed)
        prompts = [one.prompt for one in asked for _ in range(settings.answers)]
        written = cache.value("written", partial(sample_answers, start, tokenizer, prompts, settings, seed=seed))
        each = settings.answers
        pairs = compare(asked, [written[first : first + each] for first in range(0, len(written), each)], settings)
        trained = Controls(seeded, asked, pairs[: len(pairs) * 7 // 8], None, documents).train(ARM, adapter)
        for arm, folder in (("sft", adapter), (ARM, trained.folder)):
            policy, own = (start if arm == "sft" else load_policy(preset, folder)), weights_sha256(folder)
            for decoding, temperature in (("sampled", settings.temperature), ("greedy", 0.0)):
                options = {"seed": 100 + seed, "temperature": temperature}
                write = partial(sample_answers, policy, tokenizer, [one.prompt for one in test], settings, **options)
                found = cache.value("fresh", write, policy=own, **options, questions=QUESTIONS, tested=TESTED)
                rows += described(found, test, tokenizer, arm=arm, seed=seed, decoding=decoding)
            plain = replace(cache, inputs={"device": device_name(), "adapter": own})
            costs[arm, seed] = list(read(policy, cuts, plain))
        print(f"seed {seed}: {time.perf_counter() - began:,.0f} s", flush=True)
    table = pd.DataFrame(rows).assign(step=0)
    numbers = ["gold", "length", "ended", "words_right"]
    return write_record(
        out,
        SLUG,
        preset=preset.name,
        question="Does the arm that kept long context and was preferred do so again, on seeds of no choice?",
        tables={
            "wins": wins(table, test),
            "answers": table.groupby(["arm", "seed", "decoding"], sort=False)[numbers].mean().reset_index(),
            "nll": costs_of(preset, costs, seeds),
        },
        seeds={"preference": list(seeds), "questions": QUESTIONS, "bootstrap": SEED},
        seconds=time.perf_counter() - began,
        provenance={
            "command": f"python -m experiments preference --fresh {len(seeds)} --preset {preset.name}",
            "device": f"{device_name()}, {preset.base.dtype}",
            "versions": {"python": platform.python_version(), **package_versions(), "trl": version("trl")},
        },
    )


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


def costs_of(preset: Preset, read: dict[tuple[str, int], list[np.ndarray]], seeds: Sequence[int]) -> pd.DataFrame:
    """NLL minus the instruction-tuned model's, nats a token, by seed; of the row of all seeds `seed` is missing.

    `unread`: of the documents that the twelve arms were not tested on, or of those that they were. A seed's interval is
    a bootstrap over documents. That of all seeds is one over documents, each the mean of its seeds, or Student's t over
    seeds, whichever is wider.
    """
    options = {"bootstrap_samples": preset.evaluation.bootstrap_samples, "seed": preset.evaluation.seed}
    rows = []
    for unread, part in ((True, slice(DOCUMENTS, None)), (False, slice(DOCUMENTS))):
        changes = []
        for seed in seeds:
            own, before = read[ARM, seed][part], read["sft", seed][part]
            nll, low, high = paired_difference(own, before, 1, preset.extension.window, **options)
            rows.append({"unread": unread, "seed": seed, "nll": nll, "low": low, "high": high, "documents": len(own)})
            changes.append([float((after - one).mean(dtype=float)) for after, one in zip(own, before, strict=True)])
        means = pd.DataFrame(changes, index=seeds)
        low, high = wider(*mean_interval(means.mean().to_numpy()), means.mean(axis=1))
        whole = {"unread": unread, "seed": None, "nll": means.to_numpy().mean(), "low": low, "high": high}
        rows.append({**whole, "documents": means.shape[1]})
    return pd.DataFrame(rows).astype({"seed": "Int64"})
