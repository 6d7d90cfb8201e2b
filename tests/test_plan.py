"""The plan of runs: its numbers against what the model and the harness really do, and the listing as it is typed."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dqx import load
from dqx.config import CONF_DIR, build, compose, resolve
from dqx.evaluate.sizes import SIZES
from dqx.models.checkpoint import FAMILIES
from dqx.models.published import PUBLISHED, of_family
from dqx.models.transformer import MaskedDiffusionTransformer
from dqx.plan import amount, duration, forward_flops, plan_run, print_plan, quantization_flops, task_cost

ROOT = CONF_DIR.parent
LLADA = ["model=llada_8b_base", "bits=w4a16"]


def listing(*runs: list[str], tflops: float = 200.0) -> str:
    out = io.StringIO()
    print_plan([plan_run(compose(overrides)) for overrides in runs], tflops, out)
    return out.getvalue()


@pytest.mark.parametrize("family", FAMILIES)
def test_operations_are_those_that_torch_counts(family: str) -> None:
    """A forward of a small model with the family's biases and heads; torch counts multiplications and additions."""
    config = json.loads((Path(__file__).parent / "golden" / f"{family}_tiny" / "config.json").read_text())
    arch = FAMILIES[family].architecture(config)
    model = MaskedDiffusionTransformer(arch).requires_grad_(False)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(torch.arange(20)[None])
    assert forward_flops(arch, 20) == counter.get_total_flops()


def test_published_shapes_have_the_published_numbers_of_parameters() -> None:
    with torch.device("meta"):
        sizes = {
            name: sum(p.numel() for p in MaskedDiffusionTransformer(a).parameters()) for name, a in PUBLISHED.items()
        }
    assert {name: f"{n / 1e9:.2f}" for name, n in sizes.items()} == {"LLaDA-8B": "8.02", "Dream-7B": "7.62"}
    assert of_family("gpt") is None


def test_forwards_are_those_of_the_harness() -> None:
    lm = load("nano_llada")
    for task in ("nano_sums", "nano_facts"):
        spec = resolve(compose([f"task={task}"])).task.suite[task]
        done, cost = lm.evaluate(task, limit=2)[task], task_cost(spec, limit=2)
        assert cost is not None
        if task == "nano_sums":
            assert (cost.forwards, cost.documents) == (done.n_forwards, done.n)
        else:  # answers of one token need one draw
            assert 8 <= done.n_forwards <= cost.forwards == 64


def test_sizes_of_the_bundled_tasks() -> None:
    for task in ("facts", "sums", "code"):
        lines = (ROOT / "dqx" / "assets" / "nano" / f"{task}.jsonl").read_text().splitlines()
        assert SIZES[f"nano_{task}"].documents == len(lines)


def test_cost_of_a_task() -> None:
    suite = resolve(compose(["task=qdlm"])).task.suite
    assert all(spec.harness in SIZES for spec in suite.values())
    mmlu, gsm8k, piqa = (task_cost(suite[name]) for name in ("mmlu", "gsm8k", "piqa"))
    assert (mmlu.forwards, mmlu.length) == (14042 * 4, 120 + 5 * 110 + 1)  # one token to answer: one draw
    assert piqa.forwards == 1838 * 2 * 128
    assert (gsm8k.forwards, gsm8k.length) == (1319 * 256, 65 + 4 * 195 + 256)
    assert task_cost(suite["gsm8k"], limit=10, steps=64, passes=2).forwards == 10 * 64 * 2
    suite["piqa"].harness = "another"
    assert task_cost(suite["piqa"]) is None


def test_quantization_costs_what_the_method_reads() -> None:
    def flops(method: str, *overrides: str) -> float:
        config = resolve(compose([f"method={method}", *LLADA, *overrides]))
        return quantization_flops(build(config.method), config.bits, arch, 2, 64)

    arch = PUBLISHED["LLaDA-8B"]
    one_pass = forward_flops(arch, 64, head=False)
    hessians = 2 * 32 * 2 * 64 * (3 * 4096**2 + 12288**2)
    assert flops("rtn") == 0
    assert flops("gptq") == 3 * 2 * one_pass + hessians
    assert flops("gptq", "bits=w16a16") == 0
    assert flops("awq", "method.transforms.scale.n_grid=10") == (3 + 15) * 2 * one_pass


def test_a_plan_needs_no_checkpoint_and_counts_a_baseline_once() -> None:
    first, second = (plan_run(compose([*LLADA, f"method={m}", "task=arc_easy"])) for m in ("rtn", "gptq"))
    assert first.problems == second.problems == []
    assert first.baselines == second.baselines
    assert (first.assumed, first.method, first.bits) == ("LLaDA-8B", "rtn", "w4a16")
    other = plan_run(compose([*LLADA, "method=rtn", "task=arc_easy", "seed=1"]))
    assert other.baselines != first.baselines
    text = listing([*LLADA, "method=rtn", "task=arc_easy"], [*LLADA, "method=gptq", "task=arc_easy"], tflops=100)
    rows = {line.split()[1]: line.split() for line in text.splitlines() if line.startswith("llada_8b_base ")}
    assert rows["rtn"][7] != "-"
    assert rows["gptq"][7] == "-"
    assert "llada_8b_base is not here; it is taken to have the shapes of LLaDA-8B." in text
    assert "at 100 x 10^12 operations per second" in text


def test_hours_follow_from_operations() -> None:
    run = plan_run(compose([*LLADA, "method=rtn", "task=arc_easy"]))
    seconds = sum(run.evaluation.values()) / 200e12
    assert sum(run.evaluation.values()) == 2376 * 4 * 128 * forward_flops(PUBLISHED["LLaDA-8B"], 29 + 5)
    text = listing([*LLADA, "method=rtn", "task=arc_easy"])
    assert duration(seconds) in text
    assert duration(2 * seconds) in text  # with the full-precision side
    assert duration(seconds / 2) in listing([*LLADA, "method=rtn", "task=arc_easy"], tflops=400)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["method=fp16", "bits=w4a16"], "fp16 quantizes nothing"),
        ([*LLADA, "bits.weight.group_size=100"], "group_size=100 does not divide 4096"),
        ([*LLADA, "task.limit=0", "seed=-1"], "task.limit=0 leaves no documents"),
        ([*LLADA, "+model.dtyp=x"], "model.dtyp is no setting"),
        ([*LLADA, "calib.length=8192"], "longer than the model's 4096 positions"),
    ],
)
def test_what_cannot_run_is_listed_and_costs_nothing(overrides: list[str], said: str) -> None:
    text = listing(overrides, ["method=rtn"])
    assert said in text
    (row,) = (line for line in text.splitlines() if line.endswith("cannot run"))
    assert len(row.split()) == 6  # model, method, bits, tasks
    assert not any(line.startswith("all ") for line in text.splitlines())  # one run is left, so there is no sum


def test_full_precision_as_a_method_is_evaluated_once() -> None:
    run = plan_run(compose(["model=llada_8b_base", "method=fp16", "task=arc_easy"]))
    assert not run.changes
    assert run.quantization == 0


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (999, "999"), (1000, "1k"), (12345, "12.3k"), (999600, "1M"), (5.6e15, "5.6P")]
)
def test_amounts(value: float, text: str) -> None:
    assert amount(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "-"), (0.2, "< 1 s"), (89, "89 s"), (600, "10 min"), (7200, "2.0 h"), (1e7, "2777.8 h")]
)
def test_durations(value: float, text: str) -> None:
    assert duration(value) == text


def test_plan_as_typed(tmp_path: Path) -> None:
    """A preset from the command line, offline: all runs are listed, nothing is left behind, exit code 0."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), "+experiment=qdlm_table5", "plan=true", "method=gptq"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "2 runs planned" in done.stdout
    rows = [line.split()[:4] for line in done.stdout.splitlines() if line.startswith("dream_7b_base gptq")]
    assert rows == [["dream_7b_base", "gptq", bits, "4"] for bits in ("w4a16", "w3a16")]
    assert list(tmp_path.iterdir()) == []
