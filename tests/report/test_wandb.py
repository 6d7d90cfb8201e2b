"""The copy in Weights & Biases, read back from the offline file; and everything that may go wrong with it."""

import base64
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from records import record
from tiny import SITES
from wandb_offline import messages, read_back
from wandb_server import Server

from dqx.diagnostics.activations import PartStats
from dqx.diffusion.rollout import TOKEN_CLASSES
from dqx.record.folder import RunFolder
from dqx.record.summary import summary
from dqx.report.wandb import command, content, copy_run, login, note_skipped, panels, writing
from dqx.report.wandb.identity import identity


def table(run_folder, entry):
    """A logged table as a list of dicts."""
    data = json.loads((Path(run_folder) / "files" / entry["path"]).read_text())
    return [dict(zip(data["columns"], row, strict=True)) for row in data["data"]]


def along(run_folder, axis):
    """The rows of the history that have a place on an axis."""
    (path,) = Path(run_folder).glob("run-*.wandb")
    rows = [
        {"/".join(item.nested_key or [item.key]): json.loads(item.value_json) for item in message.history.item}
        for message in messages(path)
        if message.HasField("history")
    ]
    return [row for row in rows if axis in row]


def bare():
    """A record of which nothing was measured but the tasks."""
    return record(outliers={}, fidelity={})


def part(block, site, token_class, step=None, mask_ratio=None, abs_max=2.0):
    counts = {
        "outlier_channels": 1,
        "massive_values": 0,
        "massive_tokens": 0,
        "relative_values": 0,
        "relative_tokens": 0,
    }
    numbers = {"tokens": 8, "abs_max": abs_max, "median": 0.5, "p99": 1.0, "p999": 1.5, "kurtosis": 3.0, **counts}
    return PartStats(block, site, token_class, step, mask_ratio, **numbers)


def everything():
    """A record of which every part was measured."""
    run = record(warnings=["nano_sums: one prompt was cut"])
    run.config["wandb"] |= {"mode": "auto", "figures": True}  # no login: offline
    run.memory = {"limit": {}, "peak": {"ram": 1_500_000_000, "gpu": 0}, "stages": {}}
    states = [(0, 1.0), (12, 0.25)]
    parts = [part(block, site, name) for block in (0, 1) for site in SITES for name in TOKEN_CLASSES]
    parts += [part(b, site, "all", s, r, abs_max=3.0 + s + b) for b in (0, 1) for site in SITES for s, r in states]
    run.outliers = {side: replace(stats, parts=parts) for side, stats in run.outliers.items()}
    maps = [f"{side}/{block}/{site}/channel_max" for side in run.outliers for block in (0, 1) for site in SITES]
    run.activations = {name: torch.arange(1.0, 17.0) for name in maps}
    return run


@pytest.fixture(scope="module")
def logged_out(tmp_path_factory):
    """No login to be found, and a user with a name; temporary folders are below their home."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith("WANDB")] + ["NETRC"]:
            patch.delenv(name, raising=False)
        for name in ("USER", "LOGNAME", "USERNAME", "HOSTNAME"):
            patch.setenv(name, "somebody")
        patch.setenv("HOME", str(tmp_path_factory.getbasetemp()))
        yield


@pytest.fixture(autouse=True)
def nobody(logged_out):
    """For every test."""


@pytest.fixture(scope="module")
def copy(logged_out, tmp_path_factory):
    """A run, its folder, and what became of its copy."""
    run, folder = everything(), RunFolder(tmp_path_factory.mktemp("runs") / "nano_llada-gptq-w3")
    folder.write(run)
    return run, folder, copy_run(folder.read(), folder.path, group="sweep-7")


def test_a_copy_is_one_offline_run(copy):
    run, folder, status = copy
    assert (status["state"], status["mode"], status["url"]) == ("written", "offline", None)
    assert status["id"] == identity(run) == identity(folder.read())
    assert Path(status["folder"]).parent == folder.path / "wandb"
    assert Path(status["folder"]).name.endswith(status["id"])
    config, _, _, started = read_back(status["folder"])
    assert started.run_id == status["id"]
    assert config["cfg"] == run.config
    assert config["choices"] == run.choices
    assert config["checkpoint"]["fingerprint"] == "0123456789abcdef"
    assert (started.project, started.run_group, started.display_name) == ("dqx", "sweep-7", "nano_llada-gptq-w3")
    assert sorted(started.tags) == ["gptq", "group/code", "nano_llada", "nano_sums", "w3a16"]


def test_summary(copy):
    run, _, status = copy
    summary = read_back(status["folder"])[1]
    assert summary["average_bits"] == 3.15
    assert summary["seconds"] == 2.0
    assert summary["memory/ram_gb"] == 1.5
    for row in run.deltas:
        assert summary[f"accuracy/{row.name}"] == row.quantized
        assert summary[f"delta/{row.name}"] == row.delta
        assert summary[f"delta_low/{row.name}"] == row.low
        assert summary[f"delta_high/{row.name}"] == row.high
        assert summary[f"level/{row.name}"] == row.level


def test_tables(copy):
    run, _, status = copy
    history = read_back(status["folder"])[2]
    rows = table(status["folder"], history["deltas"])
    assert [(r["name"], r["delta"], r["lost"]) for r in rows] == [(d.name, d.delta, d.lost) for d in run.deltas]
    rows = table(status["folder"], history["outliers"])
    assert len(rows) == 2 * 2 * len(SITES)
    (planted,) = [r for r in rows if (r["model"], r["block"], r["site"]) == ("quantized", 1, "mlp_in")]
    assert planted["outlier_channels"] == 1
    assert planted["top_channel"] == 3
    assert planted["abs_max"] == run.outliers["quantized"].at(1, "mlp_in").abs_max
    assert table(status["folder"], history["fidelity_by_mask_ratio"]) == run.fidelity["by_mask_ratio"]
    assert table(status["folder"], history["fidelity_by_step"]) == run.fidelity["by_step"]
    decibels = {(r["block"], r["step"]): r["sqnr_db"] for r in table(status["folder"], history["sqnr"])}
    assert decibels == {(0, 0): None, (0, 12): 41.5, (1, 0): 18.25, (1, 12): 22.0}
    classes = {r["token_class"] for r in table(status["folder"], history["outliers_by_class"])}
    assert classes == set(TOKEN_CLASSES)
    rows = table(status["folder"], history["outliers_by_step"])
    assert len(rows) == 2 * 2 * len(SITES) * 2
    assert {(r["step"], r["mask_ratio"], r["token_class"]) for r in rows} == {(0, 1.0, "all"), (12, 0.25, "all")}
    assert table(status["folder"], history["warnings"]) == [{"warning": "nano_sums: one prompt was cut"}]


def test_documents_with_both_outputs(copy):
    run, _, status = copy
    rows = table(status["folder"], read_back(status["folder"])[2]["documents"])
    outcomes = [(row["task"], row["outcome"]) for row in rows]
    assert outcomes == [("nano_sums", "lost")] * 2 + [("nano_sums", "same")] * 2 + [
        ("group/code", "lost"),
        ("group/code", "same"),
    ]
    before, after = (
        {row.doc_id: row for row in side["nano_sums"].documents} for side in (run.full_precision, run.quantized)
    )
    for row in rows[:4]:
        first, second = before[row["doc_id"]], after[row["doc_id"]]
        assert (row["full_precision"], row["quantized"]) == (first.prediction, second.prediction)
        assert (row["score_full_precision"], row["score_quantized"]) == (first.score, second.score)


def test_what_changed_comes_first_and_every_run_shows_the_same_documents():
    run = record()
    assert [row[2] for row in content.document_rows(run, 3)] == ["lost", "lost", "same", "lost", "same"]
    assert content.document_rows(run, 0) == []
    same = record(quantized=run.full_precision)
    shown = {row[1] for row in content.document_rows(same, 2)}
    assert shown == {row[1] for row in content.document_rows(record(quantized=run.full_precision), 2)}


def test_figures_are_those_of_the_record(copy):
    status = copy[2]
    history = read_back(status["folder"])[2]
    by = {"divergence_by_step", "divergence_by_mask_ratio", "outliers_by_class", "outliers_by_step"}
    assert logged_figures(status) == {"channel_maxima", "sqnr", *by}
    for entry in (entry for key, entry in history.items() if key.startswith("figures/")):
        assert (entry["_type"], entry["format"]) == ("image-file", "png")
        assert (Path(status["folder"]) / "files" / entry["path"]).read_bytes().startswith(b"\x89PNG")


def logged_figures(status):
    return {key.removeprefix("figures/") for key in read_back(status["folder"])[2] if key.startswith("figures/")}


def test_offline_figures_are_drawn_later(copy, tmp_path):
    """By `dqx mirror`, of which the copy without them speaks; a setting that says so has them at once."""
    run, folder = replace(copy[0], config=copy[0].config | {"wandb": record().config["wandb"]}), RunFolder(tmp_path)
    run.mirror = copy_run(run, tmp_path)
    folder.write(run)
    assert "`dqx mirror`" in run.mirror["message"]
    assert logged_figures(run.mirror) == set()
    mirror = command.again(tmp_path).mirror
    assert mirror == folder.read().mirror
    assert "message" not in mirror
    assert logged_figures(mirror) == logged_figures(copy[2])


def test_a_figure_that_cannot_be_drawn_costs_the_others_nothing(tmp_path, caplog):
    run = record(activations={"nowhere": torch.ones(1)})
    assert copy_run(run, tmp_path, {"figures": True})["state"] == "written"
    assert "no figures in W&B: ValueError: not enough values" in caplog.text


@pytest.mark.parametrize(("group", "sites"), [(None, ["mlp_in", "mlp_out"]), ("a sweep", ["mlp_out"])])
def test_one_run_of_many_has_one_surface(tmp_path, group, sites):
    run = record(fidelity={})
    run.activations = {f"full_precision/1/{site}/surface": torch.ones(12, 16) for site in ("mlp_in", "mlp_out")}
    status = copy_run(run, tmp_path, {"figures": True}, group)
    assert logged_figures(status) == {f"surface_1_{site}" for site in sites}


def test_histograms(copy):
    run, _, status = copy
    history = read_back(status["folder"])[2]
    for side, stats in run.outliers.items():
        for site in SITES:
            bars = history[f"log2_abs/{side}/{site}"]
            values = [r for r in stats.rows if r.site == site]
            zeros = sum(r.tokens * r.channels for r in values) - sum(bars["values"])
            assert bars["_type"] == "histogram"
            assert zeros == 0
            assert 2.0 ** bars["bins"][-2] <= max(r.abs_max for r in values) < 2.0 ** bars["bins"][-1]


def test_series_have_axes_of_their_own(copy):
    run, _, status = copy
    rows = along(status["folder"], "denoising_step")
    assert [row["denoising_step"] for row in rows] == [0, 12]
    assert [row["by_step/divergence"] for row in rows] == [r["divergence"] for r in run.fidelity["by_step"]]
    assert [row["by_step/commit_flips"] for row in rows] == [0.25, 0.0]
    assert [row["by_step/sqnr_db"] for row in rows] == [18.25, 22.0]
    assert [row["by_step/abs_max/quantized/mlp_out"] for row in rows] == [4.0, 16.0]
    rows = along(status["folder"], "mask_ratio")
    assert [(row["mask_ratio"], row["by_mask_ratio/agreement"]) for row in rows] == [(0.1, 0.96875), (0.9, 0.5)]
    rows = along(status["folder"], "block")
    assert [row["by_block/sqnr_db"] for row in rows] == [41.5, 20.125]
    assert rows[1]["by_block/abs_max/quantized/mlp_in"] == run.outliers["quantized"].at(1, "mlp_in").abs_max
    (path,) = Path(status["folder"]).glob("run-*.wandb")
    axes = {m.metric.glob_name: m.metric.step_metric for m in messages(path) if m.HasField("metric")}
    assert (
        axes.items() >= {"by_step/*": "denoising_step", "by_mask_ratio/*": "mask_ratio", "by_block/*": "block"}.items()
    )


def test_nothing_is_lost_until_the_upload(copy):
    """Media and the files of artifacts lie in the run folder, as they were when they were logged."""
    _, folder, status = copy
    (path,) = Path(status["folder"]).glob("run-*.wandb")
    files = [item.path for message in messages(path) for item in message.files.files]
    assert {Path(name).suffix for name in files} >= {".json"}
    assert all((Path(status["folder"]) / "files" / name).is_file() for name in files)
    for entry in read_back(path.parent)[2].values():
        if isinstance(entry, dict) and "sha256" in entry:
            logged = (path.parent / "files" / entry["path"]).read_bytes()
            assert hashlib.sha256(logged).hexdigest() == entry["sha256"]
    artifacts = [message.artifact for message in messages(path) if message.HasField("artifact")]
    assert len(artifacts) == len(content.tables(everything(), 50))
    entries = [entry for artifact in artifacts for entry in artifact.manifest.contents]
    for entry in entries:
        staged = Path(entry.local_path)
        assert staged.is_relative_to(folder.path)
        assert base64.b64encode(hashlib.md5(staged.read_bytes()).digest()).decode() == entry.digest
    left = {path for path in folder.path.glob("wandb/staged-*/**/*") if path.is_file()}
    assert left == {Path(entry.local_path) for entry in entries}  # and nothing that nobody will read
    assert not empty_folders(folder.path)


def empty_folders(folder):
    return [path for path in folder.rglob("*") if path.is_dir() and not any(path.iterdir())]


def test_a_staged_file_is_found_wherever_its_name_stands(tmp_path):
    """Blocks of W&B's file begin with a header, also in the middle of a name."""
    staged = tmp_path / "staged" / "artifacts"
    staged.mkdir(parents=True)
    for name in ("tmpnamed01", "tmpnobody1"):
        (staged / name).write_text("")
    file = tmp_path / "run.wandb"
    content = bytearray(b"x" * 70000)
    content[writing.BLOCK - 4 : writing.BLOCK] = b"tmpn"
    at = writing.BLOCK + writing.BLOCK_HEADER
    content[at : at + 6] = b"amed01"
    file.write_bytes(content)
    writing.remove_unnamed(tmp_path / "staged", file)
    assert [path.name for path in staged.iterdir()] == ["tmpnamed01"]


KEY = "0" * 40  # of nobody


def test_an_upload_later_has_everything(copy):
    """`wandb sync`, to a server that keeps what it is sent."""
    run, _, status = copy
    run_folder = Path(status["folder"])
    program = str(Path(sys.executable).with_name("wandb"))
    with Server() as server:
        login = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
        done = subprocess.run(
            [program, "sync", str(run_folder)], env=os.environ | login, capture_output=True, text=True, cwd=run_folder
        )
    assert done.returncode == 0, done.stderr
    config, _, history, started = read_back(run_folder)
    sent = server.runs[status["id"]]
    assert (sent["groupName"], sent["displayName"], sent["tags"]) == (
        "sweep-7",
        "nano_llada-gptq-w3",
        list(started.tags),
    )
    assert {key: entry["value"] for key, entry in json.loads(sent["config"]).items()}["cfg"] == config["cfg"]
    (text,) = server.lines["wandb-summary.json"].values()
    assert {key: value for key, value in json.loads(text).items() if key in summary(run)} == summary(run)
    rows = [json.loads(line) for _, line in sorted(server.lines["wandb-history.jsonl"].items())]
    assert {key for row in rows for key in row} == history.keys()
    media = [path.relative_to(run_folder / "files") for path in (run_folder / "files" / "media").rglob("*.*")]
    assert {path.suffix for path in media} == {".png", ".json"}
    for path in media:
        assert server.files[f"run/{path}"] == (run_folder / "files" / path).read_bytes()
    assert server.artifacts == {f"run-{status['id']}-{name}" for name in content.tables(run, 50)}
    for name, (columns, rows) in content.tables(run, 50).items():
        sent = json.loads(server.files[f"artifact/run-{status['id']}-{name}/{name}.table.json"])
        assert sent["columns"] == list(columns)
        assert sent["data"] == rows


def test_online_a_run_that_is_started_again_is_written_in_the_place_of_the_first(tmp_path, monkeypatch):
    import wandb

    wandb.teardown()  # or it keeps the address it had
    run = record(outliers={})
    run.config["wandb"] |= {"mode": "auto", "figures": None}
    with Server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        first = copy_run(run, tmp_path / "first")
        lines = dict(server.lines["wandb-history.jsonl"])
        second = copy_run(run, tmp_path / "second")

    wandb.teardown()
    assert (first["state"], first["mode"], "message" in first) == ("written", "online", False)
    assert second["url"] == first["url"] == f"{server.url}/somebody/dqx/runs/{identity(run)}"
    assert list(server.runs) == [identity(run)]
    assert server.runs[identity(run)]["displayName"] == "second"
    assert server.lines["wandb-history.jsonl"].keys() == lines.keys()  # replaced, not appended
    assert any("figures/divergence_by_step" in line for line in lines.values())  # somebody will look
    assert not list(tmp_path.glob("*/wandb/staged-*"))  # uploaded
    assert not empty_folders(tmp_path)


def test_no_names_of_people_or_machines(copy):
    run_folder = Path(copy[2]["folder"])
    (path,) = run_folder.glob("run-*.wandb")
    *read, started = read_back(run_folder)
    assert started.host == ""
    assert not [message for message in messages(path) if message.HasField("environment")]
    assert "somebody" not in json.dumps(read)
    assert not [
        file for file in (run_folder / "files").rglob("*") if file.is_file() and b"somebody" in file.read_bytes()
    ]
    assert content.shown(Path.home() / "runs" / "a") == "~/runs/a"
    assert content.shown(Path("runs/a")) == "runs/a"


def test_the_summary_stays_small(copy):
    """What there is per block and step is no part of it."""
    run = everything()
    few = set(summary(run))
    run.fidelity["by_step"] *= 100
    run.fidelity["layers"] = {"steps": [0], "mask_ratios": [1.0], "sqnr_db": [[1.0]] * 100}
    run.outliers = {side: replace(stats, rows=stats.rows * 16) for side, stats in run.outliers.items()}
    assert set(summary(run)) == few
    written = {key for key in read_back(copy[2]["folder"])[1] if not key.startswith(("_", "figures/"))}
    bars = {f"log2_abs/{side}/{site}" for side in run.outliers for site in SITES}
    assert written - few == {"folder", *content.tables(run, 50), *bars}


def test_who_a_run_is():
    run = record()
    again = record(created="2030-01-01", timings={"load": 9.0}, warnings=["slow"])
    again.config |= {"cache_dir": "elsewhere", "reuse": False}
    again.config["wandb"] = {"mode": "online", "project": "other", "tags": ["x"]}
    assert identity(again) == identity(run)
    for change in (
        {"config": {**run.config, "seed": 1}},
        {"config": {**run.config, "wandb": {"group": "mine"}}},
        {"model": {**run.model, "fingerprint": "f" * 16}},
        {"environment": {**run.environment, "commit": "another"}},
        {"environment": {**run.environment, "device": "a GPU"}},
    ):
        assert identity(record(**change)) != identity(run)


def test_a_second_copy_replaces_the_first(tmp_path):
    """Offline runs cannot be resumed: of several attempts at one W&B run the last complete one stays."""
    run = bare()
    place = tmp_path / "wandb"
    dead = [
        place / f"unfinished-{identity(run)}",
        place / f"staged-{identity(run)}-0",
        place / f"offline-run-1-{identity(run)}",
    ]
    others = [place / "offline-run-1-other", place / "staged-other-0"]
    for path in (*dead, *others):
        path.mkdir(parents=True)
        (path / "torn").write_text("")
    status = copy_run(run, tmp_path)
    assert status["id"] == identity(run)
    assert not any(path.exists() for path in dead)
    assert all(path.exists() for path in others)
    (complete,) = place.glob(f"offline-run-*-{identity(run)}")
    assert str(complete) == status["folder"]
    assert read_back(complete)[1]["average_bits"] == 3.15


def test_a_mirror_is_made_again_from_the_folder(copy, tmp_path, monkeypatch, capsys):
    """By `dqx mirror`, under the id it had, whatever an agent may have set; results.json says what became of it."""
    _, folder, status = copy
    sweep = tmp_path / "sweep"
    again = RunFolder(sweep / "0-run")
    shutil.copytree(folder.path, again.path, ignore=shutil.ignore_patterns("wandb"), dirs_exist_ok=True)
    file = again.path / "config.yaml"
    file.write_text(file.read_text().replace("figures: true", "figures: false"))
    (sweep / "multirun.yaml").write_text("")
    before = json.loads((again.path / "results.json").read_text())
    monkeypatch.setattr(sys, "argv", ["dqx mirror", str(tmp_path), "--project", "paper", "--mode", "offline"])
    monkeypatch.setenv("WANDB_RUN_ID", "another")
    for _ in range(2):
        with pytest.raises(SystemExit) as end:
            command.main()
        assert end.value.code == 0
    assert str(again.path) in capsys.readouterr().out
    (complete,) = again.path.glob("wandb/offline-run-*")
    after = json.loads((again.path / "results.json").read_text())
    assert after.pop("mirror") == {
        "state": "written",
        "mode": "offline",
        "id": status["id"],
        "folder": str(complete),
        "url": None,
    }
    assert after == {key: value for key, value in before.items() if key != "mirror"}
    config, summary, history, started = read_back(complete)
    assert (started.project, started.run_group, started.run_id) == ("paper", "sweep", status["id"])
    first = read_back(status["folder"])
    assert config["choices"] == first[0]["choices"]
    for before, after in ((first[1], summary), (first[2], history)):
        assert after.keys() == {key for key in before if not key.startswith("figures/")}
    assert table(complete, history["documents"]) == table(status["folder"], first[2]["documents"])


def test_a_folder_without_runs_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dqx mirror", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        command.main()
    assert end.value.code == 2
    assert "no finished run below" in capsys.readouterr().err


def test_panels_show_what_is_logged_and_the_readme_lists_them(copy):
    status = copy[2]
    _, summary, history, _ = read_back(status["folder"])
    readme = (Path(panels.__file__).parent / "README.md").read_text()
    for section, shown in panels.SECTIONS.items():
        for panel in shown:
            place = summary if panel.kind in ("scatter", "bars", "table") else history
            assert {*panel.keys, *([panel.x] if panel.x else [])} <= place.keys(), panel
            keys = ", ".join(f"`{key}`" for key in panel.keys)
            assert f"| {section} | {panel.kind} | {keys} | {f'`{panel.x}`' if panel.x else ''} |\n" in readme
    assert readme.count("\n| ") - readme[: readme.index("## The view")].count("\n| ") == 1 + sum(
        map(len, panels.SECTIONS.values())
    )


def test_the_readme_names_what_is_logged(copy):
    """Every key, with SIDE, SITE, NAME, RATIO and STAGE in its places."""
    run, _, status = copy
    _, summary, history, _ = read_back(status["folder"])
    names = re.findall(r"`([^`\n]+)`", (Path(panels.__file__).parent / "README.md").read_text())
    places = {"SIDE": "|".join(run.outliers), "SITE": "|".join(SITES), "STAGE": ".+", "RATIO": r"[\d.]+", "NAME": ".+"}
    patterns = [re.sub("|".join(places), lambda found: f"({places[found[0]]})", re.escape(name)) for name in names]
    keys = {key for key in (*summary, *history) if not key.startswith("_")}
    assert [key for key in keys if not any(re.fullmatch(pattern, key) for pattern in patterns)] == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_view_for_a_team(monkeypatch):
    view = panels.workspace("our-team", "paper")._to_model().model_dump_json(by_alias=True)
    for key in {key for shown in panels.SECTIONS.values() for panel in shown for key in panel.keys}:
        assert f'"{key}"' in view or f'"summary:{key}"' in view
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(ImportError):
        panels.workspace("our-team", "paper")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_view_is_saved(tmp_path, monkeypatch, capsys):
    import wandb

    run = RunFolder(tmp_path / "run")
    run.write(bare())
    monkeypatch.setattr(
        sys, "argv", ["dqx mirror", str(tmp_path), "--mode", "disabled", "--project", "paper", "--workspace"]
    )
    with Server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        wandb.teardown()
        with pytest.raises(SystemExit) as end:
            command.main()
    wandb.teardown()
    assert end.value.code == 0
    (view,) = server.views
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("somebody", "paper", panels.VIEW)
    assert [s["name"] for s in json.loads(view["spec"])["section"]["panelBankConfig"]["sections"]] == list(
        panels.SECTIONS
    )
    assert f"view: {server.url}/somebody/paper" in capsys.readouterr().out


def test_the_quantized_model_is_an_artifact(tmp_path):
    model = tmp_path / "checkpoint"
    model.mkdir()
    (model / "quantized.json").write_text("{}")
    (model / "head.safetensors").write_bytes(b"weights")
    status = copy_run(bare(), tmp_path / "run", checkpoint=model)
    shutil.rmtree(model)
    (path,) = Path(status["folder"]).glob("run-*.wandb")
    (artifact,) = [m.artifact for m in messages(path) if m.HasField("artifact") and m.artifact.type == "model"]
    assert artifact.name == "nano_llada-gptq-w3a16"
    assert json.loads(artifact.metadata)["fingerprint"] == "0123456789abcdef"
    files = {entry.path: Path(entry.local_path).read_bytes() for entry in artifact.manifest.contents}
    assert files == {"quantized.json": b"{}", "head.safetensors": b"weights"}


def test_an_agents_id_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "step0")
    assert copy_run(bare(), tmp_path)["id"] == "step0"


def test_one_task_is_its_own_average():
    one = record()
    one.deltas = [row for row in one.deltas if row.name == "nano_sums"]
    numbers = summary(one)
    assert numbers["delta/average"] == numbers["delta/nano_sums"] == -0.5


def test_a_run_of_a_sweep_that_cannot_be(tmp_path):
    status = note_skipped({"seed": -1}, tmp_path, {"mode": "offline"}, "seed=-1 must be 0 or more")
    config, summary, _, _ = read_back(status["folder"])
    assert config["cfg"] == {"seed": -1}
    assert summary["skipped"] == "seed=-1 must be 0 or more"


def test_without_a_server_the_copy_is_offline(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(writing, "INIT_TIMEOUT", 1.0)
    wandb.teardown()  # or it keeps the address it had
    run = bare()
    run.config["wandb"]["mode"] = "auto"
    assert login.pick_mode("auto") == "online"
    status = copy_run(run, tmp_path)
    assert (status["state"], status["mode"], status["url"]) == ("written", "offline", None)
    assert status["message"].startswith("wanted online, but")
    assert read_back(status["folder"])[1]["average_bits"] == 3.15


def test_a_failing_init_is_reported_and_nothing_more(tmp_path, monkeypatch, caplog):
    import wandb

    def fail(**_):
        raise OSError("no space left on device\nsecond line")

    monkeypatch.setattr(wandb, "init", fail)
    run = record()
    run.mirror = copy_run(run, tmp_path)
    assert run.mirror == {"state": "failed", "message": "OSError: no space left on device"}
    assert "no copy of the run in W&B" in caplog.text
    RunFolder(tmp_path).write(run)
    assert RunFolder(tmp_path).read().mirror == run.mirror


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    status = copy_run(record(), tmp_path)
    assert status == {"state": "failed", "message": "the package wandb cannot be imported"}


def test_disabled_writes_nothing(tmp_path):
    run = record()
    run.config["wandb"]["mode"] = "disabled"
    assert copy_run(run, tmp_path) == {"state": "disabled", "mode": "disabled"}
    assert list(tmp_path.iterdir()) == []


def test_unknown_mode_is_no_exception(tmp_path):
    run = record()
    run.config["wandb"]["mode"] = "sometimes"
    assert "wandb.mode=sometimes is unknown" in copy_run(run, tmp_path)["message"]


def test_login_is_found_where_wandb_keeps_it(tmp_path, monkeypatch):
    assert login.pick_mode("auto") == "offline"
    file = tmp_path / "netrc"
    file.write_text("machine api.example.org login user password x\n")
    file.chmod(0o600)
    monkeypatch.setenv("NETRC", str(file))
    assert not login.has_login()
    monkeypatch.setenv("WANDB_BASE_URL", "https://api.example.org")
    assert login.has_login()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert login.pick_mode("auto") == "disabled"
    assert login.pick_mode("online") == "online"  # what the config says outright wins
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("NETRC")
    assert not login.has_login()
    monkeypatch.setenv("WANDB_API_KEY", "key")
    assert login.has_login()


@pytest.mark.parametrize(
    ("machine", "server"),
    [
        (None, None),  # where `wandb login` of the installed version writes
        ("api.wandb.ai", None),  # where older versions did
        ("localhost:8080", "http://localhost:8080"),
    ],
)
def test_logins_of_every_age_are_found(machine, server, tmp_path, monkeypatch):
    import wandb

    machine = machine or urlsplit(wandb.Settings().base_url).netloc
    file = tmp_path / "netrc"
    file.write_text(f"machine {machine} login user password x\n")
    file.chmod(0o600)
    monkeypatch.setenv("NETRC", str(file))
    if server:
        monkeypatch.setenv("WANDB_BASE_URL", server)
    assert login.has_login()


CHILD = """
import sys, time
sys.path.insert(0, {tests!r})
from records import record
from wandb_server import Server
import wandb
from dqx.report.wandb import copy_run
if sys.argv[1] == "die":
    def log(*_, **__):
        print("ready", flush=True)
        time.sleep(60)
    wandb.Table = log
print(copy_run(record(), {folder!r})["state"])
"""


@pytest.fixture
def no_commit(monkeypatch):
    """Whatever is committed meanwhile: dqx's commit is part of an identity."""
    monkeypatch.setenv("GIT_DIR", "nowhere")


@pytest.mark.slow
@pytest.mark.usefixtures("no_commit")
def test_a_kill_while_it_is_written_leaves_nothing_half(tmp_path):
    code = CHILD.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path))
    root = str(Path(__file__).parents[2])
    others = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}  # of this process
    environment = {**others, "PYTHONPATH": root}

    def start(what):
        return subprocess.Popen(
            [sys.executable, "-c", code, what], stdout=subprocess.PIPE, text=True, cwd=root, env=environment
        )

    child = start("die")
    try:
        assert child.stdout.readline().strip() == "ready"
    finally:
        child.kill()
        child.communicate()
    assert list(tmp_path.glob("wandb/unfinished-*"))
    assert not list(tmp_path.glob("wandb/*run-*"))  # nothing that `wandb sync` would take for a run
    child = start("live")
    assert child.communicate()[0].strip() == "written"
    (run_folder,) = tmp_path.glob("wandb/offline-run-*")
    assert run_folder.name.endswith(identity(record()))
    assert sorted(path.name for path in (tmp_path / "wandb").iterdir()) == sorted(
        [run_folder.name, *(path.name for path in tmp_path.glob("wandb/staged-*"))]
    )
    assert len(list(tmp_path.glob("wandb/staged-*"))) == 1
    config, summary, _, _ = read_back(run_folder)
    assert config["cfg"]["method"] == {"name": "gptq"}
    assert summary["delta/average"] == record().deltas[-1].delta


KILLED = """
import os, runpy, signal
from dqx.evaluate.journal import Journal
append = Journal.append
def once(journal, lines):
    append(journal, lines)
    os.kill(os.getpid(), signal.SIGKILL)
Journal.append = once
runpy.run_path("launch.py", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.usefixtures("no_commit")
def test_a_run_that_was_killed_and_started_again_is_one_run_of_wandb(tmp_path):
    """Killed in its evaluation, started again elsewhere, and once more in its own folder: always the same."""
    small = ["method=rtn", "bits=4", "task=nano_facts", "task.limit=4", "outliers.samples=1", "fidelity.samples=0"]
    small += ["wandb.mode=offline", "wandb.figures=false", f"cache_dir={tmp_path / 'cache'}"]

    def ends(*start, folder):
        place = f"hydra.run.dir={tmp_path / folder}"
        root = Path(__file__).parents[2]
        return subprocess.run([sys.executable, *start, *small, place], cwd=root, stdout=subprocess.DEVNULL).returncode

    assert ends("-c", KILLED, folder="first") == -signal.SIGKILL
    assert list(tmp_path.glob("cache/results/*.journal.*"))
    assert not (tmp_path / "first" / "wandb").exists()
    for folder in ("second", "first"):
        assert ends("launch.py", folder=folder) == 0
    written = [read_back(path) for path in tmp_path.glob("*/wandb/offline-run-*")]
    assert len(written) == 2
    assert {run.run_id for *_, run in written} == {identity(RunFolder(tmp_path / "first").read())}
    assert written[0][1]["accuracy/nano_facts"] == written[1][1]["accuracy/nano_facts"]
