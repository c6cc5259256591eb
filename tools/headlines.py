"""What was found on real models: README's brief and headlines, and the words that they use."""

from functools import partial

from experiments.real_models import DoseResults, OtherTexts, read_dose_results, read_other_texts
from llama_long_utils.notebooks import NO_DIFFERENCE, measured
from llama_long_utils.presets import load_preset
from llama_long_utils.records import recorded
from tools.claims.comparison import compared, statements_found
from tools.claims.line import MODELS
from tools.scoreboard import markdown_table, scoreboard

WORDS = """\
- **loss**, **NLL**: the negative natural logarithm of the probability that the model gave to the right token. Its \
unit is the **nat**. A hundredth of a nat less means one percent more probability.
- **arm**: one of the models, or ways of training, that are compared.
- **windows**: the model reads the text through a sliding window of the old length. That is what you would do \
without an extension.
- **full context**: the model reads everything before the token.
- **far out**: positions in the far half of the texts, beyond the old window.
- **control**: the same model, trained on as many tokens without an extension, and read through windows.
- **PoSE**: training on short sequences whose positions skip ahead.
- **planted statement**: a sentence hidden in a text and asked for at the end.
- **RoPE**: rotary position embedding, which turns queries and keys by angles that grow with the position. Four ways \
to change it: **ABF** (adjusted base frequency) raises its base, **PI** (position interpolation) squeezes the \
positions, **YaRN** squeezes slow rotations only, **xPos** lets scores fade with distance.
- **ROUGE-L**: 0 to 100, how many of the wanted words were written in order."""
VERDICTS = """\
**What full context is worth to real models in 4 bits**, in nats per token. Below zero is better. Brackets: the \
outer ends of two 95% intervals, one over texts, one over kinds of text. *Behind*: both intervals lie above zero. \
*Ahead*: both lie below zero, and the lead is larger than the largest distance between seeds at any dose, where \
several were trained. We \
ask more of good news than of bad, but three seeds tell their distance only roughly. *No difference detected*: \
neither of these, which does not mean that both are equal."""
CAVEATS = """\
**Caveats.** Our windows slide by half their length, so a token has on average three quarters of the old window \
before it. A denser slide would be a stronger opponent, and full context would gain less (notebook 13). Seed 0 \
of SmolLM2, but for its largest control, was trained by an earlier form of the script (notebook 13); a seed is held \
against its own control where there is one. SmolLM2's far half lies beyond the sequences that it was trained \
on, Qwen's does not. A third of the training sequences quote themselves, in every model compared. The bases have \
probably read these texts in pretraining."""


def in_brief() -> str:
    """Markdown: what was found, in a few sentences."""
    lines = []
    for results in read_dose_results(list(MODELS)).values():
        name = MODELS[results.preset]
        own, far, inside = (compared(results, *line) for line in (("full",), ("fair",), ("fair", "inside")))
        own_nats, far_nats, inside_nats = (measured(*one.found, digits=3) for one in (own, far, inside))
        useful = "Far context became useful" if own.gains else "Far context was not shown to become useful"
        lines += [
            f"**{name}**, after {own.tokens / 1e6:.1f} million tokens of whole long sequences, {own.runs}:\n",
            f"- {useful}: full context reads {own_nats} nat per token against windows of the same model. "
            f"{_part_of_it(results)}",
            f"- Far out, against a control trained on as many tokens: {far.says}, {far_nats} nat.",
            f"- Inside the old window, against that control: {inside.says}, {inside_nats} nat.",
        ]
        if again := read_other_texts(results):
            lines += _on_other_texts(again, far.spread)
        lines[-1] += "\n"
    verdicts = [line.verdict.partition(":")[0] for line in scoreboard().values()]
    counts = ", ".join(f"{verdicts.count(one)} *{one}*" for one in dict.fromkeys(sorted(verdicts)))
    lines.append(f"**The paper's {len(verdicts)} claims**, at the sizes that we could train: {counts}.")
    return "\n".join(lines)


def _part_of_it(results: DoseResults) -> str:
    """The gain over own windows where these are nearly full, and in texts that hardly repeat themselves."""
    full, texts, limit = compared(results, "full", whole=True), results.gains_of_texts(), 0.1
    plain = texts[texts.repeats_itself < limit].nats
    return (
        f"Where those windows are nearly full, it is {measured(*full.found, digits=3)}. In the {len(plain)} of "
        f"{len(texts)} texts that repeat less than {limit:.0%} of themselves, it is {plain.mean():+.3f} on average."
    )


def _on_other_texts(again: OtherTexts, spread: float) -> list[str]:
    """Lines of a list: the same weights on texts that no choice had seen; `spread` as `Comparison` has it."""
    found = again.compare().set_index(["quantity", "texts"])
    own, control = "far out, minus its own windows", "far out, minus another seed's control in windows"
    new, old_and_new = (found.loc[(control, texts)] for texts in ("second set", "both"))
    gains = new.high < 0 and -new.nats > spread
    told = [
        measured(*row[["nats", "low", "high"]], digits=3) for row in (found.loc[(own, "second set")], new, old_and_new)
    ]
    return [
        f"- {new.documents:.0f} other texts of {new.kinds:.0f} kinds, read after every choice was made, with the first "
        f"seed's weights: {told[0]} nat against its own windows. Against another seed's control in windows: "
        f"{'ahead' if gains else 'behind' if new.low > 0 else NO_DIFFERENCE}, {told[1]}; with the first texts, "
        f"{old_and_new.documents:.0f} in all, {told[2]}, which is "
        f"{'more' if -old_and_new.nats > spread else 'less'} than the largest distance between seeds, at any dose."
    ]


def headlines() -> str:
    """Markdown: what was found on real models, a column for each, and the longest training step."""
    doses = read_dose_results(list(MODELS)).values()
    tables = []
    for column_of in (_of_doses, _of_statements):
        columns = [column_of(results) for results in doses]
        tables.append(markdown_table([[name, *(column[name] for column in columns)] for name in columns[0]]))
    record = recorded("gpu", "04_one_gpu_budget")
    row, device = record.table("longest").iloc[0], record.content["provenance"]["device"]
    seconds = row.context / row.tokens_per_second
    longest = (
        f"**The longest 4-bit training step that ran**: {row.model}, {row.context:,.0f} tokens in {seconds:.0f} s, "
        f"under a cap of {row.cap_gib:.0f} GiB, {row.allocated_gib:.1f} GiB allocated, activation checkpoints on the "
        f"host (one {device}, random weights)."
    )
    return "\n\n".join(
        [VERDICTS, tables[0], "**Planted statements found**, right to the word:", tables[1], CAVEATS, longest]
    )


def _of_doses(results: DoseResults) -> dict[str, str]:
    """What full context is worth to one model, by question."""
    old, new = load_preset(results.preset).base.window, load_preset(results.preset).extension.window
    own, posed, far, inside = (
        compared(results, *line) for line in (("full",), ("pose",), ("fair",), ("fair", "inside"))
    )
    read = results.record.table("held_out").tokens.max()
    arms = results.record.table("arms").set_index("arm")
    length = int(arms.window[results.largest("full").rpartition("-")[0]].max())
    return {
        "": f"{MODELS[results.preset]}, {old:,} to {new:,} tokens" + (f", read to {read:,}" if read < new else ""),
        "trained on whole sequences": f"{own.tokens / 1e6:.1f} million tokens in sequences of {length:,}, {own.runs}",
        "far out": f"positions {read // 2:,} to {read:,}",
        "far out, full context minus the same model's windows": str(own),
        "own windows, where they are nearly full": str(compared(results, "full", whole=True)),
        "own windows, seed by seed": own.by_seed,
        "the same, trained by PoSE instead": str(posed or "not run"),
        "far out, full context minus the control's windows": str(far),
        "control's windows, where they are nearly full": str(compared(results, "fair", whole=True)),
        "control's windows, seed by seed": far.by_seed,
        "inside the old window, minus the control": str(inside),
        "inside, seed by seed": inside.by_seed,
    }


def _of_statements(results: DoseResults) -> dict[str, str]:
    """How many planted statements one model found, by arm and length."""
    old = load_preset(results.preset).base.window
    found = partial(statements_found, results)
    return {
        "": f"{MODELS[results.preset]}, old window {old:,} tokens, 5 texts of 20 statements",
        "in four times the old window: trained on whole sequences": found(results.largest("full"), 4 * old),
        "in four times the old window: untrained, YaRN": found("yarn-nf4", 4 * old),
        "in twice the old window: trained on whole sequences": found(results.largest("full"), 2 * old),
        "in twice the old window: untrained, RoPE base raised": found("raised-nf4", 2 * old),
        "in twice the old window: untrained, YaRN": found("yarn-nf4", 2 * old),
        "in the old window: trained on whole sequences": found(results.largest("full"), old),
        "in the old window: base": found("base-nf4", old),
        "in the old window: control": found(results.largest("control"), old),
    }
