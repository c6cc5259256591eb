"""The ablation of instruction tuning (Llama 2 Long, arXiv:2309.16039, Table 9) on questions that are right or wrong.

Every arm is tuned on as many tokens, by the same questions for each token, and asked about documents that are held out.
Expected before it was run: past the old window, questions about long documents beat short ones alone by 10 points of
exact answers, and a loss on the long documents adds a few points, by keeping the model at reading. An interval of the
difference that holds 0, or lies below, refutes either.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiments.instruction_answers import answers, held_out_dialogues
from llama_long_utils.cache import Cache
from llama_long_utils.data.documents import TokenizedDocument
from llama_long_utils.data.instructions import Dialogue, Maker, dialogue_maker, join_dialogues, quotation_dialogue
from llama_long_utils.data.mixture import read_documents
from llama_long_utils.evaluation.perplexity import bucket_sums, random_stretches
from llama_long_utils.model.adapters import find_adapter
from llama_long_utils.model.arms import load_arm
from llama_long_utils.model.loss import causal_lm, hidden_states, labelled_nll
from llama_long_utils.model.weights import load_tokenizer, locate_base, weights_sha256
from llama_long_utils.progress import track
from llama_long_utils.records import device_name, package_versions, write_record
from llama_long_utils.settings import IGNORED_LABEL, Preset
from llama_long_utils.stages import Instruction
from llama_long_utils.training.adapter import TrainedAdapter
from llama_long_utils.training.instruction import InstructionTrainer, tune_instructions

QUESTION = "What should the questions of instruction tuning be about, and what is to be trained on?"
SLUG = "09_instruction_tuning"
VERSION = 1  # of what an arm measures: raise it when its numbers change
QUESTIONS = 8  # about each held-out document, at each length


def synthetic_dialogue(
    documents: Sequence[TokenizedDocument],
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    settings: Instruction,
    generator: np.random.Generator,
) -> Dialogue:
    """A long document made of short ones, and the questions about all of them behind it: context synthesis."""
    short = min(settings.short_window, tokens)
    parts = [quotation_dialogue(documents, tokenizer, short, settings, generator) for _ in range(tokens // short)]
    ids = np.concatenate([parts[0].token_ids, *(part.token_ids[1:] for part in parts[1:])])
    asked = [
        dataclasses.replace(question, place=(number + question.place) / len(parts))
        for number, part in enumerate(parts)
        for question in part.questions
    ]
    order = generator.permutation(len(asked))
    return Dialogue("synthetic", ids, [asked[number] for number in order])


ANSWERS: dict[bytes, torch.Tensor] = {}  # of long sequences, by their token ids: which are answers


def noted_dialogue(
    documents: Sequence[TokenizedDocument],
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    settings: Instruction,
    generator: np.random.Generator,
) -> Dialogue:
    """A long dialogue as the settings have it, whose answers AnswerWeight then knows."""
    dialogue = dialogue_maker(settings)(documents, tokenizer, tokens, settings, generator)
    sequence = join_dialogues([dialogue], tokenizer, loss_on_prompt=False)
    ANSWERS[sequence.input_ids.tobytes()] = torch.from_numpy(sequence.completion_mask == 1)
    return dialogue


class AnswerWeight(InstructionTrainer):
    """In long sequences an answer's label weighs as without a loss on the prompt, or, `diluted`, as with it.

    Other labels always weigh as with it. One sequence at once.
    """

    diluted = False

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
        (sequence,) = inputs["input_ids"]
        answers = ANSWERS.get(sequence.cpu().numpy().tobytes())
        if answers is None:  # short
            return super().compute_loss(model, inputs, **options)
        weights = torch.full((len(answers) - 1,), 1 / (len(answers) - 1))
        if not self.diluted:
            weights[answers[1:]] = 1 / answers[1:].sum()
        labels = torch.nn.functional.pad(inputs.pop("labels")[:, 1:], (0, 1), value=IGNORED_LABEL)
        nll = labelled_nll(hidden_states(model, **inputs), causal_lm(model).get_output_embeddings(), labels)
        return (nll[0, :-1] * weights.to(nll.device)).sum()


class Diluted(AnswerWeight):
    """See AnswerWeight."""

    diluted = True


@dataclass(frozen=True)
class Arm:
    """What [instruction] is changed to; `extended` False: the base as it is."""

    long_share: float = 0.0
    text_share: float = 0.0
    loss_on_prompt: bool = False
    extended: bool = True
    maker: Maker | None = None  # of long dialogues; None: as the settings have it
    trainer: type[InstructionTrainer] = InstructionTrainer
    times: int = 1  # the steps
    rate: float = 1.0  # times the learning rate

    @property
    def once(self) -> bool:
        """Whether it has one seed only."""
        return (self.times, self.rate) != (1, 1)

    def settings(self, preset: Preset, seed: int) -> Instruction:
        """The preset's [instruction] as this arm and seed have it."""
        changes = {"long_share": self.long_share, "text_share": self.text_share, "loss_on_prompt": self.loss_on_prompt}
        changes |= {"steps": self.times * preset.instruction.steps}
        changes |= {"learning_rate": self.rate * preset.instruction.learning_rate}
        return dataclasses.replace(preset.instruction, **changes, seed=seed)

    def tune(self, preset: Preset, name: str, seed: int, start: Path | None = None) -> TrainedAdapter:
        """Its adapter, trained now or read; `start`: where it begins, in place of what `find_adapter` finds."""
        made = {"long_dialogue": self.maker, "trainer_class": self.trainer, "extended": self.extended}
        return tune_instructions(preset, settings=self.settings(preset, seed), adapter=start, name=name, **made)


ARMS = {
    "untuned": Arm(),  # the extended model before
    "chat base": Arm(extended=False),
    "short": Arm(),
    "short, text": Arm(text_share=0.5),
    "long": Arm(long_share=0.5),
    "long, loss on prompt": Arm(long_share=0.5, loss_on_prompt=True),
    "synthetic context": Arm(long_share=0.5, maker=synthetic_dialogue),
    # Added when the loss on the prompt had fallen behind: does it only need more steps?
    "long, 4 times": Arm(long_share=0.5, times=4),
    "long, loss on prompt, 4 times": Arm(long_share=0.5, loss_on_prompt=True, times=4),
    # Added then: does it cost answers, or do answers that weigh less?
    "long, loss on prompt, full answers": Arm(
        long_share=0.5, loss_on_prompt=True, maker=noted_dialogue, trainer=AnswerWeight
    ),
    "long, diluted answers": Arm(long_share=0.5, maker=noted_dialogue, trainer=Diluted),
    # And is it the learning rate?
    "long, rate / 4": Arm(long_share=0.5, rate=0.25),
    "long, loss on prompt, rate / 4": Arm(long_share=0.5, loss_on_prompt=True, rate=0.25),
}


def ablate(preset: Preset, folder: Path) -> Path:
    """Measure every arm and seed that was not yet, then write the record SLUG into a folder."""
    tokenizer = load_tokenizer(base := locate_base(preset))
    _, held_out = read_documents(preset.data, tokenizer, length=preset.evaluation.tokens)
    evaluation = preset.evaluation
    stretches = random_stretches(held_out, evaluation.tokens, at_most=1, seed=evaluation.seed)
    lengths = [length for length in preset.retrieval.lengths if length >= preset.base.window]
    edges = evaluation.near_edges
    inputs = {"instruction": preset.instruction, "data": preset.data, "lora": preset.lora, "evaluation": evaluation}
    inputs |= {"base": weights_sha256(base), "start": weights_sha256(find_adapter(preset)), "lengths": lengths}
    inputs |= {"device": device_name(), "versions": package_versions(), "dtype": preset.base.dtype}
    cache = Cache(preset.run_folder / "instruction-ablation", VERSION, inputs)
    seeds, once = preset.race.seeds, {name for name, arm in ARMS.items() if name == "untuned" or arm.once}
    runs = [(name, seed) for seed in seeds for name in ARMS if name not in once]
    runs += [(name, seeds[0]) for name in ARMS if name in once]
    measured = [
        cache.value(
            f"{name}-{seed}",
            lambda name=name, seed=seed: _measure(preset, tokenizer, stretches, lengths, edges, name, seed),
        )
        for name, seed in track(runs, "instruction ablation")
    ]
    return _write(preset, folder, runs, measured, lengths, edges, [f"{c.source}/{c.name}" for (c,) in stretches])


def _measure(
    preset: Preset,
    tokenizer: PreTrainedTokenizerBase,
    stretches: list[list[TokenizedDocument]],
    lengths: list[int],
    edges: list[int],
    name: str,
    seed: int,
) -> dict:
    """Of one arm and seed: labels trained on, answers by length and document, NLL by bucket and document."""
    arm, labels = ARMS[name], 0
    model: PreTrainedModel | PeftModel
    if name == "untuned":
        model = load_arm(preset, "extended")
    else:
        trained = arm.tune(preset, name.replace(", ", "-").replace(" ", "-"), seed)
        labels = trained.label_tokens
        scaling = preset.extended_rope if arm.extended else preset.base_rope
        model = load_arm(preset, "extended", adapter=trained.folder, scaling=scaling)
    window = 0 if arm.extended else preset.base.window
    options = {"questions": QUESTIONS, "seed": preset.evaluation.seed}
    dialogues = held_out_dialogues(stretches, tokenizer, preset.instruction, lengths, **options)
    read: dict[str, np.ndarray] = {}
    rows = answers(model, tokenizer, dialogues, window=window, nll=read)
    nats, tokens = bucket_sums([nll[None] for nll in read.values()], edges) if arm.extended else np.zeros((2, 0))
    return {"labels": labels, "answers": rows.to_dict("list"), "nats": nats.tolist(), "tokens": tokens.tolist()}


def _write(
    preset: Preset,
    folder: Path,
    runs: list[tuple[str, int]],
    measured: list[dict],
    lengths: list[int],
    edges: list[int],
    documents: list[str],
) -> Path:
    rows, arrays = [], {"documents": np.array(documents)}
    for length in lengths:
        every = [pd.DataFrame(one["answers"]) for one in measured]
        tables = [table[table.length == length] for table in every]
        for measure in ("exact", "words", "log_probability"):
            by_document = [table.groupby("document")[measure].mean().reindex(documents) for table in tables]
            arrays[f"{measure}_{length}"] = np.stack([part.to_numpy(float) for part in by_document])
        for (arm, seed), table in zip(runs, tables, strict=True):
            means = table[["exact", "words", "log_probability"]].mean()
            rows.append({"arm": arm, "seed": seed, "length": length, "questions": len(table), **means})
    nll = [(arm, seed, one) for (arm, seed), one in zip(runs, measured, strict=True) if one["nats"]]
    positions = [
        {"arm": arm, "seed": seed, "position_low": low, "position_high": high, "nll": sums / count}
        for arm, seed, one in nll
        for low, high, sums, count in zip(
            edges[:-1], edges[1:], np.sum(one["nats"], axis=0), np.sum(one["tokens"], axis=0), strict=True
        )
    ]
    arrays["nats"] = np.array([one["nats"] for _, _, one in nll])
    arrays["tokens"] = np.array(nll[0][2]["tokens"])
    trained = [
        {"arm": arm, "seed": seed, "labels": one["labels"]} for (arm, seed), one in zip(runs, measured, strict=True)
    ]
    return write_record(
        folder,
        SLUG,
        arrays=arrays,
        preset=preset.name,
        question=QUESTION,
        tables={
            "answers": pd.DataFrame(rows),
            "nll_by_position": pd.DataFrame(positions),
            "runs": pd.DataFrame(trained),
        },
        seeds={"training": preset.race.seeds, "evaluation": preset.evaluation.seed, "split": preset.data.split_seed},
        seconds=0.0,
        provenance={
            "command": f"python -m experiments instruction --preset {preset.name}",
            "device": f"{device_name()}, {preset.base.dtype}",
        },
    )
