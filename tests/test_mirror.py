"""The copy in Weights & Biases, read back from the offline file; and everything that may go wrong with it."""

import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from records import record

from dqx import mirror
from dqx.outliers import SITES
from dqx.store import RunFolder


def messages(path, block=32768):
    """The records of a .wandb file: 32 KiB blocks of chunks, each with checksum, length and type."""
    from wandb.proto.wandb_internal_pb2 import Record as Message

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, parts = 7, []
    while position + 7 <= len(data):
        left = block - position % block
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if kind == 0 or position + 7 + length > len(data):
            break
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # whole, or last part
            message = Message()
            message.ParseFromString(b"".join(parts))
            yield message
            parts = []


def read_back(run_folder):
    """Config, summary and history of an offline run, with the run's own message."""
    (path,) = Path(run_folder).glob("run-*.wandb")
    config, summary, history, run = {}, {}, {}, None
    for message in messages(path):
        if message.HasField("run"):
            run = message.run
        for items, into in (
            (message.run.config.update, config),
            (message.config.update, config),
            (message.summary.update, summary),
            (message.history.item, history),
        ):
            for item in items:
                *outer, last = item.nested_key or [item.key]
                place = into
                for key in outer:
                    place = place.setdefault(key, {})
                place[last] = json.loads(item.value_json)
    return config, summary, history, run


def table(run_folder, entry):
    """A logged table as a list of dicts."""
    data = json.loads((Path(run_folder) / "files" / entry["path"]).read_text())
    return [dict(zip(data["columns"], row, strict=True)) for row in data["data"]]


@pytest.fixture(autouse=True)
def logged_out(monkeypatch, tmp_path):
    for name in [n for n in os.environ if n.startswith("WANDB")] + ["NETRC"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def test_offline_run_holds_config_summary_outliers_and_delta(tmp_path):
    run = record()
    run.config["wandb"]["mode"] = "auto"  # no login: offline
    folder = RunFolder(tmp_path / "nano_llada-gptq-w3")
    folder.write(run)
    before = signal.getsignal(signal.SIGTERM)
    status = mirror.log(folder.read(), folder.path, group="sweep-7")
    assert signal.getsignal(signal.SIGTERM) is before
    assert (status["state"], status["mode"], status["url"]) == ("written", "offline", None)
    assert status["folder"].startswith(str(folder.path))

    config, summary, history, started = read_back(status["folder"])
    assert config["cfg"] == run.config
    assert config["choices"] == run.choices
    assert config["checkpoint"]["fingerprint"] == "0123456789abcdef"
    assert (started.project, started.run_group, started.display_name) == ("dqx", "sweep-7", "nano_llada-gptq-w3")
    assert started.host == ""

    assert summary["average_bits"] == 3.15
    assert summary["seconds"] == 2.0
    assert summary["folder"] == str(folder.path)
    for row in run.deltas:
        assert summary[f"accuracy/{row.name}"] == row.quantized
        assert summary[f"delta/{row.name}"] == row.delta
        assert summary[f"delta_low/{row.name}"] == row.low
        assert summary[f"delta_high/{row.name}"] == row.high
        assert summary[f"level/{row.name}"] == row.level

    rows = table(status["folder"], history["deltas"])
    assert [(r["name"], r["delta"], r["lost"]) for r in rows] == [(d.name, d.delta, d.lost) for d in run.deltas]

    rows = table(status["folder"], history["outliers"])
    assert len(rows) == 2 * 2 * len(SITES)
    (planted,) = [r for r in rows if (r["model"], r["block"], r["site"]) == ("quantized", 1, "mlp_in")]
    assert planted["outlier_channels"] == 1
    assert planted["top_channel"] == 3
    assert planted["abs_max"] == run.outliers["quantized"].at(1, "mlp_in").abs_max

    for side, stats in run.outliers.items():
        for site in SITES:
            bars = history[f"log2_abs/{side}/{site}"]
            values = [r for r in stats.rows if r.site == site]
            zeros = sum(r.tokens * r.channels for r in values) - sum(bars["values"])
            assert bars["_type"] == "histogram"
            assert zeros == 0
            assert 2.0 ** bars["bins"][-2] <= max(r.abs_max for r in values) < 2.0 ** bars["bins"][-1]


def test_one_task_is_its_own_average():
    one = record()
    one.deltas = [row for row in one.deltas if row.name == "nano_sums"]
    summary = mirror.summary(one)
    assert summary["delta/average"] == summary["delta/nano_sums"] == -0.5


def test_a_run_of_a_sweep_that_cannot_be(tmp_path):
    status = mirror.skip({"seed": -1}, tmp_path, {"mode": "offline"}, "seed=-1 must be 0 or more")
    config, summary, _, _ = read_back(status["folder"])
    assert config["cfg"] == {"seed": -1}
    assert summary["skipped"] == "seed=-1 must be 0 or more"


def test_without_a_server_the_copy_is_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(mirror, "INIT_TIMEOUT", 1.0)
    run = record(outliers={})
    run.config["wandb"]["mode"] = "auto"
    assert mirror.pick_mode("auto") == "online"
    status = mirror.log(run, tmp_path)
    assert (status["state"], status["mode"], status["url"]) == ("written", "offline", None)
    assert status["message"].startswith("wanted online, but")
    assert read_back(status["folder"])[1]["average_bits"] == 3.15


def test_a_failing_init_is_reported_and_nothing_more(tmp_path, monkeypatch, caplog):
    import wandb

    def fail(**_):
        raise OSError("no space left on device\nsecond line")

    monkeypatch.setattr(wandb, "init", fail)
    run = record()
    run.mirror = mirror.log(run, tmp_path)
    assert run.mirror == {"state": "failed", "message": "OSError: no space left on device"}
    assert "no copy of the run in W&B" in caplog.text
    RunFolder(tmp_path).write(run)
    assert RunFolder(tmp_path).read().mirror == run.mirror


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    status = mirror.log(record(), tmp_path)
    assert status == {"state": "failed", "message": "the package wandb cannot be imported"}


def test_disabled_writes_nothing(tmp_path):
    run = record()
    run.config["wandb"]["mode"] = "disabled"
    assert mirror.log(run, tmp_path) == {"state": "disabled", "mode": "disabled"}
    assert list(tmp_path.iterdir()) == []


def test_unknown_mode_is_no_exception(tmp_path):
    run = record()
    run.config["wandb"]["mode"] = "sometimes"
    assert "wandb.mode=sometimes is unknown" in mirror.log(run, tmp_path)["message"]


def test_login_is_found_where_wandb_keeps_it(tmp_path, monkeypatch):
    assert mirror.pick_mode("auto") == "offline"
    file = tmp_path / "netrc"
    file.write_text("machine api.example.org login user password x\n")
    file.chmod(0o600)
    monkeypatch.setenv("NETRC", str(file))
    assert not mirror.has_login()
    monkeypatch.setenv("WANDB_BASE_URL", "https://api.example.org")
    assert mirror.has_login()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert mirror.pick_mode("auto") == "disabled"
    assert mirror.pick_mode("online") == "online"  # what the config says outright wins
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("NETRC")
    assert not mirror.has_login()
    monkeypatch.setenv("WANDB_API_KEY", "key")
    assert mirror.has_login()


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
    assert mirror.has_login()


CHILD = """
import sys, time
sys.path.insert(0, {tests!r})
from records import record
import wandb
from dqx import mirror
table = wandb.Table
def slow(**settings):
    print("ready", flush=True)
    time.sleep(60)
wandb.Table = slow
mirror.log(record(), {folder!r})
"""


def test_termination_keeps_what_was_written(tmp_path):
    code = CHILD.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    root = str(Path(__file__).parent.parent)
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": root},
    )
    try:
        assert child.stdout.readline().strip() == "ready"
        child.send_signal(signal.SIGTERM)
        assert child.wait(120) == 143
    finally:
        child.kill()
        child.communicate()
    (run_folder,) = tmp_path.glob("wandb/offline-run-*")
    config, summary, _, _ = read_back(run_folder)
    assert config["cfg"]["method"] == {"name": "gptq"}
    assert summary["delta/average"] == record().deltas[-1].delta
