"""DuQuant's rotations: official matrices by replay, the quick search against a plain one, whole models."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dqx.quant.activation import PerToken
from dqx.quant.bits import ActivationBits, WeightBits
from dqx.quant.grid import make_grid
from dqx.quant.transforms.block_rotate import find_rotation, zigzag_permutation
from dqx.quant.transforms.greedy_rotation import (
    Int8Tiles,
    Tiles,
    base_rotation,
    exchanged,
    greedy_rotation,
    spreading_rotation,
)

GOLDEN = Path(__file__).parent / "golden"
LINEAR_CASES = json.loads((GOLDEN / "duquant_linear.json").read_text())["cases"]


def plain_search(x_NC: Tensor, base_BB: Tensor, steps: int, index: str) -> tuple[Tensor, list[int]]:
    """The greedy search as the authors' code does it: all tiles multiplied and scanned at every step."""
    width = len(base_BB)
    tiles = x_NC.reshape(-1, width)
    indices: list[int] = []
    peaks = []
    for _ in range(steps):
        flat = tiles.flatten()
        top, bottom = int(flat.argmax()), int(flat.argmin())
        peaks.append(float(flat[top] - flat[bottom]))
        position = top if flat[top].abs() > flat[bottom].abs() else bottom
        indices.append(position % width if index == "channel" else position // width)
        tiles = tiles @ exchanged(base_BB, indices[-1] % width)
    peaks.append(float(tiles.max() - tiles.min()))
    kept = peaks.index(min(peaks))
    rotation = torch.eye(width)
    for e in indices[:kept]:
        rotation = rotation @ exchanged(base_BB, e % width)
    return rotation, indices[:kept]


def outliers(n_tokens: int, channels: int, seed: int, gain: float) -> Tensor:
    """Gaussian inputs with two loud channels and one loud token."""
    x = torch.randn(n_tokens, channels, generator=torch.Generator().manual_seed(seed))
    x[:, [1, channels // 2]] *= gain
    x[n_tokens // 3] *= gain
    return x


def base(width: int, seed: int = 0) -> Tensor:
    return base_rotation(width, torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def linear():
    return load_file(GOLDEN / "duquant_linear.safetensors")


@pytest.mark.parametrize("case", LINEAR_CASES, ids=lambda case: case["name"])
def test_replay_equals_official(linear, case):
    golden = {k.removeprefix(case["name"] + "."): v for k, v in linear.items()}
    x, weight, steps = golden["x"], golden["weight"], case["max_rotation_step"]
    found = find_rotation(x, list(golden["base_rots"]), steps, "row")
    torch.testing.assert_close(found.rotations.float(), golden["R"], atol=5e-6, rtol=0)
    assert torch.equal(found.permutations, golden["perm"])

    first = greedy_rotation(x, golden["base_rots"][0], steps, "row")
    assert first.indices == golden["exchange_ids.0"].tolist()
    between = (x.view(-1, case["block_size"]) @ golden["R"][0]).view_as(x)[:, golden["perm"][0]]
    assert greedy_rotation(between, golden["base_rots"][1], steps, "row").indices == golden["exchange_ids.1"].tolist()

    x_rotated, w_rotated = found(x), found(weight)
    torch.testing.assert_close(x_rotated, golden["x_rotated"], atol=2e-4, rtol=0)  # entries up to 26
    torch.testing.assert_close(w_rotated, golden["w_rotated"], atol=5e-6, rtol=0)
    seen = PerToken(0.9, include_zero=False)(x_rotated, ActivationBits(4))
    rounded = make_grid(WeightBits(4, -1), include_zero=False).fake(w_rotated, clip_ratio=0.8)
    for ours, theirs in ((seen, "x_dequant"), (rounded, "w_dequant"), (seen @ rounded.T, "y")):
        close = torch.isclose(ours, golden[theirs], atol=1e-3, rtol=0)
        assert close.float().mean() > 0.995, theirs  # a value on the edge of two codes may fall either way


@pytest.mark.parametrize("case", LINEAR_CASES, ids=lambda case: case["name"])
@pytest.mark.parametrize("index", ["channel", "row"])
def test_output_is_preserved_and_errors_are_smaller(linear, case, index):
    x, weight = linear["x"], linear["weight"]
    bases = [base(case["block_size"], seed) for seed in (1, 2)]
    found = find_rotation(x, bases, case["max_rotation_step"], index)
    x64, w64 = x.double(), weight.double()
    torch.testing.assert_close(found(x64) @ found(w64).T, x64 @ w64.T, atol=1e-9, rtol=0)
    assert found(x).abs().max() < 0.4 * x.abs().max()

    def error(inputs: Tensor, rows: Tensor) -> Tensor:
        seen = PerToken(include_zero=False)(inputs, ActivationBits(4))
        return (seen @ make_grid(WeightBits(4, -1)).fake(rows).T - x @ weight.T).square().mean()

    assert error(found(x), found(weight)) < error(x, weight)


@pytest.mark.parametrize("width", [2, 3, 16, 128])
def test_base_matrix(linear, width):
    spread = spreading_rotation(width)
    torch.testing.assert_close(spread[0], torch.full((width,), width**-0.5, dtype=torch.float64))
    for matrix in (spread, base(width)):
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(width, dtype=torch.float64))
    # A^T R0 = diag(1, Z), also for the recorded matrices
    matrices = [base(width), *(m.double() for c in LINEAR_CASES for m in linear[c["name"] + ".base_rots"])]
    for matrix in (m for m in matrices if len(m) == width):
        inner = spread.T @ matrix
        expected = torch.cat((torch.ones(1), torch.zeros(width - 1))).double()
        torch.testing.assert_close(inner[0], expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(inner[:, 0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("index", ["channel", "row"])
@pytest.mark.parametrize("gain", [1.0, 6.0, 100.0])
@pytest.mark.parametrize(("n_tokens", "channels", "width"), [(7, 24, 8), (65, 64, 16), (40, 96, 32), (130, 256, 128)])
def test_quick_search_equals_the_plain_one(n_tokens, channels, width, gain, index):
    for seed in range(3):
        x, start = outliers(n_tokens, channels, seed, gain), base(width, seed).float()
        rotation, indices = plain_search(x, start, 40, index)
        for chunk in (16, 1024):
            found = greedy_rotation(x, start, 40, index, chunk=chunk)
            assert found.indices == indices
            torch.testing.assert_close(found.rotation_BB.float(), rotation, atol=3e-6, rtol=0)


@pytest.mark.parametrize("kind", [Tiles, Int8Tiles])
@pytest.mark.parametrize("gain", [1.0, 6.0, 100.0])
def test_extremes_of_rotated_tiles(kind, gain):
    x, start = outliers(100, 64, 0, gain).view(-1, 16), base(16)
    tiles = kind(x, start, 32)
    for seed in range(5):
        product = base(16, seed) @ base(16, seed + 100)
        expected = x @ product.float()
        highest, lowest = tiles.extremes(product)
        assert (highest.position, lowest.position) == (int(expected.argmax()), int(expected.argmin()))
        torch.testing.assert_close(highest.value, float(expected.max()), rtol=1e-5, atol=0)
        torch.testing.assert_close(lowest.value, -float(expected.min()), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", [Tiles, Int8Tiles])
def test_of_equal_entries_the_first_counts(kind):
    x = torch.randint(-3, 4, (64, 16), generator=torch.Generator().manual_seed(0)).float()
    highest, lowest = kind(x, base(16), 8).extremes(torch.eye(16, dtype=torch.float64))
    assert (highest.position, lowest.position) == (int(x.argmax()), int(x.argmin()))
    zero = kind(torch.zeros(64, 16), base(16), 8).extremes(torch.eye(16, dtype=torch.float64))
    assert [(extreme.value, extreme.position) for extreme in zero] == [(0, 0), (0, 0)]


def test_search_of_inputs_it_cannot_flatten_returns_the_identity():
    assert greedy_rotation(torch.zeros(4, 32), base(16), 5).indices == []
    assert greedy_rotation(torch.randn(4, 32), base(16), 0).indices == []


def test_search_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="tiles of 16 channels do not divide 40 channels"):
        greedy_rotation(torch.zeros(4, 40), base(16), 5)
    with pytest.raises(ValueError, match="index='column' is unknown; it is one of channel, row"):
        greedy_rotation(torch.zeros(4, 32), base(16), 5, "column")
    for broken in (float("nan"), float("inf")):
        x = torch.randn(4, 32)
        x[2, 3] = broken
        with pytest.raises(ValueError, match="NaN or infinity"):
            greedy_rotation(x, base(16), 5)


def test_zigzag_deals_channels_by_size():
    absmax = torch.tensor([3.0, 9, 1, 8, 7, 2, 6, 5, 4, 0, 11, 10])
    # by size 10 11 1 3 4 6 7 8 0 5 2 9, dealt to tiles 0 1 2 2 1 0 0 1 2 2 1 0
    assert zigzag_permutation(absmax, 4).tolist() == [10, 6, 7, 9, 11, 4, 8, 2, 1, 3, 0, 5]
