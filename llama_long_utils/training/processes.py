"""Several processes that train together: what each one takes of a step, and of each sequence.

torchrun or accelerate starts them, one for each GPU, and transformers' `Trainer` adds their gradients up (DDP). The
base is replicated, as it is small in NF4, and only the adapters' gradients are sent. Sequences are spread over groups
of `context` processes; within a group each process holds a part of every sequence (`ContextShare`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import distributed
from torch.utils.data import Dataset

from llama_long_utils.data.packing import TrainingSequence
from llama_long_utils.model.attention import ContextShare
from llama_long_utils.settings import IGNORED_LABEL, TrainingSettings

Tensors = dict[str, torch.Tensor]


def join_processes() -> PartialState:
    """This process among those that a launcher started; alone without one."""
    # The others wait as long as the first one needs to read and tokenize. If one dies, the launcher ends all.
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=7))


@dataclass(frozen=True)
class Division:
    """How a step's sequences are divided: `context` of the `processes` share each of a process' `sequences`."""

    processes: int
    context: int
    sequences: int
    at_once: int

    def share(self, index: int) -> ContextShare:
        """What the process with this index holds of each sequence. All processes have to call it."""
        if self.context == 1:
            return ContextShare()
        group, _ = distributed.new_subgroups(self.context)
        return ContextShare(index % self.context, self.context, group)


def divide(settings: TrainingSettings, processes: int = 1, context: int = 1) -> Division:
    """The division of a step, which has the same sequences however many processes there are; ValueError if none."""
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
    return Division(processes, context, sequences, math.gcd(sequences, settings.sequences_at_once))


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
