"""What a masked diffusion language model does with its logits: write answers, and score them.

    noise.py       random numbers as a pure function of (seed, document, ...): nothing depends on batch or device
    philox.py      where a sampler's come from: the counter-based generator, in tensors of whatever device
    samplers/      Sampler: what every sampler is, and the loop that writes answers; one file for each family's
    engine.py      the same answers for many prompts at once: padded batches, refilled, stopped when settled
    block_engine.py  the same for samplers that write block by block over stored keys and values
    frames.py      an answer after every forward, for whoever watches it being written
    likelihood.py  Monte-Carlo bound on log p(target | prefix), exact for one-token targets
    factorization.py  the same as a sum over blocks, for models that write block by block; the autoregressive one
    scorer.py      both for many targets at once: every masked sequence once, in batches over all requests
    states.py      which masked states a likelihood needs, with what weight; the exact expectation by enumeration
    batches.py     masked sequences of many requests, sorted by length and cut into batches
    block_rows.py  the same where blocks are masked: a text once, and beside it the masked blocks of all that follow it
    stopping.py    when a question needs no more draws
    rollout.py     denoising states of fixed windows, as one model writes them
    settings.py    checks of settings

Generation, for B prompts of P tokens and G new tokens: append G masks; then at each step `model(ids)` gives logits
[B, T, V] (row i predicts token i in every family), a candidate token and a confidence come out for each masked position
of the answer, and the schedule says how many of the most confident ones are written. Nothing written is ever changed
again. What the approximations cost and save is in README.md.

Likelihood: draw which target tokens to mask (`mask_states`), run the masked sequences, read the log-probabilities of
the true tokens (`masked_log_probs`), weight and average.

The samplers' `generate` on one prompt and `log_likelihood` are the plain implementation. Evaluations use `Engine` and
`Scorer`, which are proven equal to it, as anything faster has to be. `n_forwards` counts sequences through the model (a
batch of 8 counts 8, guidance doubles it), `n_tokens` their tokens, with a cache those that are computed.
"""

from dqx.diffusion.likelihood import LogLikelihood, greedy_matches, log_likelihood, log_likelihood_given
from dqx.diffusion.noise import Noise, SeededNoise, generator
from dqx.diffusion.samplers import Generation, Sampler

__all__ = [
    "Generation",
    "LogLikelihood",
    "Noise",
    "Sampler",
    "SeededNoise",
    "generator",
    "greedy_matches",
    "log_likelihood",
    "log_likelihood_given",
]
