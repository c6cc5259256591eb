"""Are C2 to C4 undecided because the race is short? The paper's four methods, trained for many more steps.

In the race an arm at full length has 20 steps, 82 thousand tokens. Position interpolation (PI) then still reads far
worse inside the old window than the base did, so the race says little of what is left of PI once it has recovered. A
pilot (PI, seed 9, `--times 8`; no held-out text was read) took its training loss from 3.8 nats, of steps 11 to 20, to
3.2 at the end. So the four methods get 16 times as many steps: 320, 1.3 million tokens, 4% of
what the base was trained on (the paper: 20%). All else is as in the race: seeds 0 to 2, one learning rate for all.

Expected, written before any arm was trained. Intervals are those of the scoreboard, over seeds and documents. "Far" is
from the old window's end to the new one's.
(1) PI recovers: trained PI minus the untrained base, in the second half of the old window, is not above 0.1 nat beyond
its interval. Refuted if it is.
(2) ABF reads no worse than PI far: a loss of 0.01 nat is excluded. Refuted if ABF is worse beyond the interval.
(3) PI reads better than plain RoPE far, beyond the interval. Refuted if it is worse beyond it.
(4) ABF does not keep 80% of its first-sentence retrieval (ROUGE-L) from 256 to 4,096 tokens, but has more at 4,096 than
after 20 steps. The first is refuted if 80% are kept within the interval, the second if the mean has not risen.
(5) At 2,048 tokens PI retrieves less than ABF, beyond the interval. Refuted if it retrieves more beyond it.
(6) xPos on top of ABF retrieves less than ABF at 2,048 tokens, beyond the interval. Refuted if it retrieves more. Of
its perplexity nothing is expected.

C2 to C4 will be judged by these arms, by the rules that judge the race now, once all of them are measured.

What came out. (1) is open: PI's interval holds 0.1 nat. (As committed, without a word for "open", it would hold.) (2)
and (6) hold, (4) in its first part: ABF has no more at 4,096 tokens than before. (5) is open. (3) is refuted: plain
RoPE, trained as long, reads better past the old window than PI, and nearly as well as ABF. But it does not retrieve
there. (The paper's 20% is that of its main models. Its ablation, 80B tokens, is 4% of Llama 2's training, as here.)

Does its learning rate decide that? It is the race's, for 16 times as many steps, and was not tuned. So PI, ABF and
unscaled RoPE were trained again at a quarter of it (`--times 16 --learning-rate 5e-4`), all else equal.
Expected, written before any of these arms was trained:
(7) At 2,048 tokens ABF retrieves more at the lower rate than at the higher, beyond the interval. Refuted if it
retrieves less beyond it.
(8) There it does not retrieve less than after 20 steps. Refuted if it does, beyond the interval; it holds if the mean
is not below.
(9) Unscaled RoPE reads worse than ABF past the old window, beyond the interval. Refuted if the difference, with its
interval, is below 0.01 nat.
(10) PI reads worse than unscaled RoPE there, as at the higher rate. Refuted if it reads better beyond the interval.
If (7) and (9) hold, the rate explains what notebook 11 leaves open. If (7) is refuted, it does not.

What came out. (7) is open: ABF retrieves about as much at either rate. (8) is refuted, (9) holds. So the rate decides
how near unscaled RoPE comes in loss, and is not shown to be why ABF retrieves less after many steps. (10) was not run.
"""

import dataclasses
from collections.abc import Sequence

from experiments.race import Arm, race_arms
from experiments.race_results import FULL_LENGTH
from llama_long_utils.presets import with_numbers
from llama_long_utils.settings import Preset


def longer_race(
    preset: Preset, times: int, methods: Sequence[str], learning_rate: float | None = None
) -> tuple[Preset, list[Arm]]:
    """A preset whose race is full-length training of some methods, in `times` as many steps, and its arms.

    `learning_rate` is the preset's unless it is given.

    Raises:
        ValueError: the race has no full-length training, or not of such a method.
    """
    way = preset.race.trainings.get(FULL_LENGTH)
    if way is None or not set(methods) <= set(way.methods):
        raise ValueError(
            f"preset {preset.name!r} trains {way.methods if way else 'no method'} at full length: name those"
        )
    way = with_numbers(way, f"race.trainings.{FULL_LENGTH}", methods=list(methods), steps=times * way.steps)
    training = with_numbers(preset.training, "training", learning_rate=learning_rate)
    race = dataclasses.replace(preset.race, trainings={FULL_LENGTH: way})
    longer = dataclasses.replace(preset, race=race, training=training)
    return longer, [arm for arm in race_arms(longer) if arm.method in methods]
