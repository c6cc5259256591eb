"""What was found on real models: README's brief and headlines, and the words that they use."""

from dataclasses import replace
from functools import partial

from experiments.dose_doubts import WITHOUT, leads, mean_lead, nearly_full
from experiments.real_models import DoseResults, OtherTexts, read_dose_results, read_other_texts
from llama_long_utils.notebooks import NO_DIFFERENCE, measured
from llama_long_utils.presets import load_preset
from llama_long_utils.records import recorded
from tools.claims.comparison import Comparison, compared, statements_found
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
- **far out**: positions in the far half of the texts, beyond the old window.
- **control**: the same model, trained on as many tokens without an extension, and read through windows.
- **PoSE**: training on short sequences whose positions skip ahead.
- **planted statement**: a sentence hidden in a text and asked for at the end.
- **RoPE**: rotary position embedding, which turns queries and keys by angles that grow with the position. Four ways \
to change it: **ABF** (adjusted base frequency) raises its base, **PI** (position interpolation) squeezes the \
positions, **YaRN** squeezes slow rotations only, **xPos** lets scores fade with distance.
- **ROUGE-L**: 0 to 100, how many of the wanted words were written in order."""
HARDLY = 0.1  # of a text, in stretches that it repeats
VERDICTS = """\
**What full context is worth to real models in 4 bits**, in nats per token. Below zero is better. Brackets: the \
outer ends of two 95% intervals, one over texts, one over kinds of text. *Behind*: both intervals lie above zero. \
*Ahead*: both lie below zero, and the lead is larger than seeds lie apart, however long they were trained. We \
ask more of good news than of bad, but three seeds tell their distance only roughly. *No difference detected*: \
neither of these, which does not mean that both are equal. README calls that *not shown*."""
CAVEATS = """\
**Caveats.** Our windows slide by half their length, so a token has on average three quarters of the old window \
before it. A denser slide would be a stronger opponent, and full context would gain less (notebook 13). Seed 0 \
of SmolLM2, but for its largest control, was trained by an earlier form of the script (notebook 13); a seed is held \
against its own control where there is one. SmolLM2's far half lies beyond the sequences that it was trained \
on, Qwen's does not. A third of the training sequences quote themselves, in every model compared. The bases have \
probably read these texts in pretraining. One learning rate served all trainings of a model and was not tuned: a \
better one, or more tokens, may lower what the extension costs inside the old window. The untrained methods had no \
practice in quoting."""


IN_BRIEF = """\
The *control* is a copy trained as long without the extension, and read through windows of the old length. Losses in \
nats per token; 0.01 less means one percent more probability. Brackets: the outer ends of two 95% intervals, one over \
texts, one over kinds of text. A gain is a *yes* only if its bracket lies below zero and it is larger than seeds lie \
apart, where several were trained; one seed tells nothing of others. *Not shown* does not \
mean that there is nothing."""


def in_brief() -> str:
    """Markdown: what was found on real models, question by question, how many claims hold, and the longest step."""
    columns = [_answers(results) for results in read_dose_results(list(MODELS)).values()]
    table = markdown_table([[question, *(column[question] for column in columns)] for question in columns[0]])
    verdicts = [line.verdict.partition(":")[0] for line in scoreboard().values()]
    counts = ", ".join(f"{verdicts.count(one)} *{one}*" for one in dict.fromkeys(sorted(verdicts)))
    claims = f"**The paper's {len(verdicts)} claims**, at the sizes that we could train: {counts}."
    sentences = "\n".join(_in_two_sentences(results) for results in read_dose_results(list(MODELS)).values())
    return "\n\n".join([sentences, table, IN_BRIEF, claims, _longest_step()])


NO_GAIN = "no difference from its control is detected"


def _in_two_sentences(results: DoseResults) -> str:
    """One model in two sentences, for those who read no table."""
    own, far, inside = compared(results, "full"), compared(results, "fair"), compared(results, "fair", "inside")
    window, nearly = load_preset(results.preset).base.window, compared(results, "full", whole=True)
    gain = "is not shown to read far text better"
    if own.gains:
        gain = f"reads far text {-own.found[0]:.3f} nats per token better"
    where = f"{-nearly.found[0]:.3f}" if nearly.gains else "not shown" if own.gains else "nor"
    ahead = "it is ahead of its control" if far.gains else "it is behind its control" if far.found[1] > 0 else ""
    fully = compared(results, "fair", whole=True).found
    fuller = fully[1] > 0 and not ahead
    behind = f", and it reads {fully[0]:.3f} nats worse where the control's windows are nearly full" * bool(fuller)
    cost = f"{inside.found[0]:.3f} nats worse than the control" if inside.found[1] > 0 else "not measurably worse"
    return (
        f"- **{MODELS[results.preset]}**, trained on {own.tokens / 1e6:.1f} million tokens of whole long texts, {gain} "
        f"with full context than through sliding windows of {window:,} tokens ({where} where these are nearly full). "
        f"Far out, {ahead or NO_GAIN}{behind}; within the old window it reads {cost}."
    )


def _answers(results: DoseResults) -> dict[str, str]:
    """What a reader asks first of one model, and what was measured."""
    old, new = load_preset(results.preset).base.window, load_preset(results.preset).extension.window
    full, own = results.largest("full"), compared(results, "full")
    far, inside = compared(results, "fair"), compared(results, "fair", "inside")
    untrained = [statements_found(results, arm, 2 * old) for arm in ("raised-nf4", "yarn-nf4")]
    best = max(untrained, key=lambda found: int(found.split()[0]))
    rival = ("raised-nf4", "yarn-nf4")[untrained.index(best)]
    lead = leads(results, rival, 2 * old)
    window = int(results.record.table("arms").set_index("arm").window[full.rpartition("-")[0]].max())
    again, others, control = read_other_texts(results), "not read", "not read"
    if again:
        found = again.compare().set_index(["quantity", "texts"])[["nats", "low", "high"]]
        minus = "far out, minus its own windows", "far out, minus another seed's control in windows"
        others, control = (
            _answered(replace(one, found=tuple(found.loc[quantity, "second set"])))
            for one, quantity in zip((own, far), minus, strict=True)
        )
    read = results.record.table("held_out").tokens.max()
    return {
        "": f"{MODELS[results.preset]}, {old:,} to {new:,} tokens" + (f", read to {read:,}" if read < new else ""),
        "trained in 4 bits": f"{own.tokens / 1e6:.1f} million tokens in whole sequences of {window:,}, {own.runs}",
        "Far beyond the old window, does the whole text help more than a sliding window of the old length?": (
            _answered(own)
        ),
        "... where that window is nearly full?": _nearly_full(results),
        f"... there, in texts that repeat less than {HARDLY:.0%} of themselves?": _in_plain_texts(results),
        "... on other texts, read after every choice was made?": others,
        "Does it help more than the same training without the extension (the control)?": (_answered(far)),
        "... where the control's window is nearly full?": _answered(compared(results, "fair", whole=True)),
        "... on those other texts, against another seed's control?": control,
        "Does it cost something inside the old window, against the control?": _answered(inside, better_is=-1),
        "Sentences hidden in texts of twice the old window: found, to the word": statements_found(
            results, full, 2 * old
        ),
        "... by the better of two untrained methods": best,
        "... by how many more than that, of 20 in each of five texts": measured(*mean_lead(lead), digits=1),
        "... in texts of four times the old window": statements_found(results, full, 4 * old),
    }


def _answered(found: Comparison, better_is: int = 1) -> str:
    """Yes, no or not shown, with the numbers; the question asks for a gain, or with -1 for a loss."""
    gains, loses = ("yes", "no, it reads worse") if better_is > 0 else ("no, it gains", "yes, it reads worse")
    answer = gains if found.gains else loses if found.found[1] > 0 else "not shown"
    apart = f" (seeds lie {found.spread:.3f} apart at {found.widest})" if found.found[2] < 0 and not found.gains else ""
    return f"**{answer}**{apart}: {measured(*found.found, digits=3)}"


def _nearly_full(results: DoseResults) -> str:
    """The same where windows are nearly full, and without the text that speaks most for it."""
    row = nearly_full(results).set_index(["line", "texts"]).loc[("full", WITHOUT)]
    without = measured(row.nats, row.low, row.high, digits=3)
    return f"{_answered(compared(results, 'full', whole=True))}; without one text {without}"


def _longest_step() -> str:
    record = recorded("gpu", "04_one_gpu_budget", needed=True)
    row, device = record.table("longest").iloc[0], record.content["provenance"]["device"]
    return (
        f"**The longest 4-bit training step that ran**: {row.model}, {row.context:,.0f} tokens in "
        f"{row.context / row.tokens_per_second:.0f} s, under a cap of {row.cap_gib:.0f} GiB, "
        f"{row.allocated_gib:.1f} GiB allocated, activation checkpoints on the host (one {device}, random weights)."
    )


def headlines() -> str:
    """Markdown: what was found on real models, in full: a column for each."""
    doses = read_dose_results(list(MODELS)).values()
    tables, others = [], []
    for column_of in (_of_doses, _of_statements):
        columns = [column_of(results) for results in doses]
        tables.append(markdown_table([[name, *(column[name] for column in columns)] for name in columns[0]]))
    for results in doses:
        if again := read_other_texts(results):
            described = _on_other_texts(again, compared(results, "fair").spread)
            others += [f"**{MODELS[results.preset]} on other texts.** {described}"]
    return "\n\n".join(
        [VERDICTS, tables[0], *others, "**Planted statements found**, right to the word:", tables[1], CAVEATS]
    )


def _in_plain_texts(results: DoseResults) -> str:
    """The gain over own nearly full windows in texts that hardly repeat themselves."""
    row = nearly_full(results).query("line == 'full'").iloc[-1]
    return f"{measured(row.nats, row.low, row.high, digits=3)}, {row.documents} texts"


def _on_other_texts(again: OtherTexts, spread: float) -> str:
    """The same weights on texts that no choice had seen, against a control; `spread` as `Comparison` has it."""
    found = again.compare().set_index(["quantity", "texts"])
    new, old_and_new = (
        found.loc[("far out, minus another seed's control in windows", texts)] for texts in ("second set", "both")
    )
    gains = new.high < 0 and -new.nats > spread
    texts = [measured(*row[["nats", "low", "high"]], digits=3) for row in (new, old_and_new)]
    return (
        f"On {new.documents:.0f} texts of {new.kinds:.0f} kinds, with the first seed's weights, against another "
        f"seed's control in windows: {'ahead' if gains else 'behind' if new.low > 0 else NO_DIFFERENCE}, {texts[0]}; "
        f"with the first texts, {old_and_new.documents:.0f} in all, {texts[1]}, which is "
        f"{'more' if -old_and_new.nats > spread else 'less'} than the largest distance between seeds, at any dose."
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
