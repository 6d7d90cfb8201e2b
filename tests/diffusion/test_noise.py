"""Noise is a pure function of seed and key (dqx/diffusion/noise.py)."""

import numpy as np
import pytest
import torch

from dqx.diffusion.noise import SeededNoise, generator
from dqx.diffusion.philox import philox
from dqx.diffusion.philox import uniforms as philox_uniforms


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


def uniforms(noise, places, kind="token", width=5):
    """Of (row, position, step) each."""
    return noise.uniform(kind, *torch.tensor(places).T, width)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers(counter, key, expected):
    """The test vectors of Random123 for philox4x32 with ten rounds (its kat_vectors)."""
    counter, key = ([torch.tensor(int(word, 16)) for word in words.split()] for words in (counter, key))
    assert " ".join(f"{word.item():08x}" for word in philox(counter, key)) == expected


def test_a_number_depends_on_what_it_is_for_and_on_nothing_else():
    batch = SeededNoise(7, ["a", ("task", 3)])
    alone = SeededNoise(7, [("task", 3)])
    places = [(1, 4, 2), (1, 9, 2), (0, 4, 2), (1, 4, 3), (0, 9, 0)]
    together = uniforms(batch, places)
    assert together.shape == (5, 5)
    assert together.dtype == torch.float64
    assert torch.equal(together[1:2], uniforms(alone, [(0, 9, 2)]))
    assert torch.equal(together.flip(0), uniforms(batch, places[::-1]))
    assert torch.equal(together[:, :4], uniforms(batch, places, width=4))  # whatever other tokens there are
    others = [uniforms(batch, places, kind="order"), uniforms(SeededNoise(8, batch.documents), places)]
    assert len(torch.cat((together, *others)).unique()) == 3 * 5 * 5


def test_numbers_are_the_same_in_parts_of_any_size(monkeypatch):
    noise = SeededNoise(1, range(3))
    places = [(i % 3, i, 7 - i) for i in range(8)]
    whole = uniforms(noise, places, width=7)
    for size in (1, 15, 22):
        monkeypatch.setattr("dqx.diffusion.noise.TOGETHER", size)
        assert torch.equal(uniforms(noise, places, width=7), whole)


def test_numbers_stay_what_they_are():
    """Recorded, so that a later version that draws other numbers is noticed."""
    numbers = uniforms(SeededNoise(3, ["doc"]), [(0, 5, 2)], width=3)[0]
    assert numbers.mul(2**53).long().tolist() == [4852540933418797, 7529201845113681, 2150026912611787]


def test_uniforms_are_uniform():
    """Over positions, tokens, steps and documents, and the pair of two that share a counter."""
    n = 4000
    along = torch.stack((torch.arange(n), torch.zeros(n).long(), torch.zeros(n).long()))
    noise = SeededNoise(0, range(n))
    for u in (
        noise.uniform("order", *along.roll(1, 0))[:, 0],  # positions
        noise.uniform("token", *along[:, :1], n)[0],
        noise.uniform("order", *along.roll(2, 0))[:, 0],  # steps
        noise.uniform("order", *along)[:, 0],
    ):
        assert ((u >= 0) & (u < 1)).all()
        counts = torch.histc(u, bins=10, min=0, max=1)
        assert ((counts - 400).square() / 400).sum() < 27.9  # chi-square with 9 degrees of freedom, p = 0.001
        pairs = torch.histc((u[0::2] * 4).floor() * 4 + (u[1::2] * 4).floor(), bins=16, min=0, max=16)
        assert ((pairs - 125).square() / 125).sum() < 37.7  # 15 degrees of freedom


def test_the_ends_of_the_interval():
    word = torch.tensor([0, 2**32 - 1])
    assert philox_uniforms(word, word).tolist() == [0.0, 1 - 2**-53]
