"""Reading the pretraining experiment: its record from the cells, and what an arm costs and is worth beside another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd

from experiments.power_law import fit_power_law
from experiments.race_results import student_reach, wider_interval
from llama_long_utils.evaluation.statistics import Bootstrap
from llama_long_utils.paths import RESULTS
from llama_long_utils.presets import load_preset
from llama_long_utils.records import Record, read_record, write_record

SLUG = "12_pretraining_curriculum"
LARGER_SLUG = "12_curriculum_of_a_larger_model"
LATER = "12_switch_of_a_copying_model"
MIXED = "12_data_mix_of_a_copying_model"
GPU_SLUG = "12_curriculum_on_a_gpu"
FOUR_SLUG = "12_curriculum_of_4m"
NAMES = ["size", "arm", "seed"]
SWITCHED = ("switch-20", "switch-40", "switch-80", "switch-95")


@dataclass(frozen=True)
class PretrainingResults:
    """The cells as recorded: `cells` has a row for each, in the order of the arrays' first axis.

    `arrays`: nats (cells, ways, documents, buckets), tokens (documents, buckets), loss (cells, steps; NaN behind the
    end), documents, edges, ways. Of models that copy also copied_hits (cells, documents, distances), copied_tokens
    (documents, distances), distances (edges of the buckets, in tokens); short_hits and short_tokens are those in the
    first 1,024 tokens.
    """

    cells: pd.DataFrame
    arrays: dict[str, np.ndarray]
    bootstrap: Bootstrap
    record: Record | None = None

    def nats(
        self, size: str, arm: str, low: int, high: int, way: str = "full"
    ) -> tuple[dict[int, np.ndarray], np.ndarray]:
        """Nats of each document by seed, and tokens of each document, at positions [low, high)."""
        edges, ways = list(self.arrays["edges"]), list(self.arrays["ways"])
        buckets = slice(edges.index(low), edges.index(high))
        rows = self.cells[(self.cells["size"] == size) & (self.cells.arm == arm)]
        nats = self.arrays["nats"][:, ways.index(way), :, buckets].sum(axis=2)
        return {int(seed): nats[row] for row, seed in rows.seed.items()}, self.arrays["tokens"][:, buckets].sum(axis=1)

    def seeds(self, size: str, *arms: str) -> list[int]:
        """Seeds of which all these arms were measured."""
        parts = self.cells[self.cells["size"] == size]
        return sorted(set.intersection(*(set(parts[parts.arm == arm].seed) for arm in arms)))

    def difference(
        self, size: str, first: tuple[str, str], second: tuple[str, str], low: int = 1, high: int = 4096
    ) -> dict[str, Any]:
        """NLL of one (arm, way) minus another's, paired by seed and document: value, low, high, each seed, seeds."""
        return self.interval(*self._change(size, first, second, low, high))

    def less_from_context(self, size: str, arm: str, low: int, high: int, base: str = "long") -> dict[str, Any]:
        """What full context saves `base` against windows minus what it saves `arm`, as in `difference`.

        Above zero, the arm makes less of what lies far back.
        """
        seeds = self.seeds(size, arm, base)
        gains = [self._change(size, (one, "full"), (one, "window"), low, high, seeds) for one in (arm, base)]
        return self.interval(gains[0][0] - gains[1][0], gains[0][1])

    def _change(
        self, size: str, first: tuple[str, str], second: tuple[str, str], low: int, high: int, seeds: Sequence[int] = ()
    ) -> tuple[np.ndarray, np.ndarray]:
        """Nats of one (arm, way) minus another's, (seeds, documents), and tokens (documents)."""
        (one, tokens), (other, _) = (self.nats(size, arm, low, high, way) for arm, way in (first, second))
        return np.array([one[seed] - other[seed] for seed in seeds or self.seeds(size, first[0], second[0])]), tokens

    def interval(self, change: np.ndarray, tokens: np.ndarray) -> dict[str, Any]:
        """A change in nats, (seeds, documents), per token: value, low, high, each seed, seeds."""
        each = change.sum(axis=1) / tokens.sum()
        return {**wider_interval(change, tokens, self.bootstrap), "each": list(each), "seeds": len(each)}

    def copying(
        self, size: str, arm: str, base: str = "", low: int = 1024, high: int = 4096, *, within: str = "copied"
    ) -> dict[str, Any]:
        """Share of tokens of excerpts, `low` to `high` tokens from their originals, that an arm continues correctly.

        With `base`, that share minus the other arm's, paired. Keys as in `difference`. `within`: "copied" is the whole
        text, "short" its first 1,024 tokens.
        """
        edges = list(self.arrays["distances"])
        buckets = slice(edges.index(low), edges.index(high))
        seeds = self.seeds(size, arm, base or arm)
        hits = self.arrays[f"{within}_hits"][..., buckets].sum(axis=-1)
        rows = self.cells[self.cells["size"] == size].reset_index().set_index(["arm", "seed"])["index"]
        change = np.array([hits[rows[arm, seed]] - (hits[rows[base, seed]] if base else 0) for seed in seeds])
        return self.interval(change, self.arrays[f"{within}_tokens"][:, buckets].sum(axis=1))

    def cost(self, size: str, arm: str, column: str = "flops") -> float:
        """Mean over seeds of a column of `cells`."""
        return float(self.cells[(self.cells["size"] == size) & (self.cells.arm == arm)][column].mean())

    def curriculum(self, size: str) -> pd.DataFrame:
        """A row for each arm from scratch and the continued one: cost beside "long", NLL minus that of "long".

        For NLL, "short" is read in windows of its own length, all others with full context. Of models that copy there
        are also "copied", `copying` from beyond 1,024 tokens, and "copied_less", what it is minus that of "long".
        """
        rows = []
        for arm in ("long", *SWITCHED, "in-reach", "short", "continued", "s2"):
            if not self.seeds(size, "long", arm):
                continue
            way = "window" if arm == "short" else "full"
            whole = {name: self.cost(size, arm, name) / self.cost(size, "long", name) for name in COSTS}
            whole |= {name: self.cost(size, arm, name) for name in STEPS}
            rows.append({"arm": arm, **whole, **self.difference(size, (arm, way), ("long", "full"))})
            if "copied_hits" in self.arrays:
                rows[-1] |= {"copied": self.copying(size, arm)["value"], "copied_less": self.copying(size, arm, "long")}
        return pd.DataFrame(rows)

    def spike(self, size: str, arm: str, before: int = 20, after: int = 60) -> np.ndarray:
        """Training loss of an arm minus that of "long" at the same step, on the same tokens, around its switch.

        Shape (seeds, before + after), in nats; column `before` is the first long step.
        """
        loss, rows = self.arrays["loss"], self.cells[self.cells["size"] == size].set_index(["arm", "seed"], append=True)
        at = {(arm, seed): row for row, arm, seed in rows.index}
        seeds = self.seeds(size, arm, "long")
        switch = int(self.cost(size, arm, "short_steps"))
        change = np.array([loss[at[arm, seed]] - loss[at["long", seed]] for seed in seeds])
        return change[:, switch - before : switch + after]

    def mean_nll(self, cell: int) -> float:
        """NLL of a row of `cells` over all tokens, with full context."""
        ways = list(self.arrays["ways"])
        return float(self.arrays["nats"][cell, ways.index("full")].sum() / self.arrays["tokens"].sum())

    def content_and_length(self, size: str) -> pd.DataFrame:
        """Rows: what is changed between two mixes, and far NLL of the first minus the second: value, low, high."""
        pairs = {
            "length alone": ("mix-shredded", "mix-original"),
            "content, all rows short": ("mix-long-removed", "mix-shredded"),
            "content, lengths unchanged": ("mix-better", "mix-original"),
            "more long documents": ("mix-upweighted", "mix-original"),
        }
        return pd.DataFrame(
            {"what is changed": what, "first minus second": " - ".join(arm.removeprefix("mix-") for arm in pair)}
            | self.difference(size, (pair[0], "full"), (pair[1], "full"), *PLACES["far"])
            for what, pair in pairs.items()
            if self.seeds(size, *pair)
        )

    def content_or_length(self, size: str) -> pd.DataFrame:
        """What two mixes of a model that copies differ by: a row for each change, measure and place.

        Columns value, low, high, each: NLL in nats at PLACES, copying in points at COPIED.
        """
        rows = []
        for change, (first, second) in MIX_CHANGES.items():
            for place in PLACES if self.seeds(size, first, second) else ():
                nll = self.difference(size, (first, "full"), (second, "full"), *PLACES[place])
                copied = self.copying(size, first, second, **COPIED[place])
                copied |= {name: 100 * copied[name] for name in ("value", "low", "high")}
                copied["each"] = [100 * value for value in copied["each"]]
                about = {"change": change, "place": place}
                rows += [{**about, "measure": "NLL", **nll}, {**about, "measure": "copying", **copied}]
        return pd.DataFrame(rows)

    def saved_at_equal_quality(self, size: str) -> tuple[float, float]:
        """The least and the most that a switch can save of the operations of "long", by the intervals of NLL.

        Least: by arms of which a loss of `EQUAL` is excluded. Most: by those not told to be worse. 0 if there is none.
        Arms of fewer than `FEWEST_SEEDS` tell neither.
        """
        arms = self.curriculum(size).set_index("arm").filter(SWITCHED, axis="index")
        arms = arms[arms.seeds >= FEWEST_SEEDS]
        least, most = (max([0.0, *(1 - arms.flops[which])]) for which in (arms.high < EQUAL, arms.low <= 0))
        return least, most

    def context_saves_more(
        self, larger: str, smaller: str, other: "PretrainingResults | None" = None
    ) -> dict[str, Any]:
        """What the longest context saves `larger` minus what it saves `smaller`, which may be of another record.

        Paired by document, and by seed if both have several.
        """
        tables = [results.record.table("context_saved") for results in (self, other or self)]
        named = [table[table.model == name] for table, name in zip(tables, (larger, smaller), strict=True)]
        first, second = (table.pivot_table("nats", "seed", "document") for table in named)
        if len(first) > 1 < len(second):
            first, second = first.align(second, "inner", axis="index")
        tokens = named[1].groupby("document").tokens.first()
        return self.interval(first.to_numpy() - second.to_numpy(), tokens.to_numpy())


PLACES = {"near": (1, 512), "far": (2048, 4096)}
FIRST_ORDERS = 3  # of the data mixes: more were added when these had been seen
LENGTH, CONTENT = "length taken away", "better content"  # what is compared: both at an equal share of quotes
MIX_CHANGES = {  # of a model that copies: the first arm minus the second
    LENGTH: ("mix-cut-first", "mix-original"),
    CONTENT: ("mix-better", "mix-original"),
    (REMOVED := "content taken away, all short"): ("mix-long-removed", "mix-cut-first"),
    (PARTED := "quotes parted, all short"): ("mix-shredded", "mix-cut-first"),
    (MORE := "more long documents"): ("mix-upweighted", "mix-original"),
    (OTHER := "another domain"): ("mix-other-domain", "mix-original"),
}
COPIED = {  # distances back to what is quoted, and in which part of the text
    "near": {"low": 1, "high": 512, "within": "short"},
    "far": {"low": 1024, "high": 4096, "within": "copied"},
}
LAW_SAMPLES = 300
FEWEST_SEEDS = 3  # from scratch: of fewer, an interval says nothing, or is of the documents alone
EQUAL = 0.01  # nat: a loss to exclude before quality is called equal; one percent less probability
COSTS = ("flops", "flops_counted", "seconds", "tokens")
STEPS = ("short_steps", "long_steps")


def pretraining_results(path: Path | None = None) -> PretrainingResults:
    """The experiment from its committed record, or another."""
    record = Record(path or RESULTS / "tiny" / f"{SLUG}.json")
    arrays = record.arrays
    evaluation = load_preset("tiny").evaluation
    bootstrap = Bootstrap(len(arrays["documents"]), evaluation.bootstrap_samples, evaluation.seed)
    return PretrainingResults(record.table("cells"), arrays, bootstrap, record)


def larger_results() -> PretrainingResults:
    """The curriculum from scratch at a larger size, from its committed record."""
    return pretraining_results(RESULTS / "tiny" / f"{LARGER_SLUG}.json")


def recorded_loss(size: str, arm: str, seed: int) -> float | None:
    """NLL of this cell over all tokens, with full context, from the first of the committed records that has it."""
    for path in sorted((RESULTS / "tiny").glob("12_*.json")):
        results = pretraining_results(path)
        cells = results.cells.query("`size` == @size and arm == @arm and seed == @seed")
        if len(cells):
            return results.mean_nll(int(cells.index[0]))
    return None


def over_sizes(parts: Sequence[tuple[PretrainingResults, str]], arm: str, base: str = "long") -> dict[str, Any]:
    """NLL of an arm minus another's at several sizes together, as in `difference`: every seed of each size counts once.

    Student's interval thus takes the sizes for as many draws of one effect.
    """
    changes = [results._change(size, (arm, "full"), (base, "full"), 1, 4096) for results, size in parts]
    results, _ = parts[0]
    return results.interval(np.concatenate([change for change, _ in changes]), changes[0][1])


def copying_results() -> PretrainingResults:
    """The tiny Llama trained on (pretraining_copying.py), from its committed record."""
    return pretraining_results(RESULTS / "tiny" / f"{LATER}.json")


def mixed_results() -> PretrainingResults:
    """The data mixes of the tiny Llama (pretraining_mix.py), from their committed record."""
    return pretraining_results(RESULTS / "tiny" / f"{MIXED}.json")


def heavier(effects: pd.DataFrame, measure: str, skip: int = 0) -> str:
    """What changes a far measure more, "length" or "content", by the interval of the paired difference; else "neither".

    `effects` are `content_or_length`, of the same orders of the texts for both changes; `skip` leaves the first out.
    The interval is Student's t over orders. A change for the better by length, or for the worse by content, is none.
    """
    far = effects[(effects.measure == measure) & (effects.place == "far")].set_index("change").each
    worse = 1 if measure == "NLL" else -1
    cost, gain = worse * np.array(far[LENGTH])[skip:], -worse * np.array(far[CONTENT])[skip:]
    for name, one, other in (("length", cost, gain), ("content", gain, cost)):
        if all(each.mean() > student_reach(each) for each in (one, one - other)):
            return name
    return "neither"


def power_laws(table: pd.DataFrame, bootstrap: Bootstrap) -> pd.DataFrame:
    """A row for each model and seed: the law's numbers, beta with a 95% interval over documents, the misfit in nats.

    `table` has columns model, seed, parameters, document, context, nats, tokens. "saved" is what the longest context
    saves against the shortest, in nats, with its interval, too.
    """
    rows = []
    for (model, seed), part in table.groupby(["model", "seed"], sort=False):
        nats, tokens = (part.pivot_table(name, "document", "context").to_numpy() for name in ("nats", "tokens"))
        context = np.sort(part.context.unique()).astype(float)
        losses = nats.sum(axis=0) / tokens.sum(axis=0)
        law = fit_power_law(context, losses)
        weights = replace(bootstrap, units=len(nats), samples=LAW_SAMPLES).weights()
        drawn = (weights @ nats) / (weights @ tokens)
        betas, gains = [fit_power_law(context, line)["beta"] for line in drawn], drawn[:, 0] - drawn[:, -1]
        row = {"model": model, "seed": int(seed), "parameters": int(part.parameters.iloc[0]), **law}
        row["beta_low"], row["beta_high"] = np.percentile(betas, [2.5, 97.5])
        row["saved"] = losses[0] - losses[-1]
        row["saved_low"], row["saved_high"] = np.percentile(gains, [2.5, 97.5])
        rows.append(row)
    return pd.DataFrame(rows)


def read_as_trained(cells: Sequence[Path], way: str = "full") -> pd.DataFrame:
    """What cells of sparse attention read with the attention they were trained with: nats and tokens by document."""
    parts = []
    for path in cells:
        if "as_trained" in read_record(path)["tables"]:
            table, cost = Record(path).table("as_trained"), Record(path).table("cost")
            parts.append(table[table.way == way].assign(**cost[["size", "seed"]].iloc[0]))
    if not parts:
        return pd.DataFrame()
    return pd.concat(parts).groupby(["size", "seed", "document"], sort=False)[["nats", "tokens"]].sum().reset_index()


def collect(
    records: list[Path],
    folder: Path,
    slug: str = SLUG,
    *,
    contexts: Sequence[Path] = (),
    called: Mapping[str, str] = MappingProxyType({}),
    more: Mapping[str, pd.DataFrame] = MappingProxyType({}),
    about: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Join the records of cells and of losses by context to folder/slug.json and .npz.

    `called` gives sizes other names there; `more` are tables beside those of the cells, `about` is more provenance.
    """
    cells = pd.concat([Record(path).table("cost") for path in records], ignore_index=True)
    cells["size"] = cells["size"].replace(dict(called))
    tables = [Record(path).table("nll") for path in records]
    have = [read_record(path)["tables"] for path in records]
    losses = [[row["loss"] for row in tables.get("loss", ())] for tables in have]
    first = tables[0]
    documents, ways = list(first.document.unique()), list(first.way.unique())
    edges = sorted({*first.position_low, *first.position_high})
    shape = (len(documents), len(ways), len(edges) - 1)
    nats = np.array([table.nats.to_numpy().reshape(shape).swapaxes(0, 1) for table in tables])
    loss = np.full((len(records), max(map(len, losses))), np.nan, dtype=np.float32)
    for row, values in zip(loss, losses, strict=True):
        row[: len(values)] = values
    tokens = first.tokens.to_numpy().reshape(shape)[:, 0]
    arrays = {"nats": nats.astype(np.float32), "tokens": tokens, "loss": loss, "edges": np.array(edges)}
    by_distance = {}
    for name, within in {"copying": "copied", "copying_short": "short"}.items():
        lacking = [path.stem for path, tables in zip(records, have, strict=True) if name not in tables]
        if len(lacking) == len(records):
            continue
        if lacking:
            raise ValueError(f"cells without {name!r}, which others have, are to be measured again: {lacking}")
        copied = [Record(path).table(name) for path in records]
        distances = sorted({*copied[0].distance_low, *copied[0].distance_high})
        shape = len(documents), len(distances) - 1
        arrays[f"{within}_hits"] = np.array([table.hits.to_numpy().reshape(shape) for table in copied])
        arrays[f"{within}_tokens"] = copied[0].tokens.to_numpy().reshape(shape)
        arrays["distances"] = np.array(distances)
        named = [cells.loc[[cell], NAMES].merge(table, "cross") for cell, table in enumerate(copied)]
        sums = pd.concat(named).groupby([*NAMES, "distance_low", "distance_high"], sort=False)[["hits", "tokens"]].sum()
        by_distance[name] = (sums.hits / sums.tokens)[sums.tokens > 0].rename("value").reset_index()
    arrays |= {"documents": np.array(documents), "ways": np.array(ways)}
    by_context = {}
    if contexts:
        table = pd.concat([Record(path).table("contexts") for path in contexts], ignore_index=True)
        table["model"] = table["model"].replace(dict(called))
        sums = table.groupby(["model", "seed", "parameters", "context"], sort=False)[["nats", "tokens"]].sum()
        by_context["context_loss"] = (sums.nats / sums.tokens).rename("value").reset_index()
        evaluation = load_preset("tiny").evaluation
        ends = table[table.context.isin([table.context.min(), table.context.max()])]
        nats = ends.pivot_table("nats", ["model", "seed", "document", "tokens"], "context", sort=False)
        saved = (nats[nats.columns.min()] - nats[nats.columns.max()]).rename("nats")
        by_context["context_saved"] = saved.reset_index()
        by_context["power_law"] = power_laws(table, Bootstrap(len(documents), LAW_SAMPLES, evaluation.seed))
    contents = [read_record(path) for path in records]
    provenance = [content["provenance"] for content in contents]
    arithmetic = "products in bf16, weights in fp32"
    versions = {}
    if slug == GPU_SLUG:  # which was another machine
        versions = {"versions": provenance[0]["versions"]}
        arithmetic = "products of the layers in bf16, of the head in TF32, weights and reading in fp32"
    if slug in (SLUG, LARGER_SLUG, FOUR_SLUG):
        arithmetic = "products of training in bf16, weights and reading in fp32"
    same = {name: ", ".join(sorted({entry[name] for entry in provenance})) for name in ("commit", "date", "device")}
    return write_record(
        folder,
        slug,
        arrays=arrays,
        preset=contents[0]["preset"],
        question=contents[0]["question"],
        tables={"cells": cells, **by_distance, **by_context, **more},
        seeds={"training": sorted(int(seed) for seed in cells.seed.unique())}
        | {name: provenance[0]["seeds"][name] for name in ("evaluation", "split")},
        seconds=float(cells.seconds.sum()),
        provenance={
            **same,
            **versions,
            "command": "python -m experiments pretraining",
            "device": f"{same['device']}, {arithmetic}",
            **about,
        },
    )


def add_cells(
    record: Path,
    cells: Sequence[Path],
    contexts: Sequence[Path] = (),
    *,
    called: Mapping[str, str] = MappingProxyType({}),
    more: Mapping[str, pd.DataFrame] = MappingProxyType({}),
    about: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Add cells that were measured later, and their losses by context, to a record; those that it has stay as they are.

    Only the losses by context of cells that are added here are. The rest is as in `collect`.
    """
    before = pretraining_results(record)
    there = set(before.cells[NAMES].itertuples(index=False, name=None))
    cells = [path for path in cells if tuple(Record(path).table("cost")[NAMES].iloc[0]) not in there]
    if not cells:
        return record
    with TemporaryDirectory() as scratch:
        added = {(cost["size"], cost.seed) for cost in (Record(path).table("cost").iloc[0] for path in cells)}
        read = {path: Record(path).table("contexts").iloc[0] for path in contexts}
        contexts = [path for path, row in read.items() if (row.model, row.seed) in added]
        later = pretraining_results(
            collect(cells, Path(scratch), record.stem, contexts=contexts, called=called, more=more, about=about)
        )
        assert before.record and later.record  # read from files
        new, content, arrays = later.record.content["provenance"], before.record.content, dict(before.arrays)
        tables = {name: before.record.table(name) for name in content["tables"]}
        for name in later.record.content["tables"]:
            tables[name] = pd.concat([tables.get(name), later.record.table(name)], ignore_index=True)
        steps = max(results.arrays["loss"].shape[1] for results in (before, later))
        for name in ("nats", "loss"):
            both = [results.arrays[name] for results in (before, later)]
            if name == "loss":
                both = [np.pad(one, ((0, 0), (0, steps - one.shape[1])), constant_values=np.nan) for one in both]
            arrays[name] = np.concatenate(both)
    provenance = content["provenance"] | {name: about[name] for name in about if name == "command"}
    for name in ("commit", "date", "device"):
        provenance[name] = ", ".join(dict.fromkeys([provenance[name], new[name]]))
    training = {int(seed) for seed in tables["cells"].seed}
    provenance["seeds"] = {**provenance["seeds"], "training": sorted(training)}
    provenance["seconds"] = round(provenance["seconds"] + new["seconds"], 1)
    about = {name: content[name] for name in ("preset", "question")}
    rest = {"tables": tables, "seeds": provenance["seeds"], "seconds": provenance["seconds"]}
    return write_record(record.parent, record.stem, **about, **rest, provenance=provenance, arrays=arrays)
