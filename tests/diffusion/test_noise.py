"""Noise is a pure function of seed and key (dqx/diffusion/noise.py)."""

import numpy as np
import pytest
import torch

from dqx.diffusion.noise import SeededNoise, generator


def stream(seed, *key, n=4):
    return torch.rand(n, generator=generator(seed, *key), dtype=torch.float64)


def test_same_seed_and_key_give_the_same_stream_whatever_was_drawn_before():
    first = stream(0, "gsm8k", 17)
    torch.rand(100)
    generator(1)
    assert torch.equal(first, stream(0, "gsm8k", 17))
    assert torch.equal(first, stream(np.int64(0), "gsm8k", np.int64(17)))


def test_streams_differ_when_any_part_of_the_key_differs():
    keys = [(0,), (1,), (0, "a"), (0, "b"), (0, "a", "b"), (0, "ab"), (0, 1), (0, "1"), (0, 1, 2), (0, 12), (0, "a", 0)]
    firsts = {stream(*key)[0].item() for key in keys}
    assert len(firsts) == len(keys)


def test_stream_does_not_depend_on_the_process_or_version():
    """A recorded seed: results of earlier runs stay comparable."""
    assert generator(3, "doc", 5).initial_seed() == 7610473896225429717


def test_key_parts_other_than_str_and_int_are_refused():
    with pytest.raises(TypeError, match=r"noise key 0\.5 is a float"):
        generator(0, "a", 0.5)


def test_seeded_noise_of_a_position_ignores_batch_and_other_positions():
    batch = SeededNoise(7, ["a", ("task", 3)])
    alone = SeededNoise(7, [("task", 3)])
    both = batch.uniform("token", 2, 1, torch.tensor([4, 9]), 5)
    assert both.shape == (2, 5)
    assert both.dtype == torch.float64
    assert torch.equal(both[1:], alone.uniform("token", 2, 0, torch.tensor([9]), 5))
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(both, batch.uniform("token", 2, 0, torch.tensor([4, 9]), 5))
    assert not torch.equal(both, batch.uniform("token", 3, 1, torch.tensor([4, 9]), 5))
    assert not torch.equal(both, batch.uniform("order", 2, 1, torch.tensor([4, 9]), 5))


def test_uniforms_are_uniform():
    u = SeededNoise(0, ["a"]).uniform("order", 0, 0, torch.arange(4000), 1)
    assert ((u >= 0) & (u < 1)).all()
    counts = torch.histc(u, bins=10, min=0, max=1)
    assert ((counts - 400).square() / 400).sum() < 27.9  # chi-square with 9 degrees of freedom, p = 0.001
