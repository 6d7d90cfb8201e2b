"""Quantized checkpoints: every method, width and format comes back from disk with the same logits, to the bit."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from goldens import tiny
from tiny import Batch
from torch import nn

from dqx.common.parts import build_part
from dqx.config.compose import build, select
from dqx.config.schema import Config
from dqx.models.checkpoint import CheckpointError, inspect, load_weights
from dqx.models.transformer import MaskedDiffusionTransformer
from dqx.quant import load_quantized, quantize, save_quantized
from dqx.quant.checkpoint.folder import decode, read_recipe
from dqx.quant.linear import QuantLinear

SMALL = "bits.weight.group_size=32"
TILE = "method.transforms.rotate.tile=32"
CASES = {
    "rtn w4a16": ("rtn", "w4a16", SMALL),
    "rtn w8a8": ("rtn", "w8a8"),
    "rtn w4a16, down in 8 bit": ("rtn", "w4a16", SMALL, "bits.overrides.down.weight=8"),
    "rtn w4a4, the last block in 8 and 16 bit": ("rtn", "w4a4", "bits.blocks.b2={weight: 8, activation: 16}"),
    "rtn w8a8, static": ("rtn", "w8a8", "method.activation=static"),
    "rtn w4a4, per group": ("rtn", "w4a4", "bits.activation.group_size=32", "method.activation.rescale=true"),
    "rtn fp8": ("rtn", "fp8"),
    "rtn mxfp4": ("rtn", "mxfp4"),
    "rtn nvfp4": ("rtn", "nvfp4"),
    "rtn nvfp4, static": ("rtn", "nvfp4", "method.activation=static"),
    "fp16": ("fp16", "w16a16"),
    "gptq w3a16": ("gptq", "w3a16", SMALL, "method.rounding.act_order=true"),
    "gptq as published": ("gptq_as_published", "w4a16", SMALL),
    "gptaq w2a16": ("gptaq", "w2a16", SMALL),
    "awq w4a16": ("awq", "w4a16", SMALL, "method.transforms.scale.n_grid=4"),
    "smoothquant w8a8": ("smoothquant", "w8a8"),
    "smoothquant as published": ("smoothquant_as_published", "w8a8"),
    "quarot w4a4": ("quarot", "w4a4"),
    "quarot w16a16": ("quarot", "w16a16"),
    "duquant w4a4": ("duquant", "w4a4", TILE, "method.transforms.rotate.steps=8"),
    "d2quant w2a16": ("d2quant", "w2a16", SMALL, TILE, "method.clip.n_grid=10"),
}
IDS = torch.randint(0, 300, (3, 24), generator=torch.Generator().manual_seed(2))


def dtype_of(case: str) -> torch.dtype:
    """Half of the cases are in bfloat16."""
    return torch.bfloat16 if "8" in case else torch.float32


@cache
def configured(family: str, case: tuple[str, ...]) -> Config:
    method, bits, *overrides = case
    return select(method=method, bits=bits, overrides=[f"model=nano_{family}", *overrides])


@cache
def quantized(family: str, case: tuple[str, ...], dtype: torch.dtype = torch.float32):
    """Model, method, bits and report; not to be changed."""
    config = configured(family, case)
    model, part = tiny(family, dtype), build(config.method)
    batches = [Batch(IDS)] if part.needs_data else []
    return model, part, config.bits, quantize(model, part, config.bits, batches, progress=False)


def assert_same(ours: MaskedDiffusionTransformer, theirs: MaskedDiffusionTransformer) -> None:
    """Equal to the bit: parameters, codes, logits."""
    a, b = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) and not b[name].requires_grad for name in a)
    for name, module in theirs.named_modules():
        if isinstance(module, QuantLinear) and module.scale is not None:
            assert torch.equal(module.codes(), ours.get_submodule(name).codes())
    assert torch.equal(theirs(IDS), ours(IDS))
    assert (theirs.dtype, theirs.arch, theirs.training) == (ours.dtype, ours.arch, False)


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_saved_model_is_the_model(case, family, tmp_path):
    model, method, bits, report = quantized(family, CASES[case], dtype_of(case))
    save_quantized(model, report, tmp_path / "saved", method=method, bits=bits)
    again, report_again = load_quantized(tmp_path / "saved")
    assert report_again == report
    assert_same(model, again)


@pytest.fixture
def saved(tmp_path):
    model, method, bits, report = quantized("llada", CASES["rtn w4a16"])
    save_quantized(model, report, tmp_path / "saved", method=method, bits=bits)
    return tmp_path / "saved"


def test_the_recipe_says_what_was_done(saved):
    recipe = read_recipe(saved)
    config = select(method="rtn", bits="w4a16", overrides=[SMALL])
    assert build_part(recipe["method"]) == build(config.method)
    assert (recipe["bits"]["name"], recipe["bits"]["weight"]["group_size"]) == ("w4a16", 32)
    assert set(recipe["shards"]) == {p.name for p in saved.iterdir()} - {"quantized.json"}


def test_a_tied_head_is_stored_once(tmp_path, tiny_checkpoint):
    model = load_weights(inspect(str(tiny_checkpoint("llada", weight_tying=True))))
    config = select(method="rtn", bits="w4a16", overrides=[SMALL])
    method = build(config.method)
    report = quantize(model, method, config.bits, progress=False)
    save_quantized(model, report, tmp_path / "saved", method=method, bits=config.bits)
    again, _ = load_quantized(tmp_path / "saved")
    assert again.head.weight is again.embed.weight


def test_damage_is_found_and_named(saved):
    file = saved / "block-00001.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"block-00001\.safetensors missing or changed"):
        load_quantized(saved)
    load_quantized(saved, verify=False)
    file.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=r"block-00001\.safetensors cannot be read"):
        load_quantized(saved, verify=False)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"block-00001\.safetensors missing or changed"):
        load_quantized(saved)


def test_what_is_no_quantized_checkpoint_says_so(saved, tmp_path):
    with pytest.raises(CheckpointError, match=r"holds a quantized model; read it with dqx\.quant\.load_quantized"):
        inspect(str(saved))
    with pytest.raises(CheckpointError, match="cannot be read; a quantized checkpoint is a folder that holds it"):
        load_quantized(tmp_path)
    recipe = read_recipe(saved)
    (saved / "quantized.json").write_text(json.dumps(recipe | {"version": 99}))
    with pytest.raises(CheckpointError, match="has version 99; this version of dqx reads 1 and 2"):
        load_quantized(saved)


def test_only_known_classes_are_built(saved):
    with pytest.raises(CheckpointError, match=r"no class os\.system is known"):
        decode({"kind": "os.system", "command": "true"}, {})


@dataclass(frozen=True)
class Foreign:
    """An activation part that no checkpoint can hold."""

    needs = frozenset()

    def fit(self, stats):
        return self

    def __call__(self, x, bits):
        return x

    def problems(self, where, setting):
        return []


def test_a_foreign_part_is_refused_and_nothing_is_left_behind(tmp_path):
    config = select(method="rtn", bits="w8a8")
    method, model = replace(build(config.method), activation=Foreign()), tiny("llada")
    report = quantize(model, method, config.bits, progress=False)
    with pytest.raises(ValueError, match=r"q\.activation is a Foreign, which no quantized checkpoint can hold yet"):
        save_quantized(model, report, tmp_path / "saved", method=method, bits=config.bits)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        save_quantized(model, report, tmp_path / "there", method=method, bits=config.bits)


def test_several_modules_at_one_place_keep_their_order(tmp_path):
    """Methods in a row: rotations, then a division, then keys and values."""
    model, method, bits, report = quantized(
        "dream", ("quarot", "w4a4", "+method.transforms.smooth=smooth", "method.transforms.smooth.alpha=0.3")
    )
    assert isinstance(model.blocks[0].inputs["mlp_out"], nn.Sequential)
    save_quantized(model, report, tmp_path / "saved", method=method, bits=bits)
    again, _ = load_quantized(tmp_path / "saved")
    with torch.no_grad():
        assert_same(model, again)
