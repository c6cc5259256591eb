"""Controls of preference tuning: what made words worse and long documents dearer?

Expected, before they were run, and what would refute it:
- RL on gold itself keeps right words. Then the learnt reward is to blame; if words fall as they did, RLOO is.
- With a leash ten times as tight RL's KL is about half, words fall less, and long documents still cost over 0.02 nat.
- Imitation (the loss of instruction tuning on the chosen answers) wins less than DPO on the same pairs.
- Text beside the pairs keeps long documents within 0.02 nat and most of what DPO wins (over 0.7 preferred): the cure of
  InstructGPT (arXiv:2203.02155, PPO-ptx). Its weight and the lower learning rate were chosen on the first seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from llama_long_utils.data.documents import TokenizedDocument
from llama_long_utils.evaluation.perplexity import random_stretches
from llama_long_utils.model.loss import causal_lm, hidden_states, next_token_nll
from llama_long_utils.settings import Preset
from llama_long_utils.training.adapter import TrainedAdapter
from llama_long_utils.training.comparisons import Asked, Comparison
from llama_long_utils.training.preferences import TokenPairTrainer, optimise_policy, train_dpo

CONTROLS = ("rl on gold", "slow dpo with text", "imitation", "slow dpo", "dpo with text", "tight rl")
TEXT, TOKENS = 0.3, 1024  # nats a token of a text of so many tokens, beside the loss of the pairs
SLOW = 2e-4  # learning rate
TIGHTER = 10  # times beta


def with_text(texts: Sequence[torch.Tensor], weight: float = TEXT) -> type[TokenPairTrainer]:
    """A trainer whose loss counts a text, too, another one in each step."""

    class TextTrainer(TokenPairTrainer):
        def compute_loss(self, model: PeftModel, *arguments: Any, **options: Any) -> torch.Tensor:
            loss, ids = super().compute_loss(model, *arguments, **options), texts[self.state.global_step][None]
            hidden = hidden_states(model, ids)
            return loss + weight * next_token_nll(hidden, causal_lm(model).get_output_embeddings(), ids) / (TOKENS - 1)

    return TextTrainer


@dataclass(frozen=True)
class WithText:
    """DPO with a text beside the pairs."""

    weight: float  # of the text's nats a token
    learning_rate: float
    loss: str = "sigmoid"  # TRL's name
    beta: float = 0.1


@dataclass(frozen=True)
class Controls:
    """What a seed of the study trains on, and its reward model."""

    preset: Preset
    asked: Sequence[Asked]
    pairs: Sequence[Comparison]
    reward_model: Path | None  # which only "tight rl" needs
    documents: Sequence[TokenizedDocument]

    def gold(self, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> list[float]:
        """The reward that was meant."""
        right = {tuple(one.prompt): one for one in self.asked}
        return [right[tuple(prompt)].gold(answer) for prompt, answer in zip(prompts, answers, strict=True)]

    def texts(self) -> list[torch.Tensor]:
        """One for each step of DPO, from documents that are trained on."""
        seed, steps = self.preset.preference.seed, self.preset.preference.dpo.steps
        cuts = [cut for many in random_stretches(self.documents, TOKENS, at_most=4, seed=seed) for cut in many]
        order = np.random.default_rng(seed).permutation(len(cuts))[:steps]
        return [torch.from_numpy(cuts[number].token_ids.astype(np.int64)) for number in order]

    def train(self, arm: str, adapter: Path) -> TrainedAdapter:
        """The policy of a control, from the instruction-tuned adapter."""
        numbers = self.preset.preference
        slow = replace(numbers, dpo=replace(numbers.dpo, learning_rate=SLOW))
        tight = replace(numbers, rl=replace(numbers.rl, beta=TIGHTER * numbers.rl.beta))
        prompts, options = [one.prompt for one in self.asked], {"name": f"{arm.replace(' ', '-')}-{numbers.seed}"}
        match arm:
            case "rl on gold":
                return optimise_policy(self.preset, prompts, self.gold, adapter, **options)
            case "tight rl":
                return optimise_policy(self.preset, prompts, self.reward_model, adapter, settings=tight, **options)
            case "imitation":
                return train_dpo(self.preset, self.pairs, adapter, losses=["sft"], **options)
            case "slow dpo":
                return train_dpo(self.preset, self.pairs, adapter, settings=slow, **options)
        rate = SLOW if "slow" in arm else numbers.dpo.learning_rate
        return self.train_with_text(WithText(TEXT, rate), adapter, **options)

    def train_with_text(self, arm: WithText, adapter: Path, *, name: str) -> TrainedAdapter:
        """DPO with a text beside the pairs, from the instruction-tuned adapter."""
        numbers = replace(self.preset.preference.dpo, learning_rate=arm.learning_rate, beta=arm.beta)
        options = {"settings": replace(self.preset.preference, dpo=numbers), "losses": [arm.loss], "name": name}
        return train_dpo(self.preset, self.pairs, adapter, trainer=with_text(self.texts(), arm.weight), **options)
