"""The cache: exact keys, no trust in files, each artefact computed once; and the journal of what is not complete."""

from __future__ import annotations

import itertools
import json
import logging
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from records import task_result

from dqx.api import load
from dqx.common.digest import code_version, digest
from dqx.common.files import PACKAGE
from dqx.data.calibration import CalibBatch
from dqx.evaluate.journal import Journal, Line
from dqx.evaluate.results import TaskResult
from dqx.evaluate.spec import TaskSpec
from dqx.study import facts
from dqx.study.cache.artifacts import ArtifactCache
from dqx.study.cache.key import Key
from dqx.study.cache.store import Store
from dqx.study.facts import model_digest
from dqx.study.stages import Results

SPEC = TaskSpec(
    harness="nano_sums",
    category="math",
    kind="generation",
    metric="exact_match",
    gen_length=16,
    block_length=8,
    steps=16,
)
LIKELY = TaskSpec(harness="nano_facts", category="general", kind="likelihood", metric="acc", mc_samples=4)
RESULT = task_result("nano_sums", [1, 0, 1], n_saved=3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint's text files, a data folder, and a place for the cache."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    (tmp_path / "data" / "openai").mkdir(parents=True)
    (tmp_path / "data" / "openai" / "test.jsonl").write_text("{}\n")
    return tmp_path


def model(folder: Path, **changes: Any) -> dict[str, Any]:
    """The facts of a model at full precision, after these changes of its experiment."""
    sections = {
        "outliers": {"gain": 1.0, "channels": 4},
        "mask_token_id": None,
        "chat": False,
        "sampler": {"temperature": 0.0},
    }
    settings = {"seed": 0, "data_root": str(folder / "data"), "task": SimpleNamespace(limit=changes.pop("limit", None))}
    settings |= {key: changes.pop(key) for key in ("seed", "data_root") if key in changes}
    settings |= {"model": SimpleNamespace(**sections | changes.pop("model", {}))}
    here = {"fingerprint": "abc", "dtype": torch.float32, "device": torch.device("cpu")} | changes
    checkpoint = SimpleNamespace(folder=folder / "model")
    experiment: Any = SimpleNamespace(config=SimpleNamespace(**settings), checkpoint=checkpoint, **here)
    return facts.evaluation_facts(experiment)


def results(folder: Path, depends_on: dict[str, Any] | None = None, *, reuse: bool = True, **more: Any) -> Results:
    cache = ArtifactCache(Store(folder / "cache"), reuse=reuse)
    return Results(cache, model(folder) if depends_on is None else depends_on, **more)


def source(cache: Results, name: str = "nano_sums", spec: TaskSpec = SPEC) -> str:
    """Where the result comes from: `computed` or `reused`."""
    result, found = cache.get(name, spec, lambda name, spec, journal: replace(RESULT, name=name))
    assert result == replace(RESULT, name=name)
    return found


# keys


def test_a_result_is_computed_once(folder: Path) -> None:
    assert source(results(folder)) == "computed"
    again = results(folder)
    assert source(again) == "reused"
    assert source(again, "nano_facts", LIKELY) == "computed"
    assert again.cache.store.warnings == []
    assert sorted(p.suffix for p in (folder / "cache" / "results").iterdir()) == [".json", ".json", ".lock", ".lock"]


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "abd"}, {"dtype": torch.bfloat16}, {"seed": 1}, {"limit": 2}, {"data_root": None},
        {"model": {"chat": True}}, {"model": {"mask_token_id": 3}}, {"model": {"sampler": {"temperature": 0.5}}},
        {"model": {"outliers": {"gain": 8.0, "channels": 4}}},
    ],
    ids=str,
)  # fmt: skip
def test_another_setting_is_another_result(folder: Path, change: dict[str, Any]) -> None:
    source(results(folder))
    assert source(results(folder, model(folder, **change))) == "computed"


@pytest.mark.parametrize("change", [{"fewshot": 2}, {"gen_length": 32}, {"metric": "other"}, {"harness": "x"}], ids=str)
def test_another_spec_is_another_result(folder: Path, change: dict[str, Any]) -> None:
    cache = results(folder)
    source(cache)
    assert source(cache, spec=replace(SPEC, **change)) == "computed"


def test_steps_count_where_they_matter(folder: Path) -> None:
    own, same, other = (results(folder, steps=steps) for steps in (None, 16, 8))
    assert source(own) == source(own, "nano_facts", LIKELY) == "computed"
    assert source(same) == "reused"  # the task's own number, said explicitly
    assert source(other) == "computed"
    assert source(other, "nano_facts", LIKELY) == "reused"  # likelihood takes no denoising steps


@pytest.mark.parametrize(
    "file", ["model/tokenizer.json", "model/chat_template.jinja", "data/openai/test.jsonl", "data/new.txt"]
)
def test_changed_files_make_another_result(folder: Path, file: str) -> None:
    source(results(folder))
    (folder / file).write_text("changed")
    assert source(results(folder)) == "computed"


def test_code_version_follows_the_sources_it_is_asked_for(tmp_path: Path) -> None:
    for name in ("models", "quant", "formats", "evaluate/tasks"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "models" / "a.py").write_text("x = 1")
    versions = [(code_version(facts.EVALUATING, tmp_path), code_version(facts.QUANTIZING, tmp_path))]
    for file, text in (
        ("quant/b.py", "y"),
        ("models/a.py", "2"),
        ("evaluate/tasks/t.yaml", "k: v"),
        ("formats/c.py", "1"),
    ):
        (tmp_path / file).write_text(text)
        versions.append((code_version(facts.EVALUATING, tmp_path), code_version(facts.QUANTIZING, tmp_path)))
    evaluating, quantizing = zip(*versions, strict=True)
    assert [a == b for a, b in itertools.pairwise(evaluating)] == [True, False, False, True]
    assert [a == b for a, b in itertools.pairwise(quantizing)] == [False, False, True, False]
    (tmp_path / "quant" / "RESULTS.md").write_text("words")  # and not what is written about them
    assert code_version(facts.QUANTIZING, tmp_path) == quantizing[-1]


def test_sources_that_are_asked_for_exist() -> None:
    assert all((PACKAGE / name).exists() for name in (*facts.EVALUATING, *facts.QUANTIZING, *facts.MEASURING))
    measuring = {path.stem for path in (PACKAGE / "diagnostics/activations").glob("*.py")}
    measuring -= {"__init__", "findings"}
    assert measuring
    assert {f"diagnostics/activations/{name}.py" for name in measuring} < set(facts.MEASURING)


@pytest.mark.parametrize("pair", [("gptq", "w3a16"), ("smoothquant_as_published", "w8a8"), ("quarot", "w4a4")], ids=str)
def test_the_digest_is_of_the_model_as_it_computes(pair: tuple[str, str]) -> None:
    """Equal for equal models; another number, name or setting anywhere makes another digest."""

    def quantized() -> torch.nn.Module:
        lm = load("nano_llada")
        ids = torch.arange(2, 66).view(2, 32)
        lm.quantize(*pair, calib=[CalibBatch(ids, torch.zeros(2))])
        return lm.model

    model, again = quantized(), quantized()
    found = [model_digest(load("nano_llada").model), model_digest(model)]
    assert model_digest(again) == found[1]
    linear = again.blocks[1].q
    linear.weight.data[3, 5] += 1e-3
    found.append(model_digest(again))
    linear.activation_bits = replace(linear.activation_bits, bits=5)
    found.append(model_digest(again))
    again.to(torch.float64)
    found.append(model_digest(again))
    assert len(set(found)) == 5


def test_what_a_quantized_model_depends_on() -> None:
    basics = {"method": {"name": "gptq"}, "bits": {"name": "w3"}, "calib": {"text": "nano"}, "seed": 0}
    basics |= {"calibration": [CalibBatch(torch.arange(8).view(2, 4), torch.zeros(2))]}
    original = {"fingerprint": "abc", "dtype": "float32"}
    found = [digest(facts.quantization_facts(original, **basics))]
    assert digest(facts.quantization_facts(original, **basics)) == found[0]
    for change in (
        {"method": {"name": "rtn"}}, {"bits": {"name": "w4"}}, {"calib": None}, {"seed": 1}, {"calibration": ()},
        {"calibration": [CalibBatch(torch.arange(1, 9).view(2, 4), torch.zeros(2))]},
    ):  # fmt: skip
        found.append(digest(facts.quantization_facts(original, **(basics | change))))
    found.append(digest(facts.quantization_facts(original | {"dtype": "bfloat16"}, **basics)))
    assert len(set(found)) == len(found)


# files


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"score": 1.0', '"score": 0.0'),
        lambda text: text.replace('"seed": 0', '"seed": 7'),
        lambda text: text.replace('"doc_id"', '"id"'),
    ],
    ids=["cut", "empty", "other JSON", "score changed", "facts changed", "key renamed"],
)
def test_a_damaged_result_is_reported_and_not_used(folder: Path, damage: Any) -> None:
    source(results(folder))
    (path,) = (folder / "cache" / "results").glob("*.json")
    whole = path.read_text()
    path.write_text(damage(whole))
    assert path.read_text() != whole
    cache = results(folder)
    assert source(cache) == "computed"
    assert "damaged" in cache.cache.store.warnings[0]
    assert str(path) in cache.cache.store.warnings[0]
    assert source(results(folder)) == "reused"


def test_a_cache_that_cannot_be_written_stops_nothing(folder: Path) -> None:
    (folder / "cache").write_text("a file where the folder should be")
    cache = results(folder)
    assert source(cache) == "computed"
    assert [words in " ".join(cache.cache.store.warnings) for words in ("cannot be locked", "could not be kept")] == [
        True
    ] * 2


def test_results_are_computed_afresh_on_request(folder: Path) -> None:
    source(results(folder))
    cache = results(folder, reuse=False)
    key = cache.key("nano_sums", SPEC)
    cache.cache.store.journal(key).append([Line("nano_sums/0", "", ["old"])])
    found = []
    _result, where = cache.get("nano_sums", SPEC, lambda name, spec, journal: found.append(journal.read()) or RESULT)
    assert (where, found[0].lines) == ("computed", {})
    assert source(results(folder)) == "reused"


# the journal


KEY = Key("results", "task", {"seed": 0})


def journal(folder: Path, rank: int = 0, key: Key = KEY, warnings: list[str] | None = None) -> Journal:
    return Journal(folder / "task-1", key.facts, rank, (warnings if warnings is not None else []).append)


def lines(n: int, start: int = 0) -> list[Line]:
    return [
        Line(f"task/{i}", "t", [[-1 / (i + 3), False], float("-inf"), "a\n\u2028\ud800"], {"n_forwards": 2}, ["note"])
        for i in range(start, start + n)
    ]


def test_what_is_appended_is_read(tmp_path: Path) -> None:
    first = journal(tmp_path)
    assert first.read().lines == {}
    first.append(lines(2))
    first.append(lines(1, start=2))
    second = journal(tmp_path)
    past = second.read()
    assert [line.document for line in past.lines.values()] == ["task/0", "task/1", "task/2"]
    (nats, flag), least, text = past.lines["task/1"].responses
    assert (nats, flag, float(least), text) == (-1 / 4, False, -float("inf"), "a\n\u2028\ud800")
    assert (past.spent["n_forwards"], past.notes) == (6, ["note"])
    second.append(lines(1, start=3))
    assert len(journal(tmp_path).read().lines) == 4
    second.remove()
    assert list(tmp_path.iterdir()) == []


def test_all_processes_are_read_and_the_slowest_counts(tmp_path: Path) -> None:
    for rank, seconds in ((0, 5), (1, 7), (2, 1)):
        one = lines(1, start=rank)
        one[0].spent["nanoseconds"] = seconds
        journal(tmp_path, rank).append(one)
    past = journal(tmp_path, 1).read()
    assert len(past.lines) == 3
    assert past.spent == {"n_forwards": 6, "nanoseconds": 7}


@pytest.mark.parametrize("cut", [1, 2, 20, 60])
def test_a_half_written_line_costs_its_document(tmp_path: Path, cut: int) -> None:
    journal(tmp_path).append(lines(3))
    path = tmp_path / "task-1.journal.0"
    os.truncate(path, path.stat().st_size - cut)
    expected = {"task/0", "task/1"} | ({"task/2"} if cut == 1 else set())  # only the end of its line is missing
    warnings: list[str] = []
    again = journal(tmp_path, warnings=warnings)
    assert again.read().lines.keys() == expected
    assert len(warnings) == (cut > 1)
    again.append(lines(1, start=3))  # goes on in a line of its own
    assert journal(tmp_path).read().lines.keys() == expected | {"task/3"}


def test_a_flipped_byte_costs_one_document_at_most(tmp_path: Path) -> None:
    journal(tmp_path).append(lines(3))
    path = tmp_path / "task-1.journal.0"
    whole = path.read_bytes()
    found = set()
    for at in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[at] ^= 4
        path.write_bytes(damaged)
        found.add(len(journal(tmp_path).read().lines))
    assert found == {2, 3}  # 3: the header alone is damaged, and every line vouches for itself


@pytest.mark.parametrize("facts", [{"seed": 1}, {"seed": 0, "code": "other"}, {"seed": 0, "model": "other"}], ids=str)
def test_journals_of_other_evaluations_are_not_mixed_in(tmp_path: Path, facts: dict[str, Any]) -> None:
    journal(tmp_path, key=Key("results", "task", facts)).append(lines(3))
    path = tmp_path / "task-1.journal.0"
    header, _, rest = path.read_bytes().partition(b"\n")
    path.write_bytes(b"x" + header + b"\n" + rest)
    warnings: list[str] = []
    assert journal(tmp_path, warnings=warnings).read().lines == {}  # without a header that says so: by the checksums
    assert "3 of 3 lines" in warnings[0]
    path.write_bytes(header + b"\n" + rest)
    assert journal(tmp_path, warnings=warnings).read().lines == {}
    assert "other settings" in warnings[1]
    assert not path.exists()
    assert Key("results", "task", facts).path != KEY.path  # in a cache they have places of their own anyway


def test_a_journal_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "task-1.journal.0").mkdir()
    warnings: list[str] = []
    one = journal(tmp_path, warnings=warnings)
    one.append(lines(1))
    one.append(lines(1))
    assert len(warnings) == 1


# one at a time


def hold(folder: Path, started: Any, name: str) -> None:
    """Compute a result in another process, slowly; leave its name."""

    def compute(name: str, spec: TaskSpec, journal: Journal) -> TaskResult:
        started.set()
        journal.append([Line("nano_sums/0", "", [name])])
        with (folder / "computed").open("a") as f:
            f.write("x")
        time.sleep(0.5 if name == "nano_sums" else 600)
        return RESULT

    results(folder).get(name, SPEC, compute)


def test_two_at_the_same_time_compute_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    context = multiprocessing.get_context("fork")
    started = context.Event()
    other = context.Process(target=hold, args=(folder, started, "nano_sums"))
    other.start()
    assert started.wait(30)
    with caplog.at_level(logging.INFO):
        assert source(results(folder)) == "reused"
    assert "another run computes nano_sums, with the same settings: waiting for it" in caplog.text
    other.join()
    assert (folder / "computed").read_text() == "x"


def test_the_lock_of_a_killed_run_is_free_and_its_journal_is_there(folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    started = context.Event()
    other = context.Process(target=hold, args=(folder, started, "endless"))
    other.start()
    assert started.wait(30)
    while not list((folder / "cache").glob("results/*.journal.0")):
        time.sleep(0.01)
    time.sleep(0.1)
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    found = []
    cache = results(folder)
    cache.get("endless", SPEC, lambda name, spec, journal: found.append(journal.read()) or RESULT)
    assert list(found[0].lines) == ["nano_sums/0"]
    assert not list((folder / "cache").glob("results/*.journal.*"))
    stored = json.loads(next((folder / "cache").glob("results/*.json")).read_text())
    assert stored["facts"]["task"]["name"] == "endless"
