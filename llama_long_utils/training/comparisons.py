"""Answers to questions about documents, compared by how right they are, and a model that learns which are preferred.

At preset tiny a question has one right answer, to the letter, so that what a reward model was meant to learn (gold)
can be measured beside what it learnt (proxy).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from llama_long_utils.cache import Cache, digest
from llama_long_utils.data.documents import TokenizedDocument
from llama_long_utils.data.instructions import quotation_dialogue
from llama_long_utils.data.mixture import Mixture
from llama_long_utils.model.adapters import load_adapter, read_card
from llama_long_utils.model.base import load_base
from llama_long_utils.model.loss import Model, causal_lm, hidden_states, in_compute_dtype
from llama_long_utils.model.weights import load_tokenizer, locate_base, weights_sha256
from llama_long_utils.settings import Preset
from llama_long_utils.stages import Preference
from llama_long_utils.training.planner import GIB, model_shape
from llama_long_utils.training.trainer import VERSION

AT_ONCE = 32  # answers to be compared that are sampled together, if their keys and values take a sixth of the memory
Reward = Callable[[Sequence[list[int]], Sequence[list[int]]], list[float]]  # of prompts and answers


@dataclass(frozen=True)
class Asked:
    """A document with a question behind it, and the answer with EOS: token ids."""

    prompt: list[int]
    answer: list[int]

    def gold(self, written: Sequence[int]) -> float:
        """How right an answer is, from 0 to 1: twice the tokens that match in order, over those of both.

        EOS is a token: who writes the answer and does not stop has less than 1.
        """
        return SequenceMatcher(None, self.answer, list(written), autojunk=False).ratio()


@dataclass(frozen=True)
class Comparison:
    """Two answers to a prompt, one of which was preferred: token ids; an answer ends in EOS if the model ended it."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def ask(
    documents: Sequence[TokenizedDocument], tokenizer: PreTrainedTokenizerBase, preset: Preset, count: int, seed: int
) -> list[Asked]:
    """Questions that quote a stretch of a document and ask what follows there (`quotation_dialogue`)."""
    generator, asked = np.random.default_rng(seed), []
    numbers = replace(preset.instruction, tokens_per_question=preset.preference.tokens)
    while len(asked) < count:
        dialogue = quotation_dialogue(documents, tokenizer, preset.preference.tokens, numbers, generator)
        for question, answer in dialogue.turns(tokenizer) if dialogue.questions else ():
            asked.append(Asked([*dialogue.token_ids.tolist(), *question.tolist()], answer.tolist()))
    return asked


@torch.no_grad()
def sample_answers(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    settings: Preference,
    *,
    seed: int = 0,
    temperature: float | None = None,
    at_once: int = 64,
) -> list[list[int]]:
    """An answer to each prompt, with EOS if the model ended it; temperature 0 is greedy, None the settings' own."""
    temperature, written, training = settings.temperature if temperature is None else temperature, {}, model.training
    options: dict[str, Any] = {"do_sample": temperature > 0, "pad_token_id": tokenizer.eos_token_id}
    if temperature:
        options |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for first in range(0, len(order), at_once):
            rows = [torch.tensor(prompts[number]) for number in order[first : first + at_once]]
            pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_side="left")
            inputs = {"input_ids": pad(rows), "attention_mask": pad([torch.ones_like(row) for row in rows])}
            inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
            with in_compute_dtype(model):
                found = model.eval().generate(**inputs, max_new_tokens=settings.answer_tokens, **options)
            for number, row in zip(order[first:], found[:, inputs["input_ids"].shape[1] :].tolist(), strict=False):
                end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
                written[number] = row[:end]
    model.train(training)
    return [written[number] for number in range(len(prompts))]


def compare(asked: Sequence[Asked], answers: Sequence[Sequence[list[int]]], settings: Preference) -> list[Comparison]:
    """The best and the worst answer to each question that has both; some are turned round, as by people who err."""
    generator, found = np.random.default_rng(settings.seed), []
    for question, written in zip(asked, answers, strict=True):
        worst, *_, best = sorted(written, key=question.gold)
        if generator.random() < settings.errors:
            worst, best = best, worst
        if question.gold(best) != question.gold(worst):
            found.append(Comparison(question.prompt, best, worst))
    if not found:
        raise ValueError(f"answers to each of {len(asked)} questions are equally right: raise [preference] questions")
    return found


def load_reward_model(preset: Preset, adapter: Path, *, trainable: bool = False, seed: int = 0) -> PeftModel:
    """The base with a head for one number: a trained reward model, or a new head on another adapter's weights."""
    base = locate_base(preset)
    torch.manual_seed(seed)  # of a new head
    model = load_base(base, read_card(adapter).rope, dtype=preset.base.dtype, reward=True)
    return load_adapter(model, adapter, base, trainable=trainable)


@torch.no_grad()
def rewards(model: PeftModel, rows: Sequence[list[int]], at_once: int = 64) -> list[float]:
    """The reward model's number for each text, read at its last token (EOS, if it has ended)."""
    inner, found = causal_lm(model).eval(), []
    for first in range(0, len(rows), at_once):
        part = [torch.tensor(row, device=model.device) for row in rows[first : first + at_once]]
        ids = torch.nn.utils.rnn.pad_sequence(part, batch_first=True)  # behind the text, where nothing sees it
        ends = hidden_states(model, ids)[torch.arange(len(part)), [len(row) - 1 for row in part]]
        found += inner.score(ends.float())[:, 0].tolist()
    return found


def reward_of(model: PeftModel) -> Reward:
    """What a policy is optimised against."""
    return lambda prompts, answers: rewards(model, [[*one, *two] for one, two in zip(prompts, answers, strict=True)])


def kept_gib(preset: Preset, tokens: int) -> float:
    """Keys and values of so many tokens."""
    config, size = model_shape(preset.base.source), 2 if preset.base.dtype == "bfloat16" else 4
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * size * tokens / GIB


def collect(preset: Preset, adapter: Path) -> tuple[list[Asked], list[Comparison]]:
    """Questions about documents that are trained on, and comparisons of what an adapter's model answers.

    Answers are kept batch by batch. Each has random numbers of its own: after a stop the rest is sampled as without.
    """
    settings, base, rope = preset.preference, locate_base(preset), read_card(adapter).rope
    room = preset.memory_gib / 6 / kept_gib(preset, settings.tokens + settings.answer_tokens)
    at_once = max(settings.rl.rows_at_once, min(AT_ONCE, int(room)))
    many = f"{settings.answers} to each of {settings.questions:,} questions, {at_once} at a time"
    print(f"{settings.questions * settings.answers:,} answers, sampled where none is kept: {many}", flush=True)
    tokenizer = load_tokenizer(base)
    documents = next(Mixture(preset.data, tokenizer, window=settings.tokens).buffers(preset.training))
    asked = ask(documents, tokenizer, preset, settings.questions, settings.seed)
    prompts = [one.prompt for one in asked for _ in range(settings.answers)]
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    model = cache(lambda: load_adapter(load_base(base, rope, dtype=preset.base.dtype), adapter, base).eval())

    def write(part: Sequence[int]) -> list[list[int]]:
        own = {"seed": int(digest(settings.seed, part[0])[:8], 16), "at_once": at_once}
        return sample_answers(model(), tokenizer, [prompts[number] for number in part], settings, **own)

    depends_on = {"start": weights_sha256(adapter), "prompts": digest(prompts)}
    depends_on |= {"settings": [settings.answer_tokens, settings.temperature, settings.seed], "at_once": at_once}
    kept = Cache(preset.run_folder / "answers", VERSION, depends_on)
    found = kept.items("sampled", order, write, item_key=int, at_once=at_once, progress="sampling answers")
    written = [answer for _, answer in sorted(zip(order, found, strict=True))]
    answers = [written[first : first + settings.answers] for first in range(0, len(written), settings.answers)]
    return asked, compare(asked, answers, settings)
