"""Preference tuning with TRL: a reward model from comparisons, RLOO against it with a KL penalty, DPO on those pairs.

All start from the instruction-tuned adapter on the 4-bit base, and a frozen copy of it, in the same model, is the
reference. TRL 1.16 tokenizes texts again, puts EOS behind answers that were cut off, and drops what is longer than
1,024 tokens. Here rows are token ids as they were read and written, and none is dropped.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from peft import PeftModel
from transformers import Trainer, TrainerCallback
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer

from llama_long_utils.cache import digest
from llama_long_utils.model.adapters import keep_copies_fp32, load_adapter, read_card
from llama_long_utils.model.base import check_rope, load_base
from llama_long_utils.model.weights import load_tokenizer, locate_base, weights_sha256
from llama_long_utils.settings import Preset, Scaling, TrainingSettings
from llama_long_utils.stages import Preference
from llama_long_utils.training.adapter import TrainedAdapter, train_stage
from llama_long_utils.training.comparisons import Comparison, Reward, collect, kept_gib, load_reward_model, reward_of
from llama_long_utils.training.instruction import weights_kept
from llama_long_utils.training.ledger import ledger
from llama_long_utils.training.planner import GIB, Plan, model_shape, plan
from llama_long_utils.training.processes import join_processes, use_one_gpu
from llama_long_utils.training.random_llama import StepShape
from llama_long_utils.training.trainer import Labels

ANSWERS = ("chosen_ids", "rejected_ids")


class TokenPolicyTrainer(RLOOTrainer):
    """`RLOOTrainer` on prompts that are token ids already."""

    def _tokenize_prompts(self, prompts: list[list[int]]) -> tuple[list[list[int]], None, dict]:
        return prompts, None, {}


class TokenPairTrainer(DPOTrainer):
    """`DPOTrainer` on pairs that are token ids already: none is cut, dropped or ended."""

    def _prepare_dataset(self, dataset: datasets.Dataset, *_: Any, **_options: Any) -> datasets.Dataset:
        return dataset


@contextmanager
def reference_kept(model: PeftModel) -> Iterator[None]:
    """`weights_kept`, also for the copy named "ref" that TRL makes for a reference: rounded to the base's dtype.

    Its norms are fp32 with outputs in the base's dtype afterwards, as the policy's are (`add_lora`).
    """
    with weights_kept(model):
        yield
    keep_copies_fp32(model)
    weights = dict(model.named_parameters())
    for name in (name for name in weights if ".ref." in name):
        weights[name].data = weights[name.replace(".ref.", ".default.")].data.clone()


def check_preference(trainer: Trainer, rope: Scaling) -> None:
    """ValueError unless policy and reference rotate as asked, and the reference is a copy of the policy."""
    check_rope(trainer.model, rope)
    if (reference := getattr(trainer, "ref_model", None)) is not None:
        check_rope(reference, rope)  # TRL loads it by its path, with the RoPE that its config.json has
    elif not isinstance(trainer, RewardTrainer):
        weights = dict(trainer.model.named_parameters())
        copies = {name: weights[name.replace(".default.", ".ref.")] for name in weights if ".default." in name}
        if not all(torch.equal(weights[name], copy) for name, copy in copies.items()):
            raise ValueError("the reference is not a copy of the policy: KL would not start at 0")
    wrong = {weight.dtype for weight in trainer.model.parameters() if weight.requires_grad} - {torch.float32}
    if wrong:
        raise ValueError(f"trained weights are {wrong}, not fp32: norms near 1 would move in steps of 1/128")


def plan_preference(preset: Preset, stage: str, settings: Preference) -> tuple[TrainingSettings, Plan]:
    """[training] with the numbers of a stage, and the plan for a step; ValueError if none fits.

    A step holds both sequences of a comparison, and the reference, a copy of the adapter. "rl" holds the reward model's
    base, too, and keys and values.
    """
    own, window = getattr(settings, stage), settings.tokens + settings.answer_tokens
    numbers = {name: value for name, value in asdict(own).items() if hasattr(preset.training, name)}
    numbers |= {"sequences_per_step": own.rows_per_step, "sequences_at_once": own.rows_at_once, "seed": settings.seed}
    training = replace(preset.training, **numbers, window=window, reach=window, pack=False, attention="sdpa")
    config, sequences = model_shape(preset.base.source), own.rows_at_once * (1 if stage == "rl" else 2)
    shape = StepShape(window, preset.base.dtype, training.memory_savings, sequences, accumulated=True, gpu=True)
    held = ledger(config, preset.lora, shape)
    others = 0.0 if stage == "reward" else held["adapters"] / GIB
    if stage == "rl":
        others += held["weights"] / GIB + sequences * kept_gib(preset, window)
    if others >= preset.memory_gib:
        raise ValueError(
            f"stage {stage!r}: the reward model, keys and values of {sequences} answers take {others:.1f} of "
            f"{preset.memory_gib:g} GiB: lower preference.rl.rows_at_once, or preference.tokens"
        )
    try:
        found = plan(config, preset.lora, shape, preset.memory_gib - others)
    except ValueError as error:
        fewer = f"lower preference.{stage}.rows_at_once"
        raise ValueError(f"stage {stage!r}, {sequences} sequences at once: {error}; or {fewer}") from None
    return replace(training, memory_savings=found.memory_savings), replace(found, device_gib=found.device_gib + others)


def train_reward_model(
    preset: Preset, comparisons: Sequence[Comparison], adapter: Path, **options: Any
) -> TrainedAdapter:
    """Train a head, and the adapter under it, so that the preferred answer of each pair has the larger number."""
    rows = [
        {"chosen_ids": [*one.prompt, *one.chosen], "rejected_ids": [*one.prompt, *one.rejected]} for one in comparisons
    ]

    def build(model: PeftModel, rows: Sequence[dict], shared: dict, tokenizer: Any, _beta: float) -> Trainer:
        # The number is read before padding, so no text may end with that: EOS, which BOS and padding may be, does.
        ends = {ids[-1] for row in rows for ids in row.values()} | {tokenizer.eos_token_id}
        candidates = tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id, *range(len(tokenizer))
        padding = tokenizer.convert_ids_to_tokens(next(one for one in candidates if one not in {None, *ends}))
        config = RewardConfig(**shared, max_length=None, pad_token=padding)
        use_one_gpu(config)
        return RewardTrainer(model, args=config, train_dataset=as_dataset(rows), processing_class=tokenizer)

    return _tune(preset, "reward", rows, adapter, build, **options)


def optimise_policy(
    preset: Preset, prompts: Sequence[list[int]], reward: Path | Reward, adapter: Path, **options: Any
) -> TrainedAdapter:
    """RLOO (arXiv:2402.14740): sampled answers that a reward model, or a function, rates above others become likelier.

    A nat of KL to the reference costs `beta`. With a function, name the run by what it computes.
    """
    if isinstance(reward, Path) and read_card(reward).rope != read_card(adapter).rope:
        raise ValueError(f"the reward model in {reward} rotates in another way than the policy in {adapter}")

    @cache
    def rate() -> Reward:
        return reward_of(load_reward_model(preset, reward).eval()) if isinstance(reward, Path) else reward

    def rated(prompts: list[list[int]], completion_ids: list[list[int]], **_columns: Any) -> list[float]:
        return rate()(prompts, completion_ids)

    def build(model: PeftModel, rows: Sequence[dict], shared: dict, tokenizer: Any, beta: float) -> Trainer:
        numbers = options.get("settings") or preset.preference
        shared |= {"num_generations": numbers.answers, "max_completion_length": numbers.answer_tokens}
        config = RLOOConfig(**shared, beta=beta, temperature=numbers.temperature, shuffle_dataset=False)
        use_one_gpu(config)
        prompts = as_dataset(rows[:: numbers.answers])  # which TRL repeats
        return TokenPolicyTrainer(model, rated, config, prompts, processing_class=tokenizer)

    given = weights_sha256(reward) if isinstance(reward, Path) else options.get("name")
    rows = [{"prompt": prompt} for prompt in prompts]
    return _tune(preset, "rl", rows, adapter, build, reward=given, **options)


def train_dpo(
    preset: Preset,
    comparisons: Sequence[Comparison],
    adapter: Path,
    *,
    trainer: type[TokenPairTrainer] = TokenPairTrainer,
    losses: Sequence[str] = ("sigmoid",),
    **options: Any,
) -> TrainedAdapter:
    """DPO (arXiv:2305.18290) on the same pairs: no reward model, nothing is sampled.

    `losses` are TRL's names. With others or a trainer, name the run by what it computes.
    """
    rows = [{"prompt_ids": one.prompt, "chosen_ids": one.chosen, "rejected_ids": one.rejected} for one in comparisons]

    def build(model: PeftModel, rows: Sequence[dict], shared: dict, tokenizer: Any, beta: float) -> Trainer:
        config = DPOConfig(**shared, beta=beta, max_length=None, loss_type=list(losses))
        use_one_gpu(config)
        return trainer(model, None, config, train_dataset=as_dataset(rows), processing_class=tokenizer)

    return _tune(preset, "dpo", rows, adapter, build, **options)


def as_dataset(rows: Sequence[dict]) -> datasets.Dataset:
    """The rows as TRL takes them."""
    datasets.disable_progress_bars()
    return datasets.Dataset.from_list(list(rows))


def _tune(
    preset: Preset,
    stage: str,
    given: Sequence[dict],
    adapter: Path,
    build: Callable[..., Trainer],
    *,
    reward: str | None = None,
    settings: Preference | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    name: str = "",
    progress: int = 0,
) -> TrainedAdapter:
    """Train one stage in runs/PRESET/STAGE, as `train_adapter`; rows come in a new order in each pass."""
    if join_processes().num_processes > 1:
        raise ValueError("preference tuning runs in one process: start it without a launcher")
    settings, base, rope = settings or preset.preference, locate_base(preset), read_card(adapter).rope
    training, plan = plan_preference(preset, stage, settings)
    longest = max(sum(map(len, row.values())) - len(row.get("rejected_ids", ())) for row in given)
    if longest > training.window + 1:
        raise ValueError(f"a row has {longest:,} tokens: preference.tokens and answer_tokens allow {training.window:,}")
    repeats = settings.answers if stage == "rl" else 1
    needed, generator = training.steps * training.sequences_per_step // repeats, np.random.default_rng(settings.seed)
    order = np.concatenate([generator.permutation(len(given)) for _ in range(-(-needed // len(given)))])[:needed]
    rows, tokenizer = [given[number] for number in order for _ in range(repeats)], load_tokenizer(base)

    def load() -> PeftModel:
        if stage == "reward":
            return load_reward_model(preset, adapter, trainable=True, seed=settings.seed)
        return load_adapter(load_base(base, rope, dtype=preset.base.dtype), adapter, base, trainable=True)

    def build_trainer(
        model: PeftModel, rows: Sequence[dict], _division: Any, arguments: dict
    ) -> tuple[Trainer, Labels]:
        arguments |= {"bf16": False, "gradient_checkpointing": False}  # TRL's defaults are True
        with reference_kept(model):
            trainer = build(model, rows, arguments, tokenizer, getattr(settings, stage).beta)
        check_preference(trainer, rope)
        for callback in callbacks:
            trainer.add_callback(callback)
        return trainer, {number: sum(len(row.get(side, ())) for side in ANSWERS) for number, row in enumerate(rows)}

    once = {name: replace(getattr(settings, name), checkpoint_every=1) for name in ("reward", "rl", "dpo")}
    began = {"start": weights_sha256(adapter), "preference": asdict(replace(settings, **once))}
    given = {"depends_on": {"data": digest(rows), "reward": reward, **began}, "noted": {"stage": stage, **began}}
    options = {"report_every": progress, "build": build_trainer, "rewarded": stage == "rl"}
    return train_stage(preset, (stage, name or stage), training, plan, rope, load, rows, **given, **options)


def tune_preferences(preset: Preset, stage: str, adapter: Path, *, progress: int = 0) -> TrainedAdapter:
    """A stage from a preset's numbers, "reward", "rl" or "dpo"; "rl" trains the reward model if there is none yet."""
    plan_preference(preset, stage, preset.preference)  # refuses what does not fit
    asked, pairs = collect(preset, adapter)
    if stage == "dpo":
        return train_dpo(preset, pairs, adapter, progress=progress)
    rated = train_reward_model(preset, pairs, adapter, progress=progress)
    prompts = [one.prompt for one in asked]
    return rated if stage == "reward" else optimise_policy(preset, prompts, rated.folder, adapter, progress=progress)
