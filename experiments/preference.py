"""Preference tuning against a reward model, over seeds: what the reward model says (proxy), what is right (gold), KL.

Expected, before it was run: RL and DPO raise the gold score of held-out answers over the instruction-tuned model's, and
the proxy rises with it. Refuted if the interval of the share of questions with a better answer includes one half.
Over-optimisation would be a proxy that rises while gold falls, or answers that grow longer or repeat themselves.
Neither came. Added afterwards, from the answers that were kept: right words whatever follows them, and the untrained
answer cut where an arm's ends, or stopped by a rule. Gold also rises when wrong answers end earlier.
"Preference tuning keeps long context": refuted if held-out documents of a whole window cost 0.02 nat a token more. It
was: averages of the adapters before and after were added when that had been seen.

A real model (SmolLM2-135M-Instruct, `--small --quoting 8`). On documents that are trained on, its extended adapter
began 27 of 32 greedy answers right and never stopped, so it was first tuned on a few short quotations: then about half
of them ended, and answers to a question differ. Expected, before preferences were tuned:
- RL and DPO are preferred, sampled and greedily, mostly because more answers end. An interval that includes one half
  refutes it. RL's steps are few, so DPO may be told from a tie where RL is not.
- Right words do not fall, unlike at tiny: they were the base's before any tuning. An interval of the change in greedy
  right words below 0 refutes it.
- Proxy and gold rise together. Over-optimisation would be a proxy that rises from the first measurement to the last
  while gold or right words fall, or longer or more repetitive answers.
- Held-out stretches of 2,048 tokens (longer ones take too long) cost less than 0.02 nat a token more. An interval
  above it refutes that.
DPO was run first, then RL, with one seed each. DPO's sampled answers are preferred, more by right words than by their
end: that part of the first point was wrong. RL's are preferred by their end; for it the second and the last
point are refuted. Greedily both are undecided.

Seeds 1 and 2 came after that, with nothing changed. A seed has questions to train on, answers to them, comparisons, a
reward model and orders of its own. The start, the held-out questions and its answers to them are the same. Expected,
before they were run:
- Each new seed's sampled answers are preferred by more than one half, of DPO and of RL. One that is not refutes it for
  that arm. Over three seeds Student's interval may hold one half all the same: then it is undecided.
- RL wins by ending: against the answers cut as its own, no interval over all seeds lies above one half. DPO's may.
- RL's greedy answers begin right less often than the start's in both new seeds; DPO's do not get worse. A new seed with
  the other sign refutes RL's, an interval over all seeds below 0 DPO's.
- Long stretches cost less than 0.02 nat with DPO, more with RL, in each new seed. A seed's interval on the other side
  refutes it.
The first point held, and the second and third for RL. DPO differs by seed: with seed 1 its answers ended early and far
fewer began right. With both, stretches cost more than 0.02 nat, which refutes the last point for DPO.
"""

import itertools
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase, TrainerCallback

from experiments.preference_answers import repeated, shortened, with_words
from experiments.preference_controls import CONTROLS, Controls
from experiments.race_results import wider
from llama_long_utils.cache import Cache
from llama_long_utils.data.documents import TokenizedDocument
from llama_long_utils.data.mixture import Mixture
from llama_long_utils.evaluation.generation import likelihoods
from llama_long_utils.evaluation.perplexity import paired_table, random_stretches, token_nll
from llama_long_utils.evaluation.retrieval import score
from llama_long_utils.evaluation.retrieval_items import planted_items
from llama_long_utils.evaluation.statistics import SEED, mean_interval, paired_mean, share_interval
from llama_long_utils.model.adapters import load_adapter, read_card
from llama_long_utils.model.base import load_base
from llama_long_utils.model.weights import load_tokenizer, locate_base, weights_sha256
from llama_long_utils.records import device_name, package_versions, write_record
from llama_long_utils.settings import Preset
from llama_long_utils.training.comparisons import (
    Asked,
    Comparison,
    ask,
    compare,
    load_reward_model,
    rewards,
    sample_answers,
)
from llama_long_utils.training.instruction import tune_instructions
from llama_long_utils.training.preferences import optimise_policy, train_dpo, train_reward_model

SLUG = "10_preference_tuning"
ARMS = ("rl", "dpo")  # against the reward model; on the same pairs
KEPT = (0.25, 0.125)  # shares of the change, in averages of the adapters before and after, after arXiv:2309.06256
VERSION = 1  # of what is measured
SEEDS = (0, 1, 2)
TESTED = 64  # held-out questions
MEASUREMENTS = 3  # of a training, the last one at its end
DOCUMENTS = 12  # held-out, of a whole window
QUESTIONS = 12  # pass keys, asked at every length
LOGGED = ("step", "loss", "reward", "kl", "accuracy", "margin", "length", "entropy")
SHOWN = 24  # questions whose answers go to the record, for the panel
MEASURES = ("words_right", "exact", "gold", "proxy_scaled")


@dataclass(frozen=True)
class Scope:
    """How much is trained and measured. SMALL takes a real model a quarter of an hour of one core for a seed."""

    seeds: Sequence[int] = SEEDS
    arms: Sequence[str] = ARMS
    measurements: int = MEASUREMENTS
    averages: Sequence[float] = KEPT
    controls: Sequence[str] = CONTROLS
    tokens: int = 0  # of a held-out document; 0: a whole window
    pass_keys: bool = True
    tasks: bool = False  # short ones


SMALL = Scope(arms=("dpo", "rl"), measurements=2, averages=(), controls=(), tokens=2048, pass_keys=False, tasks=True)


def in_few_steps(preset: Preset) -> Preset:
    """The same with half the steps of RL and DPO: a quick look."""
    halves = {stage: getattr(preset.preference, stage) for stage in ("rl", "dpo")}
    for stage, numbers in halves.items():
        steps = max(6, numbers.steps // 2)
        halves[stage] = replace(numbers, steps=steps, warmup_steps=min(numbers.warmup_steps, steps - 1))
    return replace(preset, preference=replace(preset.preference, **halves))


def load_policy(preset: Preset, adapter: Path, start: Path | None = None, kept: float = 1.0) -> PeftModel:
    """An adapter on the base, in eval mode; with `start`, only a share `kept` of the way from there.

    Factors of LoRA are averaged, not their products: not quite an average of the weights.
    """
    base = locate_base(preset)
    model = load_adapter(load_base(base, read_card(adapter).rope, dtype=preset.base.dtype), adapter, base).eval()
    if start:
        before, after = (load_file(folder / "adapter_model.safetensors") for folder in (start, adapter))
        set_peft_model_state_dict(model, {name: torch.lerp(before[name], after[name], kept) for name in after})
    return model


def quoting_adapter(preset: Preset, steps: int) -> Path:
    """The extended adapter, tuned on short stretches with the questions that are asked here.

    [instruction] of a preset may teach others, and at windows that take longer.
    """
    window = 4 * preset.preference.tokens
    numbers = {"window": window, "short_window": window // 2, "tokens_per_question": preset.preference.tokens // 2}
    numbers |= {"long_share": 0.0, "loss_on_prompt": False, "steps": steps, "checkpoint_every": steps}
    settings = replace(preset.instruction, **numbers, questions="quotations")
    return tune_instructions(preset, settings=settings, name="quotations").folder


@dataclass
class Judge:
    """Measures a policy on the held-out questions."""

    preset: Preset
    tokenizer: PreTrainedTokenizerBase
    asked: list[Asked]
    reward_model: PeftModel
    start: PeftModel

    def rows(self, policy: PeftModel, **labels: Any) -> list[dict[str, Any]]:
        """One for each question and way of decoding: gold, proxy, kl (log-ratio in nats), length, repeated."""
        found = []
        prompts = [one.prompt for one in self.asked]
        for decoding, temperature in (("greedy", 0.0), ("sampled", self.preset.preference.temperature)):
            settings, numbers = self.preset.preference, {"seed": 99, "temperature": temperature}
            answers = sample_answers(policy, self.tokenizer, prompts, settings, **numbers)
            proxy = rewards(self.reward_model, [[*one, *two] for one, two in zip(prompts, answers, strict=True)])
            pairs = list(zip(prompts, answers, strict=True))
            models = dict.fromkeys((policy, self.start)) if temperature else ()  # of greedy answers it is no KL
            nats = [np.array([one for one, *_ in likelihoods(model, pairs)]) for model in models]
            kl = nats[0] - nats[-1] if nats else np.full(len(pairs), np.nan)
            for number, (question, answer) in enumerate(zip(self.asked, answers, strict=True)):
                found.append(
                    {
                        **labels,
                        "decoding": decoding,
                        "question": number,
                        "gold": question.gold(answer),
                        "proxy": proxy[number],
                        "kl": kl[number],
                        "length": len(answer),
                        "repeated": repeated(answer),
                        "ended": float(answer[-1] == self.tokenizer.eos_token_id),
                        "answer": self.tokenizer.decode(answer, skip_special_tokens=True),
                    }
                )
        return found


class Measure(TrainerCallback):
    """Measures the policy every few steps of its training."""

    def __init__(self, judge: Judge, cache: Cache, labels: dict[str, Any], every: int) -> None:
        self.judge, self.cache, self.labels, self.every = judge, cache, labels, every

    def on_step_end(self, _arguments: Any, state: Any, _control: Any, model: PeftModel, **_options: Any) -> None:
        if state.global_step % self.every == 0:
            training = model.training
            labels = {**self.labels, "step": state.global_step}
            self.cache.value("answers", lambda: self.judge.rows(model.eval(), **labels), **labels)
            model.train(training)


def run_preference(preset: Preset, adapter: Path, out: Path, scope: Scope = Scope()) -> Path:
    """Write the record 10_preference_tuning of a preset; what was measured lies in runs/PRESET/preference."""
    began, tokenizer = time.perf_counter(), load_tokenizer(locate_base(preset))
    mixture = Mixture(preset.data, tokenizer)
    documents = [one for source in mixture.sources for one in mixture.training(source)]
    held_out = mixture.held_out()
    test, start = ask(held_out, tokenizer, preset, TESTED, 1000), load_policy(preset, adapter)
    arms, rows, logs, rated = [("sft", 0, adapter, {})], [], [], []
    key = {"start": weights_sha256(adapter), "base": weights_sha256(locate_base(preset))}
    for seed in scope.seeds:
        settings = replace(preset.preference, seed=seed)
        seeded = replace(preset, preference=settings)
        cache = Cache(preset.run_folder / "preference", VERSION, {**key, "settings": settings})
        questions = ask(documents, tokenizer, seeded, settings.questions, seed)
        prompts = [one.prompt for one in questions]
        repeats = [prompt for prompt in prompts for _ in range(settings.answers)]
        written = cache.value("written", partial(sample_answers, start, tokenizer, repeats, settings, seed=seed))
        answers = [written[first : first + settings.answers] for first in range(0, len(written), settings.answers)]
        pairs = compare(questions, answers, settings)
        kept = len(pairs) * 7 // 8  # the last ones only test the reward model
        name = f"study-{seed}"
        proxy = train_reward_model(seeded, pairs[:kept], adapter, name=name)
        reward_model = load_reward_model(seeded, proxy.folder).eval()
        rated.append({"seed": seed, "comparisons": kept, **rating(reward_model, pairs[kept:])})
        judge = Judge(seeded, tokenizer, test, reward_model, start)
        rows += cache.value("answers", partial(judge.rows, start, arm="sft", seed=seed, step=0), arm="sft")
        for arm in scope.arms:
            labels, steps = {"arm": arm, "seed": seed}, (settings.dpo if arm == "dpo" else settings.rl).steps
            every = steps // scope.measurements
            options = {"callbacks": [Measure(judge, cache, labels, every)], "name": name}
            if arm == "rl":
                trained = optimise_policy(seeded, prompts, proxy.folder, adapter, **options)
            else:
                trained = train_dpo(seeded, pairs[:kept], adapter, **options)
            for step in range(every, steps + 1, every):
                part = {**labels, "step": step}
                rows += cache.value("answers", partial(no_such_step, part), **part)
            arms.append((arm, seed, trained.folder, {}))
            for share in scope.averages:
                last, mixed = (
                    {"arm": f"{arm}, {share:g}", "seed": seed, "step": steps},
                    {"start": adapter, "kept": share},
                )
                average = partial(load_policy, preset, trained.folder, **mixed)
                rows += cache.value("answers", lambda j=judge, a=average, p=last: j.rows(a(), **p), **last)
                arms.append((last["arm"], seed, trained.folder, mixed))
            logs += [{**labels, **{column: row.get(column) for column in LOGGED}} for row in trained.log]
            print(f"seed {seed}, {arm}: {time.perf_counter() - began:,.0f} s", flush=True)
        controls = Controls(seeded, questions, pairs[:kept], proxy.folder, documents)
        for arm in scope.controls:
            folder, steps = (trained := controls.train(arm, adapter)).folder, trained.settings.steps
            last, policy = {"arm": arm, "seed": seed, "step": steps}, weights_sha256(folder)
            rows += cache.value(
                "answers", lambda f=folder, j=judge, p=last: j.rows(load_policy(preset, f), **p), **last, policy=policy
            )
            arms.append((arm, seed, folder, {}))
            print(f"seed {seed}, {arm}: {time.perf_counter() - began:,.0f} s", flush=True)
    table = with_words(pd.DataFrame(rows), test, tokenizer)
    tables = {"curves": curves(table), "wins": wins(table, test), "changes": differences(table)}
    tables["wins_by_step"] = wins_by_step(table)
    tables |= {"reward_model": pd.DataFrame(rated).join(heeded(table), on="seed")}
    others = table.arm.isin(["sft, stopped", *CONTROLS])
    tables |= {"log": pd.DataFrame(logs), "shown": shown(table[~others], test, tokenizer)}
    kept_context = Cache(preset.run_folder / "preference", VERSION, {"device": device_name()})
    tables |= costs(preset, arms, held_out, tokenizer, kept_context, scope)
    if scope.tasks:
        from experiments.preference_tasks import stage_changes  # imports the harness

        stages = [(arm, seed, folder) for arm, seed, folder, _ in arms]
        tables["stages"] = stage_changes(preset, stages)
    return write_record(
        out,
        SLUG,
        preset=preset.name,
        question="Does preference tuning do what it is asked, and keep long context?",
        tables=tables,
        seeds={"preference": list(scope.seeds), "questions": 1000, "bootstrap": SEED},
        seconds=time.perf_counter() - began,
        provenance={
            "command": " ".join(["python -m experiments", *sys.argv[1:]]),
            "device": f"{device_name()}, {preset.base.dtype}",
            "versions": {"python": platform.python_version(), **package_versions(), "trl": version("trl")},
        },
    )


def no_such_step(part: dict[str, Any]) -> list:
    """What is measured during training cannot be measured later."""
    raise RuntimeError(
        f"{part} was not measured: remove runs/PRESET/{part['arm']}/study-{part['seed']}-* and run again"
    )


def rating(model: PeftModel, pairs: Sequence[Comparison]) -> dict[str, float]:
    """How often the reward model agrees with comparisons that it was not trained on."""
    sides = [rewards(model, [[*one.prompt, *getattr(one, side)] for one in pairs]) for side in ("chosen", "rejected")]
    right = int(np.sum(np.array(sides[0]) > np.array(sides[1])))
    low, high = share_interval(right, len(pairs))
    return {"held_out": len(pairs), "right": right / len(pairs), "low": low, "high": high}


def heeded(table: pd.DataFrame) -> pd.DataFrame:
    """By seed: rank correlations of the reward model's number, over the SFT model's sampled answers."""
    drawn = table[(table.arm == "sft") & (table.decoding == "sampled")]
    columns = ["ended", "length", "gold", "words"]
    return pd.DataFrame(
        {seed: part[columns].corrwith(part.proxy, method="spearman") for seed, part in drawn.groupby("seed")}
    ).T.add_prefix("rank_")


def curves(table: pd.DataFrame) -> pd.DataFrame:
    """Means over questions, by arm, seed, step and decoding."""
    numbers = ["gold", "proxy", "kl", "length", "repeated", "ended", "exact", "words", "words_right", "proxy_scaled"]
    return table.groupby(["arm", "seed", "step", "decoding"], sort=False)[numbers].mean().reset_index()


def differences(table: pd.DataFrame) -> pd.DataFrame:
    """By arm, decoding and measure: the last step against the SFT model and against the first step that was measured.

    Paired; intervals as those of `wins`. Controls were measured at their end only.
    """
    means, of_seeds = (
        table.pivot_table(index=unit, columns=["decoding", "arm", "step"], values=list(MEASURES))
        for unit in ("question", "seed")
    )
    rows = []
    measured = [arm for arm in (*ARMS, *CONTROLS) if arm in set(table.arm)]
    for arm, decoding, name in itertools.product(measured, ("sampled", "greedy"), MEASURES):
        steps = means[name, decoding, arm].columns
        for since, before in (("sft", ("sft", 0)), ("first", (arm, steps[0])))[: 2 if arm in ARMS else 1]:
            pairs = [
                (part[name, decoding, *before], part[name, decoding, arm, steps[-1]]) for part in (means, of_seeds)
            ]
            change = paired_mean(*(side.to_numpy() for side in pairs[0]))
            numbers = {key: getattr(change, key) for key in ("before", "after", "difference")}
            numbers["low"], numbers["high"] = wider(change.low, change.high, pairs[1][1] - pairs[1][0])
            if name != "proxy_scaled":  # of shares
                numbers |= {end: float(np.clip(numbers[end], -1, 1)) for end in ("low", "high")}
            rows.append({"arm": arm, "decoding": decoding, "measure": name, "since": since, **numbers})
    return pd.DataFrame(rows)


def wins(table: pd.DataFrame, test: Sequence[Asked]) -> pd.DataFrame:
    """Shares of questions that an arm, fully trained, answers better than the SFT model, as well, and worse.

    `preferred` counts half of the ties; low and high bound it by a bootstrap over questions, each the mean of its
    seeds, or by Student's t over seeds if that is wider. `preferred_cut` is the same against the SFT model's answer,
    cut where the arm's ends. Of the row of all seeds, `seed` is missing.
    """
    index, end = ["decoding", "seed", "question"], test[0].answer[-1]
    last = table[table.step == table.groupby("arm").step.transform("max")].set_index(index)
    sft, rows = last[last.arm == "sft"], []
    for arm in [arm for arm in dict.fromkeys(table.arm) if arm != "sft"]:
        own = last[last.arm == arm].join(sft[["tokens", "gold"]], rsuffix="_sft").reset_index()
        own["gold_cut"] = [
            test[row.question].gold(shortened(row.tokens_sft, row.tokens, end)) for row in own.itertuples()
        ]
        decodings = sorted(table.decoding.unique(), reverse=True)
        for decoding, seed in itertools.product(decodings, (None, *sorted(table.seed.unique()))):
            part = own[(own.decoding == decoding) & ((own.seed == seed) | (seed is None))]
            row = {"arm": arm, "decoding": decoding, "seed": seed, "questions": part.question.nunique()}
            for name in ("", "_cut"):
                better = np.sign((part.gold - part[f"gold{name or '_sft'}"]).round(9))
                points = (better + 1) / 2
                low, high = mean_interval(points.groupby(part.question).mean().to_numpy())
                if seed is None:
                    low, high = np.clip(wider(low, high, points.groupby(part.seed).mean()), 0, 1)
                if not name:
                    row |= {"win": (better > 0).mean(), "tie": (better == 0).mean(), "loss": (better < 0).mean()}
                row |= {f"preferred{name}": points.mean(), f"low{name}": low, f"high{name}": high}
            rows.append(row)
    return pd.DataFrame(rows).astype({"seed": "Int64"})


def wins_by_step(table: pd.DataFrame) -> pd.DataFrame:
    """By arm, step, decoding and seed: `preferred` with its interval, as in `wins`; of all seeds `seed` is missing."""
    index, labels, rows = ["decoding", "seed", "question"], ["arm", "step", "decoding"], []
    before = table[table.arm == "sft"].set_index(index).gold.rename("gold_sft")
    own = table[table.arm.isin(ARMS)].join(before, on=index)
    own = own.assign(points=(np.sign((own.gold - own.gold_sft).round(9)) + 1) / 2)
    for key, whole in own.groupby(labels, sort=False):
        for seed, part in [(None, whole), *whole.groupby("seed")]:
            low, high = mean_interval(part.groupby("question").points.mean().to_numpy())
            if seed is None:
                low, high = np.clip(wider(low, high, part.groupby("seed").points.mean()), 0, 1)
            numbers = {"preferred": part.points.mean(), "low": low, "high": high}
            rows.append({**dict(zip(labels, key, strict=True)), "seed": seed, **numbers})
    return pd.DataFrame(rows).astype({"seed": "Int64"})


def shown(table: pd.DataFrame, test: Sequence[Asked], tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    """Questions with the right answer, and what each arm of the first seed answers, sampled."""
    last = table[(table.step == table.groupby("arm").step.transform("max")) & (table.seed == table.seed.min())]
    last = last[(last.decoding == "sampled") & (last.question < SHOWN)]
    table = partial(last.pivot_table, index="question", columns="arm")
    texts, golds = table(values="answer", aggfunc="first"), table(values="gold").add_prefix("gold_")
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    asked = {
        "prompt": [decode(one.prompt) for one in test[:SHOWN]],
        "answer": [decode(one.answer) for one in test[:SHOWN]],
    }
    return pd.DataFrame(asked, index=texts.index).join(texts).join(golds).reset_index()


def costs(
    preset: Preset,
    arms: Sequence[tuple[str, int, Path, dict[str, Any]]],
    held_out: Sequence[TokenizedDocument],
    tokenizer: PreTrainedTokenizerBase,
    cache: Cache,
    scope: Scope,
) -> dict[str, pd.DataFrame]:
    """Long context before and after: NLL by position on the same documents, and retrieval of the same pass keys."""
    window = scope.tokens or preset.extension.window
    edges = [edge for edge in preset.evaluation.near_edges if edge <= window]
    cuts = [cut for (cut,) in random_stretches(held_out, window, at_most=1, seed=0)][:DOCUMENTS]
    lengths = [length for length in preset.retrieval.lengths if scope.pass_keys and length <= 2048]
    items = {
        length: planted_items("passkey", held_out, tokenizer, length, preset.retrieval, questions=QUESTIONS, seed=0)
        for length in lengths
    }
    read, found = {}, []
    for arm, seed, folder, mixed in arms:
        model, inputs = load_policy(preset, folder, **mixed), {"adapter": weights_sha256(folder)}
        if mixed:
            inputs |= {**mixed, "start": weights_sha256(mixed["start"])}
        own = replace(cache, inputs={**cache.inputs, **inputs})
        read[arm, seed] = [
            own.arrays(cut.name, lambda m=model, c=cut: {"nll": token_nll(m, c)}, ids=cut.token_ids)["nll"][None]
            for cut in cuts
        ]
        for part in items.values() if arm in ("sft", *ARMS) else ():
            found.append(score(model, tokenizer, part, preset.retrieval, own).assign(arm=arm, seed=seed))
    options = {"bootstrap_samples": preset.evaluation.bootstrap_samples, "seed": preset.evaluation.seed}
    changes = []
    for arm, seed, *_ in arms[1:]:
        for bounds in ([1, window], edges):
            part = paired_table(read[arm, seed], read["sft", 0], bounds, **options)
            changes.append(part.assign(arm=arm, seed=seed, whole=len(bounds) == 2))
    tables = {"nll": pd.concat(changes), "nll_of_seeds": costs_of_seeds(read)}
    if not found:
        return tables
    answers = pd.concat(found)
    columns = ["arm", "seed", "task", "length"]
    by_length = answers.groupby(columns, sort=False)[["probability", "exact", "rouge_l"]].mean().reset_index()
    means = answers.pivot_table(index="number", columns=["arm", "seed"], values="probability")
    paired = []
    for arm, seed in (pair for pair in means if pair != ("sft", 0)):
        change = paired_mean(means["sft", 0].to_numpy(), means[arm, seed].to_numpy())
        paired.append(
            {
                "arm": arm,
                "seed": seed,
                "questions": len(means),
                **{name: getattr(change, name) for name in ("before", "after", "difference", "low", "high")},
            }
        )
    return tables | {"retrieval": by_length, "retrieval_change": pd.DataFrame(paired)}


def costs_of_seeds(read: dict[tuple[str, int], list[np.ndarray]]) -> pd.DataFrame:
    """Of each arm, nats a token more than the SFT model over documents of one length, with the intervals of `wins`."""
    rows = []
    for arm in dict.fromkeys(arm for arm, _ in read if arm != "sft"):
        own = {seed: nll for (name, seed), nll in read.items() if name == arm}
        means = pd.DataFrame(
            {
                seed: [(after - before).mean(dtype=float) for after, before in zip(nll, read["sft", 0], strict=True)]
                for seed, nll in own.items()
            }
        )
        low, high = wider(*mean_interval(means.mean(axis=1).to_numpy()), means.mean())
        numbers = {"nll": means.mean(axis=None), "low": low, "high": high}
        rows.append({"arm": arm, **numbers, "documents": len(means), "seeds": len(own)})
    return pd.DataFrame(rows)
