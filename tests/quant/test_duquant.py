"""DuQuant's rotations: official matrices by replay, the quick search against a plain one, whole models."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from goldens import GOLDEN, golden, hub_name, rope, tiny
from tiny import ROLES, SITES, Batch
from torch import Tensor

from dqx.formats.make import make_grid
from dqx.models.plant import plant_outliers
from dqx.models.transformer import shift_logits
from dqx.quant import ActivationBits, BitsConfig, Method, WeightBits, quantize
from dqx.quant.activation import PerToken
from dqx.quant.clip import FixedRatio
from dqx.quant.kv import KeysValues
from dqx.quant.protocols import Context
from dqx.quant.rounding.rtn import RTN
from dqx.quant.transforms.block_rotate import BlockRotate, BlockRotation, find_rotation, zigzag_permutation
from dqx.quant.transforms.greedy_rotation import (
    Int8Tiles,
    Tiles,
    base_rotation,
    exchanged,
    greedy_rotation,
    spreading_rotation,
)
from dqx.quant.transforms.smooth import Smooth

LINEAR_CASES = json.loads((GOLDEN / "duquant_linear.json").read_text())["cases"]
W4A4 = BitsConfig("w4a4", WeightBits(4, -1), ActivationBits(4))
W16A16 = BitsConfig("w16a16", WeightBits(16, -1), ActivationBits(16))


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
    return golden("duquant_linear")


@pytest.mark.parametrize("case", LINEAR_CASES, ids=lambda case: case["name"])
def test_replay_equals_official(linear, case):
    golden = {k.removeprefix(case["name"] + "."): v for k, v in linear.items()}
    x, weight, steps = golden["x"], golden["weight"], case["max_rotation_step"]
    found = find_rotation(x, list(golden["base_rots"]), steps, "row")
    torch.testing.assert_close(found.rotations, golden["R"], atol=1e-6, rtol=0)
    assert torch.equal(found.permutations, golden["perm"])

    first = greedy_rotation(x, golden["base_rots"][0], steps, "row")
    assert first.indices == golden["exchange_ids.0"].tolist()
    between = (x.view(-1, case["block_size"]) @ golden["R"][0]).view_as(x)[:, golden["perm"][0]]
    assert greedy_rotation(between, golden["base_rots"][1], steps, "row").indices == golden["exchange_ids.1"].tolist()

    x_rotated, w_rotated = found(x), found(weight)
    torch.testing.assert_close(x_rotated, golden["x_rotated"], atol=2e-5, rtol=0)
    torch.testing.assert_close(w_rotated, golden["w_rotated"], atol=1e-6, rtol=0)
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
    for seed in range(2):
        x, start = outliers(n_tokens, channels, seed, gain), base(width, seed).float()
        rotation, indices = plain_search(x, start, 30, index)
        for chunk in (16, 1024):
            found = greedy_rotation(x, start, 30, index, chunk=chunk)
            assert found.indices == indices
            torch.testing.assert_close(found.rotation_BB, rotation, atol=1e-6, rtol=0)


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


# ---- whole models ----------------------------------------------------------------------------------------------

ROTATED_AT = {"attn_in": "q", "attn_out": "o", "mlp_in": "gate", "mlp_out": "down"}  # the linear that finds it
PUBLISHED = {"one_linear": True, "grouped_heads": "run_time"}
MODEL_CASES = [
    ("llada", "duquant_steps16", 0),
    ("llada", "duquant_steps256", 1),
    ("dream", "duquant_dream", None),
]
ROTATES = BlockRotate(tile=16, steps=20)


@dataclass(frozen=True)
class Replay(BlockRotate):
    """Takes recorded base matrices, or with `ready` the recorded rotations, instead of drawing and searching."""

    family: str = "llada"
    file: str = ""
    ready: bool = False

    def fit(self, w_OI, stats, context, site):
        name = f"{context.index}.{hub_name(self.family, ROTATED_AT[site])}"
        data = golden(self.file)
        if self.ready:
            return BlockRotation(data[f"R.{name}"], data[f"perm.{name}"])
        bases = [data[f"base_rot.{name}.{i}"] for i in (0, 1)]
        return find_rotation(stats["inputs"][0][0], bases, self.steps, "row")


def official(rotate: BlockRotate, tile: int) -> Method:
    return Method(
        "duquant",
        RTN(include_zero=False),
        PerToken(0.9, include_zero=False),
        transforms={"smooth": Smooth(**PUBLISHED), "rotate": rotate},
        clip=FixedRatio(0.8),
        kv=KeysValues("head", "head", queries=True, key_clip_ratio=0.9, include_zero=False, rotate=True, tile=tile),
        quantizes="weights_and_activations",
    )


@pytest.mark.parametrize(("family", "file", "index"), MODEL_CASES, ids=[case[1] for case in MODEL_CASES])
@pytest.mark.parametrize("ready", [False, True], ids=["searched", "recorded"])
@torch.no_grad()
def test_quantized_model_equals_official(family, file, index, ready):
    data = golden(file)
    settings = json.loads((GOLDEN / ("duquant_dream.json" if index is None else "duquant.json")).read_text())
    case = settings if index is None else settings["cases"][index]
    tile, model = settings["block_size"], tiny(family)
    calibration = [Batch(data["calibration_ids"])]
    embedded = model.embed(data["calibration_ids"]).mean(0)
    torch.testing.assert_close(embedded, data["rotation_calibration_input"], atol=1e-6, rtol=0)

    replay = Replay(tile, case["max_rotation_step"], family=family, file=file, ready=ready)
    quantize(model, official(replay, tile), W4A4, calibration, progress=False)
    for i, block in enumerate(model.blocks):
        for site, role in ROTATED_AT.items():
            rotation = [m for m in block.inputs[site].modules() if isinstance(m, BlockRotation)][-1]
            name = f"{i}.{hub_name(family, role)}"
            assert torch.equal(rotation.permutations, data[f"perm.{name}"])
            torch.testing.assert_close(rotation.rotations, data[f"R.{name}"], atol=1e-6, rtol=0)
    for role in ROLES:
        linear, hub = getattr(model.blocks[0], role), hub_name(family, role)
        assert (linear.codes() != data[f"wcodes.{hub}"]).float().mean() < 0.002
        if f"wscale.{hub}" in data:
            torch.testing.assert_close(linear.scale, data[f"wscale.{hub}"], rtol=1e-4, atol=0)
            assert (linear.zero_point != data[f"wzero.{hub}"]).float().mean() < 0.02
    if "block0.input" in data:
        x = data["block0.input"]
        torch.testing.assert_close(
            model.blocks[0](x, rope(model.arch, x.shape[1])), data["block0.output"], atol=1e-4, rtol=0
        )

    ours = torch.cat([model(row) for row in data["input_ids"].split(1)])
    theirs = shift_logits(data["logits"]) if family == "dream" else data["logits"]
    assert (ours - theirs).square().mean() <= 0.02 * case["mse_vs_original"]


@pytest.mark.parametrize("planted", [False, True], ids=["plain", "planted_outliers"])
@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize(
    "rotate",
    [ROTATES, replace(ROTATES, index="row", permutations=2), replace(ROTATES, permutations=0, stream="quantized")],
    ids=["default", "row_and_two_permutations", "one_rotation_quantized_stream"],
)
@torch.no_grad()
def test_the_function_stays(rotate, family, planted):
    model = tiny(family, torch.float64)
    if planted:
        plant_outliers(model, gain=64, channels=4)
    ids = torch.randint(0, model.arch.vocab_size, (3, 12), generator=torch.Generator().manual_seed(0))
    before = model(ids)
    weights = [p.clone() for block in model.blocks for p in (block.q.weight, block.down.weight)]
    quantize(model, replace(official(rotate, 16), kv=None), W16A16, [Batch(ids)], progress=False)
    after = [p for block in model.blocks for p in (block.q.weight, block.down.weight)]
    assert not any(torch.allclose(a, b) for a, b in zip(weights, after, strict=True))
    torch.testing.assert_close(model(ids), before, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("family", ["llada", "dream"])
@torch.no_grad()
def test_linears_of_a_site_share_the_transform_and_blocks_do_not(family):
    ids = torch.arange(60).view(3, 20)
    models = [tiny(family), tiny(family), tiny(family)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        quantize(model, official(ROTATES, 8), W4A4, [Batch(ids)], seed=seed, progress=False)

    def rotations(model):
        found = [m for block in model.blocks for m in block.inputs.modules() if isinstance(m, BlockRotation)]
        assert len(found) == len(SITES) * len(model.blocks)
        return torch.stack([m.rotations for m in found])

    first, again, other = (rotations(model) for model in models)
    assert torch.equal(first, again)
    assert not torch.isclose(first, other).all(-1).all(-1).all(-1).any()
    assert len({tuple(matrix.flatten().tolist()) for matrix in first}) == len(first)


def test_settings_are_checked():
    model = tiny("llada")

    def problems(**changes):
        part = replace(ROTATES, **changes)
        return part.problems(
            "method.transforms.rotate", Context(model.arch, W4A4.resolve(model.arch).usual, official(part, 16))
        )

    assert problems() == []
    assert problems(tile=128) == [
        "method.transforms.rotate.tile=128 does not divide 64, the inputs of q, k, v, o, gate, up; write 64 or 32 or "
        "16",
        "method.transforms.rotate.tile=128 does not divide 192, the inputs of down; write 64 or 32 or 16",
    ]
    assert problems(tile=1) == ["method.transforms.rotate.tile=1 leaves nothing to rotate; 128 is usual"]
    assert problems(steps=-1) == ["method.transforms.rotate.steps=-1 must not be negative; 256 is usual"]
    assert problems(permutations=-1) == ["method.transforms.rotate.permutations=-1 must not be negative; 1 is usual"]
    assert problems(index="column") == ["method.transforms.rotate.index=column is unknown; write channel or row"]
    assert problems(stream="both") == ["method.transforms.rotate.stream=both is unknown; write mean, quantized or fp"]
