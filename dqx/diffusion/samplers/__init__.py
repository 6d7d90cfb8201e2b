"""Samplers: how answers are written.

    generate.py    Sampler: what every sampler is, and the loop that writes answers with it
    base.py        what samplers share: guided logits at masked positions, noise, ranking, commits
    llada.py       LLaDASampler: blocks from left to right, most confident tokens first; Fast-dLLM's approximations
    dream.py       DreamSampler: the whole answer at once on a time grid, four orders
    blockwise.py   BlockwiseSampler: an answer as a program of passes over stored keys and values
    sdar.py        SDARSampler: blocks from position 0, by threshold, schedule, order or entropy
    nemotron.py    NemotronSampler: blocks behind a causal prompt; AutoregressiveSampler, SpeculativeSampler
    fast_dllm.py   FastDLLMSampler: blocks in sub-blocks, shifted logits

`greedy` is the sampler of likelihood's greedy flag, whatever the family: one token per step, the most confident first.
"""

from dqx.diffusion.samplers.base import Call, Generation
from dqx.diffusion.samplers.dream import DreamSampler
from dqx.diffusion.samplers.generate import Sampler
from dqx.diffusion.samplers.llada import LLaDASampler

__all__ = ["Call", "DreamSampler", "Generation", "LLaDASampler", "Sampler", "greedy"]


def greedy(cfg_scale: float = 0.0) -> Sampler:
    """LLaDA's suffix_greedy_prediction, with one step per token."""
    return LLaDASampler(cfg_scale=cfg_scale)
