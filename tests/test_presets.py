import pytest

from llama_long_utils import presets
from llama_long_utils.paths import PRESETS, REPOSITORY
from llama_long_utils.presets import load_preset, preset_from_parameters, preset_names
from llama_long_utils.rope import rotation, wavelengths


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "tiny.toml").write_text((PRESETS / "tiny.toml").read_text())
    monkeypatch.setattr(presets, "PRESETS", tmp_path)
    return tmp_path


def edit(folder, old, new):
    text = (folder / "tiny.toml").read_text()
    assert old in text
    (folder / "tiny.toml").write_text(text.replace(old, new, 1))


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_valid(name):
    preset = load_preset(name)
    assert preset.name == name
    assert preset.extension.window > preset.base.window


def test_llama2_7b_is_the_paper_s():
    preset = load_preset("llama2-7b")
    assert preset.base.source == "meta-llama/Llama-2-7b-hf"
    assert (preset.extension.window, preset.extension.rope_base) == (32_768, 500_000)
    assert preset.base.head_dim == 128


def test_tiny_has_the_paper_s_ratios():
    preset = load_preset("tiny")
    assert preset.extension.window / preset.base.window == 8
    assert preset.extension.rope_base / preset.base.rope_base == 50


def test_smollm2_is_extended_with_the_base_that_the_wavelengths_ask_for():
    preset = load_preset("smollm2")
    pretrained = rotation(preset.base_rope)[0]
    critical = int((preset.base.window / wavelengths(pretrained) < 1).nonzero()[0])  # turns less than once
    least = preset.base.rope_base * preset.extended_rope.factor ** (preset.base.head_dim / (2 * critical))
    assert least < preset.extension.rope_base < 2.7 * least  # the paper: 2.6 times what its window asks for
    assert rotation(preset.control_rope)[0].equal(pretrained)
    assert preset.control_rope.window == preset.extension.window


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown preset 'tinny': use one of .*did you mean 'tiny'"):
        load_preset("tinny")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rank = 16", "rnk = 16", r"unknown key 'lora\.rnk' \(did you mean 'rank'\?\)"),
        ("rank = 16\n", "", r"key 'lora\.rank' is missing"),
        ("rank = 16", 'rank = "16"', r"lora\.rank = '16'"),
        ("rank = 16", "rank = 16 16", "not valid TOML"),
        ("[training]\nwindow = 4096", "[training]\nwindow = 8192", "reach = 4096 must be at least window = 8192"),
        ("reach = 4096", "reach = 8192", "need pack = false"),
        (
            "reach = 4096           # above the window: positions are skipped (PoSE)\npack = true",
            "reach = 8192\npack = false",
            "training.reach = 8192 is longer than",
        ),
        ('attention = "sdpa"', 'attention = "s2"', "need pack = false"),
        ('attention = "sdpa"', 'attention = "sdap"', "attention = 'sdap'"),
        ('method = "abf"', 'method = "abff"', "extension.method = 'abff'"),
        ('method = "abf"', 'method = "longrope"', "takes 32 pair_factors"),
        ("1, 4, 16", "1, 16, 4", "bucket_edges must rise"),
        ("[1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096]", "[]", "bucket_edges"),
        ("steps = 80", "steps = 0", "training.steps = 0"),
        ("sequences_at_once = 1", "sequences_at_once = 0", "training.sequences_at_once = 0"),
        ("rank = 16", "rank = 0", "lora.rank = 0"),
        ("keys = 4", "keys = 1", r"retrieval\.tasks\.keys = 1: Input should be greater than or equal to 2"),
        ("keys = 4", "kes = 4", r"unknown key 'retrieval\.tasks\.kes' \(did you mean 'keys'\?\)"),
        ("threshold = 0.5", "threshold = 50", r"retrieval\.tasks\.threshold = 50"),
        ("depths = [0.0, 0.25", "depths = [0.25, 0.0", r"retrieval\.tasks\.depths must rise, got \[0\.25, 0\.0"),
        ("depths = [0.0, 0.25", "depths = [0.0, 1.25", r"retrieval\.tasks\.depths\.1 = 1\.25"),
        ("lengths = [256, 512", "lengths = [512, 256", r"retrieval\.lengths must rise, got \[512, 256"),
        ("{ sotu = 18", "{ sotuu = 18", r"held_out names \['sotuu'\]"),
        (
            "[extension]\nwindow = 4096",
            "[extension]\nwindow = 256",
            r"\[extension\]: RoPE cannot be scaled down: window 256",
        ),
        ("sequences_per_step = 1", "sequences_per_step = 3\n", "sequences_at_once"),
    ],
)
def test_bad_preset_is_one_clear_error(folder, old, new, message):
    edit(folder, old, new)
    if "sequences_at_once" in message:
        edit(folder, "sequences_at_once = 1", "sequences_at_once = 2")
    with pytest.raises(ValueError, match=message):
        load_preset("tiny")


def test_trap_26_misspelt_parameter_stops_the_notebook():
    assert preset_from_parameters({"preset": "tiny", "_i": "x", "In": []}, {"preset": str}).name == "tiny"
    with pytest.raises(ValueError, match=r"unknown parameter 'presett'.*did you mean 'preset'"):
        preset_from_parameters({"preset": "tiny", "presett": "llama2-7b"}, {"preset": str})


@pytest.mark.parametrize("steps", ["ten", 2.5])
def test_parameter_of_the_wrong_type_stops_the_notebook(steps):
    parameters = {"preset": str, "steps": int | None}
    assert preset_from_parameters({"preset": "tiny", "steps": None}, parameters).name == "tiny"
    with pytest.raises(ValueError, match=r"parameter steps = .* must be of type int \| None"):
        preset_from_parameters({"preset": "tiny", "steps": steps}, parameters)


def test_no_code_asks_which_preset_it_runs():
    names = [f'"{name}"' for name in preset_names()]
    for path in (REPOSITORY / "llama_long_utils").glob("*.py"):
        text = path.read_text().replace('default="tiny"', "").replace('RESULTS / "tiny"', "")
        assert not any(name in text for name in names), path.name
