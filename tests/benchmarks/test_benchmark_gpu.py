"""The benchmark for a GPU: its steps on the CPU at small scale, its file, what it leaves out, that it sees faults."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from pretend.device import accelerator as pretend_accelerator
from torch import nn

from dqx.benchmarks import agreement, gpu
from dqx.common import accelerator
from dqx.config import compose
from dqx.config.schema import CONF_DIR
from dqx.models.transformer import MaskedDiffusionTransformer
from dqx.quant.linear import QuantLinear

CPU = torch.device("cpu")
SCHEMA = json.loads(Path(gpu.__file__).with_name("gpu.schema.json").read_text())
METHODS = (("rtn", "w4a16", ()),)  # the others take longer


def benchmark(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit code, and what is in the file, which fits its schema."""
    file = tmp_path / "gpu.json"
    code = gpu.main(["--device", "cpu", "--scale", "small", "--out", str(file), *arguments])
    report = json.loads(file.read_text())
    checker = jsonschema.Draft202012Validator(SCHEMA)
    checker.check_schema(SCHEMA)
    checker.validate(report)
    return code, report


def test_all_steps_run_at_small_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(agreement, "METHODS", METHODS)
    code, report = benchmark(tmp_path, "--minutes", "20", "--peak", "2")
    by_name = {step["name"]: step for step in report["steps"]}
    assert code == 0
    assert report["finished"]
    assert {step["state"] for step in report["steps"]} == {"done"}
    assert list(by_name) == [
        "matrix product", "check forward", "check tokens", "check likelihoods", "check rtn w4a16",
        "forwards gsm8k", "forwards mmlu", "forwards arc_challenge", "evaluate gsm8k", "evaluate arc_challenge",
        "quantize gptq w4a16", "quantize awq w4a16", "quantize duquant w4a4",
    ]  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[2].strip() for line in lines[1 : len(by_name) + 1]] == list(by_name)
    assert lines[-1].startswith("13 of 13 steps done in ")

    answers = by_name["evaluate gsm8k"]["figures"]
    assert answers["count"] == answers["documents"] * 256 // 8
    assert answers["equal_answers"] == answers["documents"]  # float rounding aside, which one seed can be held to
    assert answers["plain"]["forwards"] == answers["dqx"]["forwards"]  # to the end, on both sides
    forwards = by_name["forwards mmlu"]["figures"]
    assert forwards["of_peak"] == pytest.approx(forwards["flops_per_second"] / 2e12)
    block = by_name["quantize gptq w4a16"]["figures"]
    assert block["seconds_per_model"] == pytest.approx(2 * block["seconds_per_block"])
    assert block["memory"]["where"] == "ram"


def test_what_does_not_fit_is_left_out_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = benchmark(tmp_path, "--minutes", "0.01")
    left_out = [step["name"] for step in report["steps"] if step["state"] == "left out"]
    assert code == 0
    assert report["finished"]
    assert "quantize awq w4a16" in left_out
    assert capsys.readouterr().out.splitlines()[-1] == f"left out: {', '.join(left_out)}"


def test_a_step_gets_half_of_what_is_left_and_the_last_one_all(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []
    monkeypatch.setattr(
        gpu, "attempt", lambda step, limit: (limits.append(limit), ({"state": "done", "ok": True}, ""))[1]
    )
    monkeypatch.setattr(gpu.Machine, "steps", lambda self: dict.fromkeys("abc", lambda: None))
    monkeypatch.setattr(gpu.time, "monotonic", lambda: 0.0)
    assert gpu.main(["--device", "cpu", "--minutes", "2"]) == 0
    assert limits == [60, 60, 120]


def test_a_step_that_takes_too_long_is_stopped_and_one_that_fails_is_told() -> None:
    entry, line = gpu.attempt(partial(time.sleep, 60), gpu.LEAST)  # type: ignore[arg-type]
    assert (entry["state"], line) == ("left out", "left out: not done within 0 s")

    def broken() -> gpu.Outcome:
        raise torch.OutOfMemoryError("no room")

    entry, line = gpu.attempt(broken, 60)
    assert entry["state"] == "failed"
    assert line.startswith("FAILED: out of memory (OutOfMemoryError: no room")
    assert gpu.attempt(broken, 0)[0] == {"state": "left out", "reason": "no time was left"}


def test_the_file_is_whole_after_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known when the benchmark is broken off is kept."""
    seen: list[list[str]] = []

    def interrupted() -> gpu.Outcome:
        report = json.loads((tmp_path / "gpu.json").read_text())
        assert not report["finished"]
        seen.append([step["name"] for step in report["steps"]])
        raise KeyboardInterrupt

    done = gpu.Outcome({"flops_per_second": 1.0, "given": None}, "")
    monkeypatch.setattr(gpu.Machine, "steps", lambda self: {"matrix product": lambda: done, "check": interrupted})
    with pytest.raises(KeyboardInterrupt):
        benchmark(tmp_path)
    assert seen == [["matrix product"]]


def test_a_failure_and_a_difference_are_in_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = agreement.Agreement("llada, guidance", "tokens", 0.25, 0.0)
    steps: dict[str, Callable[[gpu.Machine], gpu.Outcome]] = {
        "check tokens": lambda machine: machine.check(lambda device: iter([row])),
        "forwards mmlu": lambda machine: gpu.Outcome({}["nothing"], ""),
    }
    monkeypatch.setattr(gpu.Machine, "steps", lambda self: {name: partial(do, self) for name, do in steps.items()})
    code, report = benchmark(tmp_path)
    assert code == 1
    assert [step["state"] for step in report["steps"]] == ["done", "failed"]
    out = capsys.readouterr().out
    assert "check tokens            DIFFERS: llada, guidance: tokens 0.25, at most 0" in out
    assert "differing: check tokens\nfailed: forwards mmlu\n" in out


# ---- agreement with the CPU ----------------------------------------------------------------------------------


def found(check: agreement.Check, device: torch.device = CPU) -> list[agreement.Agreement]:
    with torch.no_grad():
        return list(check(device))


def perturbed(monkeypatch: pytest.MonkeyPatch, change: Callable[[MaskedDiffusionTransformer], object]) -> None:
    """A device whose arithmetic is not the CPU's: its copy of the model is changed."""
    pair = agreement.pair

    def other(family: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
        ours, theirs = pair(family, device, dtype)
        change(theirs)
        return ours, theirs

    monkeypatch.setattr(agreement, "pair", other)


def coarse(model: MaskedDiffusionTransformer) -> None:
    """Products with three digits, as TF32 has them."""
    for linear in model.modules():
        if isinstance(linear, nn.Linear):
            linear.weight.data = linear.weight.bfloat16().to(linear.weight.dtype)


def test_products_of_few_digits_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    perturbed(monkeypatch, coarse)
    rows = found(agreement.forward)
    assert {row.path.split(", ")[1]: row.ok for row in rows} == {"float32": False, "bfloat16": True}
    assert not any(row.ok for row in found(agreement.likelihoods))
    assert agreement.summary(rows).startswith("DIFFERS: llada, float32, alike: logits 0.")


def test_another_token_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    perturbed(monkeypatch, lambda model: model.head.weight.mul_(-1))
    assert not any(row.ok for row in found(agreement.tokens))


def test_other_codes_are_seen_and_explained_only_where_the_model_is_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    check = partial(agreement.method, "rtn", "w4a16")
    assert all(row.ok and row.difference == 0 for row in found(check))
    with monkeypatch.context() as patch:
        perturbed(patch, lambda model: model.blocks[0].o.weight.mul_(-1))
        codes = [row for row in found(check) if row.measure == "codes"]
    assert all(row.difference > row.allowed and not row.explained and not row.ok for row in codes)
    perturbed(monkeypatch, permuted)
    codes = [row for row in found(check) if row.measure == "codes"]
    assert all(row.difference > row.allowed and row.explained and row.ok for row in codes)


def test_another_forward_of_a_quantized_model_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights as on the CPU, activations on another grid."""

    def moved(self: MaskedDiffusionTransformer) -> MaskedDiffusionTransformer:
        for linear in self.modules():
            if isinstance(linear, QuantLinear):
                linear.activation_bits = replace(linear.activation_bits, bits=3)
        return self

    check = partial(agreement.method, "smoothquant", "w8a8")
    assert all(row.ok for row in found(check))
    monkeypatch.setattr(MaskedDiffusionTransformer, "cpu", moved)
    wrong = {row.measure for row in found(check) if not row.ok}
    assert wrong == {"quantized logits"} | ({"codes"} & wrong)


def test_float64_is_another_rounding_and_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a device may differ in, planted: sums of other last digits, in all that is computed in float32."""
    pair = agreement.pair

    def other(family: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
        ours, theirs = pair(family, device, dtype)
        return ours, theirs.double() if dtype == torch.float32 else theirs

    monkeypatch.setattr(agreement, "pair", other)
    for name in ("forward", "tokens", "likelihoods", "smoothquant w8a8"):
        rows = found(agreement.checks()[name])
        assert all(row.ok for row in rows), agreement.summary(rows)
        assert name == "tokens" or any(row.difference > 0 for row in rows)


def test_the_methods_that_are_checked_are_those_there_are() -> None:
    """With overrides that they understand."""
    there = {path.stem for path in (CONF_DIR / "method").glob("*.yaml") if "_as_published" not in path.stem}
    assert {name for name, _, _ in agreement.METHODS} == there - {"fp16"}
    for name, bits, overrides in agreement.METHODS:
        assert compose.build(compose.select(method=name, bits=bits, overrides=overrides).method)


def permuted(model: MaskedDiffusionTransformer) -> None:
    """The MLP's channels in another order: the same function, and other codes."""
    for block in model.blocks:
        for role in ("gate", "up"):
            getattr(block, role).weight.data = getattr(block, role).weight.flip(0)
        block.down.weight.data = block.down.weight.flip(1)


def test_a_number_that_is_none_is_no_agreement() -> None:
    assert not agreement.Agreement("a", "logits", float("nan"), 1.0).ok


@pytest.mark.parametrize(
    "name", ["forward", "likelihoods", "rtn nvfp4", pytest.param("tokens", marks=pytest.mark.slow)]
)
def test_the_pretend_accelerator_agrees(name: str) -> None:
    """Which refuses tensors of two devices, as a GPU does."""
    with pretend_accelerator():
        rows = found(agreement.checks()[name], torch.device("pretend", 0))
    assert all(row.ok for row in rows), agreement.summary(rows)


@pytest.mark.slow
def test_the_steps_run_on_the_pretend_accelerator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It draws no random numbers, so that weights come from the CPU, and has no speed."""
    make = gpu.random_model
    monkeypatch.setattr(gpu, "random_model", lambda arch, seed, device, dtype: make(arch, seed, CPU, dtype).to(device))
    monkeypatch.setattr(gpu, "matmul_rate", lambda device, dtype: 1e9)
    monkeypatch.setattr(agreement, "METHODS", ())
    with pretend_accelerator():
        code, report = benchmark(tmp_path, "--device", "pretend:0", "--minutes", "20")
    assert code == 0, report
    memory = {
        step["name"]: step["figures"]["memory"] for step in report["steps"] if "memory" in step.get("figures", {})
    }
    assert {entry["where"] for entry in memory.values()} == {"gpu"}
    assert all(entry["peak"] > 0 for entry in memory.values())


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "kind", lambda: None)
    for wrong, said in (
        (["--minutes", "0"], "--minutes=0 must be above 0"),
        (["--peak", "-1"], "--peak=-1 must be above 0"),
        (["--device", "cuda"], "--device=cuda, but torch"),
        (["--out", str(tmp_path / "no" / "gpu.json")], "there is no folder"),
    ):
        with pytest.raises(SystemExit):
            gpu.arguments(wrong)
        assert said in capsys.readouterr().err
