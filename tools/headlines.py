"""What was found on real models: README's brief, and the words that it uses."""

from collections.abc import Sequence
from dataclasses import replace

from experiments.dose_doubts import WITHOUT, leads, mean_lead, nearly_full
from experiments.dose_record import SEEN
from experiments.real_models import DoseResults, read_dose_results, read_other_texts
from llama_long_utils.presets import load_preset
from llama_long_utils.records import recorded
from tools.claims.comparison import compared, statements_found
from tools.claims.line import MODELS
from tools.scoreboard import markdown_table, scoreboard

WORDS = """\
- **loss**, **NLL**: the negative natural logarithm of the probability that the model gave to the right token. Its \
unit is the **nat**. A hundredth of a nat less means one percent more probability.
- **arm**: one of the models, or ways of training, that are compared.
- **record**: numbers that were measured before, and are stored in `data/results`. **Live**: computed while the \
notebook runs.
- **windows**: the model reads the text through a sliding window of the old length. That is what you would do \
without an extension.
- **full context**: the model reads everything before the token.
- **far text**, **far out**: the second half of the positions read. It begins at the old window's end or beyond.
- **control**: the same model, trained on as many tokens without an extension, and read through windows.
- **PoSE**: training on short sequences whose positions skip ahead.
- **planted statement**: a sentence hidden in a text and asked for at the end.
- **RoPE**: rotary position embedding, which turns queries and keys by angles that grow with the position. Four ways \
to change it: **ABF** (adjusted base frequency) raises its base, **PI** (position interpolation) squeezes the \
positions, **YaRN** squeezes slow rotations only, **xPos** lets scores fade with distance.
- **ROUGE-L**: 0 to 100, how many of the wanted words were written in order."""

IN_BRIEF = """\
*Control*: a copy trained on as many tokens without the extension. *Brackets*: 95%, over texts and over kinds of text, \
the wider. *Not shown*: the bracket reaches zero, or a gain is smaller than seeds differ; it does not mean that there \
is nothing. *Far text*: the second half of the positions read, which begins at the old window's end or beyond. \
0.01 nats less means one percent more probability."""
HANGS_ON = (
    f"How much hangs on the choice of texts and windows (*nearly full*: only places where the sliding window holds at "
    f"least {SEEN:.1%} of its length); everything else, seed by seed, is in notebook 13:"
)
UNTRAINED = ["raised-nf4", "yarn-nf4"]  # RoPE scaled, and no training
NOT_SHOWN = "not shown"


def in_brief() -> str:
    """Markdown: what was found on real models, how many claims hold, and the longest step."""
    doses = sorted(read_dose_results(list(MODELS)).values(), key=lambda results: -compared(results, "full").tokens)
    columns = [_answers(results) for results in doses]
    table = markdown_table([[question, *(column[question] for column in columns)] for question in columns[0]])
    verdicts = [line.verdict.partition(":")[0] for line in scoreboard().values()]
    counts = ", ".join(f"{verdicts.count(one)} *{one}*" for one in dict.fromkeys(sorted(verdicts)))
    claims = f"**The paper's {len(verdicts)} claims**, at the sizes that we could train: {counts}."
    more = "\n".join(f"- {line}" for line in [line for results in doses for line in _what_it_hangs_on(results)])
    return "\n\n".join([_in_a_sentence(doses), table, IN_BRIEF, f"{HANGS_ON}\n\n{more}", claims, _longest_step()])


def _in_a_sentence(doses: Sequence[DoseResults]) -> str:
    """Whether the extension beats its control, what it costs, and who gains from far context at all."""
    beat, cost, gain = (
        [results for results in doses if test(results)]
        for test in (
            lambda results: compared(results, "fair").gains,
            lambda results: compared(results, "fair", "inside").found[1] > 0,
            lambda results: compared(results, "full").gains,
        )
    )
    copy = "far text better than a copy that was trained as long without the extension"
    first = f"{_names(beat)} reads {copy}" if beat else f"No model is shown to read {copy}"
    costs = "all read" if cost == list(doses) else f"{_names(cost) or 'none'} reads"
    others = [results for results in doses if results not in gain]
    uses = f"{_names(gain) or 'None'} gains from far context over windows of its own."
    if gain and others:
        uses += f" {_names(others)} is not shown to"
        fewer = max(compared(one, "full").tokens for one in others) < min(compared(one, "full").tokens for one in gain)
        uses += ", after fewer tokens." if fewer else "."
    return f"**{first}, and {costs} worse inside the old window.** {uses}"


def _names(doses: Sequence[DoseResults]) -> str:
    return " and ".join(MODELS[results.preset] for results in doses)


def _answers(results: DoseResults) -> dict[str, str]:
    """What a reader asks first of one model, and what was measured."""
    old, new = load_preset(results.preset).base.window, load_preset(results.preset).extension.window
    read, own = results.record.table("held_out").tokens.max(), compared(results, "full")
    about = f"{MODELS[results.preset]}, {old:,} to {new:,} tokens" + (f", read to {read:,}" if read < new else "")
    places = {
        "loss on far text with full context, minus **itself** in sliding windows of the old length": own,
        "loss on far text with full context, minus the **control** in such windows": compared(results, "fair"),
        "loss inside the old window, minus the control": compared(results, "fair", "inside"),
    }
    return {
        "in nats per token; below zero is better": about,
        "trained in 4 bits on": f"{own.tokens / 1e6:.1f}M tokens of whole long texts, {own.runs}",
        **{place: str(found) for place, found in places.items()},
        "hidden sentences found in texts of twice the old window": _found(results, 2 * old),
        "... of four times the old window": _found(results, 4 * old),
    }


def _found(results: DoseResults, length: int) -> str:
    """Planted statements that whole sequences found, beside the better of the untrained methods."""
    own, *others = (statements_found(results, arm, length) for arm in [results.largest("full"), *UNTRAINED])
    if "not asked" in {own, *others}:
        return "not asked"
    most, best = max((int(text.split()[0]), arm) for text, arm in zip(others, UNTRAINED, strict=True))
    low = mean_lead(leads(results, best, length))[1]
    return f"{own}; untrained {most}{'' if low > 0 else f' (lead {NOT_SHOWN})'}"


def _what_it_hangs_on(results: DoseResults) -> list[str]:
    """A line each: other texts, nearly full windows, the text that speaks most for the gain."""
    name, lines = MODELS[results.preset], []
    own, full, fair = (
        compared(results, line, whole=whole) for line, whole in (("full", False), ("full", True), ("fair", True))
    )
    if own.gains and (again := read_other_texts(results)):
        found = again.compare().set_index(["quantity", "texts"])[["nats", "low", "high"]]
        other = replace(own, found=tuple(found.loc[("far out, minus its own windows", "second set")]))
        lines.append(f"{name} minus itself in windows, on other texts, read after every choice was made: {other}")
    if own.gains:
        lines.append(f"{name} minus itself in windows, where these are nearly full: {full}")
        without = nearly_full(results).set_index(["line", "texts"]).loc[("full", WITHOUT)]
        if full.gains and without.high >= 0:
            lines.append(f"the same without the one text that speaks most for the gain: **{NOT_SHOWN}**")
    if fair.found[1] > 0:
        lines.append(f"{name} minus the control, where the control's windows are nearly full: {fair}")
    return lines


def _longest_step() -> str:
    record = recorded("gpu", "04_one_gpu_budget", needed=True)
    row, device = record.table("longest").iloc[0], record.content["provenance"]["device"]
    return (
        f"**The longest 4-bit training step that ran**: {row.model}, {row.context:,.0f} tokens in "
        f"{row.context / row.tokens_per_second:.0f} s, under a cap of {row.cap_gib:.0f} GiB, "
        f"{row.allocated_gib:.1f} GiB allocated, activation checkpoints on the host (one {device}, random weights)."
    )
