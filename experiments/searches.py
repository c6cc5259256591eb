"""Searches on the race's terms: LongRoPE's factors, RoPE bases, ways of training."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from transformers import PreTrainedModel

from experiments.race import Arm, arm_rope, arm_training, collect, run_arm, trained_arm
from experiments.race_results import race_results
from llama_long_utils.data.documents import TokenizedDocument
from llama_long_utils.data.mixture import read_documents
from llama_long_utils.evaluation.perplexity import nll_table, paired_table, random_stretches, token_nll
from llama_long_utils.model.arms import load_arm
from llama_long_utils.model.loss import causal_lm
from llama_long_utils.model.weights import load_tokenizer, locate_base, weights_sha256
from llama_long_utils.paths import RESULTS
from llama_long_utils.presets import with_numbers
from llama_long_utils.records import write_record
from llama_long_utils.rope import inverse_frequencies, longrope, rotation
from llama_long_utils.settings import Preset


def search_pair_factors(
    cost: Callable[[tuple[float, ...]], float],
    starts: Sequence[Sequence[float]],
    *,
    largest: float,
    rounds: int,
    seed: int,
) -> tuple[tuple[float, ...], list[float]]:
    """LongRoPE's search in small: mutate the best factors known, keep what costs less.

    The paper evolves a population of 64 for 40 rounds; here each round tries one mutation, which stretches or
    shrinks the factors of neighbouring pairs. As in the paper, factors never fall from one pair to the next.

    Args:
        cost: NLL on long text with these factors, shape (head_dim / 2,); training text, never held-out text.
        starts: factors to start from (PI's, NTK's, YaRN's); the cheapest is the first parent.
        largest: no factor exceeds it.

    Returns:
        The cheapest factors, and the lowest cost after the starts and after each round.
    """
    generator = np.random.default_rng(seed)
    costs = [cost(tuple(start)) for start in starts]
    best, lowest = np.array(starts[int(np.argmin(costs))]), min(costs)
    history = [lowest]
    for _ in range(rounds):
        first, last = np.sort(generator.integers(0, len(best), 2))
        stretch = np.ones(len(best))
        stretch[first : last + 1] = np.exp(generator.normal(0, 0.35))
        tried = np.maximum.accumulate(np.clip(best * stretch, 1.0, largest)).round(3)
        price = cost(tuple(tried.tolist()))
        if price < lowest:
            best, lowest = tried, price
        history.append(lowest)
    return tuple(best.tolist()), history


def search_longrope(preset: Preset, *, rounds: int, texts: int, seed: int) -> Path:
    """Search LongRoPE's factors for a preset's base on its training documents (never on held-out ones).

    Args:
        rounds: mutations to try.
        texts: stretches of the new window's length that each of them reads.

    Returns:
        The record, 11_longrope_search: the factors, and the lowest NLL after each round.
    """
    started = time.perf_counter()
    model, cuts = _base_and_texts(preset, preset.evaluation.tokens, texts, seed)
    rotary = causal_lm(model).model.rotary_emb
    scaling = arm_rope(preset, "yarn")
    plain, pairs = rotary.inv_freq.clone(), len(rotary.inv_freq)

    def cost(factors: tuple[float, ...]) -> float:
        found, rotary.attention_scaling = longrope(plain.cpu(), factors, scaling.factor, scaling.original_window)
        rotary.inv_freq = found.to(plain.device)
        return float(np.mean([token_nll(model, cut) for cut in cuts]))

    starts = [(scaling.factor,) * pairs]
    for method in ("ntk", "yarn"):
        frequencies, _ = rotation(arm_rope(preset, method))
        starts.append(tuple((plain.cpu() / frequencies).double().numpy().round(3).tolist()))
    factors, costs = search_pair_factors(cost, starts, largest=2 * scaling.factor, rounds=rounds, seed=seed)
    return write_record(
        RESULTS / preset.name,
        "11_longrope_search",
        preset=preset.name,
        question="Which factors does LongRoPE's search find?",
        tables={
            "factors": pd.DataFrame({"pair": range(pairs), "factor": factors}),
            "search": pd.DataFrame({"round": range(len(costs)), "nll": costs}),
        },
        seeds={"search": seed, "split": preset.data.split_seed},
        seconds=time.perf_counter() - started,
        provenance={"command": f"python -m experiments longrope --preset {preset.name}"},
    )


def search_rope_base(preset: Preset, bases: Sequence[float], *, texts: int, seed: int) -> Path:
    """NLL of a preset's base at several RoPE bases, untrained, on its training documents (never on held-out ones).

    Args:
        bases: RoPE bases to try beside the pretrained one.
        texts: stretches of evaluation.far_tokens that each of them reads.

    Returns:
        The record, 11_rope_base_search: mean NLL in each of the evaluation's position buckets.
    """
    started = time.perf_counter()
    model, cuts = _base_and_texts(preset, preset.evaluation.far_tokens, texts, seed)
    rotary = causal_lm(model).model.rotary_emb
    tables = []
    for base in [preset.base.rope_base, *bases]:
        rotary.inv_freq = inverse_frequencies(preset.base.head_dim, base).to(rotary.inv_freq.device)
        nll = [token_nll(model, cut)[None] for cut in cuts]
        options = {"bootstrap_samples": preset.evaluation.bootstrap_samples, "seed": preset.evaluation.seed}
        table = nll_table("rope_base_only", nll, preset.evaluation.bucket_edges, **options)
        table.insert(0, "rope_base", base)
        tables.append(table)
        print(f"base {base:,.0f}:", table.set_index("position_low").nll.round(3).to_dict(), flush=True)
    return write_record(
        RESULTS / preset.name,
        "11_rope_base_search",
        preset=preset.name,
        question="Which RoPE base costs an untrained model least, near and far?",
        tables={"search": pd.concat(tables)},
        seeds={"texts": seed, "split": preset.data.split_seed},
        seconds=time.perf_counter() - started,
        provenance={
            "command": " ".join(
                ["python -m experiments rope-bases", *(f"{base:g}" for base in bases), f"--preset {preset.name}"]
            )
        },
    )


def compare_trainings(preset: Preset, names: Sequence[str], *, seed: int) -> Path:
    """Train the preset's RoPE method in several ways, one after another, and read one held-out document of each source.

    Args:
        names: two or more of [race.trainings]; for equal time their numbers of steps must see to it.

    Returns:
        The record, 11_training_choice: what each took, its NLL in each of the evaluation's position buckets, and the
        paired difference of each later one to the first. Seconds are those of the steps, also of a resumed run.

    Raises:
        ValueError: fewer than two different names, or an unknown one, before anything is loaded.
    """
    if len(set(names)) < max(2, len(names)):
        raise ValueError(f"trainings = {list(names)}: name two or more different ones of {list(preset.race.trainings)}")
    started = time.perf_counter()
    arms = [Arm(preset.extension.method, name, seed) for name in names]
    settings = [arm_training(preset, arm) for arm in arms]  # unknown names end here
    tokenizer = load_tokenizer(preset.base.source)
    _, held_out = read_documents(preset.data, tokenizer)
    evaluation, edges = preset.evaluation, preset.evaluation.near_edges
    stretches = random_stretches(held_out, evaluation.tokens, at_most=1, seed=evaluation.seed)
    cuts = {cut.source: cut for (cut,) in stretches}  # the last of each
    costs, read = [], {}
    options = {"bootstrap_samples": evaluation.bootstrap_samples, "seed": evaluation.seed}
    for arm, given in zip(arms, settings, strict=True):
        model, log = trained_arm(preset, preset.extended_rope, given, name="training-choice")
        cost = {"training": arm.training, "window": given.window, "steps": given.steps, "seed": seed}
        tokens = np.diff([0, *(row["tokens"] for row in log)])
        seconds = sum(tokens / [row["tokens_per_second"] for row in log])
        costs.append({**cost, "tokens": int(tokens.sum()), "seconds": float(seconds)})
        read[arm.training] = [token_nll(model, cut)[None] for cut in cuts.values()]
        print(costs[-1], *(f"{rows.mean():.3f}" for rows in read[arm.training]), flush=True)
    nll = [nll_table(name, rows, edges, **options) for name, rows in read.items()]
    later = {name: paired_table(read[name], read[names[0]], edges, **options) for name in names[1:]}
    return write_record(
        RESULTS / preset.name,
        "11_training_choice",
        preset=preset.name,
        question="Which way to train gives the better model in the same time?",
        tables={
            "cost": pd.DataFrame(costs),
            "nll_by_position": pd.concat(nll),
            "difference": pd.concat([table.assign(training=name) for name, table in later.items()]),
        },
        seeds={"training": seed, "evaluation": evaluation.seed, "split": preset.data.split_seed},
        seconds=time.perf_counter() - started,
        provenance={"command": f"python -m experiments trainings {' '.join(names)} --preset {preset.name}"},
    )


def compare_quoting(preset: Preset, shares: Sequence[float], *, seed: int) -> Path:
    """Train the race's full-length ABF arm with other shares of sequences that quote themselves, and measure it.

    Returns:
        The record, 11_quoting_share: table `scores` with share, measure (as in `RaceResults`), value, low, high.
    """
    started, arm = time.perf_counter(), Arm("abf", "full-length", seed)
    tables = []
    for share in shares:
        own = dataclasses.replace(preset, race=with_numbers(preset.race, "race", self_quoting_share=share))
        path = run_arm(own, arm)
        joined = collect(own, [arm], weights_sha256(locate_base(own)), path.parent / path.stem)
        tables.append(race_results(own, joined).table().assign(share=share))
        print(f"share {share:g}:", tables[-1].set_index("measure").value.round(2).to_dict(), flush=True)
    return write_record(
        RESULTS / preset.name,
        "11_quoting_share",
        preset=preset.name,
        question="How much of first-sentence retrieval is practised copying?",
        tables={"scores": pd.concat(tables)[["share", "measure", "value", "low", "high"]]},
        seeds={"training": seed, "evaluation": preset.evaluation.seed, "split": preset.data.split_seed},
        seconds=time.perf_counter() - started,
        provenance={
            "command": f"python -m experiments quoting {' '.join(f'{s:g}' for s in shares)} --preset {preset.name}"
        },
    )


def _base_and_texts(
    preset: Preset, tokens: int, texts: int, seed: int
) -> tuple[PreTrainedModel, list[TokenizedDocument]]:
    """The base as pretrained, and stretches of `tokens` tokens of training documents, one of each."""
    documents, _ = read_documents(preset.data, load_tokenizer(preset.base.source))
    cuts = random_stretches(next(documents.buffers(preset.training)), tokens, at_most=1, seed=seed)
    chosen = np.random.default_rng(seed).choice(len(cuts), texts, replace=False)
    return load_arm(preset, "base"), [cuts[index][0] for index in chosen]
