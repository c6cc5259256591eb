"""Train a preset's adapter: `python -m llama_long_utils.train --preset NAME`. The same command continues it."""

import argparse
from collections.abc import Sequence

from llama_long_utils.presets import load_preset, training_settings


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Heavy imports come after its arguments are checked."""
    parser = argparse.ArgumentParser(prog="python -m llama_long_utils.train", description=__doc__)
    parser.add_argument("--preset", default="tiny", help="a file in presets/ (default: tiny)")
    parser.add_argument("--steps", type=int, help="instead of the preset's training.steps")
    parser.add_argument("--seed", type=int, help="instead of the preset's training.seed")
    parser.add_argument("--control", action="store_true", help="keep the base's RoPE: a control without the extension")
    parser.add_argument("--report-every", type=int, default=10, metavar="STEPS", help="steps between two lines")
    chosen = parser.parse_args(arguments)
    try:
        preset = load_preset(chosen.preset)
        settings = training_settings(preset, steps=chosen.steps, seed=chosen.seed)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    scaling = preset.control_rope if chosen.control else preset.extended_rope

    from llama_long_utils.training.adapter import train_adapter

    try:
        trained = train_adapter(preset, settings=settings, scaling=scaling, progress=chosen.report_every)
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped: the same command continues from the last checkpoint") from None
    print(f"{trained.log[-1]['step']:,} steps on {trained.label_tokens:,} labels: {trained.folder}")


if __name__ == "__main__":
    main()
