"""What figures and the helpers of notebooks promise their readers."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from llama_long_utils import figures, notebooks
from llama_long_utils.evaluation import perplexity, statistics
from llama_long_utils.paths import REPOSITORY
from llama_long_utils.presets import load_preset
from llama_long_utils.records import Record, recorded

# Machado et al. (2009): what a person without red or green cones sees, in linear RGB.
SIGHT = {
    "full": np.eye(3),
    "deutan": np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]),
    "protan": np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]),
}


def linear(colour):
    channels = np.array(to_rgb(colour))
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ rgb.clip(0, 1)
    x, y, z = np.cbrt(np.maximum(xyz / [0.9505, 1, 1.089], 1e-9))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("kind", figures.KINDS)
def test_every_colour_stands_out_from_white(kind):
    for name, (_, colour, _) in figures.KINDS[kind].items():
        contrast = 1.05 / (linear(colour) @ [0.2126, 0.7152, 0.0722] + 0.05)
        assert contrast >= 3, name


@pytest.mark.parametrize("sight", SIGHT)
def test_base_yarn_and_controls_can_be_distinguished_by_everybody(sight):
    names = ["base", "yarn", "extended", "rope_unchanged"]
    for first in names:
        for second in names[: names.index(first)]:
            one, other = (lab(SIGHT[sight] @ linear(figures.COLOURS[name])) for name in (first, second))
            assert np.linalg.norm(one - other) > 20, (first, second)
            assert figures.ARMS[first][2] != figures.ARMS[second][2]


def test_few_samples_are_drawn_one_by_one_and_have_no_bar():
    table = pd.DataFrame(
        {
            "task": ["short", "long"],
            "value": [1.0, 2.0],
            "low": [0.5, math.nan],
            "high": [1.5, math.nan],
            "each": [[], [1.5, 2.0, 2.5]],
        }
    )
    _, axes = plt.subplots()
    figures.intervals(axes, table, row="task", samples="each")
    bars, *points = axes.collections
    assert [len(bar) for bar in bars.get_segments() if len(bar)] == [2]
    assert sorted(len(one.get_offsets()) for one in points) == [0, 2, 3]


def test_a_figure_is_written_and_described_beside_it(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(figures, "display", shown.append)
    figure, _ = plt.subplots()
    figures.save_figure(figure, tmp_path, "99_nothing", "99.1", "Nothing.", "An empty frame, x < 1.")
    assert (tmp_path / "99_nothing.png").read_bytes() == shown[0].data
    assert shown[1].data.startswith("**Figure 99.1.** Nothing.")
    assert "An empty frame, x &lt; 1." in shown[1].data


def test_numbers_in_prose_carry_their_interval():
    assert notebooks.measured(-0.08329, -0.10402, -0.0624, digits=3) == "-0.083 [-0.104, -0.062]"
    assert notebooks.measured(12_345.0, digits=0, sign=False) == "12,345"
    assert notebooks.measured(-0.001, -0.01, 0.004) == "+0.00 [-0.01, +0.00]"
    assert notebooks.measured(-0.04, -0.08, -0.001) == "-0.04 [-0.08, -0.00]"  # the sign says on which side of zero


@pytest.mark.parametrize(
    ("interval", "options", "said"),
    [
        ((1, 0.5, 1.5), {}, "holds: it grows (+1.0 [+0.5, +1.5])"),
        ((-1, -1.5, -0.5), {}, "does not hold: it grows (-1.0 [-1.5, -0.5])"),
        ((1, -0.5, 2.5), {}, "undecided: it grows (+1.0 [-0.5, +2.5])"),
        ((-1, -1.5, -0.5), {"above": False}, "holds: it grows (-1.0 [-1.5, -0.5])"),
        ((0.6, 0.55, 0.65), {"than": 0.5, "sign": False, "digits": 2}, "holds: it grows (0.60 [0.55, 0.65])"),
    ],
)
def test_a_claim_is_undecided_where_its_interval_holds_both(capsys, interval, options, said):
    notebooks.shown("it grows", interval, **options)
    assert capsys.readouterr().out.strip() == said


def test_a_verdict_follows_the_interval():
    words = {"below": "better", "above": "worse", "level": "level"}
    assert notebooks.verdict(-0.2, -0.3, -0.1, **words).startswith("better (-0.200")
    assert notebooks.verdict(0.2, 0.1, 0.3, **words).startswith("worse")
    assert notebooks.verdict(0.1, -0.1, 0.3, **words).startswith("level")
    few = notebooks.verdict(0.1, math.nan, math.nan, **words)
    assert few == "undecided (+0.100, too few for an interval)"


def test_a_quick_look_shows_its_record_and_an_own_run_itself():
    preset, live = load_preset("tiny"), pd.DataFrame({"arm": ["base"]})
    shown, origin = notebooks.live_or_recorded(preset, "06_perplexity_by_position", live, "copying")
    assert len(shown) == 4 and "recorded by us" in origin
    for slug, own in (("06_perplexity_by_position", True), ("99_not_there", False)):
        assert notebooks.live_or_recorded(preset, slug, live, own=own) == (live, "computed live")


def test_saving_records_the_parameters_that_were_changed(tmp_path, monkeypatch):
    preset = load_preset("tiny")
    monkeypatch.setattr(type(preset), "run_folder", tmp_path)
    given = {"preset": "tiny", "adapter": "mine", "stretches_per_document": 1}
    notebooks.start(given, {"preset": str, "adapter": str, "stretches_per_document": int | None})
    (tmp_path / "measuring" / "06").mkdir(parents=True)
    table = pd.DataFrame({"arm": ["base"], "nats": [1.0]})
    notebooks.save(preset, "06_perplexity_by_position", "?", {"one": table}, {"x": np.arange(3)})
    record = Record(tmp_path / "records" / "06_perplexity_by_position.json")
    assert record.table("one").equals(table)
    assert record.arrays["x"].tolist() == [0, 1, 2]
    assert record.content["provenance"]["command"].endswith("-p preset tiny -p adapter mine")
    assert not (tmp_path / "measuring" / "06").exists()
    assert recorded("tiny", "99_not_there") is None


@pytest.mark.parametrize(("documents", "gap"), [(3, 1.5), (8, 0.05)])
def test_figure_6_1_says_whether_there_are_intervals_and_shows_every_arm_but_the_base(documents, gap, monkeypatch):
    cells = json.loads((REPOSITORY / "notebooks" / "06_perplexity_by_position.ipynb").read_bytes())["cells"]
    (source,) = (text for text in ("".join(cell["source"]) for cell in cells) if "figure = two_scales(" in text)
    arms = {"base": 4.0, "rope_base_only": gap, "extended": -gap, "sliding_window": 0.0}
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda *given: drawn.append(given))
    nll = {arm: [np.full((1, 511), 5 + more)] * documents for arm, more in arms.items()}
    given = {"nll": nll, "arms": [*arms][:3], "stretches": [0] * documents, "old": 128, "tokens": 512}
    given |= {"far": (256, 512), "evaluation": SimpleNamespace(bootstrap_samples=20, seed=0)}
    given |= {"np": np, "pd": pd, "perplexity": perplexity, "statistics": statistics, "measured": notebooks.measured}
    exec(source, {**given, "settings": SimpleNamespace(run_folder=Path(), extension=SimpleNamespace(method="abf"))})
    ((figure, *_, caption, _),) = drawn
    low, high = figure.axes[1].get_ylim()
    assert low < -gap < gap < high < arms["base"]
    assert ("95% bootstrap over documents" in caption) == (documents >= statistics.FEWEST)
    assert ("no band for fewer than eight" in caption) == (documents < statistics.FEWEST)
    assert documents == 3 or (low, high) == (-0.1, 0.4)


def test_a_cell_of_a_table_may_hold_a_bar_or_a_boolean(monkeypatch):
    shown = []
    monkeypatch.setattr("llama_long_utils.notebooks.display", shown.append)
    notebooks.show_table(pd.DataFrame({"text": ["a|b"], "whole": [True], "count": [1000]}))
    assert shown[0].data.splitlines()[-1] == r"| a\|b | True | 1,000 |"
