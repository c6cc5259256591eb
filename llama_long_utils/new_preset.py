"""A preset for a model of your own: `python -m llama_long_utils.new_preset --base MODEL --window N --memory GIB`.

Writes presets/NAME.toml from presets/new.toml.in and the model's config.json; no weights are read.
"""

import argparse
import contextlib
import json
import re
from pathlib import Path
from string import Template
from typing import Any

from llama_long_utils.commands import PYTHON, gibibytes, run_command, tokens
from llama_long_utils.data.documents import count_to_hold_out, whole
from llama_long_utils.data.sources import check_sources, load_documents
from llama_long_utils.paths import PRESETS, REPOSITORY
from llama_long_utils.presets import CHARACTERS, check_model, check_window, load_preset
from llama_long_utils.settings import ARCHITECTURES

TEMPLATE, HUB_DATA = PRESETS / "new.toml.in", PRESETS / "llama2-7b.toml"
STEPS, PER_STEP, PASSES = 200, 4, 4  # at most, sequences of a step, times that own texts are trained on
LONGEST, LONG_BOOKS = 65_536, 4  # tokens of many of the hub's books; held-out ones for longer windows


def arguments() -> argparse.Namespace:
    """What was asked for; what can be refused without heavy modules is refused here."""
    parser = argparse.ArgumentParser(prog="python -m llama_long_utils.new_preset", description=__doc__)
    parser.add_argument("--base", required=True, help="folder with config.json, owner/name on the hub, or packaged")
    parser.add_argument("--window", required=True, type=tokens, metavar="N", help="tokens to extend it to")
    parser.add_argument("--memory", required=True, type=gibibytes, metavar="GIB", help="of the device")
    parser.add_argument("--name", help="of the preset (default: the model's name and the window)")
    parser.add_argument("--texts", metavar="FOLDER", help="with .txt, .md, .jsonl files (default: data on the hub)")
    asked = parser.parse_args()
    asked.name = re.sub(r"[^\w.]+", "-", asked.name or f"{Path(asked.base).name.lower()}-{asked.window}").strip("-.")
    if not asked.name or asked.texts == "":
        parser.error("--texts is empty: name a folder of texts" if asked.name else "give --name a letter or a digit")
    if (PRESETS / f"{asked.name}.toml").exists():
        parser.error(f"presets/{asked.name}.toml is there and is not overwritten: use another --name, or remove it")
    check_sources([asked.texts] if asked.texts else [], {})
    check_model(asked.base)
    if (folder := REPOSITORY / asked.base).is_dir():
        with contextlib.suppress(OSError, AttributeError, TypeError, json.JSONDecodeError):  # said better later
            config = json.loads((folder / "config.json").read_bytes())
            if (kind := config.get("model_type")) not in ARCHITECTURES:
                raise ValueError(f"{folder} has model_type {kind!r}: use one of {list(ARCHITECTURES)}")
            if config.get("use_sliding_window", True) and (sliding := config.get("sliding_window")):
                raise ValueError(f"the base attends to the last {sliding:,} tokens only (sliding_window): use another")
            check_window(asked.window, config.get("max_position_embeddings"))
    return asked


def toml(value: Any) -> str:
    """A value as TOML."""
    if isinstance(value, dict):
        names = {key: key if re.fullmatch("[A-Za-z0-9_-]+", key) else toml(key) for key in value}
        return f"{{ {', '.join(f'{names[key]} = {toml(value[key])}' for key in value)} }}" if value else "{}"
    return f"{value:_}" if isinstance(value, int | float) and value >= 10_000 else json.dumps(value, ensure_ascii=False)


def own_texts(texts: str, window: int) -> dict[str, Any]:
    """[data] and the tokens to train on of texts of one's own; ValueError if they are too short or too few."""
    name = Path(texts).name or texts
    parts: dict[str, list[str]] = {}  # of each text: a long one is several documents
    for one in {" ".join(one.text.split()): one for one in load_documents(texts)}.values():
        parts.setdefault(whole(one.name), []).append(one.text)
    longest = ((max(of_one, key=len), sum(map(len, of_one))) for of_one in parts.values())
    sizes = sorted((len(text.encode()), len(text), total) for text, total in longest)
    if len(sizes) < 2 or sizes[-2][0] + 3 < window:  # a token is a byte at least
        raise ValueError(
            f"two of the {len(sizes)} texts in {texts}, copies left out, must fill {window:,} tokens (about "
            f"{CHARACTERS * window:,.0f} characters), one to train on, one to test: add longer ones, or lower --window"
        )
    shortest = min(int(CHARACTERS * window), *(count for _, count, _ in sizes[-2:]))
    held_out = count_to_hold_out(sum(count >= shortest for _, count, _ in sizes))
    trained_on = sum(count for *_, count in sizes[:-held_out]) / CHARACTERS  # tokens, if the longest are held out
    tokens = min(STEPS * PER_STEP * window, int(PASSES * trained_on))
    if tokens < PER_STEP * window:
        raise ValueError(
            f"the {len(sizes)} texts in {texts} hold about {trained_on:,.0f} tokens to train on, and {PASSES} passes "
            f"of them do not fill a step of {PER_STEP} x {window:,}: add texts, or lower --window"
        )
    data = {"sources": [texts], "held_out": {name: held_out}, "minimum_characters": shortest, "passes": PASSES}
    return {**data, "tokens": tokens, "different": len(sizes), "fill": sizes[-2][1] >= CHARACTERS * window}


def fill(asked: argparse.Namespace, config: Any, base: dict[str, Any], own: dict[str, Any]) -> str:
    """The preset's text, for the model with this configuration, these `pretrained_numbers` and `own_texts`."""
    values = {f"base_{key}": value for key, value in base.items()} | vars(asked) | own
    text, follows = TEMPLATE.read_text(encoding="utf-8"), int(CHARACTERS * asked.window)
    if own:
        if values["minimum_characters"] == follows:  # then it is left out
            text = text.replace("$minimum_characters\n", "")
        text = text.replace("$minimum", "minimum_characters = $minimum")
    else:  # as in llama2-7b
        of_llama = HUB_DATA.read_text(encoding="utf-8")
        data = of_llama[of_llama.index("# Long text is") : of_llama.index("[lora]")]
        text = text[: text.index("[data]")] + data + text[text.index("[lora]") :]
        if asked.window > LONGEST:
            text = text.replace("{ pg19 = 16 }", toml({"pg19": LONG_BOOKS}))
        values["tokens"] = STEPS * PER_STEP * asked.window
    per_token = 4 * config.num_hidden_layers * config.num_key_value_heads * base["head_dim"]  # keys and values, 16 bits
    values["question_tokens"] = min(512, asked.window // 2)  # with which many answers are affordable
    values["generate_up_to"] = int(asked.memory * 2**30 / 3 / per_token)
    return Template(text).substitute({key: toml(value) for key, value in values.items()})


def write() -> None:
    """What the command does. Heavy imports come after its arguments are checked."""
    asked = arguments()
    own = own_texts(asked.texts, asked.window) if asked.texts else {}

    from llama_long_utils.model.weights import base_config, model_config, pretrained_numbers

    config = model_config(asked.base)
    base = pretrained_numbers(config)
    check_window(asked.window, base["window"])
    text, file = fill(asked, config, base, own), PRESETS / f"{asked.name}.toml"
    file.touch(exist_ok=False)
    try:
        file.write_text(text, encoding="utf-8")
        base_config(preset := load_preset(asked.name))
    except BaseException:
        file.unlink()
        raise
    counts = preset.data.held_out
    few = " (below eight, no intervals: raise held_out in [data], or add texts)" * (sum(counts.values()) < 8)
    read = f" ({own['different']:,} different texts)" if own else ""
    short = " (fewer than two may fill the window: train then refuses them)" * bool(own and not own["fill"])
    texts = f"texts: {', '.join(source.name for source in preset.data.mixture)}{read}{short}; held out: {counts}{few}"
    print(f"presets/{asked.name}.toml: {preset.extended_rope}\n{texts}")
    print(f"then: {PYTHON} -m llama_long_utils.plan {asked.name}")
    print(f"      {PYTHON} -m llama_long_utils.train --preset {asked.name}")


if __name__ == "__main__":
    run_command(write)
