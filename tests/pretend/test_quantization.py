"""Every method on the pretend device, in memory and from disk: the CPU's numbers, and nothing left on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_saved import configured
from tiny import Batch

from dqx.config.compose import build
from dqx.models.checkpoint import inspect, load_weights
from dqx.models.transformer import MaskedDiffusionTransformer
from dqx.quant import QuantReport, load_quantized, quantize, quantize_checkpoint, save_quantized
from dqx.quant.checkpoint.on_disk import Loading, OnDisk
from pretend.device import State

GROUPS = "bits.weight.group_size=16"
TILE = "method.transforms.rotate.tile=16"
METHODS = {
    "rtn": ("rtn", "w4a16", GROUPS),
    "gptq": ("gptq", "w3a16", GROUPS),
    "scattered groups": ("gptq", "w3a16", GROUPS, "method.rounding.static_groups=false"),
    "gptaq": ("gptaq", "w2a16", GROUPS),
    "awq": ("awq", "w4a16", GROUPS, "method.transforms.scale.n_grid=3", "method.clip.n_grid=4"),
    "smoothquant": ("smoothquant", "w8a8"),
    "quarot": ("quarot", "w4a4", "method.clip.n_grid=4"),
    "duquant": ("duquant", "w4a4", TILE, "method.transforms.rotate.steps=4"),
    "d2quant": (
        "d2quant",
        "w2a16",
        GROUPS,
        TILE,
        "method.clip.n_grid=4",
        "method.rounding_by_role.down.levels.iterations=2",
    ),
    "quant_dllm": ("quant_dllm", "w2a16", GROUPS, "method.rounding.levels.iterations=2"),
    "weighted tokens": ("gptaq", "w2a16", GROUPS, "method.token_weight=confidence"),
}
FORMATS = {
    "static": ("rtn", "w8a8", "method.activation=static"),
    "per group": ("rtn", "w4a4", "bits.activation.group_size=16"),
    "fp8": ("rtn", "fp8"),
    "mxfp4": ("rtn", "mxfp4"),
    "nvfp4": ("rtn", "nvfp4", "method.activation=static"),
    "values by attention": ("rtn", "w4a4", "method.kv=per_head", "method.kv.value_clip=attention"),
    "fixed values": ("rtn", "w4a4", "method.kv=per_head", "method.kv.values=static", "method.kv.value_clip=attention"),
}
IDS = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(2))
IDS[:, ::3] = 257  # the mask token of small checkpoints
BATCHES = [Batch(IDS)]
DEVICE = "pretend:0"
families = pytest.mark.parametrize("family", ["llada", "dream"])


def on(device: str, folder: Path, case: tuple[str, ...], family: str) -> tuple[MaskedDiffusionTransformer, QuantReport]:
    """A model loaded and quantized on a device, and the report."""
    config = configured(family, case)
    model = load_weights(inspect(str(folder)), device=device)
    return model, quantize(model, build(config.method), config.bits, BATCHES, progress=False)


def same(model: MaskedDiffusionTransformer, expected: MaskedDiffusionTransformer) -> None:
    """The CPU's numbers, all on the device."""
    tensors = [*model.parameters(), *model.buffers()]
    assert {str(tensor.device) for tensor in tensors} == {DEVICE}
    assert [tensor.shape for tensor in tensors] == [t.shape for t in (*expected.parameters(), *expected.buffers())]
    with torch.no_grad():
        assert torch.equal(model(IDS.to(DEVICE)).cpu(), expected(IDS))


def told(report: QuantReport) -> QuantReport:
    """What a report says besides what the quantization took."""
    return replace(report, from_disk=False, seconds=0.0, peak_ram=0, peak_gpu=0)


@families
@pytest.mark.parametrize("case", METHODS.values(), ids=METHODS)
def test_every_method(
    case: tuple[str, ...], family: str, small_checkpoint: Path, tmp_path: Path, pretend: State
) -> None:
    """In memory, and from disk with all activations in files."""
    model, report = on("cpu", small_checkpoint, case, family)
    ours, our_report = on("pretend", small_checkpoint, case, family)
    same(ours, model)
    assert told(our_report) == told(report)
    assert our_report.peak_gpu > 0

    config = configured(family, case)
    stored = quantize_checkpoint(
        inspect(str(small_checkpoint)),
        tmp_path / "saved",
        build(config.method),
        config.bits,
        BATCHES,
        loading=Loading(device="pretend", activations_gb=0.0),
        progress=False,
    )
    assert told(stored) == told(report)
    assert stored.peak_gpu > 0
    again, _ = load_quantized(tmp_path / "saved", "pretend")
    same(again, model)


@pytest.mark.parametrize("family", ["dream"])
@pytest.mark.parametrize("case", FORMATS.values(), ids=FORMATS)
@pytest.mark.usefixtures("pretend")
def test_every_format(case: tuple[str, ...], family: str, small_checkpoint: Path) -> None:
    model, report = on("cpu", small_checkpoint, case, family)
    ours, our_report = on("pretend", small_checkpoint, case, family)
    same(ours, model)
    assert told(our_report) == told(report)


@pytest.mark.parametrize("family", ["llada"])
@pytest.mark.usefixtures("pretend")
def test_a_model_saved_on_the_device_is_loaded_anywhere(family: str, small_checkpoint: Path, tmp_path: Path) -> None:
    config = configured(family, METHODS["quarot"])
    model, report = on("pretend", small_checkpoint, METHODS["quarot"], family)
    save_quantized(model, report, tmp_path / "saved", method=build(config.method), bits=config.bits)
    on_cpu, _ = load_quantized(tmp_path / "saved")
    assert {tensor.device.type for tensor in on_cpu.parameters()} == {"cpu"}
    same(model, on_cpu)
    same(load_quantized(tmp_path / "saved", "pretend")[0], on_cpu)


@pytest.mark.parametrize("family", ["dream"])
@pytest.mark.usefixtures("pretend")
def test_an_interrupted_quantization_goes_on_on_the_device(
    family: str, small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(family, METHODS["gptaq"])
    source, part = inspect(str(small_checkpoint)), build(config.method)
    how = {"loading": Loading(device="pretend", activations_gb=0.0), "progress": False}
    take = OnDisk.take

    def stopping(self: OnDisk, index: int):
        if index == 1:
            raise KeyboardInterrupt
        return take(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(OnDisk, "take", stopping)
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(source, tmp_path / "saved", part, config.bits, BATCHES, **how)
    stored = quantize_checkpoint(source, tmp_path / "saved", part, config.bits, BATCHES, **how)
    model, report = on("cpu", small_checkpoint, METHODS["gptaq"], family)
    assert told(stored) == told(report)
    same(load_quantized(tmp_path / "saved", "pretend")[0], model)
