"""A line of the claims scoreboard, the words of its verdicts, and how numbers stand in it."""

from dataclasses import dataclass
from typing import Any

from llama_long_utils.notebooks import NO_DIFFERENCE, measured

MODELS = {"qwen2.5-coder-1.5b": "Qwen2.5-Coder-1.5B", "smollm2": "SmolLM2-135M", "tiny": "tiny Llama (4.3M)"}
AGREES, DISAGREES, UNDECIDED, NOT_TESTED = "agrees", "disagrees", "undecided", "not tested yet"
MARGIN = 0.02  # share of right answers that a short task may lose and be called unharmed
REASON_WORDS = 16  # that README gives to a verdict's reason
BOUNDS = ["value", "low", "high"]
Interval = tuple[float, float, float]  # value, low, high


@dataclass(frozen=True)
class Line:
    """A claim: what the paper found, what we found, on which model with how many seeds, and what follows.

    Attributes:
        why: the verdict's reason in a few words; empty: the verdict says it.
    """

    claim: str
    paper: str
    ours: str = "-"
    scale: str = "-"
    verdict: str = NOT_TESTED
    why: str = ""

    @property
    def reason(self) -> str:
        """`why`, or as many clauses of the verdict's own reason as stay short."""
        first, *others = self.verdict.partition(": ")[2].split("; ")
        for clause in others:
            if len(f"{first} {clause}".split()) > REASON_WORDS:
                break
            first += f"; {clause}"
        return self.why or first


def in_nats(row: Any) -> str:
    """A row with value, low and high as text."""
    return measured(row.value, row.low, row.high, digits=3)


def better_or_worse(difference: Any) -> str:
    """What an interval of NLL, minus another arm's, says."""
    return "worse" if difference.low > 0 else "better" if difference.high < 0 else NO_DIFFERENCE
