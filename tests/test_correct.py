"""The mean-shift correction: tensors, then a block."""

import torch

from dqx.quant.correct import expected_reduction, mean_shift


def streams(n_tokens=4000, n_channels=12):
    """Full-precision and quantized values [T, I] whose difference has a mean per channel, from none to large."""
    g = torch.Generator().manual_seed(0)
    x_fp = torch.randn(n_tokens, n_channels, generator=g, dtype=torch.float64)
    mean = torch.linspace(0, 1, n_channels, dtype=torch.float64)
    return x_fp, x_fp - mean - 0.3 * torch.randn(n_tokens, n_channels, generator=g, dtype=torch.float64)


def shift_of(x_fp, x_q):
    difference = x_fp - x_q
    return torch.stack((difference.mean(0), difference.var(0, unbiased=False)))


def test_the_mean_difference_vanishes_and_the_error_falls_as_expected():
    x_fp, x_q = streams()
    shift = shift_of(x_fp, x_q)
    bias = mean_shift(shift)
    assert torch.equal(bias, shift[0])
    assert (x_fp - (x_q + bias)).mean(0).abs().max() < 1e-12
    before, after = (x_fp - x_q).square().mean(0), (x_fp - x_q - bias).square().mean(0)
    torch.testing.assert_close(1 - after / before, expected_reduction(shift))


def test_equal_streams_need_no_correction():
    x_fp, _ = streams()
    for shrink in (False, True):
        assert (mean_shift(shift_of(x_fp, x_fp), shrink=shrink) == 0).all()


def test_shrinking_spares_unreliable_channels():
    shift = shift_of(*streams())
    ratio = mean_shift(shift, shrink=True) / mean_shift(shift)
    assert ratio[0] < 0.01  # a mean near zero beside a scatter of 0.3
    assert ratio[-1] > 0.9
    torch.testing.assert_close(ratio, expected_reduction(shift))
