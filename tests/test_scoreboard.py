import dataclasses
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from experiments.dose_doubts import leads, mean_lead
from experiments.instruction_results import FULL, LOSS, PAIRS, instruction_results
from experiments.pretraining_gpu_results import GPU_SIZE
from experiments.pretraining_rates import LARGER
from experiments.pretraining_results import EQUAL, copying_results, mixed_results
from experiments.race_results import race_results
from experiments.real_models import read_dose_results
from llama_long_utils.paths import REPOSITORY
from llama_long_utils.presets import load_preset
from llama_long_utils.records import Record, read_published, recorded
from tools.claims import instruction, methods, pretraining, short_tasks
from tools.claims.comparison import Comparison, compared
from tools.claims.line import AGREES, DISAGREES, MODELS, NOT_TESTED, UNDECIDED
from tools.claims.pretraining import FROM_SCRATCH
from tools.headlines import in_brief
from tools.scoreboard import scoreboard, scoreboard_details


@pytest.fixture(scope="module")
def lines():
    return scoreboard()


def test_every_claim_has_one_line_with_a_source_and_a_verdict(lines):
    assert list(lines) == [f"C{number}" for number in range(1, 13)]
    for line in lines.values():
        assert re.search(r"\((Table|Tables|Figure|section) \d", line.paper), line.paper
        words = (AGREES, DISAGREES, UNDECIDED, NOT_TESTED)
        assert line.verdict.startswith(words)
        assert (line.ours == "-") == (line.verdict == NOT_TESTED)
        assert "seed" in line.scale or line.verdict == NOT_TESTED or "no interval" in line.scale


def comparison(nats, bounds, seeds=()):
    return Comparison((nats, *bounds), 3, {1: seeds} if seeds else {})


def test_a_lead_smaller_than_seeds_lie_apart_is_none():
    assert comparison(-0.04, (-0.08, -0.01)).gains
    assert comparison(-0.04, (-0.08, -0.01), (-0.03, -0.01)).gains
    assert not comparison(-0.04, (-0.08, -0.01), (-0.01, 0.05)).gains
    assert not comparison(-0.04, (-0.08, 0.01)).gains
    assert "not shown" in str(comparison(-0.04, (-0.08, -0.01), (-0.01, 0.05)))
    assert "worse" in str(comparison(0.04, (0.03, 0.05)))


def test_of_two_intervals_the_wider_bounds_count():
    results = read_dose_results(["qwen2.5-coder-1.5b"])["qwen2.5-coder-1.5b"]
    row = results.record.table("full_minus_windows").query("position_low == 32768 and position_high == 65536").iloc[0]
    assert row.high < 0 < row.kinds_high
    assert compared(results, "full").found == (row.nats, row.kinds_low, row.kinds_high)
    assert compared(results, "pose") is None


def test_the_control_had_the_same_tokens_and_reads_through_its_own_window():
    results = read_dose_results(["smollm2"])["smollm2"]
    table = results.record.table("differences").set_index(["position_low", "position_high", "first", "second"])
    table = table.sort_index()
    for place, bucket in (("inside", (0, 8192)), ("far", (16_384, 32_768))):
        fair, nats = compared(results, "fair", place), table.nats[bucket]
        assert fair.found[0] == nats[f"full16k-s0-{fair.tokens}/full", f"control8k-s0-{fair.tokens}/window"]
        for tokens, seeds in fair.seeds.items():
            own = [nats.get((f"full16k-s{seed}-{tokens}/full", f"control8k-s{seed}-{tokens}/window"))
                   for seed in range(3)]  # fmt: skip
            first = [nats.get((f"full16k-s{seed}-{tokens}/full", f"control8k-s0-{tokens}/window"))
                     for seed in range(3)]  # fmt: skip
            assert list(seeds) == [mine or other for mine, other in zip(own, first, strict=True) if mine or other]
        assert fair.spread == max(max(seeds) - min(seeds) for seeds in fair.seeds.values()) > 0


def test_pi_is_undecided_as_long_as_it_has_not_recovered_inside_the_old_window(lines):
    """Its recorded loss there is far above the untrained base's; a race in which it is not decides by intervals."""
    assert lines["C2"].verdict.startswith(UNDECIDED)
    preset = load_preset("tiny")
    race = race_results(preset)
    pi = (race.arms.method == "pi") & (race.arms.training == "full-length")
    abf = (race.arms.method == "abf") & (race.arms.training == "full-length")
    nats = race.arrays["nats"].copy()
    nats[np.flatnonzero(pi)] = nats[np.flatnonzero(abf)]
    recovered = dataclasses.replace(race, arrays={**race.arrays, "nats": nats})
    table = read_published("llama2_long")["table_5"]
    assert methods.perplexity(recovered, table).verdict == AGREES
    figure = read_published("llama2_long")["figure_5b"]
    assert lines["C3"].verdict.startswith(UNDECIDED)
    assert "ABF falls" in lines["C3"].verdict and lines["C3"].why.endswith("without that rule: disagrees")
    assert methods.retrieval(recovered, figure).verdict == DISAGREES  # it does fall
    plain = (race.arms.method == "none") & (race.arms.training == "full-length")
    nats[np.flatnonzero(pi)] = nats[np.flatnonzero(plain)]
    assert methods.perplexity(recovered, table).verdict.startswith(UNDECIDED)  # no gain is not a loss


def test_that_nothing_is_gained_is_agreed_only_if_a_gain_is_excluded():
    bounds = {(-0.1, 0.1): UNDECIDED, (-0.005, 0.005): AGREES, (-3, -1): AGREES, (0.02, 0.04): DISAGREES}
    bounds |= {(0.003, 0.039): UNDECIDED, (0.001, 0.009): AGREES}  # a gain, maybe below the margin; surely below it
    for interval, judged in bounds.items():
        assert methods.gains_nothing(*interval, EQUAL) == judged


def test_a_base_at_chance_decides_nothing_about_short_tasks(lines):
    deltas = recorded("smollm2", "08_benchmark_deltas").table("deltas")
    mmlu = deltas[(deltas.task == "mmlu") & (deltas.metric == "accuracy")].iloc[0]
    assert mmlu.before < short_tasks.CHANCE["mmlu"]
    if MODELS["smollm2"] in lines["C7"].scale:
        assert lines["C7"].verdict.startswith(UNDECIDED)


@pytest.mark.parametrize(
    ("low", "control", "judged"),
    [
        (-0.01, -0.01, AGREES),
        (-0.01, None, UNDECIDED),
        (-0.01, -0.05, UNDECIDED),  # the control gained what the extension did not
        (-0.03, -0.01, UNDECIDED),
        (-0.2, -0.01, DISAGREES),
    ],
)
def test_short_tasks_agree_only_beside_a_control_and_without_a_loss_of_the_margin(low, control, judged, monkeypatch):
    asked = ("qwen2.5-coder-1.5b", short_tasks.BENCHMARKS)
    changed = Record(recorded(*asked).path)
    deltas = changed.table("deltas")
    rows = (deltas.task == "mmlu") & (deltas.metric == "accuracy") & (deltas.pair == "base -> extended")
    deltas.loc[rows, ["low", "high"]] = low, low + 0.1
    if control:
        deltas = pd.concat([deltas, deltas[rows].assign(pair="rope_unchanged -> extended", low=control)])
    changed.content["tables"]["deltas"] = deltas.to_dict("records")
    monkeypatch.setattr(short_tasks, "recorded", lambda *names: changed if names == asked else recorded(*names))
    line = short_tasks.short_tasks(read_published("llama2_long_benchmarks")["table_1"])
    assert line.verdict.startswith(judged)


def test_a_loss_on_the_prompt_that_halves_the_weight_of_answers_decides_nothing_by_losing_some(lines):
    """A sequence is a step of its own, so the answers of a long one weigh their share of its labels."""
    preset = load_preset("tiny")
    results, long = instruction_results(preset), preset.instruction.long_share
    labels = results.runs.groupby("arm").labels.mean()
    answers, prompts = long * labels["long"], labels["long, loss on prompt"] - labels["long"]
    assert preset.instruction.sequences_per_step == 1
    assert 0.45 < 1 - long + long * answers / (answers + prompts) < 0.55
    assert results.difference(*PAIRS[LOSS])[2] < 0
    assert lines["C10"].verdict.startswith(UNDECIDED)


@pytest.mark.parametrize(
    ("gain", "judged", "why"),
    [(-0.3, DISAGREES, "fewer"), (0.0, UNDECIDED, "no change"), (0.3, AGREES, "more")],
)
def test_a_loss_on_the_prompt_is_judged_where_answers_keep_their_weight(monkeypatch, gain, judged, why):
    preset = load_preset("tiny")
    results = instruction_results(preset)
    arrays, (full, without) = dict(results.record.arrays), PAIRS[FULL]
    rows = {arm: np.flatnonzero(results.runs.arm == arm) for arm in (full, without)}
    for length in results.past:
        arrays[f"exact_{length}"] = (exact := arrays[f"exact_{length}"].copy())
        exact[rows[full]] = exact[rows[without]] + gain
    monkeypatch.setitem(vars(results.record), "arrays", arrays)
    monkeypatch.setattr(instruction, "instruction_results", lambda one: results if one is preset else None)
    monkeypatch.setattr(instruction, "load_preset", lambda name: preset if name == "tiny" else None)
    line, long = instruction.instruction_tuning(read_published("llama2_long")["table_9"])
    assert line.verdict.startswith(judged)
    assert why in line.why
    assert long.verdict.startswith(UNDECIDED)  # a rule wrote the questions


@pytest.mark.parametrize(
    ("gains", "loss", "long"),
    [
        ((0.3, 0.3, 0.3), UNDECIDED, AGREES),  # of the loss, the tiny model tells nothing
        ((0.0, 0.3, 0.0), UNDECIDED, UNDECIDED),
        ((-0.3, 0.3, 0.3), UNDECIDED, UNDECIDED),
        ((0.0, -0.3, 0.0), UNDECIDED, UNDECIDED),  # fewer, but the loss dilutes answers
        ((-0.3, -0.3, -0.6), UNDECIDED, DISAGREES),
    ],
)
def test_a_real_model_past_its_old_window_decides_about_long_questions(monkeypatch, gains, loss, long):
    """`gains` in F1 over short questions: of long ones, with a loss on the prompt, and with answers at full weight."""
    results = instruction_results(load_preset("smollm2"))
    arrays, arms = dict(results.record.arrays), ("long", "long, loss on prompt", PAIRS[FULL][0])
    rows = {arm: np.flatnonzero(results.runs.arm == arm) for arm in ("short", *arms)}
    (length,) = results.past
    arrays[f"f1_{length}"] = (f1 := arrays[f"f1_{length}"].copy())
    for arm, gain in zip(arms, gains, strict=True):
        f1[rows[arm]] = f1[rows["short"]] + gain
    monkeypatch.setitem(vars(results.record), "arrays", arrays)
    tiny = instruction_results(load_preset("tiny"))
    monkeypatch.setattr(instruction, "instruction_results", {"tiny": tiny, "smollm2": results}.get)
    monkeypatch.setattr(instruction, "load_preset", lambda name: name)
    judged = instruction.instruction_tuning(read_published("llama2_long")["table_9"])
    assert judged[0].verdict.startswith(loss)
    assert judged[1].verdict.startswith(long)


@pytest.mark.parametrize(
    ("signs", "judged"),
    [
        ((1, 1), AGREES),
        ((1, 0), UNDECIDED),
        ((1, -1), UNDECIDED),
        ((0, -1), UNDECIDED),
        ((-1, -1), DISAGREES),
    ],
)
def test_models_or_ways_must_all_say_so(signs, judged):
    assert instruction.judged(*((sign, sign - 0.5, sign + 0.5) for sign in signs)) == judged


def scratch(**nats):
    """The switch at 80% minus long throughout at each size: value, with an interval of a thousandth on both sides."""
    sizes = dict(zip((FROM_SCRATCH, LARGER, GPU_SIZE), nats.values(), strict=True))
    table = pd.DataFrame({"value": sizes, "flops": 0.5, "seeds": 3})
    return dict(table.assign(low=table.value - 0.001, high=table.value + 0.001).iterrows())


ONE_RATE = {"long": 1, "short": 1, "highest": 2}


def test_copying_lost_near_as_well_as_far_is_no_loss_of_far_context_alone(lines, monkeypatch):
    """The recorded switch loses both; one that copies as "long" does is told from it, near or everywhere."""
    results, line = copying_results(), lines["C9"]
    assert "near and far" in line.verdict and "13 of 64 steps long" in line.scale
    rows = {arm: results.cells.index[results.cells.arm == arm] for arm in ("long", "switch-80")}
    for near in (slice(1, 2), slice(None)):
        array = results.arrays["copied_hits"].copy()
        array[rows["switch-80"], ..., near] = array[rows["long"], ..., near]
        results = dataclasses.replace(results, arrays={**results.arrays, "copied_hits": array})
        monkeypatch.setattr(pretraining, "copying_results", lambda changed=results: changed)
        judged = pretraining.with_a_copying_model(line, scratch(a=0, b=0, c=0), ONE_RATE)
        assert "near and far" not in judged.verdict
        assert ("copies less" in judged.why) == (near == slice(1, 2))
    assert judged.verdict.startswith(AGREES)
    worse = pretraining.with_a_copying_model(line, scratch(a=0.1, b=0.1, c=0.1), ONE_RATE)
    assert worse.verdict.startswith(DISAGREES)


def test_sizes_that_contradict_each_other_leave_a_late_switch_undecided(lines):
    line = lines["C9"]
    worse = pretraining.with_a_copying_model(line, scratch(a=0.02, b=0.1, c=0.1), ONE_RATE)
    assert worse.verdict.startswith(DISAGREES)
    rates = {"long": 2, "short": 1, "highest": 2}
    both = pretraining.with_a_copying_model(line, scratch(a=0.02, b=0.1, c=-0.1), rates, own_rates=[LARGER, GPU_SIZE])
    assert both.verdict.startswith(UNDECIDED)
    assert "a late switch reads better at 16M, worse at 0.4M and at 0.9M" in both.verdict
    assert both.why.startswith("of 3 trainings from scratch a late switch reads better in 1, worse in 2")
    assert "arms with rates of their own: 0.9M, 16M" in both.scale
    assert "at 16M long throughout has 2 times the rate, the highest tried" in both.verdict


def test_a_data_mix_is_judged_by_nll_and_by_copying(lines, monkeypatch):
    """What only one measure says decides nothing; made to say the same in both, they agree or disagree."""
    results, line = mixed_results(), lines["C8"]
    assert line.verdict.startswith(UNDECIDED)
    arrays = {name: results.arrays[name].copy() for name in ("nats", "copied_hits")}
    for shift, verdict in ((50, DISAGREES), (0, AGREES)):
        for name, sign in (("nats", 1), ("copied_hits", -1)):
            rows = {
                arm: results.cells.index[results.cells.arm == f"mix-{arm}"]
                for arm in ("original", "cut-first", "better")
            }
            original = results.arrays[name][rows["original"]]
            arrays[name][rows["cut-first"]] = original + sign * shift
            arrays[name][rows["better"]] = original - sign * (50 - shift)
        changed = dataclasses.replace(results, arrays={**results.arrays, **arrays})
        monkeypatch.setattr(pretraining, "mixed_results", lambda changed=changed: changed)
        assert pretraining.with_mixes_of_a_copying_model(line).verdict.startswith(verdict)


def test_the_brief_answers_each_question_as_the_intervals_and_seeds_say():
    brief, doses = in_brief(), read_dose_results(list(MODELS))
    results, qwen = doses["smollm2"], doses["qwen2.5-coder-1.5b"]
    rows = [line.split(" | ") for line in brief.splitlines() if line.startswith("| ")]
    cells = {row[0].strip("| "): row[1] for row in rows}
    assert "SmolLM2" in rows[0][1]  # the model that was trained longest comes first
    own, far, inside = (compared(results, *line) for line in (("full",), ("fair",), ("fair", "inside")))
    assert own.gains
    assert not far.gains
    assert inside.found[1] > 0
    helps, more, cost = [cell for question, cell in cells.items() if question.startswith("loss")][:3]
    for cell, answer, found in ((helps, "better", own), (more, "not shown", far), (cost, "worse", inside)):
        assert cell.startswith(f"**{answer}** {found.found[0]:+.3f} [")
    assert brief.startswith("**No model is shown to read far text better than a copy")
    assert "and all read worse inside the old window.** SmolLM2-135M gains from far context" in brief
    harmed = compared(qwen, "fair", whole=True)
    assert f"minus the control, where the control's windows are nearly full: **worse** {harmed.found[0]:+.3f}" in brief
    lead = mean_lead(leads(qwen, "raised-nf4", 2 * load_preset(qwen.preset).base.window))
    assert lead[1] < 0 and "untrained 66 (lead not shown)" in brief


def test_the_scoreboard_waits_for_no_library_that_loads_models():
    heavy = "import sys, tools.headlines; print(*{'transformers', 'peft', 'bitsandbytes'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", heavy], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout == "\n", done.stdout + done.stderr


def test_readme_fits_a_screen_and_a_half():
    text = (REPOSITORY / "README.md").read_text("utf-8")
    assert len(re.sub(r"(?s)<!-- (\w+) -->.*?<!-- /\1 -->", "", text).split()) <= 900


def test_details_hold_every_number_of_a_line_and_no_bare_html(lines):
    folded = scoreboard_details().split("<details>")[1:]
    for name, text in zip(lines, folded, strict=True):
        summary, _, listed = text.partition("</summary>")
        assert summary.startswith(f"<summary>{name} · ") and "<" not in summary.removeprefix("<summary>")
        plain = listed.replace("\n  - ", "; ")
        assert all(part in plain for part in (lines[name].paper, lines[name].ours, lines[name].scale))
