"""One run end to end on the bundled model: what is computed, what is reused, what is left behind."""

import json
import subprocess
import sys

import pytest
import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir

from dqx.config.compose import compose, resolve
from dqx.config.origin import Origin
from dqx.config.schema import CONF_DIR
from dqx.quant import fused
from dqx.quant.backends.choice import untrusted
from dqx.record.folder import RunFolder
from dqx.study.run import run

SMALL = [
    "task.limit=2",
    "calib.samples=2",
    "calib.length=64",
    "outliers.samples=2",
    "outliers.steps=2",
    "fidelity.samples=1",
]


@pytest.fixture
def launch(tmp_path):
    """Run with these overrides into a fresh folder below tmp_path; returns the record and its folder."""

    def start(name, *overrides):
        config = resolve(compose([*SMALL, f"cache_dir={tmp_path / 'cache'}", "wandb.mode=disabled", *overrides]))
        return run(config, tmp_path / name), tmp_path / name

    return start


def test_a_run_leaves_its_whole_record(launch, capsys):
    record, folder = launch("run", "method=gptq", "bits=3")
    assert {p.name for p in folder.iterdir()} >= {
        "config.yaml",
        "environment.json",
        "results.json",
        "outliers.json",
        "quantization.json",
        "documents",
    }
    assert {p.stem for p in (folder / "documents").iterdir()} == {"nano_facts", "nano_sums", "nano_code"}
    again = RunFolder(folder).read()
    assert again.results() == json.loads((folder / "results.json").read_text())
    assert {row.name for row in record.deltas if row.kind == "task"} == {"nano_facts", "nano_sums", "nano_code"}
    assert record.outliers["full_precision"].at(0, "attn_in").abs_max > 0
    assert 3 < record.average_bits < 4
    table = capsys.readouterr().out
    for words in ("nano_llada, gptq w3a16", "nano_facts", "95 % interval", "mlp_out", "Record:"):
        assert words in table


def test_outliers_need_not_be_measured(launch, capsys):
    record, folder = launch("run", "method=rtn", "task=nano_facts", "outliers.samples=0")
    assert record.outliers == {}
    assert RunFolder(folder).read().results() == record.results()
    assert "attn_in" not in capsys.readouterr().out


def test_results_that_cannot_be_written_are_printed(launch, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "documents").touch()  # where a folder should go
    with pytest.raises(OSError, match="documents"):
        launch("run", "method=rtn", "task=nano_facts")
    assert "nano_facts" in capsys.readouterr().out


def test_the_baseline_is_computed_once(launch):
    first, _ = launch("first", "method=rtn", "bits=4")
    second, _ = launch("second", "method=rtn", "bits=2")
    assert set(first.sources["full_precision"].values()) == {"computed"}
    assert set(second.sources["full_precision"].values()) == {"reused"}
    assert set(second.sources["quantized"].values()) == {"computed"}
    assert second.full_precision == first.full_precision


def test_another_seed_or_limit_has_a_baseline_of_its_own(launch):
    launch("first", "method=rtn", "bits=4", "task=nano_facts")
    assert launch("seed", "method=rtn", "bits=4", "task=nano_facts", "seed=1")[0].sources["full_precision"] == {
        "nano_facts": "computed"
    }
    assert launch("limit", "method=rtn", "bits=4", "task=nano_facts", "task.limit=3")[0].sources["full_precision"] == {
        "nano_facts": "computed"
    }


def test_fp16_changes_nothing_and_says_so(launch):
    record, _ = launch("run", "method=fp16")
    assert all(row.delta == 0 and row.lost == row.gained == 0 for row in record.deltas)
    assert record.average_bits == 16
    assert record.quantized == record.full_precision


def test_auto_multiplies_codes_where_a_kernel_can(launch):
    """What the record says of it, that what is kept is the simulation, and that results are not taken for its."""
    said = ("method=rtn", "bits=w8a8", "bits.overrides.down.weight=4", "task=nano_facts")
    simulated, _ = launch("simulated", *said)
    record, folder = launch("auto", *said, "backend=auto")
    n = 18 if untrusted("int8", torch.device("cpu")) is None else 0
    assert record.quantization["kernels"] == ({"int8": n, "simulated": 3} if n else {"simulated": 21})
    kernels = {row["role"]: row["kernel"] for row in record.quantization["linears"]}
    assert (kernels["q"], kernels["down"]) == ("int8" if n else "simulated", "simulated")
    assert f"backend=auto: {21 - n} of 21 linears are simulated" in " ".join(record.warnings)
    assert set(record.sources["quantized"].values()) == ({"computed"} if n else {"reused"})
    assert simulated.quantization["kernels"] == {"simulated": 21}
    assert RunFolder(folder).read().results() == record.results()
    again, _ = launch("again", *said, "backend=auto")
    assert set(again.sources["quantized"].values()) == {"reused"}


def test_the_same_configuration_gives_the_same_results(launch):
    first, _ = launch("first", "method=gptq", "bits=2", "task=nano_facts")
    second, _ = launch("second", "method=gptq", "bits=2", "task=nano_facts")
    for name, result in first.quantized.items():
        assert [r.to_dict() for r in result.documents] == [r.to_dict() for r in second.quantized[name].documents]
    assert [row["weight_error"] for row in first.quantization["linears"]] == [
        row["weight_error"] for row in second.quantization["linears"]
    ]


def test_planted_outliers_reach_the_record_and_no_answer(launch):
    plain, _ = launch("plain", "method=fp16", "task=nano_facts")
    planted, _ = launch("planted", "method=fp16", "task=nano_facts", "model.outliers.gain=64")
    assert planted.sources["full_precision"] == {"nano_facts": "computed"}
    before, after = plain.outliers["full_precision"], planted.outliers["full_precision"]
    assert after.at(1, "attn_in").outlier_channels >= before.at(1, "attn_in").outlier_channels + 4
    for old, new in zip(
        plain.full_precision["nano_facts"].documents, planted.full_precision["nano_facts"].documents, strict=True
    ):
        assert new.log_likelihoods == pytest.approx(old.log_likelihoods, abs=1e-3)


@pytest.mark.slow  # compiles
@pytest.mark.skipif(fused.missing(torch.device("cpu")) is not None, reason="no C++ compiler")
def test_activations_rounded_by_one_kernel_change_no_result(launch):
    how = ("method=smoothquant", "bits=w8a8", "task=nano_facts", "reuse=false")
    (plain, _), (ours, _) = launch("plain", *how), launch("ours", *how, "model.fused=true")
    assert plain.environment["fused"] == []
    assert ours.environment["fused"] == ["int, 8 bits, float32: one kernel, as the plain ones"]
    assert ours.quantized["nano_facts"].documents == plain.quantized["nano_facts"].documents
    assert [row.delta for row in ours.deltas] == [row.delta for row in plain.deltas]


def test_the_command_to_repeat_a_run_has_a_teams_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DQX_CONFIG_PATH", "our configs")
    monkeypatch.setattr(sys, "argv", ["launch.py"])
    overrides = ["method=rtn", "bits=w4", f"hydra.searchpath=[{tmp_path}]", "hydra.mode=MULTIRUN"]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        hydra = hydra_compose("config", overrides, return_hydra_config=True)
    expected = f"DQX_CONFIG_PATH='our configs' python launch.py 'hydra.searchpath=[{tmp_path}]' method=rtn bits=4"
    origin = Origin.of(hydra.hydra)
    assert origin.command == expected  # bits=4 as it was typed
    hydra.hydra.runtime.cwd = "/home/me/my runs"
    monkeypatch.setattr(sys, "argv", ["../dqx/launch.py"])
    again = expected.replace("python launch.py", "python ../dqx/launch.py")
    assert Origin.of(hydra.hydra).again == f"cd '/home/me/my runs' && {again}"


@pytest.mark.slow
def test_the_default_run_from_the_command_line(tmp_path):
    """`python launch.py` as the README says, in full: accuracies of the bundled model and time to spare."""
    import subprocess

    done = subprocess.run(
        [sys.executable, "launch.py", f"cache_dir={tmp_path / 'cache'}", f"hydra.run.dir={tmp_path / 'run'}"],
        cwd=CONF_DIR.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    tasks = json.loads((tmp_path / "run" / "results.json").read_text())["tasks"]
    assert all(task["full_precision"]["value"] >= 0.9 for task in tasks.values()), tasks


def test_a_sweep_from_the_command_line(tmp_path):
    """Two methods in one command: one baseline, two records, a line each, one closing table, exit code 0."""
    done = subprocess.run(
        [
            *(sys.executable, "launch.py", "-m", "method=rtn,duquant", "bits=4", "task=nano_sums", *SMALL),
            *("wandb.mode=disabled", f"cache_dir={tmp_path / 'cache'}", f"hydra.sweep.dir={tmp_path / 'sweep'}"),
        ],
        cwd=CONF_DIR.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    folders = sorted(path.parent.name for path in (tmp_path / "sweep").glob("*/results.json"))
    assert folders == ["0-nano_llada-rtn-w4a16", "1-nano_llada-duquant-w4a4"]
    assert len(list((tmp_path / "cache").glob("results/*.json"))) == 3  # of full precision, and of each width
    lines = done.stdout.splitlines()
    assert [line.partition(": ")[0] for line in lines[:2]] == folders
    assert lines[2] == ""
    closing = "\n".join(lines[3:])
    assert all(words in closing for words in ("nano_llada", "rtn w4a16", "duquant w4a4", "95 % interval"))
    widths = "bits=4 means w4a16 for rtn, w4a4 for duquant; bits=w4a16 means the same for all."
    assert widths in " ".join(closing.split())
    assert widths in done.stderr.splitlines()[0]  # before the first run
    assert closing.endswith(f"Runs:    2 finished\nRecords: {tmp_path / 'sweep'}")
    assert max(len(line) for line in lines if str(tmp_path) not in line and not line.startswith("Note")) <= 80
    rows = (tmp_path / "sweep" / folders[1] / "documents" / "nano_sums.jsonl").read_text().splitlines()
    side = json.loads(rows[0])["full_precision"]
    assert side["answer"] in side["prediction"]
