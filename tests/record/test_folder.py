"""The run folder: written whole, valid by its schema, readable back."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import torch
import yaml
from conftest import DATA
from records import record

from dqx.common.environment import environment
from dqx.common.files import jsonable, write_json
from dqx.record import folder as store
from dqx.record.collection import runs
from dqx.record.folder import RunFolder


def test_folder_reads_back_equal(tmp_path):
    written = record()
    folder = RunFolder(tmp_path / "run")
    folder.write(written)
    back = folder.read()
    for name in (
        "config",
        "model",
        "quantization",
        "outliers",
        "fidelity",
        "timings",
        "choices",
        "command",
        "created",
        "deltas",
        "mirror",
    ):
        assert getattr(back, name) == getattr(written, name), name
    assert back.full_precision == written.full_precision
    assert back.quantized == written.quantized
    assert back.sources == {
        "full_precision": {"nano_sums": "reused", "group/code": "computed"},
        "quantized": {"nano_sums": "computed", "group/code": "computed"},
    }
    assert sorted(p.name for p in folder.path.rglob("*") if p.is_file()) == [
        "config.yaml", "environment.json", "group-code.jsonl", "nano_sums.jsonl",
        "outliers.json", "quantization.json", "results.json",
    ]  # fmt: skip


def test_activations_are_read_when_asked_for(tmp_path):
    same = torch.rand(24)  # of a method that changed nothing
    tensors = {f"{side}/0/mlp_out/channel_max": same for side in store.SIDES}
    folder = RunFolder(tmp_path)
    folder.write(record(activations=tensors))
    read = folder.read().activations
    assert set(read) == set(tensors)
    assert len(read) == 2
    assert all(read[name].equal(tensor) for name, tensor in tensors.items())
    assert read.get("quantized/1/mlp_out/surface") is None
    folder.write(record())
    assert dict(folder.read().activations) == {}


def test_reading_makes_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no finished run"):
        RunFolder(tmp_path / "nowhere").read()
    assert not list(tmp_path.iterdir())


def test_documents_hold_both_sides(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write(record())
    lines = (tmp_path / "documents" / "nano_sums.jsonl").read_text(encoding="utf-8").strip().split("\n")
    rows = [json.loads(line) for line in lines]
    assert [row["doc_id"] for row in rows] == [f"nano_sums/{i}" for i in range(4)]
    assert rows[1]["full_precision"]["score"] == 1
    assert rows[1]["quantized"] == {
        "score": 0.0,
        "prediction": "line\n1 \u2028 é",
        "answer": None,
        "log_likelihoods": [-1.5, "-Infinity"],
        "forwards": None,
        "tokens": None,
    }


def test_results_fit_their_schema(tmp_path):
    schema = json.loads(store.SCHEMA.read_text())
    checker = jsonschema.Draft202012Validator(schema)
    checker.check_schema(schema)
    bare = record(outliers={}, fidelity={}, quantization={}, command=None)
    old = RunFolder(DATA / "records" / "schema3").read()
    broken = {k: replace(v, value=math.nan) for k, v in record().full_precision.items()}
    mirrored = {"state": "failed", "mode": "online", "folder": None, "url": None, "message": "no network"}
    for i, case in enumerate((record(), bare, record(full_precision=broken), record(mirror=mirrored), old)):
        folder = RunFolder(tmp_path / str(i))
        folder.write(case)
        results = json.loads((folder.path / "results.json").read_text())
        checker.validate(results)
        for key in results:  # the schema is not so wide that anything passes
            assert not checker.is_valid({k: v for k, v in results.items() if k != key}), key
        assert not checker.is_valid(results | {"stranger": 1})
        results["deltas"][0]["level"] = "bad"
        assert not checker.is_valid(results)


def test_numbers_json_lacks_are_never_bare(tmp_path):
    path = tmp_path / "x.json"
    write_json(
        path, {"a": math.nan, "b": [math.inf, -math.inf, 1.5], "c": torch.tensor(2), 3: Path("d/e"), "s": {2, 1}}
    )

    def refuse(name):
        raise AssertionError(name)

    read = json.loads(path.read_text(), parse_constant=refuse)
    assert read == {"a": "NaN", "b": ["Infinity", "-Infinity", 1.5], "c": 2, "3": "d/e", "s": [1, 2]}
    assert math.isnan(float(read["a"]))
    with pytest.raises(TypeError, match="object has no place"):
        jsonable({"x": object()})


def test_half_a_surrogate_pair_survives(tmp_path):
    write_json(tmp_path / "x.json", {"text": "a\udc80b"})
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"text": "a\udc80b"}


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_what_a_run_was_is_written_before_it_works(tmp_path):
    folder = RunFolder(tmp_path / "a" / "b")
    folder.start({"seed": 3, "model": {"name": "x"}}, environment("cpu"))
    assert yaml.safe_load((folder.path / "config.yaml").read_text()) == {"seed": 3, "model": {"name": "x"}}
    with pytest.raises(OSError, match=r"results\.json"):
        folder.read()


def test_another_schema_version_is_refused(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write(record())
    results = json.loads((tmp_path / "results.json").read_text())
    write_json(tmp_path / "results.json", results | {"schema_version": 99})
    with pytest.raises(ValueError, match="schema version 99"):
        folder.read()


@pytest.mark.parametrize("version", store.READABLE)
def test_records_of_every_schema_version_are_read(version):
    """Written by versions of dqx that had them: full precision and 4-bit weights on two documents, shortened."""
    folder = RunFolder(DATA / "records" / f"schema{version}")
    read = folder.read()
    assert json.loads((folder.path / "results.json").read_text())["schema_version"] == version
    assert read.results()["schema_version"] == store.SCHEMA_VERSION
    assert read.deltas[0].level == "< 1 %"  # versions before 5 had words
    assert [read.full_precision["nano_sums"].value, read.quantized["nano_sums"].n] == [1.0, 2]
    assert [row.doc_id for row in read.quantized["nano_sums"].documents] == ["nano_sums/0", "nano_sums/1"]
    assert read.deltas == folder.read(documents=False).deltas  # tests of differences are computed where none were kept
    assert (read.deltas[0].verdict, read.deltas[0].p_adjusted) == ("not distinguishable", 1.0)
    assert read.outliers["quantized"].at(0, "mlp_out").massive_values > 0
    assert bool(read.fidelity) == (version > 1)
    assert ("by_step" in read.fidelity) == (version > 3)
    assert dict(read.activations) == {}
    run = read.settings
    assert (run.model, run.method_label, run.bits, run.seed, run.limit) == ("nano_llada", "rtn", "w4a16", 0, 2)
    assert (run.masking, run.approximations, list(run.tasks)) == ("clean", (), ["nano_sums"])


def test_records_of_all_versions_are_runs_alike():
    """One frame holds them, one row per run and task."""
    read = runs(DATA / "records")
    assert repr(read) == "Runs(6 finished of nano_llada)"
    frame = read.to_pandas()
    assert frame[["model", "method", "bits", "task", "delta"]].drop_duplicates().values.tolist() == [
        ["nano_llada", "rtn", "w4a16", "nano_sums", 0.0]
    ]
    assert list(frame["folder"]) == [str(run.path) for run in read]
    assert "nano_sums" in read._repr_html_()
    assert "rtn w4a16" in repr(read[0].record)
    assert len(read[1:]) == 5


def test_records_are_read_without_torch():
    code = "import sys, dqx.record.collection, dqx.report.command, dqx.report.compare; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_environment_names_versions_and_no_person():
    here = environment("cpu")
    assert here["packages"]["torch"] in (torch.__version__, torch.__version__.split("+")[0])
    text = json.dumps(jsonable(here))
    assert str(Path.home()) not in text
    assert not any(key in text for key in ("API_KEY", "TOKEN", "hostname"))
    assert here["device"] == "cpu"
