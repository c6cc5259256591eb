"""What notebook 10 says of preference tuning of a real model, from its record: findings, tables, and a figure."""

from pathlib import Path

import pandas as pd

from experiments.preference_figures import LOOKS, draw_by_step, in_brackets
from llama_long_utils.evaluation.statistics import share_interval
from llama_long_utils.figures import save_figure
from llama_long_utils.notebooks import finding, measured, say, show_table, shown
from llama_long_utils.records import Record

ENDS = ["gold", "words_right", "ended"]
WATCHED = ("proxy", "gold", "words_right")
STEPS = {
    "preferred": ("preferred to the start", "wins and half of the ties"),
    "words_right": ("right words", "share of answers"),
    "length": ("length", "tokens of an answer"),
}
SMALL_CHANGE = 0.05  # nats per token of a contrast
NAMES = {"hellaswag": "HellaSwag", "truthfulqa_mc1": "TruthfulQA"}
WORDS = {"accuracy_per_character": "right", "contrast": "contrast"}
STAGES = {"sft": "quotations", "dpo": "DPO", "rl": "RL"}


def by_step(record: Record) -> pd.DataFrame:
    """`curves` with the share that is preferred, its interval, and one half at the start."""
    labels = ["arm", "seed", "step", "decoding"]
    table = record.table("curves").merge(record.table("wins_by_step"), on=labels, how="left")
    return table.fillna({"preferred": 0.5, "low": 0.5, "high": 0.5})


def say_real_model(record: Record, limit: float, folder: Path, slug: str, number: str) -> None:
    """Tables of what was measured, whether what was expected holds, and the figure."""
    table, rated, costs = by_step(record), record.table("reward_model"), record.table("nll_of_seeds")
    wins, changes = record.table("wins"), record.table("changes")
    each = record.table("nll").query("whole")
    seeds, questions = sorted(table.seed.unique()), wins.questions.iloc[0]
    said = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}; {questions} held-out questions"
    origin = f"SmolLM2-135M-Instruct, {record.origin}; {said}"
    last = table[table.step == table.groupby("arm").step.transform("max")]
    ends = last[last.arm.isin(["sft", "sft, stopped", *LOOKS])].groupby(["arm", "decoding"], sort=False)[ENDS].mean()
    whole = wins[wins.seed.isna() & wins.arm.isin([*LOOKS, "sft, stopped"])].set_index(["arm", "decoding"])
    for name, end in (("preferred", ""), ("preferred, cut", "_cut")):
        ends[name] = pd.Series({key: in_brackets(row, f"preferred{end}", end) for key, row in whole.iterrows()})
    say(f"""At the end of training, {origin}. *Preferred*: by gold, to the start's answer, and to it cut as the arm's,
        with 95% over questions or seeds:""")
    start = {"sft": "start", "sft, stopped": "start, stopped"}
    show_table(ends.rename(index=start, columns={"words_right": "right words"}).fillna("-").reset_index())
    agreed, total = int((rated.right * rated.held_out).round().sum()), int(rated.held_out.sum())
    rank = rated.filter(like="rank_").mean()
    say(f"""The reward model agrees with {agreed} of {total} comparisons that it was not trained on
        ({measured(agreed / total, *share_interval(agreed, total), sign=False)}). Over the start's sampled answers its
        rank correlation with having ended is {rank.rank_ended:.2f}, with right words {rank.rank_words:.2f}.""")
    tokens, documents = int(each.position_high.max()), costs.documents.iloc[0]
    say(f"""Seed by seed, against the start. The cost is in nats a token of {documents} held-out stretches of {tokens:,}
        tokens. 95%: of a seed over questions (documents), of all seeds the wider of that or over seeds.""")
    show_table(seed_by_seed(record, table))
    for arm in (arm for arm in LOOKS if arm in set(table.arm)):
        since = changes[(changes.arm == arm) & (changes.decoding == "greedy") & (changes.since == "sft")]
        words = since.set_index("measure").loc["words_right", ["difference", "low", "high"]]
        shown(f"{arm}: fewer greedy answers begin right than at the start", words, above=False, digits=2)
        sampled = table[(table.arm == arm) & (table.decoding == "sampled")]
        curves = [
            part.groupby("step")[[*WATCHED]].mean() for part in (sampled, *(one for _, one in sampled.groupby("seed")))
        ]
        over, *found = [gamed(curve.iloc[0], curve.iloc[-1]) for curve in curves]
        claim = f"{arm}, sampled, mean over seeds: late in training the proxy rises and gold or right words fall"
        finding(f"{claim} (of single seeds: {sum(found)} of {len(found)})", over)
        within = f"{arm}: long stretches cost at most {limit:g} nat, every seed's interval"
        finding(within, each.high[each.arm == arm].max() <= limit)
    draw_steps(record, table, folder, slug, number, origin)
    say_stages(record.table("stages"))


def seed_by_seed(record: Record, table: pd.DataFrame) -> pd.DataFrame:
    """What each arm wins and costs with each seed and with all: text for a reader. `table`: as by `by_step`."""
    wins, rows, labels = record.table("wins"), [], ["arm", "seed"]
    greedy = table[table.decoding == "greedy"].set_index([*labels, "step"]).words_right.sort_index()
    costs = record.table("nll").query("whole").set_index(labels)
    words = record.table("changes").query("decoding == 'greedy' and measure == 'words_right' and since == 'sft'")
    for arm in (arm for arm in LOOKS if arm in set(table.arm)):
        own = wins[(wins.arm == arm) & (wins.decoding == "sampled")]
        for _, won in own.sort_values("seed").iterrows():
            alone = not pd.isna(won.seed)
            if alone:
                changed = f"{greedy[arm, won.seed].iloc[-1] - greedy['sft', won.seed].iloc[0]:+.2f}"
                paid = costs.loc[(arm, won.seed)]
            else:
                changed = in_brackets(words.set_index("arm").loc[arm], "difference", sign=True)
                paid = record.table("nll_of_seeds").set_index("arm").loc[arm]
            row = {"arm": arm, "seed": f"{won.seed:.0f}" if alone else "all"}
            row |= {"sampled: preferred": in_brackets(won, "preferred"), "greedy: change of right words": changed}
            rows.append(row | {"cost": measured(*paid[["nll", "low", "high"]], digits=3)})
    return pd.DataFrame(rows)


def gamed(first: pd.Series, end: pd.Series) -> bool:
    """Whether the proxy rose, and gold or the share of right words fell, between two measurements."""
    return bool(end.proxy > first.proxy and (end.gold < first.gold or end.words_right < first.words_right))


def draw_steps(record: Record, table: pd.DataFrame, folder: Path, slug: str, number: str, origin: str) -> None:
    """Sampled answers against steps: the share preferred, with bars of all seeds, right words and length."""
    sampled, wins = (part[part.decoding == "sampled"] for part in (table, record.table("wins_by_step")))
    figure, panels, ends = draw_by_step(sampled, STEPS)
    wins, preferred, shorter, torn = wins[wins.seed.isna()], {}, [], []
    start = sampled[sampled.arm == "sft"].set_index("seed")[["words_right", "length"]]
    for place, (arm, (_, colour, _)) in enumerate(LOOKS.items()):
        rows = wins[wins.arm == arm].sort_values("step")
        spread = [rows.preferred - rows.low, rows.high - rows.preferred]
        form = {"color": colour, "fmt": "none", "capsize": 3}
        panels[0].errorbar(rows.step + 0.1 * place, rows.preferred, yerr=spread, **form)
        last = rows.iloc[-1]
        verdict = "are" if last.low > 0.5 else "are not" if last.high < 0.5 else "are not shown to be"
        preferred.setdefault(verdict, []).append(f"{arm.upper()}'s")
        own = sampled[(sampled.arm == arm) & (sampled.step == last.step)].set_index("seed")
        change = own[[*start]] - start
        shorter.append(change.length.max() < 0)
        if change.words_right.min() < 0 < change.words_right.max():
            torn.append(f"{arm.upper()}'s")
    for axes, level in zip(panels, (0.5, start.words_right.mean()), strict=False):
        axes.axhline(level, color="0.4", linewidth=1)
    message = [
        f"{' and '.join(whose)} answers {verdict} preferred to the start's." for verdict, whose in preferred.items()
    ]
    if [*preferred] == ["are"] and all(shorter):
        message = ["Answers are preferred to the start's and get shorter."]
    if torn:
        message.append(f"In right words {' and '.join(torn)} seeds disagree.")
    caption = f"""**{" ".join(message)}** A step of RL is not a step of DPO.

*Sampled answers, {origin}. Thin lines: single seeds. Bars: 95%, the wider over questions or seeds.*"""
    save_figure(figure, folder, slug, number, caption, "; ".join(ends) + ".")


def say_stages(table: pd.DataFrame) -> None:
    """A table of `stage_changes` for a reader, and whether what was expected holds."""
    say(f"""What each stage changes besides: quotations minus the extended model, DPO and RL minus quotations, on
        {table["items"].max()} questions of each task. "Right" is the share of right choices, "contrast" how far the
        right choice's NLL is below the others', in nats a token. 95%, the wider over questions or seeds:""")
    rows = []
    for (task, name), part in table.groupby(["task", "measure"], sort=False):
        own = part.set_index("arm")
        row = {"task": NAMES[task], "measure": WORDS[name], "extended": measured(own.before["sft"], sign=False)}
        for arm, stage in STAGES.items():
            row[stage] = measured(*own.loc[arm, ["difference", "low", "high"]])
        rows.append(row)
    show_table(pd.DataFrame(rows))
    for arm, stage in STAGES.items():
        changes = table[(table.arm == arm) & (table.measure == "contrast")]
        found = [within(row.low, row.high) for row in changes.itertuples()]
        said = next(word for word in ("does not hold", "undecided", "holds") if word in found)
        print(f"{said}: {stage}: the contrast changes by less than {SMALL_CHANGE:g} nat in both tasks")


def within(low: float, high: float) -> str:
    """Whether a change is small, by its interval."""
    if low > -SMALL_CHANGE and high < SMALL_CHANGE:
        return "holds"
    return "does not hold" if low > SMALL_CHANGE or high < -SMALL_CHANGE else "undecided"
