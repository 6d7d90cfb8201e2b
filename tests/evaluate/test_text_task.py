"""A text's nats per token: equal to the plain estimate window by window, paired, and judged before anything runs."""

import math
import shutil
from pathlib import Path

import pytest
import torch

from dqx.api import load
from dqx.config.compose import compose, resolve
from dqx.data.texts import ASSETS
from dqx.diffusion.likelihood import log_likelihood
from dqx.diffusion.samplers.llada import LLaDASampler
from dqx.evaluate.problems import hub_problems, task_problems
from dqx.evaluate.settings import EvaluationSettings
from dqx.evaluate.tasks import evaluate
from dqx.evaluate.text import text_windows
from dqx.record.deltas import compare
from dqx.study.cache.artifacts import ArtifactCache
from dqx.study.cache.store import Store
from dqx.study.estimate.work import task_work
from dqx.study.experiment import problems
from dqx.study.stages import Results

DATA = Path(__file__).parents[1] / "data"


def suite(task, *overrides):
    return resolve(compose([f"task={task}", *overrides])).task.suite


@pytest.fixture(scope="module")
def lm():
    return load("nano_llada")


@pytest.fixture(scope="module")
def result(lm):
    return lm.evaluate("nano_text", limit=2)["nano_text"]


def test_a_window_has_the_plain_estimate(lm, result):
    spec = suite("nano_text")["nano_text"]
    windows = text_windows("nano_text", spec, lm.tokenizer, limit=2)
    start = torch.tensor([lm.model.arch.eos_token_id])
    for i, (row, window) in enumerate(zip(result.documents, windows, strict=True)):
        plain = log_likelihood(lm.model, start, window, samples=spec.mc_samples, seed=0, key=("corpus.txt", i))
        assert row.log_likelihoods == [pytest.approx(plain.value, rel=1e-5)]
        assert row.score == -row.log_likelihoods[0] / 64
    assert (result.metric, result.category, result.n, result.tokens) == ("nll", "text", 2, 0)
    assert result.value == pytest.approx(sum(row.score for row in result.documents) / 2)
    assert 0.1 < result.value < math.log(lm.model.arch.vocab_size) / 2  # the model has learnt such text


def test_windows_are_the_text_from_its_start(lm):
    windows = text_windows("t", suite("nano_text")["nano_text"], lm.tokenizer)
    assert windows.shape == (64, 64)
    text = (ASSETS / "nano" / "corpus.txt").read_text()
    first = lm.tokenizer.decode(windows.flatten().tolist()).split("<|endoftext|>")[0]
    assert first == text.split("\n\n")[0].strip()
    assert torch.equal(text_windows("t", suite("nano_text")["nano_text"], lm.tokenizer, limit=5), windows[:5])


def test_the_same_questions_for_both_models(lm, result):
    again = lm.evaluate("nano_text", limit=1)["nano_text"]
    assert [row.doc_id for row in again.documents] == ["nano_text/0"]
    assert [row.score for row in again.documents] == pytest.approx([row.score for row in result.documents[:1]])
    worse = load("nano_llada")
    with torch.no_grad():
        worse.model.blocks[0].o.weight.zero_()
    other = worse.evaluate("nano_text", limit=2)["nano_text"]
    (row,) = compare({"nano_text": result}, {"nano_text": other})
    assert row.delta > 0
    assert (row.lost, row.gained, row.level) == (2, 0, None)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_wikitext_and_files_on_both_families(tiny_checkpoint, tmp_path, family):
    model = load(str(tiny_checkpoint(family)), dtype="float32")
    small = ["task.suite.wikitext2.length=32", "task.suite.wikitext2.mc_samples=2"]
    specs = suite("wikitext2", *small)
    settings = EvaluationSettings(limit=2, data_root=str(DATA), progress=False)
    found = evaluate(model.model, model.tokenizer, specs, sampler=model.sampler, settings=settings)["wikitext2"]
    assert found.value == pytest.approx(math.log(model.model.arch.vocab_size), rel=0.5)  # an untrained model
    assert found.n_forwards <= 4
    (tmp_path / "a.txt").write_text(" = Robert Boulter = \n\n" * 20)
    specs = suite("wikitext2", *small, f"task.suite.wikitext2.text={tmp_path / 'a.txt'}")
    windows = text_windows("wikitext2", specs["wikitext2"], model.tokenizer)
    assert model.tokenizer.decode(windows[0].tolist()) == (" = Robert Boulter = \n\n" * 2)[:32]
    specs["wikitext2"].length = 10_000
    with pytest.raises(ValueError, match=r"task.suite.wikitext2.length=10000 is more than the 440 tokens of .*a\.txt"):
        text_windows("wikitext2", specs["wikitext2"], model.tokenizer)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["metric=acc"], "metric='acc' does not fit kind=text"),
        (["length=null"], "length is not set; a text task needs it"),
        (["mc_samples=0"], "mc_samples=0 must be 1 or more"),
        (["windows=0"], "windows=0 must be 1 or more"),
        (["text=null"], "text is not set; give a name, a file or a dataset id"),
        (["text=nowhere.txt"], "text=nowhere.txt: the file does not exist"),
        (["text=nothing"], "text=nothing is neither one of nano, wikitext2, pile"),
    ],
)
def test_what_cannot_work_is_said_before(changes, expected):
    specs = suite("nano_text", *(f"task.suite.nano_text.{change}" for change in changes))
    (found,) = task_problems(specs)
    assert found.startswith("task.suite.nano_text.")
    assert expected in found


def test_a_missing_copy_and_a_long_window_are_said_before(tmp_path):
    (found,) = task_problems(suite("wikitext2"), data_root=str(tmp_path))
    assert "task.suite.wikitext2.text=Salesforce/wikitext" in found
    assert task_problems(suite("wikitext2"), data_root=str(DATA)) == []
    assert hub_problems(suite("wikitext2")) == []  # the text itself says so when it is read
    config = resolve(compose(["task=nano_text", "task.suite.nano_text.length=4096"]))
    assert problems(config) == [
        "task.suite.nano_text.length=4096 and a start token are more than the model's 4096 positions; "
        "choose 4095 or less"
    ]


def test_the_plan_counts_windows():
    work = task_work(suite("nano_text")["nano_text"], LLaDASampler())
    assert (work.documents, work.at_most, work.length) == (64, 64 * 8, 65)
    assert work.forwards == pytest.approx(64 * 8, rel=0.01)  # hardly any state is drawn twice
    assert task_work(suite("wikitext2")["wikitext2"], LLaDASampler(), limit=10).at_most == 80
    assert task_work(suite("wikitext2", "task.suite.wikitext2.text=a.txt")["wikitext2"], LLaDASampler()) is None


def test_a_changed_file_is_another_baseline(tmp_path):
    file = tmp_path / "a.txt"
    spec = suite("nano_text", f"task.suite.nano_text.text={file}")["nano_text"]
    results = Results(ArtifactCache(Store(tmp_path / "cache")), {})
    file.write_text("one")
    before = results.key("nano_text", spec)
    shutil.copy(file, tmp_path / "b.txt")
    file.write_text("two")
    assert results.key("nano_text", spec) != before
    shutil.copy(tmp_path / "b.txt", file)
    assert results.key("nano_text", spec) == before
