"""C10 and C11: instruction tuning with a loss on the prompt, and with self-instructed long questions."""

from dataclasses import replace
from functools import partial
from typing import Any

from experiments.instruction_results import (
    DILUTION,
    FULL,
    LONG,
    LOSS,
    PAIRS,
    PLAIN,
    InstructionResults,
    instruction_results,
)
from llama_long_utils.notebooks import measured
from llama_long_utils.presets import load_preset
from tools.claims.line import AGREES, DISAGREES, MODELS, UNDECIDED, Interval, Line


def instruction_tuning(table: dict[str, Any]) -> list[Line]:
    """C10 and C11: judged where answers keep their weight, by the tiny model and by a real one past its window."""
    quality = {name: row[table["columns"].index("quality")] for name, row in table["rows"].items()}
    before, without, with_loss = (
        quality[row] for row in ("RLHF V5 data", *(f"with self-instruct, {no}loss on the prompt" for no in ("no ", "")))
    )
    loss = Line("A loss on the long prompt helps instruction tuning", f"QuALITY {without} to {with_loss} (Table 9)")
    long = Line(
        "Self-instructed long questions help without human labels",
        f"QuALITY {before} to {with_loss} with a loss on the prompt, to {without} without (Table 9)",
    )
    results = instruction_results(load_preset("tiny"))
    if results is None:
        return [loss, long]
    points = partial(measured, digits=1)
    asked = f"exact answers to quotations, {results.past[0]:,} to {results.past[-1]:,} tokens:"
    exact = results.difference(*PAIRS[LOSS])
    full, alone, plain, read = (results.difference(*PAIRS[name]) for name in (FULL, DILUTION, PLAIN, LONG))
    kept = results.far_nll(*PAIRS[FULL])
    scale = f"{MODELS['tiny']}, {len(results.seeds('long'))} seeds"
    real = instruction_results(load_preset("smollm2"))
    on_squad = {name: real.difference(*PAIRS[name], "f1") for name in (FULL, PLAIN, LONG)} if real else {}

    ours = f"{asked} {points(*exact)} points; with answers at their weight without it {points(*full)}, and far NLL "
    ours += f"{measured(*kept)} nat; by that dilution of answers alone {points(*alone)}"
    verdict = judged(full, *([on_squad[FULL]] if real else []))
    why = f"with answers kept at full weight {_exact_answers(full)} at tiny"
    reason = f"{why} (a control that was added afterwards){', and the model reads better' if kept[2] < 0 else ''}"
    if exact[2] < 0:
        why += "; as a mean over all labels they are fewer"
        reason += "; as a mean over all labels, which dilutes answers, it costs exact ones"
        reason += ", and so does dilution alone" if alone[2] < 0 else ""
    reason += "; compared at one learning rate"
    loss = replace(loss, ours=ours, scale=scale, verdict=f"{verdict}: {reason}", why=why)

    ours = f"{asked} without the loss {points(*plain)} points, with it {points(*read)}"
    verdict = judged(on_squad[PLAIN], on_squad[LONG]) if real else UNDECIDED
    reason = f"at tiny no model wrote the questions, a rule quotes them; without the loss {_exact_answers(plain)}, "
    reason += f"with it {_exact_answers(read)}"
    long = replace(long, ours=ours, scale=scale, verdict=f"{verdict}: {reason}")
    return [_on_squad(loss, real, FULL), _on_squad(long, real, LONG)] if real else [loss, long]


def _on_squad(line: Line, results: InstructionResults, pair: str) -> Line:
    """The line with the difference of a pair of arms at the real model, past its old window."""
    f1, likely = (results.difference(*PAIRS[pair], measure) for measure in ("f1", "log_probability"))
    ours = f"{line.ours}; F1 on SQuAD behind {results.past[-1]:,} tokens: {measured(*f1, digits=1)} points, "
    ours += f"log-probability of the answer {measured(*likely)} nat a token"
    f1_is, likelihood_is = (
        "not detectably different" if one[1] <= 0 <= one[2] else "higher" if one[1] > 0 else "lower"
        for one in (f1, likely)
    )
    judged = f"{line.verdict}; at SmolLM2, past the old window, F1 is {f1_is}, log-probability {likelihood_is}"
    seeds = len(results.seeds("long"))
    steps = results.preset.instruction.steps
    scale = (
        f"{line.scale}; {MODELS['smollm2']}, {seeds} seed{'s' if seeds > 1 else ''}, {steps} steps in the old window"
    )
    return replace(line, ours=ours, scale=scale, verdict=judged)


def judged(*differences: Interval) -> str:
    """Whether all intervals lie above 0, all lie below, or neither."""
    if all(low > 0 for _, low, _ in differences):
        return AGREES
    return DISAGREES if all(high < 0 for *_, high in differences) else UNDECIDED


def _exact_answers(difference: Interval) -> str:
    if difference[1] <= 0 <= difference[2]:
        return "no change of exact answers was detected"
    return f"exact answers are {'more' if difference[1] > 0 else 'fewer'}"
