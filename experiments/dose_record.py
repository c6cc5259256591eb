"""The record of the dose experiment: what its readings say, with the intervals of a sceptic.

Differences are paired: the same documents, the same tokens. An interval resamples kinds of documents and, within each
kind, documents; two documents of one manual tell less than two of two. A bootstrap of ten kinds is a little too narrow,
so beside it stands Student's interval of the kinds' means, with the number of documents in which a difference is below
zero, and what is left of it without the one document that speaks most for it.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from llama_long_utils.evaluation.statistics import SAMPLES, SEED, Bootstrap, share_interval
from llama_long_utils.presets import load_preset
from llama_long_utils.records import Record, read_arrays, write_record

SLUG, SECOND_SLUG = "06_dose_response", "06_dose_second_texts"
BIN = 128  # positions whose NLL is summed up in the arrays
SEEN = 0.875  # share of a window's length
BASE, SIXTEEN_BIT, RAISED, YARN = "base-nf4/window", "base/window", "raised-nf4/full", "yarn-nf4/full"
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class KindBootstrap(Bootstrap):
    """Kinds are drawn first, and within each draw its units; `kinds` has one for each unit.

    Units of one kind (speeches, plays) are alike, so that nine documents of three kinds tell less than nine of nine.
    """

    kinds: Sequence[str]

    def weights(self) -> np.ndarray:
        """How often each sample draws each unit: int of shape (samples, units)."""
        if len(self.kinds) != self.units:
            raise ValueError(f"{len(self.kinds)} kinds for {self.units} units: give each unit one")
        generator = np.random.default_rng(self.seed)
        members = [np.flatnonzero(np.array(self.kinds) == kind) for kind in dict.fromkeys(self.kinds)]
        drawn = generator.multinomial(len(members), np.full(len(members), 1 / len(members)), size=self.samples)
        weights = np.zeros((self.samples, self.units), dtype=np.int64)
        for member, times in zip(members, drawn.T, strict=True):
            weights[:, member] = generator.multinomial(times * len(member), np.full(len(member), 1 / len(member)))
        return weights


@dataclass(frozen=True)
class Readings:
    """What was read: sums of NLL by reading, document and bin of `BIN` positions, NaN past a document's end.

    Attributes:
        nats: reading ("ARM-DOSE/full" or "ARM-DOSE/window") to an array of shape (documents, bins).
        tokens: of each document.
        kinds: of each document.
        window: the old one, in tokens.
    """

    nats: dict[str, np.ndarray]
    tokens: np.ndarray
    kinds: list[str]
    window: int

    @classmethod
    def of(cls, record: Record, preset: str) -> "Readings":
        """Those of a record."""
        texts, arrays = record.table("held_out"), record.arrays
        nats = dict(zip(arrays["readings"].tolist(), arrays["nats"], strict=True))
        return cls(nats, texts.tokens.to_numpy(), texts.kind.tolist(), load_preset(preset).base.window)

    def joined(self, other: "Readings") -> "Readings":
        """The texts of both, as far as both have a reading."""
        nats = {name: np.concatenate([self.nats[name], other.nats[name]]) for name in self.nats if name in other.nats}
        return Readings(nats, np.concatenate([self.tokens, other.tokens]), self.kinds + other.kinds, self.window)

    def buckets(self, above: int = 0) -> list[tuple[int, int]]:
        """(first position, end) of the buckets that begin at `above` or later: parts of the old window and beyond."""
        old, new = self.window, int(self.tokens.max())
        edges = sorted({0, old // 4, old // 2, old, new // 2, 3 * new // 4, new})
        buckets = dict.fromkeys((*pairwise(edges), (0, old), (new // 2, new)))
        return [bucket for bucket in buckets if bucket[0] >= above]

    def bucket(self, reading: str, low: int, high: int, seen: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """(mean NLL at positions low to high - 1, place in the list) of each document that is long enough.

        Args:
            seen: only positions that a window sliding by half its length reads with at least this share of it before
                them; they have seen 1/2 to 1, three quarters on average. Beyond the first window only.
        """
        there, half = np.flatnonzero(self.tokens >= high), self.window // 2
        places = np.arange(low // BIN, high // BIN)
        places = places[(places * BIN + BIN // 2) % half >= (2 * seen - 1) * half]
        sums = self.nats[reading][np.ix_(there, places)].sum(axis=1, dtype=np.float64)
        return sums / (len(places) * BIN - (places[0] == 0)), there  # position 0 is BOS and costs nothing

    def interval(self, values: np.ndarray, documents: np.ndarray) -> tuple[float, float]:
        """Bounds of the mean over documents, resampled by kind and document."""
        bootstrap = KindBootstrap(len(values), SAMPLES, SEED, [self.kinds[document] for document in documents])
        low, high = bootstrap.interval(values[:, None], np.ones((len(values), 1)))
        return float(low[0]), float(high[0])

    def mean(self, reading: str, low: int, high: int) -> dict[str, Any]:
        """A row of table nll_by_position."""
        values, documents = self.bucket(reading, low, high)
        bounds = dict(zip(("low", "high"), self.interval(values, documents), strict=True))
        count = {"documents": len(values), "tokens": len(values) * (high - max(low, 1))}
        return {"position_low": low, "position_high": high, "nll": values.mean(), **bounds, **count}

    def difference(self, first: str, second: str, low: int, high: int, seen: float = 0.0) -> dict[str, Any]:
        """A row of first minus second."""
        (one, documents), (other, _) = self.bucket(first, low, high, seen), self.bucket(second, low, high, seen)
        return {"position_low": low, "position_high": high, **self.summary(one - other, documents)}

    def summary(self, values: np.ndarray, documents: np.ndarray) -> dict[str, Any]:
        """Mean of paired differences, one of each document, and what a sceptic asks next."""
        low, high = self.interval(values, documents)
        by_kind = pd.Series(values).groupby([self.kinds[document] for document in documents]).mean()
        kinds_low, kinds_high = (
            stats.t.interval(0.95, len(by_kind) - 1, by_kind.mean(), stats.sem(by_kind))
            if len(by_kind) > 1
            else (np.nan, np.nan)  # one kind tells nothing of kinds
        )
        most = np.argmax(values * np.sign(values.mean()))
        return {
            **{"nats": values.mean(), "low": low, "high": high, "kinds_low": kinds_low, "kinds_high": kinds_high},
            **{"documents": len(values), "kinds": len(by_kind), "below_zero": int((values < 0).sum())},
            "without_one": np.delete(values, most).mean(),
        }


def write_dose_record(
    runs: Sequence[Path], folder: Path, *, preset: str, provenance: dict[str, Any] | None = None
) -> Path:
    """Write the record and its arrays from what `experiments.dose` left in the folders of one or several runs.

    Texts of the second set say how much of them is in those of the first: their record has a name of its own.

    Args:
        runs: a folder with a record, and no results of a run, is an earlier record that goes on: it comes first.

    Raises:
        ValueError: the runs did not read the same texts.
    """
    rows, sums, before = [], {}, None
    for run in sorted(runs, key=lambda run: not (run / "results.jsonl").is_file()):  # earlier records last
        if not (run / "results.jsonl").is_file():
            paths = [run / f"{slug}.json" for slug in (slug_of(rows), SLUG, SECOND_SLUG)]
            before = EarlierRecord(next(filter(Path.is_file, paths), paths[0]))
            rows, sums = before.rows() + rows, before.nats() | sums
            continue
        rows += [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
        sums |= read_arrays(run / "nll.npz")
    start, *others = [row for row in rows if row["kind"] == "start"]
    for other in others:
        if [text["sha256_of_ids"] for text in other["heldout"]] != [text["sha256_of_ids"] for text in start["heldout"]]:
            raise ValueError(f"{', '.join(map(str, runs))}: the runs read other texts, so they make no record together")
    held_out = pd.DataFrame(start["heldout"])
    longest = max(start["texts"]) // BIN
    nats = {name: values[:, :longest] for name, values in sums.items()}
    readings = Readings(nats, np.array(start["texts"]), held_out.kind.tolist(), load_preset(preset).base.window)
    trained = {row["name"]: row for row in rows if row["kind"] == "nll"}
    earlier = before.content["tables"] if before else {}
    tables = {
        "arms": pd.DataFrame([*earlier.get("arms", []), *_arms(rows).to_dict("records")]),
        "nll_by_position": _nll(readings, trained),
        "full_minus_windows": _full_minus_windows(readings, trained),
        "whole_windows": _whole_windows(readings, trained),
        "gain_by_dose": _gain_by_dose(readings, trained),
        "differences": _differences(readings, trained),
        "retrieval": pd.DataFrame([*earlier.get("retrieval", []), *_retrieval(rows).to_dict("records")]),
        "held_out": held_out,
    }
    done = {(row["arm"], row.get("tokens_trained")) for row in trained.values() if "arm" in row}
    left_out = [row for row in rows if row["kind"] == "left out" and (row["arm"], row["dose"]) not in done]
    tables["left_out"] = pd.DataFrame(
        [{"arm": row["arm"], "dose": row["dose"], "seconds_needed": row["needed"]} for row in left_out]
    )
    tables = {name: table for name, table in tables.items() if len(table)}
    seeds = sorted(set(tables["arms"].seed)) if "arms" in tables else []
    arrays = {"nats": np.stack(list(nats.values())), "readings": np.array(list(nats))}
    arrays |= (before.losses_and_questions() if before else {}) | _losses(rows) | _asked(rows)
    return write_record(
        folder,
        slug_of(rows),
        arrays=arrays,
        preset=preset,
        question="From how many trained tokens on does a longer context pay?",
        tables=tables,
        seeds={"training": seeds, "texts": 0, "bootstrap": SEED},
        seconds=sum(row["at"] for row in rows if row["kind"] == "end"),
        provenance=provenance,
    )


def slug_of(rows: Rows) -> str:
    """The name of a record of these rows."""
    second = any("share_in_other_texts" in row["heldout"][0] for row in rows if row["kind"] == "start")
    return SECOND_SLUG if second else SLUG


class EarlierRecord(Record):
    """A record of before, as rows of a run: what other runs on the same texts are added to."""

    def nats(self) -> dict[str, np.ndarray]:
        """What was read, as a run leaves it."""
        return dict(zip(self.arrays["readings"].tolist(), self.arrays["nats"], strict=True))

    def rows(self) -> Rows:
        """What was read, when it ended, and what was left out."""
        tables = self.content["tables"]
        texts = tables["held_out"]
        rows: Rows = [{"kind": "start", "texts": [text["tokens"] for text in texts], "heldout": texts}]
        table, readings = tables["nll_by_position"], self.arrays["readings"].tolist()
        each = len(table) // len(readings)  # rows: one for each bucket of a reading, readings in their order
        for reading, about in zip(readings, table[::each], strict=True):
            name = reading.partition("/")[0]
            trained = {"arm": about["arm"]} if about["tokens_trained"] else {}
            about = {key: about[key] for key in ("tokens_trained", "weights")}
            rows.append({"kind": "nll", "name": name, **about, **trained})
        left_out = tables.get("left_out", [])
        rows += [{"kind": "left out", "needed": row["seconds_needed"], **row} for row in left_out]
        return [*rows, {"kind": "end", "at": self.content["provenance"]["seconds"]}]

    def losses_and_questions(self) -> dict[str, np.ndarray]:
        """The arrays of training and of retrieval."""
        return {name: array for name, array in self.arrays.items() if name not in ("nats", "readings")}


def _arms(rows: Rows) -> pd.DataFrame:
    """One row for each dose: how the arm was trained, and what its training took, trunk and branch together."""
    ways, trunk, table = {}, {}, []
    for row in rows:
        if row["kind"] == "arm":
            ways[row["arm"]] = row
            trunk[row["arm"]] = [0, 0.0]
        elif row["kind"] == "training":
            way, so_far = ways[row["arm"]], trunk[row["arm"]]
            seconds = row["steps"] * row["seconds_per_step"]
            if row["what"] == "trunk":
                so_far[0], so_far[1] = so_far[0] + row["steps"], so_far[1] + seconds
                continue
            tokens = (so_far[0] + row["steps"]) * row["tokens_per_step"]
            table.append(
                {
                    **{name: way[name] for name in ("arm", "window", "reach", "rope_base", "quoting", "seed")},
                    "tokens": tokens,
                    "passes": tokens / sum(way["usable_tokens"].values()),
                    "seconds": so_far[1] + seconds,
                    "tokens_per_second": tokens / (so_far[1] + seconds),
                    "peak_gib": row["peak_gib"],
                }
            )
    return pd.DataFrame(table)


def _about(name: str, trained: dict[str, dict[str, Any]]) -> dict[str, Any]:
    row = trained[name]
    return {"arm": row.get("arm", name), "tokens_trained": row["tokens_trained"], "weights": row["weights"]}


def _nll(readings: Readings, trained: dict[str, dict[str, Any]]) -> pd.DataFrame:
    table = []
    for reading in readings.nats:
        name, _, way = reading.partition("/")
        about = {**_about(name, trained), "read": way}
        table += [{**about, **readings.mean(reading, low, high)} for low, high in readings.buckets()]
    return pd.DataFrame(table)


def _full_minus_windows(readings: Readings, trained: dict[str, dict[str, Any]]) -> pd.DataFrame:
    table = []
    for reading in readings.nats:
        name, _, way = reading.partition("/")
        if way == "full" and f"{name}/window" in readings.nats:
            for low, high in readings.buckets(readings.window):
                row = readings.difference(reading, f"{name}/window", low, high)
                table.append({**_about(name, trained), **row})
    return pd.DataFrame(table)


def _whole_windows(readings: Readings, trained: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """Full context minus windows in the far half, only where the windows have seen at least SEEN of their length.

    Elsewhere a part of what full context gains is only what a window that slides by half has not seen.
    """
    end, table = int(readings.tokens.max()), []
    for reading in readings.nats:
        name, _, way = reading.partition("/")
        controls = [f"{other}/window" for other in _same_dose(name, trained) if other.startswith("control")]
        for second in [f"{name}/window", *controls] if way == "full" else []:
            if second in readings.nats:
                row = readings.difference(reading, second, end // 2, end, SEEN)
                place = {"position_low": end // 2, "position_high": end, "seen_at_least": SEEN}
                table.append({**_about(name, trained), "second": second, **place, **row})
    return pd.DataFrame(table)


def _gain_by_dose(readings: Readings, trained: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """How full context minus own windows changes from one dose of an arm to the next."""
    doses: dict[str, list[tuple[int, str]]] = {}
    for name, row in trained.items():
        if row["tokens_trained"] and row["weights"] == "nf4" and f"{name}/full" in readings.nats:
            doses.setdefault(row["arm"], []).append((row["tokens_trained"], name))
    table = []
    for arm, found in doses.items():
        for (before, less), (after, more) in pairwise(sorted(found)):
            for low, high in readings.buckets(readings.window):
                gains = []
                for name in (more, less):
                    full, documents = readings.bucket(f"{name}/full", low, high)
                    gains.append(full - readings.bucket(f"{name}/window", low, high)[0])
                place = {"position_low": low, "position_high": high}
                doses_of = {"arm": arm, "tokens_before": before, "tokens_after": after}
                table.append({**doses_of, **place, **readings.summary(gains[0] - gains[1], documents)})
    return pd.DataFrame(table)


def _differences(readings: Readings, trained: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """Each arm against the control and others of its dose, 16 bits against 4; the first seed against the bases."""
    pairs = [(SIXTEEN_BIT, BASE), (RAISED, BASE), (YARN, BASE)]
    for name, row in trained.items():
        if not row["tokens_trained"]:
            continue
        same_dose = _same_dose(name, trained)
        for way in ("full", "window"):
            pairs += [(f"{name}/{way}", other) for other in (BASE, SIXTEEN_BIT) if "-s0-" in name]
            pairs += [(f"{name}/{way}", f"{other}/window") for other in same_dose if other.startswith("control")]
        pairs += [(f"{name}/full", other) for other in (RAISED, YARN) if "-s0-" in name]
        for way in ("full", "window"):
            pairs.append((f"{name}-16bit/{way}", f"{name}/{way}"))
            if name.startswith("full"):
                pairs += [(f"{name}/{way}", f"{other}/{way}") for other in same_dose if other.startswith("pose")]
            plain = re.sub(r"-(noquote|base\w+)-", "-", name)  # as it, but for quoting or RoPE base
            pairs += [(f"{name}/{way}", f"{plain}/{way}")]
    table = []
    for first, second in dict.fromkeys(pairs):
        if first in readings.nats and second in readings.nats and first != second:
            about = {
                "first": first,
                "second": second,
                "tokens_trained": trained[first.partition("/")[0]]["tokens_trained"],
            }
            table += [{**about, **readings.difference(first, second, *bucket)} for bucket in readings.buckets()]
    return pd.DataFrame(table)


def _same_dose(name: str, trained: dict[str, dict[str, Any]]) -> list[str]:
    """Arms with 4-bit weights after as many tokens: those of an arm's seed or of the first, and every control."""
    seed, tokens = re.search(r"-s(\d+)-(\d+)", name).groups() if trained[name]["tokens_trained"] else ("", "")
    same = re.compile(rf"(.*-s(0|{seed})|control.*)-{tokens}")
    return [other for other in trained if tokens and same.fullmatch(other) and other != name]


def _retrieval(rows: Rows) -> pd.DataFrame:
    """By fifth of the text: questions answered word for word (exact bounds), and what the text is worth to them."""
    table = []
    for row in rows:
        if row["kind"] != "retrieval":
            continue
        asked = pd.DataFrame(row["rows"], columns=row["columns"])
        asked["fifth"] = np.minimum(asked.depth * 5, 4).astype(int)
        asked["gain"] = asked.log_probability - asked.alone
        for (task, length, fifth), part in asked.groupby(["kind", "length", "fifth"]):
            low, high = share_interval(int(part.exact.sum()), len(part))
            about = {"arm": row.get("arm", row["name"]), "tokens_trained": row["tokens_trained"]}
            place = {"weights": row["weights"], "task": task, "length": length, "fifth_of_depth": fifth}
            score = {"questions": len(part), "exact": part.exact.mean(), "low": low, "high": high}
            table.append({**about, **place, **score, "gain": part.gain.mean()})
    return pd.DataFrame(table)


def _losses(rows: Rows) -> dict[str, np.ndarray]:
    """Loss of every step of each arm's trunk, and of each branch."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["kind"] == "arm":
            found.pop(f"loss_{row['arm']}_trunk", None)  # of another run, which ended before
        elif row["kind"] == "training":
            name = "trunk" if row["what"] == "trunk" else row["what"].removeprefix("branch to ")
            found.setdefault(f"loss_{row['arm']}_{name}", []).extend(row["loss"])
    return {name: np.array(losses, dtype=np.float32) for name, losses in found.items()}


def _asked(rows: Rows) -> dict[str, np.ndarray]:
    """Every question, and of each arm that was asked: log-probability behind the text and alone, and word for word.

    An arm that was asked behind the shortest texts only has the questions of that length, in the same order.
    """
    found, questions = {}, pd.DataFrame()
    for row in rows:
        if row["kind"] == "retrieval":
            asked = pd.DataFrame(row["rows"], columns=row["columns"])
            questions = asked if len(asked) > len(questions) else questions
            found[f"asked_{row['name']}_log_probability"] = asked.log_probability.to_numpy(np.float16)
            found[f"asked_{row['name']}_alone"] = asked.alone.to_numpy(np.float16)
            found[f"asked_{row['name']}_exact"] = asked.exact.to_numpy(bool)
    if not found:
        return {}
    found["question_task"] = questions.kind.to_numpy(str)
    return found | {f"question_{name}": questions[name].to_numpy() for name in ("length", "text", "number", "depth")}
