"""D2Quant as its authors released it, equal to what was recorded on a small model; its shifts, its signs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from goldens import GOLDEN2, cases, golden, hub_name, tiny
from torch import Tensor

from dqx.config.compose import build, select
from dqx.models.checkpoint import inspect, load_weights
from dqx.quant import Method, load_quantized, quantize, quantize_checkpoint, save_quantized
from dqx.quant.correct import FinalShift, MeanShift, mean_shift
from dqx.quant.protocols import Context
from dqx.quant.stats import SequenceShift, Shift
from dqx.quant.transforms.hadamard import transform
from dqx.quant.transforms.rotate import ResidualRotation, make_rotation, residual_rotation

LAYERS = "model.transformer.blocks"


@dataclass(frozen=True)
class Signs(ResidualRotation):
    """The rotation with the signs that were recorded."""

    signs: Tensor | None = None

    def prepare(self, context, device):
        return residual_rotation(lambda x: transform(x * self.signs, self.tile))


def method_of(case: dict, signs: Tensor, **choice: str) -> tuple[Method, object]:
    """`d2quant_as_published` with what the case leaves out."""
    config = select(method="d2quant_as_published", bits=f"w{case['bits']}a16", **choice)
    method = build(config.method)
    fold = replace(method.transforms["fold"], subtract_embedding_mean=case["embedding_mean_subtracted"])
    method = replace(method, transforms={"fold": fold, "rotate": Signs(tile=128, signs=signs)})
    if not case["dac"]:
        method = replace(method, corrections={})
    if not case["dsq"]:
        method = replace(method, rounding_by_role={}, clip=replace(method.clip, skip_roles=[]))
    return method, config.bits


CASES = [(file, case) for file in ("d2quant_model", "d2quant_model_dac") for case in cases(file, GOLDEN2)]


@pytest.mark.parametrize(("file", "case"), CASES, ids=lambda value: value if isinstance(value, str) else value["name"])
@torch.no_grad()
def test_the_recorded_models(file: str, case: dict) -> None:
    data, name = golden(file, GOLDEN2), case["name"]
    model = load_weights(inspect(str(GOLDEN2 / "d2quant_llada"))).float()
    ids = data["input_ids"]
    torch.testing.assert_close(model(ids), golden("d2quant_model", GOLDEN2)["logits_original"], atol=1e-4, rtol=0)
    method, bits = method_of(case, data["rotation_signs"])
    quantize(model, method, bits, data[case["calibration"]], progress=False)
    compared = set()
    for i, block in enumerate(model.blocks):
        for role, linear in block.linears().items():
            hub = f"{name}.{LAYERS}.{i}.{hub_name('llada', role)}"
            for kind, ours in {
                "codes": linear.codes(),
                "scale": linear.scale,
                "zero": linear.zero_point,
                "row_scale": linear.scale.permute(1, 2, 0) if linear.scale.dim() == 3 else None,
                "col_scale": None if linear.column_scale is None else linear.column_scale[:, 0],
            }.items():
                expected = data.get(f"{kind}.{hub}")
                if expected is None or ours is None:
                    continue
                compared.add(kind)
                if ours.is_floating_point():
                    torch.testing.assert_close(ours, expected, rtol=2e-5, atol=0)
                else:
                    assert torch.equal(ours, expected), hub
        if (bias := data.get(f"mlp_norm_bias.{name}.{i}")) is not None:
            torch.testing.assert_close(block.mlp_norm.bias, bias, atol=1e-6, rtol=0)
            compared.add("bias")
    if (bias := data.get(f"final_norm_bias.{name}")) is not None:
        torch.testing.assert_close(model.norm.bias, bias, atol=1e-6, rtol=0)
    states = list(model.residual_states(ids[:1]))[1:]
    torch.testing.assert_close(torch.stack(states), data[f"block_out.{name}"], atol=1e-4, rtol=0)
    torch.testing.assert_close(model(ids), data[f"logits.{name}"], atol=1e-4, rtol=0)
    if name in ("w2_full", "w3_full"):
        assert compared == {"codes", "scale", "zero", "row_scale", "col_scale", "bias"}


# ---- the shifts --------------------------------------------------------------------------------------------------


def test_recorded_shifts() -> None:
    data = golden("d2quant_dac", GOLDEN2)
    block, final = Shift(), SequenceShift()
    for i in range(4):
        for collector in (block, final):
            collector.add(data[f"student.{i}"][None], data[f"teacher.{i}"][None])
    ours = {"block": mean_shift(block.value(), limit=10.0), "final": mean_shift(final.value(), limit=10.0)}
    for name, shift in ours.items():
        torch.testing.assert_close(shift.float(), data[f"{name}.bias"], atol=1e-6, rtol=0)
    assert (ours["block"] - ours["final"]).abs().max() > 1e-3  # sequences are not equally long
    unlimited = mean_shift(block.value())
    assert torch.equal(ours["block"], unlimited.clamp(-10, 10))


IDS = torch.randint(0, 300, (4, 24), generator=torch.Generator().manual_seed(2))
SMALL = ("bits.weight.group_size=32", "method.transforms.rotate.tile=32", "method.clip.n_grid=10")


def small(family: str, method: str = "d2quant", bits: str = "w2a16", *overrides: str) -> tuple[Method, object]:
    config = select(method=method, bits=bits, overrides=[f"model=nano_{family}", *SMALL, *overrides])
    return build(config.method), config.bits


def quantized(family: str, method: Method, bits: object, dtype: torch.dtype = torch.float32):
    model = tiny(family, dtype)
    report = quantize(model, method, bits, IDS, progress=False)
    return model, report


@torch.no_grad()
def outputs_of(model, pick: Callable, ids: Tensor = IDS) -> Tensor:
    """Mean over tokens of what a module of the model gives."""
    found = []
    handle = pick(model).register_forward_hook(lambda _, args, out: found.append(out.double().flatten(0, 1).mean(0)))
    model(ids)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_the_first_block_and_the_final_norm_have_the_mean_of_their_teachers(family: str) -> None:
    method, bits = small(family)
    corrected, report = quantized(family, method, bits)
    plain, _ = quantized(family, replace(method, corrections={}), small(family, "d2quant", "w16a16")[1])
    first = [outputs_of(model, lambda m: m.blocks[0].mlp_norm) for model in (corrected, plain)]
    assert (first[0] - first[1]).abs().max() < 1e-5
    # the teacher of the final norm: all as quantized, but the last block's MLP
    last = len(corrected.blocks) - 1
    config = {f"b{last}": {role: {"weight": 16} for role in ("gate", "up", "down")}}
    only_shift = {"mean_shift": method.corrections["mean_shift"]}
    teacher, _ = quantized(family, replace(method, corrections=only_shift), replace(bits, blocks=config))
    final = [outputs_of(model, lambda m: m.norm) for model in (corrected, teacher)]
    assert (final[0] - final[1]).abs().max() < 1e-4
    assert corrected.norm.bias.abs().max() > 1e-3
    names = {row.name: row.reason for row in report.kept}
    assert "correction" in names["norm.bias"]
    assert "correction" in names["blocks.*.mlp_norm.bias"]


def test_teachers_differ_from_the_second_block_on() -> None:
    method, bits = small("dream")
    block, fp = (
        quantized("dream", replace(method, corrections={"shift": MeanShift(teacher=teacher)}), bits)[0].blocks
        for teacher in ("block", "fp")
    )
    assert torch.allclose(block[0].mlp_norm.bias, fp[0].mlp_norm.bias, atol=1e-6)
    assert (block[1].mlp_norm.bias - fp[1].mlp_norm.bias).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_sixteen_bits_shift_nothing(family: str) -> None:
    method, bits = small(family, "d2quant", "w16a16")
    model, _ = quantized(family, method, bits, torch.float64)
    assert not model.norm.bias.any()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), tiny(family, torch.float64)(IDS), atol=1e-9, rtol=0)


@pytest.mark.parametrize("method", ["d2quant", "d2quant_as_published"])
@torch.no_grad()
def test_from_disk_saved_and_loaded(method: str, tmp_path, tiny_checkpoint) -> None:
    part, bits = small("llada", method)
    source = inspect(str(tiny_checkpoint("llada")))
    model = load_weights(source).eval()
    report = quantize(model, part, bits, IDS, progress=False)
    save_quantized(model, report, tmp_path / "saved", method=part, bits=bits)
    again, told = load_quantized(tmp_path / "saved")
    assert told == report
    from_disk = quantize_checkpoint(source, tmp_path / "disk", part, bits, IDS, progress=False)
    assert from_disk.linears == report.linears
    assert from_disk.kept == report.kept
    for other in (again, load_quantized(tmp_path / "disk")[0]):
        assert torch.equal(other.norm.bias, model.norm.bias)
        assert torch.equal(other(IDS), model(IDS))


@torch.no_grad()
def test_folding_changes_no_logit() -> None:
    exact = torch.float64  # in float32 its rounding turns single codes of the next block
    kept, folded = (
        quantized(
            "llada", *small("llada", "d2quant", "w2a16", f"method.rounding_by_role.down.levels.fold={fold}"), exact
        )
        for fold in ("false", "true")
    )
    torch.testing.assert_close(kept[0](IDS), folded[0](IDS), atol=1e-6, rtol=0)
    assert folded[1].average_bits < kept[1].average_bits


def test_true_bits() -> None:
    """2.25 for down, 2.14 for the others, in groups of 128."""
    for row in quantized("llada", *small("llada"))[1].linears:
        assert row.stored_bits / (row.shape[0] * row.shape[1]) == 2 + (32 if row.role == "down" else 18) / 32


# ---- equal signs in every tile -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["random_hadamard", "orthogonal"])
def test_tiles_can_share_what_is_random(kind: str) -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for equal in (True, False):
        rotate = make_rotation(kind, 64, 16, torch.Generator().manual_seed(1), equal_tiles=equal)
        matrix = rotate(torch.eye(64, dtype=torch.float64))
        tiles = [matrix[i : i + 16, i : i + 16] for i in range(0, 64, 16)]
        assert torch.equal(matrix, torch.block_diag(*tiles))
        assert all(torch.equal(tile, tiles[0]) for tile in tiles) == equal
        torch.testing.assert_close(rotate(x).norm(dim=-1), x.norm(dim=-1))


def test_settings_are_checked(setting: Context) -> None:
    assert MeanShift().problems("here", setting) == []
    assert FinalShift().problems("here", setting) == []
    assert "here.teacher=both" in MeanShift(teacher="both").problems("here", setting)[0]
    for part in (MeanShift(limit=0), FinalShift(limit=-1)):
        assert "limit=" in part.problems("here", setting)[0]
    assert FinalShift(limit=None).problems("here", setting) == []
