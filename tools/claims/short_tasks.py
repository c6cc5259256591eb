"""C7: short tasks before and after the extension."""

from typing import Any

import numpy as np

from experiments.real_models import read_dose_results
from llama_long_utils.evaluation.statistics import FEWEST
from llama_long_utils.notebooks import measured
from llama_long_utils.records import recorded
from tools.claims.comparison import compared
from tools.claims.line import AGREES, DISAGREES, MARGIN, MODELS, UNDECIDED, Line

BENCHMARKS = "08_benchmark_deltas"
CHANCE = {"mmlu": 0.25}  # of its four choices, one is right


def short_tasks(table: dict[str, Any]) -> Line:
    """C7: MMLU from the same 4-bit base must not lose `MARGIN`, beside a control."""
    place = table["columns"].index("mmlu")
    before, after = (table[model]["7B"][place] for model in ("llama_2", "llama_2_long"))
    claim, paper = "Short tasks do not suffer", f"MMLU {before} to {after} at 7B (Table 1)"
    name = next((preset for preset in MODELS if recorded(preset, BENCHMARKS)), None)
    if name is None:
        return Line(claim, paper)
    deltas = recorded(name, BENCHMARKS).table("deltas")
    accuracy = deltas[(deltas.task == "mmlu") & (deltas.metric == "accuracy")].set_index("pair")
    if "base -> extended" not in accuracy.index:
        return Line(claim, paper)
    mmlu = accuracy.loc["base -> extended"]
    ours = [f"4-bit MMLU {100 * mmlu.before:.1f}% to {100 * mmlu.after:.1f}% ({_points(mmlu, 2)} points)"]
    pair, unpacked = "base_16_bit -> extended", None
    if pair in accuracy.index:
        unpacked = accuracy.loc[pair]
        ours.append(f"against the file's own 4-bit weights, unpacked, {_points(unpacked, 2)} points")
    short = deltas[(deltas.length == 0) & (deltas["items"] >= FEWEST) & (deltas.pair == "base -> extended")]
    dearer = short[(short.metric == "answer_nll") & (short.low > 0)]
    ours += [f"answers of {row.task} {measured(row.difference, row.low, row.high)} nat" for row in dearer.itertuples()]
    few = short[short.metric.isin(["exact_match", "passed"])]
    ours += [f"{row.task} {_points(row)} points" for row in few.itertuples() if row.before + row.after > 0.1]
    margin = 1.96 * np.sqrt(mmlu.before * (1 - mmlu.before) / mmlu["items"])
    if mmlu.before - margin <= CHANCE["mmlu"]:
        judged = f"{UNDECIDED}: the base answers at chance"
    elif mmlu.high < 0:
        judged = f"{DISAGREES}: on MMLU"
    elif mmlu.low > -MARGIN and "rope_unchanged -> extended" in accuracy.index:
        beside = accuracy.loc["rope_unchanged -> extended"]
        if beside.low > -MARGIN:
            judged = f"{AGREES}: on MMLU, beside a control; other tasks have too few items"
        else:
            judged = f"{UNDECIDED}: a loss of {100 * MARGIN:.0f} points against the control is not excluded"
    elif mmlu.low > -MARGIN:
        judged = f"{UNDECIDED}: MMLU {'rises' if mmlu.low > 0 else 'does not fall'} over the same 4-bit base"
        if unpacked is not None and unpacked.high < 0:
            judged += " and falls from its unpacked weights"
        judged += "; the control was not tested on it; other tasks have too few items"
    else:
        judged = f"{UNDECIDED}: a loss of {100 * MARGIN:.0f} points is not excluded"
    for results in read_dose_results([name]).values():
        inside, before = compared(results, "fair", "inside").found, results.four_bits().query("place == 'inside'")
        before = before.set_index("quantity").loc["extended minus NF4 base", ["nats", "low", "high"]]
        ours.append(f"text inside the old window {measured(*before, digits=3)} nat against the same 4-bit base")
        ours.append(f"{measured(*inside, digits=3)} against a control trained as long")
    return Line(claim, paper, "; ".join(ours), f"{MODELS[name]}, one seed", judged)


def _points(row: Any, digits: int = 0) -> str:
    """A difference of shares with its interval, in points."""
    return measured(100 * row.difference, 100 * row.low, 100 * row.high, digits=digits)
