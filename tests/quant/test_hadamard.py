"""Hadamard matrices by construction, and the fast transform against the matrix and the official outputs."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dqx.quant.transforms.hadamard import (
    OnlineHadamard,
    OnlineHeads,
    core,
    hadamard,
    tile_problems,
    transform,
    transform_heads,
)

GOLDEN = Path(__file__).parents[1] / "golden"
#: both families' widths and heads, the bundled models', the tests'
WIDTHS = (1, 2, 4, 8, 12, 16, 20, 28, 32, 40, 64, 128, 148, 160, 192, 256, 512, 3584, 4096, 12288, 18944)


def random(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("order", [n for n in WIDTHS if n <= 512] + [24, 36, 44, 60, 76, 108, 140])
def test_matrix_is_hadamard(order):
    h = hadamard(order)
    assert h.shape == (order, order)
    assert h.dtype == torch.int8
    assert bool((h.abs() == 1).all())
    assert torch.equal(h.float() @ h.float().T, order * torch.eye(order))


@pytest.mark.parametrize(("width", "order"), [(4096, 1), (12288, 12), (3584, 28), (18944, 148), (160, 20), (28, 28)])
def test_core(width, order):
    """What a width needs besides Sylvester's matrix. 18944 = 37 * 512 takes Paley's second construction, q = 73."""
    assert len(core(width)) == order
    assert torch.equal(core(width).float() @ core(width).float().T, order * torch.eye(order))


@pytest.mark.parametrize("width", [n for n in WIDTHS if n <= 512])
def test_transform_is_the_matrix(width):
    x = random(2, 3, width)
    torch.testing.assert_close(transform(x), x @ hadamard(width).double().T / width**0.5, atol=1e-12, rtol=0)


@pytest.mark.parametrize("width", WIDTHS)
def test_transform_is_orthogonal(width):
    """Inner products stay, to float64 rounding."""
    x = random(3, width)
    y = transform(x)
    torch.testing.assert_close(y @ y.T, x @ x.T, atol=1e-9, rtol=0)
    assert not torch.allclose(y, x) or width == 1


@pytest.mark.parametrize(("width", "tile"), [(18944, 512), (18944, 128), (192, 12), (256, 256)])
def test_tiles_are_transformed_by_themselves(width, tile):
    x = random(2, width)
    y = transform(x, tile)
    for start in range(0, width, tile):
        piece = slice(start, start + tile)
        torch.testing.assert_close(y[:, piece], transform(x[:, piece]), atol=1e-12, rtol=0)


def test_official_outputs():
    golden = load_file(GOLDEN / "quarot.safetensors")
    x, y = golden["had_mlp.input"], golden["had_mlp.output"]
    matrix = golden["had_matrix_mlp"]
    torch.testing.assert_close(transform(x, matrix_KK=matrix), y, atol=2e-6, rtol=0)
    torch.testing.assert_close(OnlineHadamard(matrix_KK=matrix)(x), y, atol=2e-6, rtol=0)
    x, y = golden["had_heads.input"], golden["had_heads.output"]
    torch.testing.assert_close(transform_heads(x, 4), y, atol=2e-6, rtol=0)
    torch.testing.assert_close(OnlineHeads(4)(x), y, atol=2e-6, rtol=0)


@pytest.mark.parametrize(("heads", "size"), [(28, 128), (32, 128), (4, 64), (12, 16)])
def test_heads_and_channels_are_the_full_transform(heads, size):
    """A Hadamard matrix over all channels is one inside every head times one over the heads."""
    x = random(2, heads * size)
    both = transform_heads(transform(x, size), heads)
    torch.testing.assert_close(both, transform(x, matrix_KK=hadamard(heads)), atol=1e-12, rtol=0)


def test_dtype_of_the_input_stays():
    x = random(4, 192)
    low = transform(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), transform(x.bfloat16().double()), atol=0, rtol=2**-8)


def test_unknown_orders_name_tiles_that_work():
    with pytest.raises(ValueError, match="order 52; tiles of 4, 2 do work"):
        transform(random(1, 52))
    with pytest.raises(ValueError, match="order 37; its odd width has no tiles either"):
        hadamard(37)
    with pytest.raises(ValueError, match="tiles of 512 do not divide 192"):
        transform(random(1, 192), 512)
    with pytest.raises(ValueError, match="a core of order 12 does not leave a power of two of 36"):
        transform(random(1, 36), matrix_KK=hadamard(12))
    assert tile_problems("x.tile", 18944, None, "the inputs of down") == []
    assert tile_problems("x.tile", 18944, 512, "the inputs of down") == []
    (problem,) = tile_problems("x.tile", 3584, 1024, "the inputs of down")
    assert "x.tile=1024 does not divide 3584, the inputs of down" in problem
    (problem,) = tile_problems("x.tile", 52, None, "the inputs of down")
    assert "x.tile=null: the inputs of down" in problem
    assert "tiles of 4, 2" in problem
