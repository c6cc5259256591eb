"""Several processes that train together: what each one takes of a step, and of each sequence.

torchrun or accelerate starts them, one for each GPU, and transformers' `Trainer` adds their gradients up (DDP). Only
the adapters' gradients are sent. Sequences are spread over groups of `context` processes; within a group each process
holds a part of every sequence (`ContextShare`).

Each process has the whole base, which is small in NF4, or a part of each of its weights (`shard_base`, FSDP2).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.nn.functional as F
from accelerate import PartialState
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from transformers import TrainingArguments

from llama_long_utils.data.packing import TrainingSequence
from llama_long_utils.model.attention import ContextShare
from llama_long_utils.model.loss import causal_lm
from llama_long_utils.settings import IGNORED_LABEL, TrainingSettings

Tensors = dict[str, torch.Tensor]


def join_processes() -> PartialState:
    """This process among those that a launcher started; alone without one."""
    # The others wait as long as the first one needs to read and tokenize. If one dies, the launcher ends all.
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=7))


def use_one_gpu(arguments: TrainingArguments) -> None:
    """Without a launcher `Trainer` would divide batches among all GPUs that it sees, each as large as asked for."""
    if arguments.n_gpu > 1:
        print(f"one of {arguments.n_gpu} GPUs trains; for all: torchrun (llama_long_utils.train --help)", flush=True)
        arguments._n_gpu = 1


@dataclass(frozen=True)
class Division:
    """How a step's sequences are divided: `context` of the `processes` share each of a process' `sequences`.

    `sharded_base`: each process keeps a part of the base (`shard_base`).
    """

    processes: int
    context: int
    sequences: int
    at_once: int
    sharded_base: bool = False

    def share(self, index: int) -> ContextShare:
        """What the process with this index holds of each sequence. All processes have to call it."""
        if self.context == 1:
            return ContextShare()
        group, _ = distributed.new_subgroups(self.context)
        return ContextShare(index % self.context, self.context, group)


def divide(settings: TrainingSettings, processes: int = 1, context: int = 1, sharded_base: bool = False) -> Division:
    """The division of a step, which has the same sequences however many processes there are; ValueError if none."""
    if sharded_base and processes == 1:
        raise ValueError("one process has nobody to share the base with: start several (torchrun --nproc-per-node N)")
    if context < 1 or processes % context:
        raise ValueError(f"{processes} processes do not divide into groups of {context}, which share sequences")
    groups = processes // context
    if settings.sequences_per_step % groups:
        raise ValueError(
            f"training.sequences_per_step = {settings.sequences_per_step} does not divide among {groups} "
            f"{'processes' if context == 1 else 'groups of processes'}: start fewer, let more of them share a sequence "
            "(--context-parallel), or change the number"
        )
    if context > 1 and settings.window % (2 * context):
        raise ValueError(f"a window of {settings.window:,} tokens does not divide into {2 * context} equal chunks")
    if context > 1 and settings.attention == "s2":
        raise ValueError('attention = "s2" takes whole sequences: train without --context-parallel')
    sequences = settings.sequences_per_step // groups
    return Division(processes, context, sequences, math.gcd(sequences, settings.sequences_at_once), sharded_base)


def shard_base(build: Callable[[], PeftModel]) -> PeftModel:
    """What `build` loads on the host, on this process' GPU but for 1/processes of each frozen weight of the layers.

    All processes call it. A layer's weights are gathered before its forward and its backward pass and dropped after
    them (FSDP2); norms, embeddings, head and adapters are whole. accelerate's FSDP2 takes 4-bit weights only if their
    bits are stored as floating-point numbers, which a kernel may change where it takes them for NaN (bitsandbytes
    #1945). torch itself takes bytes.
    """
    state = PartialState()
    mesh = init_device_mesh(state.device.type, (state.num_processes,))
    for turn in range(state.num_processes):  # a host holds one whole base at a time
        if turn == state.local_process_index:
            model = build()
            decoder, shared = causal_lm(model).model, set()
            for module in decoder.layers.modules():
                if isinstance(module, nn.Linear) and not module.weight.requires_grad:
                    shared.add(module.weight)
                if isinstance(module, Linear4bit):  # the weight forgets its scales, and then this is looked at
                    module.quant_state = module.weight.quant_state
                    module.quant_state.to(state.device)
            for module in (*decoder.layers, decoder):
                fully_shard(module, mesh=mesh, ignored_params=set(module.parameters()) - shared)
            model.to(state.device)
        state.wait_for_everyone()
    return model


def add_up_gradients(model: PeftModel) -> DistributedDataParallel:
    """DDP around a model whose base is sharded; accelerate does not put one around such a model."""
    sharded = [name for name, weight in model.named_parameters() if isinstance(weight, DTensor)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sharded)
    return DistributedDataParallel(model)


class SharedSequences(Dataset):
    """The tensors of sequences in the order in which `Trainer` deals them out, batch after batch to the next process.

    Each batch comes once for each process of a group, as its share. Labels are shifted before a sequence is divided.
    `labels` counts those that this process was given of each sequence.
    """

    def __init__(self, whole: Sequence[TrainingSequence], division: Division) -> None:
        self.whole, self.division = whole, division
        self.labels: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.whole) * self.division.context

    def __getitem__(self, number: int) -> Tensors:
        context, at_once = self.division.context, self.division.at_once
        batch, place = divmod(number, at_once * context)
        sequence, share = batch * at_once + place % at_once, ContextShare(place // at_once, context)
        tensors = self.whole[sequence].tensors()
        if context > 1:
            shifted = F.pad(tensors["labels"][1:], (0, 1), value=IGNORED_LABEL)
            tensors |= {"labels": shifted, "shift_labels": shifted}  # Trainer counts the one, the loss takes the other
            tensors.pop("attention_mask", None)
        tensors = {name: share.of(values, 0) for name, values in tensors.items()}
        self.labels[sequence] = int((tensors["labels"] != IGNORED_LABEL).sum())
        return tensors
