"""What a masked diffusion language model does with its logits: write answers, and score them.

    noise.py       random numbers as a pure function of (seed, document, ...): nothing depends on batch or device
    sampler.py     what samplers share: guided logits at masked positions, ranking, commits
    llada.py       LLaDASampler: blocks from left to right, most confident tokens first
    dream.py       DreamSampler: the whole answer at once on a time grid, four orders
    likelihood.py  Monte-Carlo bound on log p(target | prefix), exact for one-token targets

Data flow of generation, for B prompts of P tokens and G new tokens: append G masks; then at each step
`model(ids)` gives logits [B, T, V] (row i predicts token i in every family), a candidate token and a
confidence come out for each masked position of the answer, and the schedule says how many of the most
confident ones are written. Nothing written is ever changed again, and prompts are only read.

Data flow of likelihood: draw which target tokens to mask (`mask_states`), run the masked sequences,
read the log-probabilities of the true tokens (`masked_log_probs`), weight and average.

`n_forwards` counts sequences through the model: a batch of 8 counts 8, guidance doubles it.
This is the plain implementation against which anything faster has to be proven equal.
"""

from dqx.diffusion.dream import DreamSampler
from dqx.diffusion.likelihood import LogLikelihood, greedy_matches, log_likelihood, log_likelihood_given
from dqx.diffusion.llada import LLaDASampler
from dqx.diffusion.noise import Noise, SeededNoise, generator
from dqx.diffusion.sampler import Generation, Sampler

__all__ = [
    "DreamSampler",
    "Generation",
    "LLaDASampler",
    "LogLikelihood",
    "Noise",
    "Sampler",
    "SeededNoise",
    "generator",
    "greedy_matches",
    "log_likelihood",
    "log_likelihood_given",
]
