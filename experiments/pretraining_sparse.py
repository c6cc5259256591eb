"""Is sparse attention worth its steps? Shifted sparse attention (S2) at 0.9M parameters, at equal cost.

At 16M a GPU's time ended before full attention was trained at S2's operations, and its seconds were measured beside
other processes. Here both are asked at a size that a CPU trains. Its width is 128, so 4,096 tokens are 32 widths: far
above the six below which the paper says that attention is not most of the cost.

Arms, seeds 0 to 2, all at the recorded rate, with the texts in one order: "s2" reads as many tokens as "long" does;
"long-as-s2" is full attention on as many steps as multiply as much as S2's, with a schedule of its own. At equal
seconds no arm is trained: NLL is interpolated between "long-as-s2" and "long", linear in the logarithm of steps, at the
steps that take as long as those of S2, by CPU seconds of one thread.

Expected, written before any of it was trained. At equal tokens S2 read with full attention is worse than long
throughout, beyond the interval over seeds and documents; refuted if a loss of `EQUAL` is excluded. Read with the
attention it was trained with, no difference is detected; refuted if it is worse beyond the interval. At equal
operations full attention, which then reads about a third of the tokens, is worse than S2 read with full attention,
beyond the interval: at so few tokens more of them count most. Refuted if it is better beyond the interval. At equal
seconds the same, judged in the same way. All else is open.
"""
