import dataclasses
import json
import math
import subprocess
import sys

import pytest

from llama_long_utils import presets
from llama_long_utils.paths import PRESETS, REPOSITORY
from llama_long_utils.presets import load_preset, preset_from_parameters, preset_names, with_numbers
from llama_long_utils.rope import rotation, wavelengths
from llama_long_utils.settings import Share, raised_base


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
    assert preset.training.sequences_per_step * preset.training.window <= 131_072  # tokens of a step


def test_presets_for_hub_models_know_what_their_configurations_say():
    """As the pages of the models show them; `base_config` refuses a preset that says anything else."""
    rule = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    told = {name: load_preset(name).base for name in ("llama2-7b", "llama2-13b", "llama2-70b", "llama3.1-8b")}
    llama2 = {(base.window, base.rope_base, base.head_dim) for name, base in told.items() if "llama2" in name}
    assert llama2 == {(4096, 10_000.0, 128)}
    assert told["llama3.1-8b"].rope_scaling == {**rule, "original_max_position_embeddings": 8192}
    tiny_llama = load_preset("tinyllama-1.1b")
    assert (tiny_llama.base.window, tiny_llama.base.head_dim, tiny_llama.extension.window) == (2048, 64, 16_384)


@pytest.mark.parametrize(
    ("flags", "gpu", "dtype"),
    [
        ("fpu avx2 avx512f", False, "float32"),
        ("fpu avx512_bf16", False, "bfloat16"),
        ("fpu amx_bf16 amx_tile", False, "bfloat16"),
        ("fpu avx2", True, "bfloat16"),
        (None, False, "float32"),
    ],
)
def test_dtype_auto_is_what_this_machine_multiplies_fastest(tmp_path, monkeypatch, folder, flags, gpu, dtype):
    cpu, card = tmp_path / "cpuinfo", tmp_path / "nvidia"
    if flags:
        cpu.write_text(f"processor : 0\nflags : {flags}\n")
    if gpu:
        card.write_text("driver")
    assert presets.fastest_dtype(card, cpu) == dtype
    edit(folder, 'dtype = "float32"', 'dtype = "auto"')
    monkeypatch.setattr(presets, "fastest_dtype", lambda: dtype)
    assert load_preset("tiny").base.dtype == dtype


def test_a_preset_that_is_like_another_states_only_what_differs(folder):
    (folder / "mine.toml").write_text(
        'like = "tiny"\n[extension]\nwindow = 2048\n[data]\nsources = ["sotu", "shakespeare"]\n'
        "[retrieval.tasks]\nkeys = 7\n"
    )
    tiny, mine = load_preset("tiny"), load_preset("mine")
    assert mine.name == "mine"
    assert (mine.extension.window, mine.training.window, mine.retrieval.lengths[-1]) == (2048, 2048, 2048)
    assert (mine.retrieval.tasks.keys, mine.retrieval.tasks.depths) == (7, tiny.retrieval.tasks.depths)
    assert mine.data == dataclasses.replace(
        tiny.data, sources=["sotu", "shakespeare"], held_out=None, minimum_characters=9216
    )
    assert mine.extension.rope_base == raised_base(64, 1e4, 512, 2048) != tiny.extension.rope_base  # it follows
    assert (mine.base, mine.lora) == (tiny.base, tiny.lora)


def test_fewer_steps_than_those_of_the_other_preset_have_checkpoints_and_a_warm_up_of_their_own(folder):
    (folder / "mine.toml").write_text('like = "tiny"\n[training]\nsteps = 21\n')
    training = load_preset("mine").training
    assert (training.steps, training.warmup_steps, training.checkpoint_every) == (21, 2, 5)
    (folder / "mine.toml").write_text('like = "tiny"\n[training]\nsteps = 21\nwarmup_steps = 7\ncheckpoint_every = 9\n')
    training = load_preset("mine").training
    assert (training.warmup_steps, training.checkpoint_every) == (7, 9)
    (folder / "mine.toml").write_text('like = "tiny"\n[training]\nsteps = "21"\n')
    with pytest.raises(ValueError, match=r"mine.toml: training.steps = '21': [^;]*$"):  # and nothing is missing
        load_preset("mine")


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ('"mine"', r"use one of \['tiny'\]"),
        ('"tinny"', r"\['tiny'\] \(did you mean 'tiny'\?\)"),
        ("3", "3: use one of"),
    ],
)
def test_a_preset_that_is_like_none_is_refused(folder, like, message):
    (folder / "mine.toml").write_text(f"like = {like}\n")
    with pytest.raises(ValueError, match=rf"presets/mine.toml: like = .*{message}"):
        load_preset("mine")


def test_a_method_that_raises_no_base_has_the_pretrained_one(folder):
    (folder / "mine.toml").write_text('like = "tiny"\n[extension]\nmethod = "yarn"\n')
    assert load_preset("mine").extension.rope_base == 10_000


@pytest.mark.parametrize(("method", "base"), [("abf", 500_000), ("xpos_abf", 640_000)])
def test_a_method_that_raises_the_base_has_the_inherited_one_only_if_it_is_the_same(folder, method, base):
    (folder / "mine.toml").write_text(f'like = "tiny"\n[extension]\nmethod = "{method}"\n')
    assert load_preset("mine").extension.rope_base == base


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[extension]\nwindw = 2048", r"unknown key 'extension.windw' \(did you mean 'window'\?\)"),
        ("window = 2048", r"unknown key 'window' \(it is a key of \[base\] or \[extension\] or \[training\] or \["),
        ("[training]\ntokens = 0", "training.tokens = 0: give a whole number above 0, and no steps beside it"),
        ("[training]\ntokens = 4096\nsequences_per_step = 0", "training.sequences_per_step = 0: Input should be great"),
        ("[training]\ntokens = 4096\nsteps = 3", "training.tokens = 4096: give a whole number above 0, and no st"),
        ("[extension]\nmethod = 'none'\nrope_base = 5e5", "rope_base = 500000 of method 'none' must be base.rope_b"),
        ("[extension]\nrope_base = 5e3", "extension.rope_base = 5000 is below base.rope_base = 10000: leave it out"),
        ('[[data.sources]]\nname = "sotu"\nwight = 1.0', r"'data.sources.0.wight' \(did you mean 'weight'\?\)"),
        ("[evaluation]\ntokens = 512", "evaluation.tokens = 512 is not above base.window = 512"),
    ],
)
def test_a_key_that_is_misspelt_or_misplaced_is_named_with_the_fix(folder, line, message):
    (folder / "mine.toml").write_text(f'like = "tiny"\n{line}\n')
    with pytest.raises(ValueError, match=f"^presets/mine.toml: .*{message}"):
        load_preset("mine")
    (folder / "mine.toml").write_text('lik = "tiny"\n')
    with pytest.raises(ValueError, match=r"^presets/mine.toml: unknown key 'lik' \(did you mean 'like'\?\)"):
        load_preset("mine")


def test_held_out_documents_are_as_long_as_what_is_read_of_them():
    for name in ("llama2-7b", "llama2-70b", "tinyllama-1.1b", "llama3.1-8b"):
        preset = load_preset(name)
        assert preset.data.minimum_characters == 4.5 * preset.evaluation.tokens == 4.5 * preset.extension.window


def test_llama2_7b_is_the_paper_s():
    preset = load_preset("llama2-7b")
    assert preset.base.source == "meta-llama/Llama-2-7b-hf"
    assert (preset.extension.window, preset.extension.rope_base) == (32_768, 500_000)
    assert preset.base.head_dim == 128


def test_tiny_has_the_paper_s_ratios():
    preset = load_preset("tiny")
    assert preset.extension.window / preset.base.window == 8
    assert preset.extension.rope_base / preset.base.rope_base == 50


def test_smollm2_s_base_leaves_no_pair_at_new_angles():
    preset = load_preset("smollm2")
    seen = preset.base.window / wavelengths(rotation(preset.base_rope)[0])  # turns within the old window
    reached = preset.extension.window / wavelengths(rotation(preset.extended_rope)[0])
    assert (reached <= seen)[seen < 1].all()


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(
        ValueError, match=r"unknown preset 'tinny': use one of .*did you mean 'tiny'.*new_preset writes one"
    ):
        load_preset("tinny")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rank = 16", "rnk = 16", r"unknown key 'lora\.rnk' \(did you mean 'rank'\?\)"),
        ("rank = 16\n", "", r"key 'lora\.rank' is missing"),
        ("rank = 16", 'rank = "16"', r"lora\.rank = '16'"),
        ("rank = 16", "rank = 16 16", "not valid TOML"),
        ("rank = 16", "rank = 16,384", r"not valid TOML.*write 65_536"),
        ("[training]", "[training]\nwindow = 8192", "reach = 4096 must be at least window = 8192"),
        ("[training]", "[training]\nwindow = 512", "need pack = false"),
        (
            "pack = true",
            "pack = false\nreach = 8192",
            "training.reach = 8192 is longer than extension.window = 4096",
        ),
        (
            "pack = true",
            "pack = false\nwindow = 512\nreach = 512",
            "training.reach = 512 is shorter than extension.window",
        ),
        (
            "[evaluation]",
            "[evaluation]\nfar_tokens = 2048",
            r"evaluation.far_tokens = 2048 is shorter than extension.window",
        ),
        ("[evaluation]", "[evaluation]\nbucket_edges = [1, 16, 4, 4096]", "bucket_edges must rise"),
        (
            "[evaluation]",
            "[evaluation]\nbucket_edges = [1, 16, 2048]",
            "extension.window = 4096, got .*: leave them out",
        ),
        ("[evaluation]", "[evaluation]\nbucket_edges = []", "bucket_edges"),
        ("[retrieval]", "[retrieval]\nlengths = [512, 256]", r"retrieval\.lengths must rise, got \[512, 256"),
        (
            "[retrieval]",
            "[retrieval]\nlengths = [512, 8192]",
            r"retrieval\.lengths = 8192 is longer than",
        ),
        ("[race.trainings.s2]", "[race.trainings.s2]\nreach = 8192", r"race\.trainings\.s2\.reach = 8192 is longer"),
        ('attention = "sdpa"', 'attention = "s2"', "need pack = false"),
        ('attention = "sdpa"', 'attention = "sdap"', "attention = 'sdap'"),
        ('method = "abf"', 'method = "abff"', "extension.method = 'abff'"),
        ('method = "abf"', 'method = "longrope"', "takes 32 pair_factors"),
        ("steps = 80", "steps = 0", "training.steps = 0"),
        (
            "steps = 80",
            "steps = 10",
            r"training\.warmup_steps = 10 is not below training\.steps = 10, so .*: lower it, or",
        ),
        ("steps = 16", "steps = 1", r"instruction\.warmup_steps = 2 is not below instruction\.steps = 1, "),
        ("steps = 12", "steps = 2", r"preference\.rl\.warmup_steps = 2 is not below preference\.rl\.steps = 2"),
        (
            "warmup_steps = 5",
            "warmup_steps = 20",
            r"race\.warmup_steps = 20 is not below race\.trainings\.full-length\.st",
        ),
        ("sequences_at_once = 1", "sequences_at_once = 0", "training.sequences_at_once = 0"),
        ("rank = 16", "rank = 0", "lora.rank = 0"),
        ("keys = 4", "keys = 1", r"retrieval\.tasks\.keys = 1: Input should be greater than or equal to 2"),
        ("keys = 4", "kes = 4", r"unknown key 'retrieval\.tasks\.kes' \(did you mean 'keys'\?\)"),
        ("threshold = 0.5", "threshold = 50", r"retrieval\.tasks\.threshold = 50"),
        ("depths = [0.0, 0.25", "depths = [0.25, 0.0", r"retrieval\.tasks\.depths must rise, got \[0\.25, 0\.0"),
        ("depths = [0.0, 0.25", "depths = [0.0, 1.25", r"retrieval\.tasks\.depths\.1 = 1\.25"),
        (
            "[extension]\nwindow = 4096",
            "[extension]\nwindow = 256",
            r"\[extension\]: RoPE cannot be scaled down: window 256",
        ),
        ("sequences_per_step = 1", "sequences_per_step = 3\n", "sequences_at_once"),
        ("learning_rate = 2e-3", "learning_rate = inf", "learning_rate = inf"),
        ("learning_rate = 2e-3", "learning_rate = 2.0", "learning_rate = 2"),
        ("weight_decay = 0.0", "weight_decay = nan", "weight_decay = nan"),
        ("memory_gib = 4.0", "memory_gib = inf", "memory_gib = inf: Input should be a finite number"),
        ("rope_base = 10_000.0", "rope_base = inf", "base.rope_base = inf"),
        ("rope_base = 500_000.0", "rope_base = 1.0", "extension.rope_base = 1"),
        ("rope_base = 500_000.0", "rope_base = nan", "extension.rope_base = nan"),
        ("gradient_clipping = 1.0", "gradient_clipping = inf", "gradient_clipping = inf"),
        ("seed = 0", "seed = 4294967296", "seed = 4294967296"),
        ("seeds = [0, 1, 2]", "seeds = [0, -1]", r"race\.seeds\.1 = -1"),
        ("seeds = [0, 1, 2]", "seeds = []", r"race\.seeds"),
        ("steps = 80", "steps = 1_000_000_000", "training.steps = 1000000000"),
        ("questions = 10 ", "questions = 100_000 ", "questions = 100000"),
        ("questions = 10 ", "questions = 2026-11-26 ", "questions = '2026-11-26'"),
    ],
)
def test_bad_preset_is_one_clear_error(folder, old, new, message):
    edit(folder, old, new)
    if "sequences_at_once" in message:
        edit(folder, "sequences_at_once = 1", "sequences_at_once = 2")
    with pytest.raises(ValueError, match=message):
        load_preset("tiny")


def test_a_misspelt_parameter_stops_the_notebook():
    assert preset_from_parameters({"preset": "tiny", "_i": "x", "In": []}, {"preset": str}).name == "tiny"
    with pytest.raises(ValueError, match=r"unknown parameter 'presett'.*did you mean 'preset'"):
        preset_from_parameters({"preset": "tiny", "presett": "llama2-7b"}, {"preset": str})


def test_a_run_of_fewer_steps_reaches_its_learning_rate_and_a_longer_one_warms_up_as_before():
    training = load_preset("tiny").training
    assert (training.steps, training.warmup_steps) == (80, 10)
    shorter = [with_numbers(training, "training", steps=steps) for steps in range(1, 80)]
    assert all(one.warmup_steps < one.steps for one in shorter)
    assert [shorter[steps - 1].warmup_steps for steps in (1, 8, 40, 79)] == [0, 1, 5, 9]
    assert with_numbers(training, "training", steps=800).warmup_steps == 10
    assert with_numbers(training, "training", steps=8, warmup_steps=4).warmup_steps == 4


def test_notebook_9_lets_fewer_steps_reach_their_learning_rate_too():
    cells = json.loads((REPOSITORY / "notebooks" / "09_instruction_tuning.ipynb").read_bytes())["cells"]
    (line,) = (line for cell in cells for line in cell["source"] if line.startswith("instruction = "))
    for steps in (None, 16, 8, 2, 1):
        names = {
            "settings": load_preset("tiny"),
            "steps": steps,
            "with_numbers": with_numbers,
            "dataclasses": dataclasses,
        }
        exec(line, names)
        assert names["instruction"].steps == (steps or 16)
        assert names["instruction"].warmup_steps == (steps or 16) // 8


def lengths(preset):
    """Every number of a preset that is a length in tokens."""
    training, evaluation, retrieval = preset.training, preset.evaluation, preset.retrieval
    trainings = preset.race.trainings
    return {
        "training": (training.window, training.reach),
        "evaluation": (evaluation.tokens, evaluation.far_tokens, evaluation.bucket_edges),
        "retrieval": (retrieval.lengths, retrieval.tasks.generate_up_to),
        **{name: (trainings[name].window, trainings[name].reach) for name in ("full-length", "pose", "s2")},
    }


def test_all_lengths_follow_the_one_window(folder):
    edit(folder, "window = 4096", "window = 8192")
    assert lengths(load_preset("tiny")) == {
        "training": (8192, 8192),
        "evaluation": (8192, 8192, [1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192]),
        "retrieval": ([256, 512, 1024, 2048, 4096, 8192], 8192),
        "full-length": (8192, 8192),
        "pose": (512, 8192),
        "s2": (8192, 8192),
    }


def test_lengths_of_an_odd_window_end_at_it_and_keep_the_old_one(folder):
    edit(folder, "window = 4096", "window = 5000")
    found = lengths(load_preset("tiny"))
    assert found["evaluation"][2] == [1, 4, 16, 64, 156, 312, 512, 625, 1250, 2500, 5000]
    assert found["retrieval"][0] == [256, 312, 625, 1250, 2500, 5000]


@pytest.mark.parametrize("steps", ["ten", 2.5, True])
def test_parameter_of_the_wrong_type_stops_the_notebook(steps):
    parameters = {"preset": str, "steps": int | None}
    assert preset_from_parameters({"preset": "tiny", "steps": None}, parameters).name == "tiny"
    with pytest.raises(ValueError, match=r"parameter steps = .*: it should be a valid integer"):
        preset_from_parameters({"preset": "tiny", "steps": steps}, parameters)


@pytest.mark.parametrize("utilisation", [0, -1.0, 1.01, math.inf, math.nan])
def test_parameter_out_of_bounds_stops_the_notebook(utilisation):
    parameters = {"preset": str, "utilisation": Share}
    assert preset_from_parameters({"preset": "tiny", "utilisation": 1}, parameters).name == "tiny"
    with pytest.raises(ValueError, match=r"parameter utilisation = \S+: it should be [a-z0-9 ]+$"):
        preset_from_parameters({"preset": "tiny", "utilisation": utilisation}, parameters)


def test_presets_are_read_without_heavy_libraries():
    heavy = {"torch", "transformers", "bitsandbytes", "pandas", "matplotlib", "nbformat", "papermill", "IPython"}
    modules = ["settings", "presets", "cache", "paths", "progress"]
    code = f"import sys, {', '.join('llama_long_utils.' + name for name in modules)}; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_no_code_asks_which_preset_it_runs():
    names = [f'"{name}"' for name in preset_names()]
    for path in (REPOSITORY / "llama_long_utils").rglob("*.py"):
        text = path.read_text().replace('default="tiny"', "").replace('RESULTS / "tiny"', "")
        assert not any(name in text for name in names), path.name
