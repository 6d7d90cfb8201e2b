"""Whole runs on models with block-wise attention: tiny checkpoints in the hub's format, every family, every sampler."""

import json
from dataclasses import replace

import pytest
import torch
from tiny import TOY, random_model

from dqx.config.compose import build, compose, resolve
from dqx.config.schema import ConfigProblems
from dqx.diffusion.batches import Request
from dqx.diffusion.samplers.nemotron import AutoregressiveSampler, NemotronSampler
from dqx.diffusion.samplers.sdar import SDARSampler
from dqx.diffusion.scorer import Scorer
from dqx.evaluate.session import EvaluationSession
from dqx.models.family import family_of
from dqx.record.folder import RunFolder
from dqx.study.estimate.work import block_lines, task_work
from dqx.study.run import run

SMALL = [
    *("calib.text=nano", "calib.samples=2", "calib.length=64", "outliers.samples=1", "fidelity.samples=2"),
    *("fidelity.steps=4", "model.dtype=float32", "wandb.mode=disabled"),
]
WHOLE = [
    *("method=gptq", "bits=4", "bits.weight.group_size=16", "task=nano", "task.limit=2"),
    "task.suite.nano_facts.mc_samples=2",
]
CHOICES = {"sdar": "sdar_4b", "nemotron": "nemotron_8b", "fast_dllm": "fast_dllm_7b"}


@pytest.fixture
def launch(tmp_path, tiny_checkpoint):
    """Run a family's checkpoint with these overrides into a fresh folder."""
    checkpoints = {}

    def start(family, name, *overrides):
        if family not in checkpoints:
            checkpoints[family] = tiny_checkpoint(family)
        model = [f"model={CHOICES.get(family, 'nano_' + family)}", f"model.path={checkpoints[family]}"]
        cache = f"cache_dir={tmp_path / 'cache'}"
        return run(resolve(compose([*model, *SMALL, cache, *overrides])), tmp_path / name)

    return start


@pytest.mark.parametrize("family", CHOICES)
def test_a_run_is_whole_and_is_reused(family, launch, tmp_path):
    record = launch(family, "first", *WHOLE)
    assert {row.name for row in record.deltas if row.kind == "task"} == {"nano_facts", "nano_sums", "nano_code"}
    assert all(result.n_forwards > 0 for side in (record.full_precision, record.quantized) for result in side.values())
    assert record.quantization["linears"]
    assert {row.name for row in record.forwards} == {"nano_sums", "nano_code"}
    rows = record.quantized["nano_sums"].documents
    assert sum(row.forwards for row in rows) == record.quantized["nano_sums"].n_forwards
    assert sum(row.tokens for row in rows) == record.quantized["nano_sums"].tokens
    fidelity = record.fidelity
    assert len(fidelity["by_mask_ratio"]) == 5
    assert len(fidelity["by_step"]) == len(fidelity["layers"]["steps"]) > 1
    assert all(0 < row["divergence"] < 1 for row in (*fidelity["by_mask_ratio"], *fidelity["by_step"]))
    assert any("commit_flips" in note for note in record.warnings)
    again = launch(family, "second", *WHOLE)
    assert {source for side in again.sources.values() for source in side.values()} == {"reused"}
    assert again.deltas == record.deltas
    assert RunFolder(tmp_path / "first").read().results() == json.loads((tmp_path / "first/results.json").read_text())


@pytest.mark.parametrize("family", CHOICES)
def test_an_interrupted_evaluation_goes_on(family, launch, monkeypatch, tmp_path):
    """After its first finished document, to the results and counts of an undisturbed one."""
    settings = ["task=nano_sums", "task.limit=3", "task.suite.nano_sums.batch_size=1"]
    settings += ["method=fp16", "fidelity.samples=0", "outliers.samples=0"]
    enter = EvaluationSession.enter

    def interrupted(session, answers):
        enter(session, answers)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(EvaluationSession, "enter", interrupted)
        with pytest.raises(KeyboardInterrupt):
            launch(family, "interrupted", *settings)
    again = launch(family, "again", *settings).quantized["nano_sums"]
    whole = launch(family, "whole", *settings, f"cache_dir={tmp_path / 'other'}").quantized["nano_sums"]
    assert any(note.startswith("continued: 1 of 3 documents") for note in again.notes)
    assert again.documents == whole.documents
    assert (again.n_forwards, again.n_tokens, again.tokens) == (whole.n_forwards, whole.n_tokens, whole.tokens)


#: A family, settings of its sampler, and what it would be asked that it has not learned.
REFUSED = [
    ("sdar", ["model.sampler=llada"], "write model.sampler=sdar"),
    ("nemotron", ["model.sampler=sdar"], "write model.sampler=nemotron"),
    ("fast_dllm", ["model.sampler=sdar"], "write model.sampler=fast_dllm"),
    ("sdar", ["model.sampler=fast_dllm"], "write model.sampler=sdar"),
    ("fast_dllm", ["model.sampler=autoregressive"], "write model.sampler=fast_dllm"),
    ("llada", ["model.sampler=nemotron"], "write model.sampler=llada"),
    ("dream", ["model.sampler=sdar"], "write model.sampler=dream"),
    ("fast_dllm", ["steps.count=8"], "steps=8 has no meaning"),
]


@pytest.mark.parametrize(("family", "settings", "told"), REFUSED)
def test_what_a_model_has_not_learned_is_refused(family, settings, told, launch):
    with pytest.raises(ConfigProblems, match=told):
        launch(family, "refused", *WHOLE, *settings)


def test_likelihoods_are_what_the_sampler_says(launch, tmp_path, tiny_checkpoint):
    """A text and a choice, written and scored both ways: exact is another number, with one draw as with many."""
    texts, choices = {}, {}
    for name, *settings in (("bound",), ("many", "autoregressive", 6), ("one", "autoregressive", 2)):
        sampler, samples = settings or (None, 2)
        ways = [f"task.suite.{task}.mc_samples={samples}" for task in ("nano_text", "nano_facts")]
        ways += ["task=[nano_text,nano_facts]", "method=fp16", "bits=w16a16", "outliers.samples=0"]
        ways += [] if sampler is None else [f"model.sampler={sampler}"]
        record = launch("nemotron", name, *ways)
        documents = record.full_precision
        texts[name], choices[name] = (
            documents[task].documents[0].log_likelihoods for task in ("nano_text", "nano_facts")
        )
    assert texts["many"] == pytest.approx(texts["one"])
    assert choices["many"] == pytest.approx(choices["one"])
    assert texts["bound"] != pytest.approx(texts["one"])
    with pytest.raises(ConfigProblems, match=r"sampler\.causal_context=false .*leave it true for likelihood"):
        launch("nemotron", "refused", "model.sampler.causal_context=false")


#: A sampler, tokens of a prompt, and how many answers of which length follow each.
COUNTED = [
    (SDARSampler(block=4), 40, {3: 2, 6: 2}),
    (NemotronSampler(block=8), 1, {64: 1}),
    (NemotronSampler(block=8), 40, {1: 4}),
    (AutoregressiveSampler(), 40, {5: 3}),
]


@pytest.mark.parametrize(("sampler", "prompt", "answers"), COUNTED)
def test_a_plan_counts_what_the_scorer_does(sampler, prompt, answers):
    arch = family_of("sdar").published[1] if isinstance(sampler, SDARSampler) else family_of("nemotron").published[1]
    model = random_model(replace(TOY, attention=arch.attention, logit_shift=False))
    documents, draws = 6, 24
    requests = []
    for document in range(documents):
        prefix = torch.randint(0, 90, (prompt,), generator=torch.Generator().manual_seed(document))
        for i, length in enumerate(length for length, n in answers.items() for _ in range(n)):
            target = torch.randint(0, 90, (length,), generator=torch.Generator().manual_seed(100 * document + i))
            requests.append(Request(prefix, target, (document, i)))
    scorer = Scorer(model, samples=draws, seed=0, factorization=sampler.factorization(), batch_tokens=10**6)
    scorer.score(requests)
    sizes = {length: (documents * n, documents) for length, n in answers.items()}
    lines = block_lines(sizes, documents, prompt, sampler.factorization(), draws)
    assert lines.expected * lines.length == pytest.approx(scorer.n_tokens, rel=0.15)
    assert lines.expected == pytest.approx(scorer.n_forwards, rel=0.3)
    assert lines.at_most >= lines.expected


def test_the_preset_measures_both_ways():
    first = resolve(compose(["experiment=ar_vs_diffusion"]))
    works = []
    for sampler in first.sweep["model/sampler"].split(","):
        for bits in first.sweep["bits"].split(","):
            config = resolve(compose(["experiment=ar_vs_diffusion", f"model.sampler={sampler}", f"bits={bits}"]))
            assert (config.model.name, config.bits.name) == ("nemotron_8b", bits)
        works.append({name: task_work(spec, build(config.model.sampler)) for name, spec in config.task.suite.items()})
    diffusion, autoregressive = works
    assert list(diffusion) == ["arc_challenge", "gsm8k", "wikitext2"]
    assert all(work.tokens > 3 * autoregressive[name].tokens for name, work in diffusion.items())


def test_a_block_that_is_not_the_checkpoints_is_noted():
    arch = family_of("sdar").published[1]
    assert SDARSampler(block=arch.block_length).model_notes(arch) == []
    assert "blocks of 8 tokens (model.sampler.block)" in SDARSampler(block=8).model_notes(arch)[0]
