"""The plan of runs: its numbers against what the model and the harness really do, and the listing as it is typed."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bundled.sizes import bundled, measured
from conftest import TinyCheckpoint
from goldens import tiny_config
from torch.utils.flop_counter import FlopCounterMode

import dqx.study.estimate.memory
import dqx.study.plan.table
from dqx import load
from dqx.benchmarks.cases import MODELS
from dqx.config.compose import build, compose, resolve
from dqx.config.schema import CONF_DIR
from dqx.diffusion.batches import Request
from dqx.diffusion.engine import Engine, Prompt
from dqx.diffusion.likelihood import mask_states
from dqx.diffusion.scorer import Scorer
from dqx.evaluate.journal import Line
from dqx.models.checkpoint import inspect, load_weights
from dqx.models.family import families, family_of
from dqx.models.transformer import Architecture, MaskedDiffusionTransformer
from dqx.quant.backends import choice
from dqx.study.cache.artifacts import ArtifactCache
from dqx.study.cache.store import Store
from dqx.study.estimate.memory import weight_bytes
from dqx.study.estimate.sizes import SIZES
from dqx.study.estimate.speed import Measured, Published, block_flops, block_parameters, head_flops, work_flops
from dqx.study.estimate.work import Work, different_states, task_work
from dqx.study.experiment import Experiment, designed
from dqx.study.facts import evaluation_facts
from dqx.study.plan.progress import plan_runs
from dqx.study.plan.runs import calibration_work, hessian_flops, plan_run
from dqx.study.plan.table import amount, duration, print_plan
from dqx.study.run import run
from dqx.study.stages import Results

ROOT = CONF_DIR.parent
LLADA = ["model=llada_8b_base", "bits=w4a16", "plan_tflops=200"]


def of_nano() -> Architecture:
    return inspect("pkg://dqx/assets/nano_llada").arch


def listing(*runs: list[str]) -> str:
    out = io.StringIO()
    print_plan([plan_run(compose(overrides)) for overrides in runs], out)
    return out.getvalue()


def suite_of(*overrides: str) -> Any:
    config = resolve(compose(list(overrides)))
    return config.task.suite, build(config.model.sampler)


@pytest.mark.parametrize("family", families())
def test_operations_are_those_that_torch_counts(family: str) -> None:
    """A forward of a small model with the family's biases and heads; torch counts multiplications and additions."""
    arch = family_of(family).architecture(tiny_config(family))
    model = MaskedDiffusionTransformer(arch).requires_grad_(False)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(torch.arange(20)[None])
    assert arch.n_blocks * block_flops(arch, 20) + head_flops(arch, 20) == counter.get_total_flops()


def test_published_shapes_have_the_published_numbers_of_parameters() -> None:
    with torch.device("meta"):
        shapes = [each for f in families().values() for each in (f.published, *f.sizes.items())]
        sizes = {name: sum(p.numel() for p in MaskedDiffusionTransformer(a).parameters()) for name, a in shapes}
    assert {name: f"{n / 1e9:.2f}" for name, n in sizes.items()} == {
        **{"LLaDA-8B": "8.02", "Dream-7B": "7.62", "Fast-dLLM-v2-7B": "7.62", "Fast-dLLM-v2-1.5B": "1.54"},
        **{"SDAR-8B": "8.19", "SDAR-4B": "4.02", "SDAR-1.7B": "1.72"},
        **{f"Nemotron-Labs-Diffusion-{size}": n for size, n in {"8B": "8.49", "3B": "3.83", "14B": "13.51"}.items()},
    }


@pytest.mark.parametrize(("model", "shape"), [("sdar_4b", "SDAR-4B"), ("nemotron_8b", "Nemotron-Labs-Diffusion-8B")])
def test_models_with_block_diffusion_are_planned_by_their_passes(model: str, shape: str) -> None:
    run = plan_run(compose([f"model={model}", "task=nano", "method=gptq", "bits=4", "plan_tflops=100"]))
    assert run.problems == []
    assert any(f"the shapes of {shape}" in note for note in run.notes)
    sums, sampler = run.work["nano_sums"], build(compose([f"model={model}"]).model.sampler)
    passes = sampler.calls(16, None, sampler.steps_for(16, 16), torch.Generator())
    assert sums.at_most == 128 * len(passes)
    assert sums.tokens < sums.forwards * sums.length / 1.5


# ---- likelihood ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "draws"), [(1, 8), (2, 3), (3, 8), (3, 32), (5, 12), (8, 5)])
def test_expected_states_are_those_that_the_draws_find(length: int, draws: int) -> None:
    """By number of masked tokens, over 200 keys."""
    found = torch.zeros(length + 1)
    for key in range(200):
        states = mask_states(length, samples=draws, seed=0, key=(key,)).unique(dim=0)
        found += torch.bincount(states.sum(1), minlength=length + 1)
    expected = different_states(length, draws)
    assert torch.allclose(found[1:] / 200, torch.tensor([expected[c] for c in range(1, length + 1)]), atol=0.3)


def test_enumerated_states_are_all_of_them() -> None:
    assert sum(different_states(4, 128, exact=True).values()) == 15
    assert different_states(9, 128, exact=True) == different_states(9, 128)  # 511 are dearer than the draws
    assert sum(different_states(40, 128).values()) == pytest.approx(128, abs=4)  # hardly any is drawn twice


def test_forwards_of_likelihoods_are_those_of_the_scorer() -> None:
    """Four choices of one and of three tokens after each prompt, no token in common."""
    lm = load("nano_llada")
    scorer = Scorer(lm.model, samples=8, seed=0)
    requests = [
        Request(torch.tensor([7, document]), torch.arange(100, 100 + length) + 10 * choice, (document, choice))
        for document, length in [*((d, 1) for d in range(20)), *((d, 3) for d in range(20, 60))]
        for choice in range(4)
    ]
    scorer.score(requests)
    spec = suite_of("task=nano_facts")[0]["nano_facts"]
    size = replace(SIZES["nano_facts"], documents=60, answers={1: (80, 20), 3: (160, 40)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "nano_facts", size)
        work = task_work(spec, lm.sampler)
    assert work is not None
    assert work.forwards == pytest.approx(scorer.n_forwards, rel=0.03)
    assert scorer.n_forwards <= work.at_most == 80 + 160 * 7
    assert (work.length, work.documents) == (SIZES["nano_facts"].question + 2, 60)


# ---- generation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [[], ["steps=4"], ["model.sampler.cfg_scale=1"], ["model=nano_dream"]])
def test_forwards_without_an_early_stop_are_those_of_the_engine(overrides: list[str]) -> None:
    config = resolve(compose(["task=nano_sums", *overrides]))
    lm, spec = load(config.model.name), config.task.suite["nano_sums"]
    sampler = build(config.model.sampler)
    work = task_work(spec, sampler, limit=3, steps=config.steps.count)
    assert work is not None
    dream = config.model.family == "dream"
    engine = Engine(
        lm.model,
        sampler,
        gen_length=spec.gen_length,
        block_length=None if dream else spec.block_length,
        steps=config.steps.count or spec.steps,
    )
    answers = engine.generate([Prompt([5] * (10 + i), i) for i in range(3)])
    assert sum(answer.n_forwards for answer in answers) == work.at_most
    assert 0 < work.forwards <= work.at_most


def test_answers_stop_where_those_of_the_data_end() -> None:
    suite, sampler = suite_of("task=gsm8k")
    spec = suite["gsm8k"]

    def steps(answers: dict[int, tuple[int, int]]) -> float:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(SIZES, "gsm8k", replace(SIZES["gsm8k"], answers=answers))
            work = task_work(spec, sampler, limit=1)
        assert work is not None
        return work.forwards

    assert steps({32: (1, 1)}) == 32  # a whole block of 32
    assert steps({33: (1, 1)}) == (33 + 64) / 2
    assert steps({999: (1, 1)}) == steps({256: (1, 1)}) == 256
    assert steps({32: (3, 3), 256: (1, 1)}) == 88


# ---- sizes, memory, speed ------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["nano_facts", "nano_sums", "nano_code"])
def test_the_table_of_sizes_is_what_counting_gives(task: str) -> None:
    assert measured(suite_of(f"task={task}")[0][task], bundled(), None) == SIZES[task]


def test_every_task_of_the_study_has_a_size() -> None:
    suite, sampler = suite_of("task=qdlm")
    work = {name: task_work(spec, sampler) for name, spec in suite.items()}
    assert all(work.values())
    assert (work["mmlu"].forwards, work["mmlu"].length) == (14042, 125 + 5 * 102 + 1)  # the choices share a sequence
    assert (work["gsm8k"].at_most, work["gsm8k"].length) == (1319 * 256, 62 + 4 * 191 + 256)
    suite["piqa"].harness = "another"
    assert task_work(suite["piqa"], sampler) is None


def test_quantization_costs_what_the_method_reads() -> None:
    def counted(method: str, *overrides: str) -> tuple[int, float]:
        config = resolve(compose([f"method={method}", *LLADA, "calib.samples=2", "calib.length=64", *overrides]))
        design = designed(config, MODELS["llada_8b"], torch.bfloat16, torch.device("cuda"))
        return sum(w.at_most for w in calibration_work(design)), hessian_flops(design, 2 * 64)

    assert counted("rtn") == (0, 0)
    assert counted("gptq") == (3 * 2, 2 * 32 * 2 * 64 * (3 * 4096**2 + 12288**2))
    assert counted("gptq", "bits=w16a16") == (0, 0)
    assert counted("awq", "method.transforms.scale.n_grid=10") == ((3 + 15) * 2, 0)
    rollout = ["calib=trajectory", "calib.rollout=true", "calib.gen_length=32", "calib.steps=32"]
    assert counted("rtn", *rollout) == (2 * 32 // 2, 0)


@pytest.mark.parametrize("family", families())
def test_bytes_of_weights_are_those_of_the_loaded_model(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = inspect(str(tiny_checkpoint(family)))
    for dtype in (torch.float32, torch.bfloat16):
        loaded = load_weights(checkpoint, dtype).parameters()
        assert weight_bytes(checkpoint.arch, dtype) == sum(p.numel() * p.element_size() for p in loaded)


def test_what_does_not_fit_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dqx.study.estimate.memory, "machine_bytes", lambda: 10_000_000)
    text = listing(["task=nano_sums", "calib.samples=64"])
    assert "quantized from disk, block by block" in text
    assert "does not fit into the 10 MB of RAM there are: about 8" in text
    assert "smaller model.dtype" in text
    assert "does not fit" not in listing([*LLADA, "task=piqa"])  # another machine, of which no memory is known


def test_speed_is_measured_on_the_shapes_of_the_work() -> None:
    arch = of_nano()
    speed = Measured(arch, torch.float32, torch.device("cpu"))
    assert block_parameters(arch) == sum(p.numel() for p in speed.block.parameters() if p.dim() == 2)
    assert len(speed.outer.blocks) == 0
    suite, sampler = suite_of("task=nano_sums")
    work = task_work(suite["nano_sums"], sampler)
    assert work is not None
    assert speed.seconds(work, sampler) > 0
    assert speed.rows(work) == 512 // 36
    assert speed.seconds(replace(work, forwards=2 * work.forwards), sampler) == 2 * speed.seconds(work, sampler)
    longer = speed.block_seconds(1, 4 * speed.limit)  # more than can be timed: by operations
    assert longer == pytest.approx(
        speed.block_seconds(1, speed.limit) * block_flops(arch, 4 * speed.limit) / block_flops(arch, speed.limit)
    )


def test_a_plan_reads_no_weight(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("llada")
    (folder / "model.safetensors").unlink()
    text = listing([f"model.path={folder}", "task=nano_facts", "method=rtn", "bits.weight.group_size=-1"])
    assert "Speed measured here: 1 CPU thread, float32" in text
    assert "cannot run" not in text


def test_what_the_cache_has_is_found(tmp_path: Path) -> None:
    """Documents of an interrupted evaluation, then a whole one; not for another seed, nor with reuse=false."""
    overrides = ["method=rtn", "task=nano_facts", "task.limit=3", "outliers.samples=0", "fidelity.samples=0"]
    overrides += [f"cache_dir={tmp_path / 'cache'}", "wandb.mode=disabled"]
    config = resolve(compose([*overrides, "method=fp16", "bits=w16a16"]))
    assert plan_run(compose(overrides)).cached == {}
    assert not (tmp_path / "cache").exists()  # a plan leaves nothing

    store = Store(config.cache_dir)
    facts = evaluation_facts(Experiment.of(config))
    key = Results(ArtifactCache(store), facts).key("nano_facts", config.task.suite["nano_facts"])
    journal = store.journal(key)
    journal.append([Line("nano_facts/1", "", [])])
    journal.close()
    plan = plan_run(compose(overrides))
    assert plan.cached == {"nano_facts": 1}
    whole = plan.evaluation["nano_facts"].flops
    assert plan.cost(set())["full precision"].flops == pytest.approx(whole * 2 / 3)

    run(config, tmp_path / "run")
    plan = plan_run(compose(overrides))
    assert plan.cached == {"nano_facts": None}
    assert plan.cost(set())["full precision"].flops == 0
    assert plan.cost(set())["evaluate"].flops == whole
    printed = listing(overrides)
    row, *_ = (line for line in printed.splitlines() if " nano_facts " in line)
    assert row.split()[-1] == "all"
    assert max(map(len, printed.splitlines())) <= 80
    assert plan_run(compose([*overrides, "seed=1"])).cached == {}
    assert plan_run(compose([*overrides, "reuse=false"])).cached == {}


def test_approximate_samplers_cost_the_exact_schedule_and_it_is_said() -> None:
    exact, approximate = (
        plan_run(compose(["task=nano_sums", "plan_tflops=1", *o])) for o in ([], ["model.sampler.threshold=0.9"])
    )
    assert approximate.evaluation == exact.evaluation
    assert any("threshold0.9" in note for note in approximate.notes)
    assert exact.notes == []


def test_a_backend_is_not_timed_and_it_is_said() -> None:
    overrides = ["method=rtn", "bits=w8a8", "task=nano_sums", "plan_tflops=1"]
    simulated, kernels = (plan_run(compose([*overrides, *more])) for more in ([], ["backend=int8"]))
    assert kernels.evaluation == simulated.evaluation
    assert simulated.notes == []
    (note,) = kernels.notes
    assert note.startswith("backend=int8: what its products take only a run can tell")
    assert plan_run(compose([*overrides, "method=fp16", "bits=w16a16", "backend=auto"])).notes == []


def test_what_keeps_a_backend_from_running_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings on every machine; the kernel's start-up test where the plan is for this one."""
    monkeypatch.setattr(choice, "untrusted", lambda kernel, device: f"it adds in 16 bits on {device}")
    overrides = ["method=rtn", "task=nano_sums", "backend=int8"]
    (told,) = plan_run(compose([*overrides, "bits=w4a16", "plan_gpu=h100"])).problems
    assert told.startswith("backend=int8 takes 8-bit integers with one scale per row of a weight")
    (told,) = plan_run(compose([*overrides, "bits=w8a8"])).problems
    assert (
        told == "backend=int8 cannot be had on this machine's cpu: it adds in 16 bits on cpu; write backend=simulated"
    )
    assert plan_run(compose([*overrides, "bits=w8a8", "plan_gpu=h100"])).problems == []


# ---- the listing ---------------------------------------------------------------------------------------------


def test_a_baseline_is_counted_once() -> None:
    first, second = (plan_run(compose([*LLADA, f"method={m}", "task=arc_easy"])) for m in ("rtn", "gptq"))
    assert first.problems == second.problems == []
    assert first.baselines == second.baselines
    assert (first.method, first.bits) == ("rtn", "w4a16")
    other = plan_run(compose([*LLADA, "method=rtn", "task=arc_easy", "seed=1"]))
    assert other.baselines != first.baselines
    computed = set(first.baselines.values())
    assert second.cost(set())["full precision"].flops == second.cost(computed)["evaluate"].flops
    assert second.cost(computed)["full precision"].flops == second.checks.flops
    text = listing([*LLADA, "method=rtn", "task=arc_easy"], [*LLADA, "method=gptq", "task=arc_easy"])
    assert "llada_8b_base is not here; it is taken to have the shapes of LLaDA-8B." in text
    assert "the largest run is llada_8b_base-" in text


def test_an_assumed_speed_takes_the_place_of_the_measurement() -> None:
    run = plan_run(compose([*LLADA, "method=rtn", "task=arc_easy"]))
    assert run.evaluation["arc_easy"].seconds == run.evaluation["arc_easy"].flops / 200e12
    text = listing([*LLADA, "method=rtn", "task=arc_easy", "plan_tflops=400"])
    assert "Speed assumed: 400 TFLOP/s sustained (plan_tflops)." in text
    assert "measured here" not in text


def test_a_gpu_is_planned_for_beside_this_machine() -> None:
    overrides = ["method=rtn", "task=nano_sums", "calib.samples=1", "outliers.samples=0", "fidelity.samples=0"]
    here, card = (plan_run(compose([*overrides, *more])) for more in ([], ["plan_gpu=H100"]))
    assert card.problems == []
    there, work = card.evaluation["nano_sums"], card.work["nano_sums"]
    assert there.seconds == Published(of_nano(), "h100").seconds(work, build(resolve(compose([])).model.sampler))
    assert there.seconds < there.here == pytest.approx(here.evaluation["nano_sums"].seconds, rel=0.01)  # timed once
    text = listing([*overrides, "plan_gpu=h100"])
    assert "Speed assumed, not measured: h100 at 40 % of its published 989 TFLOP/s (bfloat16, dense)" in text
    assert "and 70 % of its 3.35 TB/s." in text
    assert "Speed measured here: 1 CPU thread, float32" in text
    headings = (found.partition("---")[0].split() for found in (text, listing(overrides)))
    assert [heading[-1] for heading in headings] == ["here", "total"]


def test_published_speeds_are_bound_by_operations_or_by_reading_weights() -> None:
    arch, sampler = MODELS["llada_8b"], suite_of("task=gsm8k")[1]
    speed = Published(arch, "a100")
    many = Work("generation", 1000, 1000, 1024, read=32, documents=1000, batch=64)
    assert speed.seconds(many, sampler) == work_flops(arch, many) / (0.4 * 312e12)
    single = Work("plain", 1000, 1000, 16)  # one short sequence at a time
    weights = 2 * (weight_bytes(arch, torch.int8) - arch.vocab_size * arch.hidden_size)  # an embedding is looked up
    assert speed.seconds(single, sampler) == pytest.approx(1000 * weights / (0.7 * 2.04e12), rel=1e-3)


def test_a_gpu_that_is_not_here_needs_no_device_here_and_may_be_too_small() -> None:
    other = ["model=llada_8b_base", "bits=w4a16", "method=gptq", "task=piqa", "model.device=cuda:77"]
    text = " ".join(listing([*other, "plan_gpu=4090"]).split())
    assert "no estimate of this machine: model.device=cuda:77" in text
    assert "on 4090, quantized from disk, block by block" in text
    assert "measured here" not in text
    text = listing([*other, "plan_gpu=h200"])
    assert "from disk" not in text
    text = listing([*other, "plan_gpu=l4", "model.dtype=float32"])
    assert "on l4, the run does not fit into the 24 GB of GPU there are" in text


def test_where_a_plan_takes_too_long_a_gpu_is_suggested(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "estimates the same" not in listing(["task=nano_sums"])
    monkeypatch.setattr(dqx.study.plan.table, "LONG", 0.001)
    assert "plan_gpu=h100 estimates the same on a GPU that is not here; so do h200, b200" in listing(["task=nano_sums"])
    assert "estimates the same" not in listing(["task=nano_sums", "plan_gpu=h100"])


def test_a_line_says_what_is_being_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    runs = plan_runs([compose([f"method={method}", "task=nano_sums", "plan_tflops=1"]) for method in ("rtn", "gptq")])
    assert [run.method for run in runs] == ["rtn", "gptq"]
    said = terminal.getvalue()
    assert "planning, 0 of 2 runs done" in said
    assert "planning, 0 of 2 runs done: nano_llada-rtn-w3a16, nano_sums" in said
    assert "planning, 1 of 2 runs done: nano_llada-gptq-w3a16, calibration and checks" in said


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["plan_gpu=h10"], "plan_gpu=h10 is not in the table, which has h100, h200"),
        (["plan_gpu=h100", "plan_tflops=200"], "are two machines to plan for; give one of them"),
        (["method=fp16", "bits=w4a16"], "fp16 quantizes nothing"),
        ([*LLADA, "bits.weight.group_size=100"], "group_size=100 does not divide 4096"),
        ([*LLADA, "task.limit=0", "seed=-1"], "task.limit=0 leaves no documents"),
        ([*LLADA, "+model.dtyp=x"], "model.dtyp is no setting"),
        ([*LLADA, "calib.length=8192"], "longer than the model's 4096 positions"),
        (["plan_tflops=-1"], "plan_tflops=-1.0 must be a number above 0"),
        (["model.device=cuda:77"], "plan_gpu=NAME or plan_tflops=NUMBER plans for another machine"),
    ],
)
def test_what_cannot_run_is_listed_and_costs_nothing(overrides: list[str], said: str) -> None:
    text = listing(overrides, ["method=rtn", "plan_tflops=1"])
    assert said in text
    (row,) = (line for line in text.splitlines() if line.endswith("cannot run"))
    assert len(row.split()) == 6  # model, method, bits, tasks
    assert not any(line.startswith("all ") for line in text.splitlines())  # one run is left, so there is no sum


def test_full_precision_as_a_method_is_evaluated_once() -> None:
    run = plan_run(compose(["model=llada_8b_base", "method=fp16", "task=arc_easy", "plan_tflops=200"]))
    assert not run.changes
    assert run.quantization.flops == 0
    assert run.cost(set())["evaluate"].flops == 0


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (999, "999"), (1000, "1k"), (12345, "12.3k"), (999600, "1M"), (5.6e15, "5.6P")]
)
def test_amounts(value: float, text: str) -> None:
    assert amount(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "-"), (0.2, "< 1 s"), (89, "89 s"), (600, "10 min"), (7200, "2.0 h"), (1e6, "277.8 h"), (1e7, "2,778 h")],
)
def test_durations(value: float, text: str) -> None:
    assert duration(value) == text


def test_plan_as_typed(tmp_path: Path) -> None:
    """A preset from the command line, offline: all runs are listed, nothing is left behind, exit code 0."""
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "launch.py"),
            "+experiment=qdlm_table5",
            "plan=true",
            "method=gptq",
            "plan_tflops=200",
            f"hydra.sweep.dir={tmp_path / 'sweep'}",
        ],
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
