"""From how many trained tokens on does a longer context pay? One base at growing doses, in several ways, on one GPU.

A way of training has one trunk with a constant rate. For each dose a branch leaves the trunk after 80% of the dose's
tokens and lets the rate fall to zero, so that every dose is a finished run. Four doses of up to 10.5 million tokens
then take 11.4 million, where four runs of their own would take 15.0; Trainer has one schedule and no way back, so the
loop is written out. At each dose the held-out texts are read, with full context and in windows, and questions asked.
Stages that would not fit into the time are left out, by the speed measured so far. What was interrupted goes on where
it was: on a CPU one dose takes hours.

The frozen weights are NF4's, dequantised once: the numbers that bitsandbytes multiplies with, without unpacking them
at each product. SmolLM2's first arms were trained by an earlier form of this script, with LoRA written out in one flat
vector and another random start; its record says which.
"""

import copy
import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from experiments.dose_inputs import Inputs
from experiments.dose_questions import COLUMNS, ask
from experiments.dose_record import BIN, write_dose_record
from experiments.dose_settings import Doses, Way, way_of_label, ways_of
from experiments.task_requests import answer
from llama_long_utils.cache import Cache
from llama_long_utils.data.documents import TokenizedDocument
from llama_long_utils.data.packing import TrainingSequence
from llama_long_utils.data.sequences import TrainingData
from llama_long_utils.evaluation.perplexity import nll_in_windows, sliding_window, token_nll
from llama_long_utils.model.adapters import add_lora
from llama_long_utils.model.arms import arm_scaling, load_arm
from llama_long_utils.model.loss import causal_lm, hidden_states, next_token_nll
from llama_long_utils.model.weights import load_tokenizer, locate_base, weights_sha256
from llama_long_utils.paths import write_atomically
from llama_long_utils.records import device_name, write_arrays
from llama_long_utils.settings import Preset, Scaling
from llama_long_utils.training.trainer import check_lora_gradients

WARMUP_STEPS, DECAY = 4, 0.2  # DECAY: last share of a dose's tokens, in which the rate falls to zero
CHUNK = 4096  # tokens whose logits exist at once
VERSION = 1  # raised when what a step or a reading gives changes
KEEP_EVERY = 300.0  # seconds of training after which a dose is kept, unfinished
# By speed, forward and backward at 16,384 tokens on an H200: 2.8 ms a layer by cuDNN, 4.5 by flash attention.
KERNELS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
Model = PreTrainedModel | PeftModel


def linear_layers(model: Model) -> list[nn.Linear]:
    """The frozen linear layers, in order, with or without LoRA beside them."""
    named = causal_lm(model).named_modules()
    return [m for name, m in named if isinstance(m, nn.Linear) and name.removesuffix(".base_layer").endswith("_proj")]


def ids_of(text: TokenizedDocument) -> np.ndarray:
    """All that a reading of it depends on."""
    return text.token_ids


def adapter_weights(model: Model) -> list[torch.Tensor]:
    """LoRA's and trained norms, in order; none of a base."""
    return [weight for name, weight in model.named_parameters() if "lora_" in name or "modules_to_save" in name]


def _timed(measure: Callable[[Any], Any], part: Sequence[Any]) -> list[dict[str, Any]]:
    """What is measured of each item, with its seconds: what an interrupted run has kept still says what it took."""
    found = []
    for item in part:
        begin = time.perf_counter()
        found.append({"result": measure(item), "seconds": time.perf_counter() - begin})
    return found


def _untimed(found: Sequence[dict[str, Any]]) -> tuple[list[Any], float]:
    """(the results, their seconds together)."""
    return [row["result"] for row in found], sum(row["seconds"] for row in found)


def load(preset: Preset, rope: Scaling, *, four_bit: bool) -> PreTrainedModel:
    """The base with this RoPE; its linear layers hold NF4's numbers if `four_bit`."""
    dtype = "bfloat16" if torch.cuda.is_available() else preset.base.dtype
    model = load_arm(preset, "base", quantized=False, dtype=dtype, scaling=rope)
    for layer in linear_layers(model) if four_bit else []:
        packed, state = bnb.quantize_4bit(layer.weight.data, quant_type="nf4", compress_statistics=True)
        layer.weight.data = bnb.dequantize_4bit(packed, state).to(layer.weight.dtype)
    return model


@dataclass
class Arm:
    """A way with its model and what it reads; `done` steps of the trunk are trained."""

    way: Way
    model: PeftModel
    sequences: list[TrainingSequence]
    per_step: int
    optimizer: torch.optim.AdamW
    done: int = 0

    def step(self, number: int, rate: float, tokens_at_once: int) -> float:
        """One step of AdamW on the sequences of step `number`; returns the loss in nats per token."""
        rows = [row.tensors() for row in self.sequences[number * self.per_step : (number + 1) * self.per_step]]
        together = max(tokens_at_once // len(rows[0]["labels"]), 1)
        scored = sum(row["labels"].numel() - 1 for row in rows)
        total = torch.zeros((), device=self.model.device)
        for first in range(0, len(rows), together):
            batch = rows[first : first + together]
            stacked = {name: torch.stack([row[name] for row in batch]).to(self.model.device) for name in batch[0]}
            skips = "attention_mask" in stacked  # all ones: positions may jump within a document
            places = (stacked["position_ids"], stacked["attention_mask"]) if skips else ()
            hidden = hidden_states(self.model, stacked["input_ids"], *places)
            head = causal_lm(self.model).get_output_embeddings()
            loss = next_token_nll(hidden, head, stacked["labels"], chunk=CHUNK) / scored
            loss.backward()
            total += loss.detach()
        if not self.optimizer.state:  # the first step
            check_lora_gradients(self.model)
        nn.utils.clip_grad_norm_(self.trained(), 1.0)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total.item()

    def trained(self) -> list[nn.Parameter]:
        return [weight for weight in self.model.parameters() if weight.requires_grad]

    def arrays(self) -> dict[str, np.ndarray]:
        """The trained weights and AdamW's state, as `resume` takes them."""
        found = {}
        for index, weight in enumerate(self.trained()):
            for name, value in {"weight": weight, **self.optimizer.state[weight]}.items():
                found[f"{index} {name}"] = value.detach().cpu().numpy()
        return found

    @torch.no_grad()
    def resume(self, arrays: dict[str, np.ndarray]) -> None:
        """Go on from what `arrays` gave."""
        for index, weight in enumerate(self.trained()):
            state = {name: torch.from_numpy(arrays[f"{index} {name}"]) for name in ("step", "exp_avg", "exp_avg_sq")}
            self.optimizer.state[weight] = {name: value.to(weight.device) for name, value in state.items()}
            weight.copy_(torch.from_numpy(arrays[f"{index} weight"]))

    def snapshot(self) -> tuple[list[torch.Tensor], dict[str, Any]]:
        return [weight.detach().clone() for weight in self.trained()], copy.deepcopy(self.optimizer.state_dict())

    @torch.no_grad()
    def restore(self, saved: tuple[list[torch.Tensor], dict[str, Any]]) -> None:
        for weight, value in zip(self.trained(), saved[0], strict=True):
            weight.copy_(value)
        self.optimizer.load_state_dict(saved[1])


def run_dose(
    preset: Preset,
    doses: Doses,
    inputs: Inputs,
    out: Path,
    *,
    seconds: float,
    bases: bool = True,
    sixteen_bit: bool = True,
    adapters: Sequence[Path] = (),
    command: str = "",
    record: Path | None = None,
) -> Path:
    """Train and read everything that fits into the time; returns the record.

    Args:
        out: folder for results.jsonl, nll.npz and the adapters, written as they come.
        seconds: after which no stage is begun that is not expected to end before.
        bases: read the untrained arms too.
        sixteen_bit: read the arm of most steps with 16-bit weights too.
        adapters: of an earlier run, "adapter-ARM-TOKENS.safetensors": read these, and train nothing.
        record: folder of the record; default: `out`.
    """
    kernels = sdpa_kernel(KERNELS, set_priority=True) if torch.cuda.is_available() else nullcontext()
    experiment = _Experiment(preset, doses, inputs, out, seconds)
    with kernels:
        if bases:
            experiment.read_bases()
        if adapters:
            experiment.read_adapters(adapters)
        else:
            experiment.run_stages(sixteen_bit=sixteen_bit)
    return write_dose_record([out], record or out, preset=preset.name, provenance={"command": command})


class _Experiment:
    def __init__(self, preset: Preset, doses: Doses, inputs: Inputs, out: Path, limit: float) -> None:
        self.preset, self.doses, self.inputs, self.out, self.limit = preset, doses, inputs, out, limit
        self.begun, self.sums = time.perf_counter(), {}
        about = (preset.base, preset.extension, preset.lora, doses.rank, doses.alpha)
        key = {"about": about, "base_sha256": weights_sha256(locate_base(preset)), "bf16": torch.cuda.is_available()}
        self.kept = Cache(out / "unfinished", VERSION, {**key, "training": list(map(ids_of, inputs.training))})
        self.seconds: dict[str, float] = {}  # of readings and questions, by kind; of a step, by its way's window
        self.tokenizer = load_tokenizer(locate_base(preset))
        self.step_tokens = preset.extension.window // 2
        lengths = [text.tokens for text in inputs.texts]
        self.write("start", stages=doses.stages, texts=lengths, heldout=inputs.about, device=device_name())

    def elapsed(self) -> float:
        return time.perf_counter() - self.begun

    def write(self, kind: str, **row: Any) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / "results.jsonl").open("w" if kind == "start" else "a") as file:
            file.write(json.dumps({"kind": kind, **row, "at": round(self.elapsed(), 2)}) + "\n")

    def read(self, name: str, model: Model, contexts: Sequence[str], longest: int, **about: Any) -> None:
        """Ask behind up to `longest` tokens, and read all texts with full context ("full") or in windows ("window")."""
        window, texts = self.preset.base.window, self.inputs.texts
        key = {"adapter": [weight.float().numpy(force=True) for weight in adapter_weights(model)]}
        stacks = [stack for stack in self.inputs.haystacks if stack.length <= longest]
        if stacks:
            timed = self.kept.items(f"ask {name}", stacks, partial(_timed, partial(ask, model)), item_key=asdict, **key)
            asked, self.seconds[f"ask {longest}"] = _untimed(timed)
            self.write("retrieval", name=name, columns=COLUMNS, rows=[row for rows in asked for row in rows], **about)

        def binned(way: str, text: TokenizedDocument) -> list[float]:
            costs = token_nll(model, text) if way == "full" else sliding_window(nll_in_windows(model, text, window))
            of_positions = np.concatenate([[0.0], costs])  # position 0 costs nothing
            return of_positions.reshape(-1, BIN).sum(axis=1, dtype=np.float64).tolist()

        for way in contexts:
            measure = partial(_timed, partial(binned, way))
            timed = self.kept.items(f"read {name} {way}", texts, measure, item_key=ids_of, **key)
            rows, self.seconds[way] = _untimed(timed)
            sums = np.full((len(rows), max(map(len, rows))), np.nan, dtype=np.float32)
            for line, bins in zip(sums, rows, strict=True):
                line[: len(bins)] = bins
            self.sums[f"{name}/{way}"] = sums
            write_arrays(self.out / "nll.npz", self.sums)
            self.write("nll", name=name, way=way, seconds=round(self.seconds[way], 2), **about)
            print(f"{self.elapsed():6.0f} s  {name} {way}: {np.nansum(sums) / np.isfinite(sums).sum() / BIN:.4f} nats")

    def ask_tasks(self, name: str, model: Model, *, written: bool) -> None:
        """Ask every task, or only those whose answers are read, not `written`; the answers go into a file."""
        requests = [request for request in self.inputs.requests if written or not request.tokens]
        if not requests:
            return
        begin = time.perf_counter()
        answers = answer(model, self.tokenizer, requests, tokens_at_once=self.doses.tokens_at_once)
        write_atomically(self.out / f"answers-{name}.json", json.dumps(answers).encode())
        self.seconds["tasks"] = time.perf_counter() - begin
        self.write("tasks", name=name, requests=len(requests), seconds=round(self.seconds["tasks"], 2))

    def arm(self, way: Way, steps: int) -> Arm:
        """A new arm with the sequences of `steps` steps."""
        per_step = max(self.step_tokens // way.window, 1)
        settings = replace(
            self.preset.training,
            **{"window": way.window, "reach": way.reach, "pack": False, "attention": "sdpa", "steps": steps},
            **{"sequences_per_step": per_step, "sequences_at_once": 1, "long_document_weight": 2.0},
            **{"self_quoting_share": way.quoting, "seed": way.seed},
        )
        sequences = list(TrainingData(self.inputs.training, settings, self.tokenizer))
        model = self.with_lora(way)
        if way.window > self.doses.tokens_at_once:
            model.activation_checkpointing_enable({"use_reentrant": False})
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        usable = sum(document.tokens for document in self.inputs.training)
        about = {"window": way.window, "reach": way.reach, "rope_base": way.rope.base, "quoting": way.quoting}
        self.write("arm", arm=way.label, **about, seed=way.seed, usable_tokens={"all": usable})
        return Arm(way, model, sequences, per_step, optimizer)

    def with_lora(self, way: Way) -> PeftModel:
        """The base in 4 bits with the RoPE of a way and new adapters."""
        lora = replace(self.preset.lora, rank=self.doses.rank, alpha=self.doses.alpha)
        return add_lora(load(self.preset, way.rope, four_bit=True), lora, seed=way.seed)

    def train(self, arm: Arm, first: int, rates: list[float], what: str) -> None:
        if not rates:
            return
        losses, seconds = self.take_steps(arm, first, rates, what)
        per_step = seconds / len(rates)
        self.seconds[f"step {arm.way.window}"] = per_step
        tokens = arm.per_step * arm.way.window
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
        speed = {"seconds_per_step": per_step, "tokens_per_second": tokens / per_step, "peak_gib": peak}
        about = {
            "first_step": first,
            "steps": len(rates),
            "tokens_per_step": tokens,
            "loss": np.round(losses, 4).tolist(),
        }
        self.write("training", arm=arm.way.label, what=what, **about, **speed)
        if not np.isfinite(losses).all():
            raise RuntimeError(f"{arm.way.label} diverged: a loss is not finite")

    def take_steps(self, arm: Arm, first: int, rates: list[float], what: str) -> tuple[list[float], float]:
        """Losses and seconds of some steps; those of an interrupted run are not trained again."""
        name, losses, seconds = f"{arm.way.label} {what}", [], 0.0
        key = {"way": arm.way, "first": first, "rates": rates, "at_once": self.doses.tokens_at_once}
        if kept := self.kept.read(name, key, ".npz"):
            arm.resume(kept)
            losses, seconds = kept["losses"].tolist(), float(kept["seconds"])
        begin = last = time.perf_counter()
        arm.model.train()
        for index in range(len(losses), len(rates)):
            losses.append(arm.step(first + index, rates[index], self.doses.tokens_at_once))
            now = time.perf_counter()
            if now - last > KEEP_EVERY or (index == len(rates) - 1 and now - begin > KEEP_EVERY):
                so_far = {"losses": np.array(losses), "seconds": np.array(seconds + now - begin)}
                self.kept.write(name, key, {**arm.arrays(), **so_far}, ".npz")
                last = now
        arm.model.eval()
        return losses, seconds + time.perf_counter() - begin

    def give(self, arm: Arm, steps: int, sixteen_bit: bool) -> None:
        """Train the trunk to where the dose's branch leaves it, then the branch; read there, and go back."""
        decay = max(round(steps * DECAY), 1)
        trunk, way = steps - decay, arm.way
        highest = self.doses.learning_rate
        rates = [highest * min((index + 1) / WARMUP_STEPS, 1.0) for index in range(arm.done, trunk)]
        self.train(arm, arm.done, rates, "trunk")
        arm.done, saved = max(trunk, arm.done), arm.snapshot()
        dose = steps * arm.per_step * way.window
        self.train(arm, trunk, [highest * (1 - index / decay) for index in range(decay)], f"branch to {dose}")
        about = {"arm": way.label, "tokens_trained": dose, "weights": "nf4"}
        name = f"{way.label}-{dose}"
        save_file(
            {key: value.contiguous() for key, value in get_peft_model_state_dict(arm.model).items()},
            self.out / f"adapter-{name}.safetensors",
        )
        asked = self.doses.asked[-1] if way.full_context else self.preset.base.window
        contexts = ("full", "window") if way.full_context else ("window",)
        self.read(name, arm.model, contexts, asked, **about)
        if way.full_context:
            self.ask_tasks(name, arm.model, written=way.window == self.step_tokens)
        if sixteen_bit:
            layers, exact = linear_layers(arm.model), linear_layers(load(self.preset, way.rope, four_bit=False))
            four_bit = [layer.weight.data for layer in layers]
            for layer, other in zip(layers, exact, strict=True):
                layer.weight.data = other.weight.data
            self.read(f"{name}-16bit", arm.model, contexts, 0, **{**about, "weights": "bf16"})
            for layer, weight in zip(layers, four_bit, strict=True):
                layer.weight.data = weight
        arm.restore(saved)

    def read_adapters(self, files: Sequence[Path]) -> None:
        """Read the texts with adapters that `give` left, and ask behind them."""
        for file in files:
            name = file.stem.removeprefix("adapter-")
            label, _, tokens = name.rpartition("-")
            way = way_of_label(label, ways_of(self.preset, self.doses.other_bases))
            model = self.with_lora(way)
            unknown = set_peft_model_state_dict(model, load_file(file)).unexpected_keys
            if unknown:
                raise ValueError(f"{file}: the model has no place for {unknown[0]}: is it another way's adapter?")
            contexts = ("full", "window") if way.full_context else ("window",)
            asked = self.doses.asked[-1] if way.full_context else self.preset.base.window
            about = {"arm": label, "tokens_trained": int(tokens), "weights": "nf4"}
            self.read(name, model.eval(), contexts, asked, **about)
        self.write("end")

    def expected(self, way: Way, steps: int) -> float:
        """Seconds that so many steps and what is read after them take, by the slowest that was measured."""
        known = {name: value for name, value in self.seconds.items() if name.startswith("step ")}
        per_step = known.get(f"step {way.window}", 1.5 * max(known.values(), default=0.0))
        readings = sum(value for name, value in self.seconds.items() if name not in known)
        return 1.05 * (steps * per_step + readings) + 1.0

    def read_bases(self) -> None:
        """Read the untrained arms: the base in 16 and in 4 bits, and in 4 with its RoPE scaled in two ways."""
        arms = (("base", "base"), ("base-nf4", "base"), ("raised-nf4", "rope_base_only"), ("yarn-nf4", "yarn"))
        for name, arm in arms:
            four_bit = name.endswith("nf4")
            model = load(self.preset, arm_scaling(self.preset, arm), four_bit=four_bit)
            asked = self.preset.base.window if arm == "base" else self.doses.asked[-1]
            about = {"tokens_trained": 0, "weights": "nf4" if four_bit else "bf16"}
            self.read(name, model, ("window",) if arm == "base" else ("full",), asked, **about)
            if name != "raised-nf4":
                self.ask_tasks(name, model, written=name == "base-nf4")

    def run_stages(self, *, sixteen_bit: bool) -> None:
        """Train and read the stages in order, leaving out what does not fit into the time."""
        ways, arms = ways_of(self.preset, self.doses.other_bases), {}
        most = {key: max(steps for way, steps in self.doses.stages if way == key) for key, _ in self.doses.stages}
        largest = max(self.doses.stages, key=lambda stage: stage[1])
        for key, steps in self.doses.stages:
            done = arms[key].done if key in arms else 0
            needed = self.expected(ways[key], steps - done)
            if self.elapsed() + needed > self.limit:
                dose = steps * self.step_tokens
                self.write("left out", arm=ways[key].label, dose=dose, needed=round(needed, 1))
                continue
            if key not in arms:
                arms[key] = self.arm(ways[key], most[key])
            self.give(arms[key], steps, sixteen_bit and (key, steps) == largest)
        self.write("end")
