"""A blind panel in a notebook: people compare two answers side by side, and a summary says which ones they preferred.

Votes go to a file, a line of JSON each. A pair is shown once to an annotator, in an order and with sides that the seed
and the annotator's name decide, so that a panel continues where it was left, also after a kill.
"""

import html
import json
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import ipywidgets as widgets
import numpy as np
import pandas as pd

from llama_long_utils.cache import digest
from llama_long_utils.evaluation.statistics import SAMPLES, SEED, Bootstrap

VERDICTS = ("win", "tie", "loss")  # of our answer
KEYS = {"1": 0, "2": None, "3": 1}  # left is better, tie, right is better


@dataclass(frozen=True)
class Pair:
    """Two answers to a prompt: `ours` and that of the model named `rival`."""

    prompt: str
    ours: str
    others: str
    rival: str

    @property
    def key(self) -> str:
        """What a vote names the pair by."""
        return digest(self.prompt, self.ours, self.others, self.rival)

    def left_is_ours(self, annotator: str, seed: int) -> bool:
        """Which answer this annotator sees on the left."""
        return random.Random(f"{seed} {annotator} {self.key}").random() < 0.5


@dataclass(frozen=True)
class Votes:
    """The votes in a file. Several people may write to it at once."""

    file: Path

    def add(self, pair: Pair, verdict: str, annotator: str, by: str) -> None:
        """Append a vote of a "person" or a "judge" (a program), and wait until the disk has it."""
        vote = {"pair": pair.key, "rival": pair.rival, "annotator": annotator, "by": by, "verdict": verdict}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        try:
            size = os.fstat(descriptor).st_size
            torn = size and os.pread(descriptor, 1, size - 1) != b"\n"  # by a kill: that vote is asked for again
            os.write(descriptor, b"\n" * bool(torn) + json.dumps(vote).encode() + b"\n")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def table(self, pairs: Sequence[Pair] | None = None) -> pd.DataFrame:
        """Columns pair, rival, annotator, by, verdict: one vote for each pair and annotator, the first; whole lines."""
        rows = []
        for line in self.file.read_text("utf-8").splitlines() if self.file.exists() else ():
            try:
                rows.append(json.loads(line))
            except ValueError:  # cut by a kill
                continue
        table = pd.DataFrame(rows, columns=["pair", "rival", "annotator", "by", "verdict"])
        asked = table if pairs is None else table[table.pair.isin([pair.key for pair in pairs])]
        return asked.drop_duplicates(["pair", "annotator", "by"], ignore_index=True)


def ask_judge(pairs: Sequence[Pair], votes: Votes, judge: Callable[[Pair], str], name: str) -> None:
    """Let a program vote on the pairs that it has not seen; it is recorded as a judge and never counts as a person."""
    table = votes.table(pairs)
    seen = set(table[(table.annotator == name) & (table.by == "judge")].pair)
    for pair in pairs:
        if pair.key not in seen:
            votes.add(pair, judge(pair), name, "judge")


@dataclass
class Panel:
    """The widget. Buttons take the mouse, or Tab and Space; in the box below them 1, 2 or 3 is a vote at once."""

    pairs: Sequence[Pair]
    votes: Votes
    seed: int = 0
    waiting: list[Pair] = field(default_factory=list)

    def __post_init__(self) -> None:
        wide = widgets.Layout(width="50%", border="1px solid #999", padding="4px 10px")
        self.name = widgets.Text(description="Your name", placeholder="then Enter", continuous_update=False)
        self.status, self.prompt = widgets.HTML(), widgets.HTML()
        self.answers = [widgets.HTML(layout=wide) for _ in range(2)]
        labels = ("Left is better (1)", "Tie (2)", "Right is better (3)")
        self.buttons = [widgets.Button(description=label) for label in labels]
        self.keys = widgets.Text(placeholder="or type 1, 2 or 3 here", layout=widgets.Layout(width="14em"))
        for button, key in zip(self.buttons, KEYS, strict=True):
            button.on_click(lambda _button, key=key: self.vote(key))
        self.keys.observe(self._typed, "value")
        self.name.observe(lambda _change: self.begin(), "value")
        controls = widgets.HBox([*self.buttons, self.keys])
        self.question = widgets.VBox([self.prompt, widgets.HBox(self.answers), controls])
        self.question.layout.display = "none"
        self.widget = widgets.VBox([self.name, self.status, self.question])

    def begin(self) -> None:
        """Show the named annotator the first pair without a vote of theirs."""
        table = self.votes.table(self.pairs)
        seen = set(table[(table.annotator == self.annotator) & (table.by == "person")].pair)
        order = random.Random(f"{self.seed} {self.annotator}").sample(list(self.pairs), len(self.pairs))
        self.waiting = [pair for pair in order if pair.key not in seen]
        self._show()
        self.keys.focus()

    @property
    def annotator(self) -> str:
        return self.name.value.strip()

    def vote(self, key: str) -> None:
        """Record what a key of `KEYS` says about the pair that is shown, and show the next one."""
        if not (self.annotator and self.waiting):
            return
        pair, side = self.waiting.pop(0), KEYS[key]
        ours = 0 if pair.left_is_ours(self.annotator, self.seed) else 1
        self.votes.add(pair, "tie" if side is None else "win" if side == ours else "loss", self.annotator, "person")
        self._show()

    def _typed(self, change: dict) -> None:
        if change["new"]:
            self.keys.value = ""
            if change["new"][-1] in KEYS:
                self.vote(change["new"][-1])

    def _show(self) -> None:
        done = len(self.pairs) - len(self.waiting)
        self.status.value = f"{done} of {len(self.pairs)} done." + (" Thank you." * (not self.waiting))
        asking = bool(self.annotator and self.waiting)
        self.question.layout.display = "" if asking else "none"
        if asking:
            pair = self.waiting[0]
            texts = [pair.ours, pair.others]
            if not pair.left_is_ours(self.annotator, self.seed):
                texts.reverse()
            for shown, text in zip((self.prompt, *self.answers), (pair.prompt, *texts), strict=True):
                shown.value = _page(text)


def _page(text: str) -> str:
    return f'<div style="white-space: pre-wrap; line-height: 1.4">{html.escape(text)}</div>'


def summary(votes: pd.DataFrame) -> pd.DataFrame:
    """Shares of verdicts for each rival, people and judges apart; intervals are over pairs, which voters share.

    Columns: rival, by, win, tie, loss, preferred (wins and half of the ties), low and high (its 95% interval), pairs,
    annotators, agreement (`agreement`; NaN for a single annotator).
    """
    rows = []
    for (rival, by), part in votes.groupby(["rival", "by"], sort=False):
        counts = _counts(part)
        sums, totals = counts @ [1.0, 0.5, 0.0], counts.sum(axis=1)
        low, high = Bootstrap(len(counts), SAMPLES, SEED).interval(sums[:, None], totals[:, None])
        shares = dict(zip(VERDICTS, counts.sum(axis=0) / totals.sum(), strict=True))
        found = {"preferred": sums.sum() / totals.sum(), "low": low[0], "high": high[0], "pairs": len(counts)}
        people = {"annotators": part.annotator.nunique(), "agreement": agreement(part)}
        rows.append({"rival": rival, "by": by, **shares, **found, **people})
    return pd.DataFrame(rows)


def _counts(votes: pd.DataFrame) -> np.ndarray:
    """Votes for each pair and verdict: shape (pairs, 3)."""
    return pd.crosstab(votes.pair, votes.verdict).reindex(columns=list(VERDICTS), fill_value=0).to_numpy()


def agreement(votes: pd.DataFrame) -> float:
    """Krippendorff's alpha: 1 if annotators always agree, 0 if as often as by chance; NaN if no pair has two votes.

    It is Fleiss' kappa with a correction for few votes, and takes pairs that not everybody voted on.
    """
    counts = _counts(votes).astype(float)
    counts = counts[counts.sum(axis=1) > 1]
    of_pair, of_verdict, total = counts.sum(axis=1), counts.sum(axis=0), counts.sum()
    chance = total**2 - (of_verdict**2).sum()
    if not total or not chance:  # nobody to compare, or one verdict only
        return float("nan")
    differing = ((of_pair**2 - (counts**2).sum(axis=1)) / (of_pair - 1)).sum()
    return float(1 - differing * (total - 1) / chance)
