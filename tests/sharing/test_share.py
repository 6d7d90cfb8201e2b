"""Runs handed on: the file, what is not in it, what is refused, and a configuration that survives the way."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import records
import torch
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir

from dqx.__main__ import main
from dqx.common.files import jsonable
from dqx.config.command_line import normalize
from dqx.config.compose import compose, resolve
from dqx.config.schema import CONF_DIR, PLACES, Config, ConfigProblems, choices
from dqx.record.folder import RunFolder
from dqx.sharing import bundle
from dqx.sharing.against import Against, environment_differences, other_predictions, results_differences
from dqx.sharing.fingerprints import data_fingerprints
from dqx.sharing.private import Cleaner
from dqx.sharing.replay import NAME, own_cache, replayed
from dqx.sharing.share import contents, share

ROOT = CONF_DIR.parent
SMALL = ("task=nano_facts", "task.limit=2", "outliers.samples=0", "fidelity.samples=0", "wandb.mode=disabled")


def record_of(config: Config, **more: Any) -> Any:
    return records.record(config=jsonable(asdict(config)), **more)


def bundled(folder: Path, config: Config, **more: Any) -> Path:
    members, facts, _ = contents(record_of(config, **more))
    bundle.write(folder / "a.dqx.zip", facts, members)
    return folder / "a.dqx.zip"


def again(path: Path, *overrides: str) -> Config:
    """The configuration that `launch.py --from PATH OVERRIDES` runs."""
    name, *rest = replayed([f"--from={path}", *overrides])
    assert name == f"--config-name={NAME}"
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return resolve(hydra_compose(NAME, overrides=rest))


def settings(config: Config) -> dict[str, Any]:
    return {key: value for key, value in asdict(config).items() if key not in PLACES}


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}
    )


# ---- configurations survive ----------------------------------------------------------------------------------

COMPOSITIONS = [
    *([f"method={method}"] for method in choices("method") if method != "fp16"),
    *([f"bits={bits}"] for bits in ("2", "w4a4", "fp8", "mxfp4_w4a16", "nvfp4", "w8a8")),
    *([f"model={model}"] for model in choices("model")),
    *([f"calib={calib}"] for calib in choices("calib")),
    ["method=fp16", "task=qdlm", "steps=64", "calib.text=pile", "seed=7"],
    ["method=quarot", "method.rounding=gptaq", "bits=w4a4", "bits.overrides.down.weight=8", "task=gsm8k,wikitext2"],
    ["bits=w4a16", "bits.blocks.b0-1.weight=8", "bits.blocks.b2.down.weight=3"],
    ["model.sampler.threshold=0.9", "+method.transforms.x=smooth", "method.clip=weight_mse", "steps=48"],
    ["experiment=qdlm_table1", "hydra/launcher=local_gpus"],
]


@pytest.mark.parametrize("overrides", COMPOSITIONS, ids=" ".join)
def test_a_configuration_survives(tmp_path: Path, overrides: list[str]) -> None:
    config = resolve(compose(overrides))
    found = again(bundled(tmp_path, config))
    assert settings(found) == settings(config)
    assert list(found.method.transforms) == list(config.method.transforms)  # their order is a setting


def test_a_teams_choices_survive_without_its_folder(tmp_path: Path) -> None:
    team = tmp_path / "team"
    for group, text in {
        "method": "defaults: [gptq]\nname: ours\nrounding: {damping: 0.02}\n",
        "bits": "defaults: [w3]\nweight: {group_size: 64}\n",
        "experiment": "# @package _global_\ndefaults: [{override /method: ours}, {override /bits: ours}]\nseed: 5\n",
    }.items():
        (team / group).mkdir(parents=True)
        (team / group / "ours.yaml").write_text(text)
    config = resolve(compose([f"hydra.searchpath=[file://{team}]", "experiment=ours"]))
    assert (config.method.name, config.bits.weight.group_size, config.seed) == ("ours", 64, 5)
    path = bundled(tmp_path, config)
    (team / "method" / "ours.yaml").unlink()
    assert settings(again(path)) == settings(config)


def test_single_settings_can_be_changed_and_names_follow(tmp_path: Path) -> None:
    path = bundled(tmp_path, resolve(compose(["bits=3"])))
    changed = again(path, "bits.weight.bits=4", "seed=2")
    assert (changed.bits.name, changed.seed, changed.bundle) == ("w4a16", 2, str(path))


@pytest.mark.parametrize("choice", ["bits=w4a4", "+method=awq", "method/rounding=gptaq", "experiment=quick", "~task"])
def test_choices_are_refused(tmp_path: Path, choice: str) -> None:
    path = bundled(tmp_path, resolve(compose([])))
    with pytest.raises(ConfigProblems, match=r"a shared run's choices are fixed.*python launch.py method=gptq bits=3"):
        replayed(["--from", str(path), choice])


def test_interpolations_in_values_stay_text(tmp_path: Path) -> None:
    config = resolve(compose([]))
    config.task.suite["nano_sums"].filter = "${not} one"
    assert again(bundled(tmp_path, config)).task.suite["nano_sums"].filter == "${not} one"


# ---- what is in a bundle, and what is not --------------------------------------------------------------------


def test_nothing_local_is_in_it(tmp_path: Path) -> None:
    config = resolve(compose(["data_root=/mnt/fast/data", "model.path=/home/someone/llada", "wandb.entity=our-team"]))
    config.calib.text = "my/own/text.txt"
    command = (
        "DQX_CONFIG_PATH='/our team/conf' python launch.py --config-dir=/our/conf data_root=/mnt/fast/data "
        "wandb.entity=our-team cache_dir=/scratch/x 'model.path=/home/someone/llada' method=rtn"
    )
    record = record_of(
        config,
        command=command,
        warnings=["/scratch/x/results/a.json could not be read", "4 tokens /s in nats/token"],
        mirror={"state": "written", "mode": "online", "url": "https://wandb.ai/our-team/dqx/1"},
        model={"name": "m", "fingerprint": "0", "path": "/home/someone/llada"},
    )
    members, facts, told = contents(record, documents=True)
    everything = json.dumps(facts) + "".join(content.decode() for content in members.values())
    for private in ("/mnt", "someone", "our-team", "our team", "/our", "scratch", "my/own"):
        assert private not in everything
    assert facts["give_anew"] == ["calib.text", "data_root", "model.path"]
    results = json.loads(members["results.json"])
    assert results["command"] == (
        "python launch.py --config-dir=<path> data_root=<data_root> model.path=<model.path> method=rtn"
    )
    assert results["warnings"] == ["<path> could not be read", "4 tokens /s in nats/token"]
    assert "data_root was local and is <data_root> in the bundle: it must be given anew" in told
    assert any("<path>" in line for line in told)


def test_nothing_of_a_path_with_odd_characters_is_left_in_the_command() -> None:
    path = "/home/someone/it's (my) llada=größe"
    typed = [f"model.path={path}", "cache_dir=/scratch/my (own)/x", "bits=w4a16", "hydra.searchpath=[]"]
    command = shlex.join(["python", "launch.py", *normalize(typed)])
    assert "\\" in command  # the path is in quotes of Hydra's, inside of those of the shell
    cleaned = Cleaner({"model.path": path}).command(command)
    assert cleaned == "python launch.py model.path=<model.path> bits=w4a16 'hydra.searchpath=[]'"
    assert Cleaner({"model.path": path}).command(shlex.join(["python", "launch.py", *typed])) == cleaned


def test_what_must_be_given_anew_is_asked_for_at_once(tmp_path: Path) -> None:
    config = resolve(compose(["data_root=../data", "model.path=/home/someone/llada"]))
    path = bundled(tmp_path, config)
    with pytest.raises(ConfigProblems, match=r"data_root=FOLDER_WITH_THE_DATASET_COPIES model.path=FOLDER_OR_HUB_ID"):
        replayed(["--from", str(path)])
    found = again(path, "data_root=elsewhere", "model.path=a/b")
    assert settings(found) == settings(config) | {"data_root": "elsewhere", "model": settings(found)["model"]}


def test_activations_stay_behind(tmp_path: Path) -> None:
    run = records.record(activations={"quantized/0/mlp_out/channel_max": torch.ones(4)})
    members = contents(run)[0]
    bundle.write(tmp_path / "a.zip", {}, members)
    read = RunFolder(bundle.read(tmp_path / "a.zip").unpack(tmp_path / "unpacked")).read()
    assert (dict(read.activations), read.fidelity) == ({}, run.fidelity)


def test_texts_of_documents_are_optional(tmp_path: Path) -> None:
    run = records.record()
    hidden, shown = (contents(run, documents=texts)[0] for texts in (False, True))
    assert "line" not in hidden["documents/nano_sums.jsonl"].decode()
    assert "line" in shown["documents/nano_sums.jsonl"].decode()
    for members in (hidden, shown):  # either way it is known which predictions are identical
        bundle.write(tmp_path / "a.zip", {}, members)
        read = RunFolder(bundle.read(tmp_path / "a.zip").unpack(tmp_path / str(len(members["config.yaml"])))).read()
        assert other_predictions(read.quantized["nano_sums"], run.quantized["nano_sums"]) == 0


def test_equal_runs_make_equal_files(tmp_path: Path) -> None:
    run = records.record()
    RunFolder(tmp_path / "run").write(run)
    for name in ("a", "b"):
        share(tmp_path / "run", tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    text = zipfile.ZipFile(tmp_path / "a").read("REPORT.md").decode()
    assert "| `gptq` | " in text
    with pytest.raises(ValueError, match="holds no finished run"):
        share(tmp_path)


def test_names_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "bigbox")
    monkeypatch.setattr("getpass.getuser", lambda: "someone")
    cleaner = Cleaner({"data_root": "/data"})
    assert cleaner.text("bigbox: someone read /data/a and ~/b, not bigboxes") == (
        "<host>: <user> read <data_root>/a and <path>, not bigboxes"
    )
    assert cleaner.taken == {"<host>", "<user>", "<data_root>", "<path>"}


def test_data_are_known_by_content(tmp_path: Path) -> None:
    def config(text: Path) -> dict[str, Any]:
        return {"data_root": None, "calib": {"text": str(text)}, "task": {"suite": {}}}

    for name, content in (("a.txt", "x"), ("b.txt", "x"), ("c.txt", "y")):
        (tmp_path / name).write_text(content)
    a, b, c, gone = (data_fingerprints(config(tmp_path / f"{name}.txt")) for name in "abcd")
    assert a == b != c
    assert gone == {}
    benchmark = jsonable(asdict(resolve(compose(["task=gsm8k", f"data_root={ROOT / 'tests' / 'data'}"]))))
    assert set(data_fingerprints(benchmark)) >= {"gsm8k"}


# ---- what is refused -----------------------------------------------------------------------------------------


def rewritten(path: Path, **changes: bytes | None) -> Path:
    """The bundle with members replaced or, with null, left out."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()} | changes
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            if content is not None:
                archive.writestr(name, content)
    return path


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"config.yaml": b"seed: 1"}, "config.yaml is damaged"),
        ({"config.yaml": None}, "its members are not those it lists: config.yaml"),
        ({"bundle.json": None}, "a zip file without bundle.json"),
        ({"bundle.json": b"[]"}, "does not say that this is a dqx bundle"),
        ({"bundle.json": b'{"format": "dqx bundle", "schema_version": 9}'}, "schema version 9"),
        ({"../evil.yaml": b""}, r"'../evil.yaml', which has no place"),
        ({"documents/../../evil.jsonl": b""}, "which has no place"),
        ({"code.py": b""}, "'code.py', which has no place"),
    ],
)
def test_damaged_and_foreign_bundles(tmp_path: Path, changes: dict[str, bytes | None], reason: str) -> None:
    path = rewritten(bundled(tmp_path, resolve(compose([]))), **changes)
    with pytest.raises(ConfigProblems, match=reason):
        replayed(["--from", str(path)])


def disguised(path: Path, **changes: bytes) -> Path:
    """The bundle with members replaced and their checksums made to fit, as whoever means harm would."""
    shared = bundle.read(path)
    bundle.write(path, shared.manifest, shared.members | changes)
    return path


def configuration(changed: str) -> bytes:
    """A bundle's config.yaml, ours but for some lines."""
    return yaml.safe_dump(jsonable(asdict(resolve(compose([]))))).encode() + changed.encode()


@pytest.mark.parametrize(
    ("yaml_text", "reason"),
    [
        (b"a: &x [1, 1]\nb: [*x, *x]\nbits: {}", "anchors or tags"),
        (b"bits: !!python/object/apply:os.system ['true']", "anchors or tags"),
        (b"bits: " + b"[" * 100 + b"]" * 100, "nested deeper than"),
        (b"bits: " + b"1:" * 100_000 + b"1", "a number of 200001 digits"),
        (b"bits: {} \x00", "is no YAML"),
        (b"- bits", "no configuration of a run"),
        (configuration("defaults: [{model: llada_8b_base}]\n"), "sets defaults, which is no setting"),
        (configuration("hydra: {searchpath: ['/tmp']}\n"), "sets hydra, which is no setting"),
        (b"bits: {}\n" + b"x: y\n" * 2_000_000, "config.yaml is larger than in any bundle"),
    ],
)
def test_yaml_that_means_harm(tmp_path: Path, yaml_text: bytes, reason: str) -> None:
    path = disguised(bundled(tmp_path, resolve(compose([]))), **{"config.yaml": yaml_text})
    with pytest.raises(ConfigProblems, match=reason):
        replayed(["--from", str(path)])


@pytest.mark.parametrize(
    ("manifest", "reason"),
    [
        ({"give_anew": 7}, "give_anew is no list of settings"),
        ({"give_anew": ["a b; rm"]}, "give_anew is no list of settings"),
        ({"data": {"gsm8k": [1]}}, "data has no fingerprints"),
    ],
)
def test_manifests_of_other_types(tmp_path: Path, manifest: dict[str, Any], reason: str) -> None:
    path = bundled(tmp_path, resolve(compose([])))
    shared = bundle.read(path)
    bundle.write(path, shared.manifest | manifest, shared.members)
    with pytest.raises(ConfigProblems, match=reason):
        replayed(["--from", str(path)])


def test_a_bundle_sets_neither_places_nor_the_environment_nor_trust(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_KEY", "1234")
    config = resolve(compose([]))
    config.cache_dir, config.cache_max_gb = "/home/someone", 0.0
    config.wandb.entity, config.wandb.project = "them", "theirs"
    secret = config.task.suite["nano_sums"]
    secret.filter = "\\${oc.env:SECRET_KEY}"
    members, facts, _ = contents(record_of(config))
    members["config.yaml"] = yaml.safe_dump(jsonable(asdict(config))).encode()
    bundle.write(tmp_path / "a.dqx.zip", facts, members)
    read, ours = again(tmp_path / "a.dqx.zip"), resolve(compose([]))
    assert (read.cache_max_gb, read.wandb) == (ours.cache_max_gb, ours.wandb)
    assert read.cache_dir == own_cache(tmp_path / "a.dqx.zip")
    assert read.task.suite["nano_sums"].filter == secret.filter


def test_parts_of_others_are_asked_for(tmp_path: Path) -> None:
    path = disguised(bundled(tmp_path, resolve(compose([]))), **{"config.yaml": configuration("parts: [their.code]\n")})
    with pytest.raises(ConfigProblems, match=r"parts of their.code, .* trust it, add 'parts=\[their.code\]'"):
        replayed(["--from", str(path)])
    assert again(path, "parts=[ours]").parts == ["ours"]


def test_bombs_and_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bundled(tmp_path, resolve(compose([])))
    content = path.read_bytes()
    monkeypatch.setattr(bundle, "LARGEST", 1000)
    with pytest.raises(bundle.BundleError, match="larger than any bundle"):
        bundle.read(path)
    monkeypatch.undo()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(bundle.BundleError, match="no zip file, or damaged"):
        bundle.read(path)
    with pytest.raises(bundle.BundleError, match="does not exist"):
        bundle.read(tmp_path / "nothing")
    with pytest.raises(bundle.BundleError, match="it is a folder; `dqx share"):
        bundle.read(tmp_path)
    for arguments in (["--from"], ["--from=a", "--from=b"]):
        with pytest.raises(ConfigProblems, match="--from"):
            replayed(arguments)
    assert replayed(["bits=w3"]) == ["bits=w3"]


# ---- against the bundle --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("there", "here"), [("0123", "0123"), ("0123", "4567"), ("0123", None), (None, "4567")])
def test_another_calibration_text_is_told(tmp_path: Path, there: str | None, here: str | None) -> None:
    """By the tokens of its windows: two machines may have files of one name."""
    config = resolve(compose([]))
    path = bundled(tmp_path, config, calibration_text=there)
    told = [line for line in Against(str(path), config, "abc", {}, here).before if line.startswith("calibration text")]
    differs = there is not None and there != here
    expected = f"calibration text: fingerprint 0123 there, {here or 'none read'} here: other tokens"
    assert told == ([expected] if differs else [])


def test_every_difference_of_the_environment() -> None:
    there = {"packages": {"torch": "2.11"}, "commit": "a-changed", "device": "cuda", "capability": "sm_90"}
    here = {"packages": {"torch": "2.13"}, "commit": "a", "device": "cuda", "capability": "sm_75", "processes": 2}
    here |= {"bf16": "emulated", "determinism": {"threads": 2}, "wandb": {"login": True}, "memory": {"ram": 8}}
    assert list(environment_differences(there, here, "bfloat16")) == [
        "torch: 2.11 there, 2.13 here",
        "commit: a-changed there, a here",
        "capability: sm_90 there, sm_75 here",
        "processes: not recorded there, 2 here",
        "commit: the sources of dqx had been changed there; those changes are not in the bundle",
        "bfloat16: this device (sm_75) has no arithmetic in it and emulates it",
    ]
    there = {"determinism": {"threads": 1}, "wandb": {"login": False}}
    here = {"determinism": {"threads": 2}, "wandb": {"login": True}}
    assert list(environment_differences(there, here, "bfloat16")) == ["determinism.threads: 1 there, 2 here"]


def test_how_results_compare() -> None:
    there = records.record()
    rows = there.quantized["nano_sums"].documents
    moved = replace(rows[0], score=0.0, prediction="something else")
    sums = replace(there.quantized["nano_sums"], documents=[moved, *rows[1:]], value=0.0)
    here = records.record(quantized=there.quantized | {"nano_sums": sums})
    lines = list(results_differences(there, here))
    assert lines[0].startswith("nano_sums, full precision: all 4 predictions are identical")
    assert lines[2].startswith("nano_sums, quantized: 1 of 4 predictions differ, 25.0 there, 0.0 here, -25.0 [")


def test_a_replay_computes_what_it_compares(tmp_path: Path) -> None:
    """Its cache is its own, by the bundle's content; where another one was set, the comparison says what was reused."""
    path = bundled(tmp_path, resolve(compose(["method=rtn"])))
    own = again(path).cache_dir
    assert re.fullmatch(r"runs/replays/a-[0-9a-f]{8}", own)
    assert again(path, "cache_dir=elsewhere").cache_dir == "elsewhere"
    path.write_bytes(path.read_bytes() + b"\0" * 22)
    assert own_cache(path) != own
    there = records.record()
    reused = {"full_precision": {"nano_sums": "reused"}}
    lines = list(results_differences(there, records.record(sources=reused)))
    same = "nano_sums, full precision: all 4 predictions are identical"
    assert lines[0] == f"{same} (reused from the cache, not computed again)"


def test_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A run, its bundle, the run again somewhere else, and what is told before and after."""
    places = (f"cache_dir={tmp_path / 'cache'}", f"hydra.run.dir={tmp_path / 'run'}")
    done = command("launch.py", "method=rtn", "bits=4", *SMALL, *places)
    assert done.returncode == 0, done.stderr[-2000:]
    path = tmp_path / "a.dqx.zip"
    monkeypatch.setattr(sys, "argv", ["dqx", "share", str(tmp_path / "run"), "--to", str(path)])
    main()
    assert f"Run it again: dqx run --from {path}" in capsys.readouterr().out
    shared = bundle.read(path)
    environment = shared.json("environment.json")
    environment["packages"]["torch"] = "1.0"
    members = shared.members | {"environment.json": json.dumps(environment).encode()}
    bundle.write(path, {k: v for k, v in shared.manifest.items() if k != "members"}, members)

    places = (f"cache_dir={tmp_path / 'other'}", f"hydra.run.dir={tmp_path / 'again'}")
    done = command("launch.py", "--from", str(path), "wandb.mode=disabled", *places)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "torch: 1.0 there" in done.stderr.partition("evaluate")[0]
    first, second = (RunFolder(tmp_path / name).read() for name in ("run", "again"))
    assert second.command == f"python launch.py --from {path} wandb.mode=disabled {' '.join(places[:1])}"
    assert second.choices == first.choices
    assert any("torch: 1.0 there" in line for line in second.warnings)
    for side in ("full precision", "quantized"):
        assert f"against a.dqx.zip: nano_facts, {side}: all 2 predictions are identical" in second.warnings
    config = yaml.safe_load((tmp_path / "again" / "config.yaml").read_text())
    original = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert {k: v for k, v in config.items() if k not in PLACES} == {
        k: v for k, v in original.items() if k not in PLACES
    }


# ---- the command ---------------------------------------------------------------------------------------------


def test_reading_a_bundle_imports_nothing_heavy() -> None:
    done = command("-c", "import sys, dqx.sharing.replay; print('torch' in sys.modules)")
    assert done.stdout.strip() == "False"
