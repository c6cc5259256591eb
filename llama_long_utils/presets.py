"""Reading presets: every number that differs between a laptop and a GPU, in one file each."""

import dataclasses
import difflib
import json
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from llama_long_utils import settings
from llama_long_utils.paths import PACKAGED, PRESETS, REPOSITORY
from llama_long_utils.settings import Preset, raised_base

CHARACTERS = 4.5  # of a token, more than most texts have
RAISED = ("abf", "xpos_abf")  # methods with a RoPE base of their own
Numbers = TypeVar("Numbers")  # a dataclass of settings
REPLACED = {  # (section, key that a preset gives): keys of the preset it is like that no longer hold
    ("extension", "window"): ("rope_base",),
    ("extension", "method"): ("rope_base",),
    ("data", "sources"): ("held_out", "minimum_characters"),
    ("training", "steps"): ("tokens", "warmup_steps", "checkpoint_every"),
    ("training", "tokens"): ("steps", "warmup_steps", "checkpoint_every"),
}


def preset_names() -> list[str]:
    """The presets there are, by name."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def load_preset(name: str) -> Preset:
    """Read presets/NAME.toml; ValueError names what is wrong in it, and the closest known name."""
    if name not in (names := preset_names()):
        known = f"use one of {names}{closest(PurePath(name).name.removesuffix('.toml'), names)}"
        raise ValueError(f"unknown preset {name!r}: {known}; python -m llama_long_utils.new_preset writes one")
    try:
        values = _read(name)
        follow_window(values)
        if "tokens" in (training := _section(values, "training")):
            given = f"presets/{name}.toml: training.tokens = {training['tokens']!r}"
            raise ValueError(f"{given}: give a whole number above 0, and no steps beside it")
        if _section(values, "base").get("dtype") == "auto":
            values["base"]["dtype"] = fastest_dtype()
        # As JSON, because pydantic's strict mode takes dataclasses from nothing else.
        preset = TypeAdapter(Preset).validate_json(json.dumps({"name": name, **values}, default=str))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f'presets/{name}.toml is not valid TOML: {error} (write 65_536, and "a text")') from error
    except ValidationError as error:
        raise ValueError(f"presets/{name}.toml: {_explain(error)}") from None
    _check_consistency(preset)
    return preset


def fastest_dtype(gpu: Path = Path("/proc/driver/nvidia/version"), cpu: Path = Path("/proc/cpuinfo")) -> str:
    """bfloat16 where there is a GPU or a CPU that multiplies it (AVX512-BF16, AMX), which is 4 times as fast there."""
    flags = set(cpu.read_text().split()) if cpu.exists() else set()
    return "bfloat16" if gpu.exists() or flags & {"avx512_bf16", "amx_bf16", "bf16"} else "float32"


def _read(name: str, *inheriting: str) -> dict[str, Any]:
    """The values in a preset's file; what it leaves out is as in the preset that it is `like`."""
    values = tomllib.loads((PRESETS / f"{name}.toml").read_text(encoding="utf-8"))
    if (like := values.pop("like", "")) == "":
        return values
    if like not in (others := [other for other in preset_names() if other not in (name, *inheriting)]):
        raise ValueError(f"presets/{name}.toml: like = {like!r}: use one of {others}{closest(str(like), others)}")
    inherited = _read(like, name, *inheriting)
    for (section, given), follow in REPLACED.items():
        own, theirs = _section(values, section), _section(inherited, section)
        for key in follow if given in own and own[given] != theirs.get(given) else ():
            theirs.pop(key, None)
    return _merged(inherited, values)


def _merged(inherited: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    merged = dict(inherited)
    for key, value in given.items():
        tables = isinstance(value, dict) and isinstance(inherited.get(key), dict) and key != "held_out"
        merged[key] = _merged(inherited[key], value) if tables else value
    return merged


def follow_window(values: dict[str, Any]) -> None:
    """Fill in, in place, the lengths and the raised RoPE base that a preset leaves out: they follow [extension] window.

    Every training and evaluation reach the window. Bucket edges and retrieval lengths are the window halved again and
    again, after a few short ones. A held-out document has CHARACTERS for each token that is read of it. The `tokens` of
    [training] stand for as many steps as they fill. A tenth of them warm up; a checkpoint comes each fourth, or 20.
    """

    def tokens_of(section: str, key: str, other: int) -> int:
        given = _section(values, section).get(key)
        return given if isinstance(given, int) and given > 0 else other  # what is no length is refused later

    window, old = tokens_of("extension", "window", 4096), tokens_of("base", "window", 4096)
    tokens = tokens_of("evaluation", "tokens", window)
    extension, base, training = (_section(values, name) for name in ("extension", "base", "training"))
    plain = [base.get(key) for key in ("head_dim", "rope_base")]
    if extension.get("method") in RAISED and all(isinstance(n, int | float) and 1 < n < 1e12 for n in plain):
        extension.setdefault("rope_base", raised_base(*plain, old, max(old, window)))
    elif extension.get("method") not in RAISED and "rope_base" in base:
        extension.setdefault("rope_base", base["rope_base"])
    halved = {window >> times for times in range(8) if window >> times >= 128}
    edges = sorted({1, 4, 16, 64} | halved | {mark for mark in (old, tokens) if 64 < mark < window})
    lengths = sorted({min(256, window)} | {window >> times for times in range(6) if window >> times >= 256})
    race = ("race", "trainings")
    for names, defaults in {
        ("data",): {"minimum_characters": int(CHARACTERS * tokens)},
        ("training",): {"window": window, "reach": window},
        ("evaluation",): {"tokens": window, "far_tokens": window, "bucket_edges": edges},
        ("retrieval",): {"lengths": lengths},
        ("retrieval", "tasks"): {"generate_up_to": window},
        **{(*race, name): {"window": window, "reach": window} for name in _section(values, *race)},
    }.items():
        section = _section(values, *names)
        section.update({**defaults, **section})
    sizes = [training.get(key) for key in ("window", "sequences_per_step")]
    if "steps" not in training and isinstance(tokens := training.get("tokens"), int) and tokens > 0:
        whole = all(isinstance(size, int) and size > 0 for size in sizes)  # else they are refused later
        training["steps"] = max(1, training.pop("tokens") // (sizes[0] * sizes[1] if whole else tokens))
    if (steps := training.get("steps")) is not None:
        steps = steps if isinstance(steps, int) else 1  # what is no number is refused later, and alone
        training.setdefault("warmup_steps", steps // 10)
        training.setdefault("checkpoint_every", min(20, max(1, steps // 4)))


def _section(values: dict[str, Any], *names: str) -> dict[str, Any]:
    for name in names:
        values = section if isinstance(section := values.get(name), dict) else {}
    return values


def preset_from_parameters(namespace: dict[str, Any], parameters: dict[str, Any]) -> Preset:
    """The preset that a notebook's parameters ask for; ValueError for an unknown name or a value of the wrong type.

    papermill only warns about a parameter that the notebook does not have, and defines it. Names are checked once in a
    kernel: cells that run again find the variables of the others there. `namespace` is the notebook's `globals()` in
    the cell right after its `parameters`, which come with their types, such as str, int | None or `settings.Share`.
    """
    names, literals = [*parameters], (str, int, float, bool, list, dict, type(None))
    for name, value in namespace.items() if "_names_checked" not in namespace else ():
        known = name in (*names, "In", "Out", "exit", "quit") or name.startswith("_")
        if not known and isinstance(value, literals):
            raise ValueError(f"unknown parameter {name!r}: this notebook has {names}{closest(name, names)}")
    for name, wanted in parameters.items():
        try:
            TypeAdapter(wanted, config=ConfigDict(strict=True, allow_inf_nan=False)).validate_python(namespace[name])
        except ValidationError as error:
            reasons = dict.fromkeys(problem["msg"].replace("Input s", "it s") for problem in error.errors())
            raise ValueError(f"parameter {name} = {namespace[name]!r}: {', or '.join(reasons)}") from None
    namespace["_names_checked"] = True
    return load_preset(namespace["preset"])


def with_numbers(settings: Numbers, section: str, **numbers: Any) -> Numbers:
    """A section's settings with other numbers, None for their own; ValueError names the one that is wrong."""
    given = {name: number for name, number in numbers.items() if number is not None}
    if "steps" in given and given["steps"] < settings.steps:  # or a short run would not reach its learning rate
        given.setdefault("warmup_steps", settings.warmup_steps * max(given["steps"], 0) // settings.steps)
    try:
        return dataclasses.replace(settings, **given)
    except ValidationError as error:
        raise ValueError(f"{section}: {_explain(error)}") from None


def _check_consistency(preset: Preset) -> None:
    """Raise ValueError if two numbers of a preset contradict each other."""
    where, window = f"presets/{preset.name}.toml", preset.extension.window
    try:
        preset.extended_rope  # noqa: B018 (its own checks run)
    except ValidationError as error:
        raise ValueError(f"{where}, [extension]: {_explain(error)}") from None
    raised, plain, method = preset.extension.rope_base, preset.base.rope_base, preset.extension.method
    if raised < plain or (method not in RAISED and raised != plain):
        wanted = "is below" if method in RAISED else f"of method {method!r} must be"
        raise ValueError(f"{where}: extension.rope_base = {raised:g} {wanted} base.rope_base = {plain:g}: leave it out")
    lengths, evaluation = preset.retrieval.lengths, preset.evaluation
    races = preset.race.trainings
    follow = f"extension.window = {window}: leave it out, then it follows the window"
    reached = {"training.reach": preset.training.reach, "evaluation.far_tokens": evaluation.far_tokens}
    within = {f"race.trainings.{name}.reach": training.reach for name, training in races.items()}
    for name, value in {**reached, **within, "retrieval.lengths": lengths[-1]}.items():
        if value > window or (name in reached and value < window):
            raise ValueError(f"{where}: {name} = {value} is {'longer' if value > window else 'shorter'} than {follow}")
    edges, tokens = evaluation.bucket_edges, evaluation.tokens
    if tokens <= preset.base.window:
        raise ValueError(
            f"{where}: evaluation.tokens = {tokens} is not above base.window = {preset.base.window}, where there is "
            "nothing to compare: leave it out, then it follows extension.window"
        )
    if sorted(set(edges)) != edges or edges[-1] != window or tokens not in edges:
        raise ValueError(
            f"{where}: evaluation.bucket_edges must rise from at least 1 over evaluation.tokens = {tokens} to "
            f"extension.window = {window}, got {edges}: leave them out, then they follow the window"
        )
    trained = {"training": preset.training, "instruction": preset.instruction}
    trained |= {f"preference.{name}": getattr(preset.preference, name) for name in ("reward", "rl", "dpo")}
    warmups = [(name, one.steps, name, one.warmup_steps) for name, one in trained.items()]
    warmups += [(f"race.trainings.{name}", one.steps, "race", preset.race.warmup_steps) for name, one in races.items()]
    for name, steps, section, warmup in warmups:
        if warmup >= steps:  # the first step of a warm-up has a rate of 0, and the one behind it the whole rate
            never = "so the learning rate would never be reached: lower it, or raise steps"
            raise ValueError(f"{where}: {section}.warmup_steps = {warmup} is not below {name}.steps = {steps}, {never}")
    for name, values in (("lengths", lengths), ("tasks.depths", preset.retrieval.tasks.depths)):
        if sorted(set(values)) != values:
            raise ValueError(f"{where}: retrieval.{name} must rise, got {values}: use {sorted(set(values))}")


def _explain(error: ValidationError) -> str:
    parts = filter(dataclasses.is_dataclass, vars(settings).values())
    known = ["like", *(field.name for part in parts for field in dataclasses.fields(part))]
    messages, unknown = [], "unexpected_keyword_argument"
    for problem in sorted(error.errors(), key=lambda problem: problem["type"] != unknown):  # which explain the missing
        key = ".".join(str(part) for part in problem["loc"] if part != "table")
        if problem["type"] == unknown:
            name = str(problem["loc"][-1])
            parts = dataclasses.fields(Preset)
            homes = [f"[{part.name}]" for part in parts if name in getattr(part.type, "__annotations__", ())]
            hint = f" (it is a key of {' or '.join(homes)})" if homes else closest(name, known)
            messages.append(f"unknown key {key!r}{hint}")
        elif problem["type"] in ("missing", "missing_argument"):
            messages.append(f"key {key!r} is missing")
        elif problem["type"] == "value_error":  # one of our own, which names the value
            messages.append(f"{key + ': ' if key else ''}{problem['ctx']['error']}")
        else:
            messages.append(f"{key} = {problem['input']!r}: {problem['msg']}")
    return "; ".join(messages)


def check_window(window: int, old: int | None) -> None:
    """ValueError if a base's own window is as long as the one asked for."""
    if old and window <= old:
        raise ValueError(f"--window {window:,} is not above the base's own {old:,} tokens: there is nothing to extend")


def check_model(model: str, names: Sequence[str] = (), preset: str = "") -> None:
    """ValueError unless a model, the base of `preset` if given, is named here or packaged, a folder, or on the hub."""
    path, names = REPOSITORY / model, [*names, *json.loads(PACKAGED.read_bytes())]
    where = f"presets/{preset}.toml, [base] source: " if preset else ""
    use = f"use a folder with config.json, owner/name on the hub, or one of {', '.join(names)}"
    on_the_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not path.parent.is_dir()
    if model in names or on_the_hub or (path / "config.json").is_file():
        return
    if path.is_dir():
        raise ValueError(f"{where}{path} is not a model folder: it has no config.json; {use}")
    beside = [str(Path(model).with_name(one.name)) for one in path.parent.glob("*/")]
    folder = "there is no such folder; " if "/" in model else ""
    raise ValueError(f"{where}unknown model {model!r}{closest(model, [*names, *beside])}: {folder}{use}")


def closest(name: str, known: list[str]) -> str:
    """A hint at the known name that is meant, or nothing."""
    match = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""
