"""From what people type to a typed configuration: spelling, choices, defaults, presets, a team's own folder."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dqx.common.parts import MOVED, RESERVED, build_part, fits, locate, part_problems
from dqx.config.command_line import as_typed, normalize
from dqx.config.compose import as_part, build, compose, resolve, select, suite
from dqx.config.schema import CONF_DIR, GROUPS, Config, ConfigProblems, choices
from dqx.formats.bits import ActivationBits, BitsConfig, WeightBits
from dqx.models.checkpoint import read_config
from dqx.models.family import family_of
from dqx.quant.protocols import Rounding
from dqx.study.experiment import problems

ROOT = CONF_DIR.parent
GOLDEN = Path(__file__).parents[1] / "golden"


def launch(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run launch.py as a user would."""
    return subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


# ---- the command line ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("bits=3", "bits=w3"),
        ("bits=3,4", "bits=w3,w4"),
        ("bits=w4a16,3", "bits=w4a16,w3"),
        ("bits=3, 4", "bits=w3,w4"),
        ("bits=16", "bits=w16a16"),
        ("bits=w4a16", "bits=w4a16"),
        ("steps=64,128", "steps=s64,s128"),
        ("steps=default,64", "steps=default,s64"),
        ("steps=48", "steps.count=48"),
        ("steps=48,64", "steps.count=48,64"),
        ("steps=default,48", "steps.count=null,48"),
        ("steps=0", "steps.count=0"),
        ("steps=s64", "steps=s64"),
        ("plan=Yes", "plan=true"),
        ("task=gsm8k", "task=gsm8k"),
        ("task=gsm8k,mmlu", "task=[gsm8k,mmlu]"),
        ("task=[gsm8k,mmlu]", "task=[gsm8k,mmlu]"),
        ("method=rtn,gptq", "method=rtn,gptq"),
        ("bits.weight.bits=3", "bits.weight.bits=3"),
        ("task.limit=4", "task.limit=4"),
        ("seed=3", "seed=3"),
        ("data_root=../shared/data", "data_root=../shared/data"),
        ("data_root=~/data", f"data_root={Path.home()}/data"),
        ("+model.path=~/a/b", f"+model.path={Path.home()}/a/b"),
        ("model.path=a/~/b", "model.path='a/~/b'"),
        ("model.path=/my(model)=x", "model.path='/my(model)=x'"),
        ("model.path=/a/{b}[c]#d", "model.path='/a/{b}[c]#d'"),
        ("model.path=it's", r"model.path='it\'s'"),
        ("model.path=größe/模型", "model.path='größe/模型'"),
        ("model.path=~/ä", f"model.path='{Path.home()}/ä'"),
        ("model.path=a,b(1)", "model.path=a,'b(1)'"),
        ("model.path='my(model)'", "model.path='my(model)'"),
        ("model.path=my model", "model.path=my model"),
        ("model.path=${oc.env:HOME}/x", "model.path=${oc.env:HOME}/x"),
        ("seed=choice(1,2)", "seed=choice(1,2)"),
        ("wandb.tags=[a,b]", "wandb.tags=[a,b]"),
        ("bits=4.5", "bits='4.5'"),
        ("bits=3,4.5", "bits=w3,'4.5'"),
        ("task=null", "task='null'"),
        ("+method=gptq", "method=gptq"),
        ("~model", "~model"),
        ("--cfg", "--cfg"),
        ("hydra.run.dir=runs/bits=3", "hydra.run.dir='runs/bits=3'"),
        ("+experiment=quick", "experiment=quick"),
        ("model.sampler=llada", "model/sampler=llada"),
        ("model.sampler=llada,dream", "model/sampler=llada,dream"),
        ("model.sampler.cache=dual", "model.sampler.cache=dual"),
        ("model.family=llada", "model.family=llada"),
    ],
)
def test_normalize(typed: str, read: str) -> None:
    assert normalize([typed]) == [read]


@pytest.mark.parametrize("path", ["/my(model)=x", "it's", "größe#1", "/plain", "${oc.env:HOME}/(x)", "/a,b(1)"])
def test_a_path_is_read_and_shown_as_typed(path: str) -> None:
    """Paths without a comma; one with it is several values."""
    (read,) = normalize([f"data_root={path}"])
    assert as_typed(read) == (f"data_root={path}" if "," not in path else read)
    if "," not in path:
        root = compose([f"data_root={path}"]).data_root
        assert root == path.replace("${oc.env:HOME}", os.environ["HOME"])


@pytest.mark.parametrize("flag", ["-m", "--multirun"])
def test_tasks_stay_a_sweep_in_a_multirun(flag: str) -> None:
    assert normalize([flag, "task=gsm8k,mmlu", "bits=3,4"]) == [flag, "task=gsm8k,mmlu", "bits=w3,w4"]


# ---- what the choices mean -----------------------------------------------------------------------------------


STUDIED = ("w8a8", "w4a8", "w4a4", "w4a16", "w3a16", "w2a16", "w16a16")


def pairs() -> list[tuple[str, str]]:
    """Every method at the study's widths, and every width with a method for activations and one for weights only."""
    methods = [name for name in choices("method") if not name.endswith("_as_published")]
    others = [bits for bits in choices("bits") if bits not in STUDIED]
    return [(m, b) for m in methods for b in STUDIED] + [(m, b) for m in ("rtn", "awq") for b in others]


@pytest.mark.parametrize(("method", "bits"), pairs())
def test_every_pair_of_method_and_bits_is_built_or_refused(method: str, bits: str) -> None:
    """On a model that 256 divides all pairs work, except that fp16 has one width and some methods round no inputs."""
    config = resolve(compose([f"method={method}", f"bits={bits}"]))
    _, arch = read_config(GOLDEN / "llada_tiny")
    arch = type(arch)(**{**vars(arch), "hidden_size": 256, "mlp_size": 512})
    problems = build(config.method).problems(config.bits, arch)
    if method == "fp16" and bits != "w16a16":
        (problem,) = problems
        assert problem.startswith(f"bits={config.bits.name}: fp16 quantizes nothing; bits must be w16a16")
    else:
        others = [problem for problem in problems if ".levels" not in problem]
        most = 4 if method.startswith("d2quant") else 3 if method.startswith("quant_dllm") else 16
        assert (len(problems) > len(others)) == (most < 16 and not few_integers(config.bits.weight, most))
        if method.startswith(("awq", "d2quant", "quant_dllm")) and config.bits.activation.bits < 16:
            (problem,) = others
            assert "quantizes weights only; write bits" in problem
        else:
            assert others == []


def few_integers(weight: WeightBits, most: int) -> bool:
    """Whether binary matrices can take the place of the grid."""
    return weight.bits == 16 or (weight.format == "int" and weight.bits <= most)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], BitsConfig("w3a16", WeightBits(3, 128), ActivationBits(16))),
        (["bits=4"], BitsConfig("w4a16", WeightBits(4, 128), ActivationBits(16))),
        (
            ["bits=4", "method.quantizes=weights_and_activations"],
            BitsConfig("w4a4", WeightBits(4, -1), ActivationBits(4)),
        ),
        (
            ["bits=w4a16", "method.quantizes=weights_and_activations"],
            BitsConfig("w4a16", WeightBits(4, 128), ActivationBits(16)),
        ),
        (["bits=w4a8"], BitsConfig("w4a8", WeightBits(4, -1), ActivationBits(8))),
        (["method=fp16"], BitsConfig("w16a16", WeightBits(16, -1), ActivationBits(16))),
        (["bits=4", "bits.weight.symmetric=true"], BitsConfig("w4a16", WeightBits(4, 128, True), ActivationBits(16))),
        (["bits=4", "bits.weight.bits=5"], BitsConfig("w5a16", WeightBits(5, 128), ActivationBits(16))),
    ],
)
def test_what_bits_mean(overrides: list[str], expected: BitsConfig) -> None:
    assert resolve(compose(overrides)).bits == expected


def test_defaults_are_typed_objects() -> None:
    config = resolve(compose())
    assert isinstance(config, Config)
    assert (config.model.name, config.method.name, config.steps.count) == ("nano_llada", "gptq", None)
    assert list(config.task.suite) == ["nano_facts", "nano_sums", "nano_code"]
    assert all(value != "???" for value in vars(config.calib).values())


@pytest.mark.parametrize("model", choices("model"))
def test_every_model_is_complete(model: str) -> None:
    config = resolve(compose([f"model={model}"]))
    assert config.model.name == model
    assert config.model.chat == (not model.startswith("nano_") and not model.endswith("_base"))
    assert part_problems(config.model.sampler, "model.sampler") == []
    assert config.model.sampler["_target_"] == family_of(config.model.family).sampler["_target_"]
    assert config.model.name.startswith("nano_") or config.model.path.count("/") == 1


def test_calibration_follows_the_model_then_the_method() -> None:
    nano, big = resolve(compose(["model=nano_llada"])).calib, resolve(compose(["model=llada_8b_base"])).calib
    assert nano.text == "nano"
    assert (big.text, big.samples, big.length) == ("wikitext2", 128, 2048)  # the study's setting
    assert resolve(compose(["model=llada_8b_base", "calib.text=pile"])).calib.text == "pile"


@pytest.mark.parametrize("task", choices("task"))
def test_every_task_composes(task: str) -> None:
    assert resolve(compose([f"task={task}"])).task.suite


def test_tasks_merge_into_one_suite() -> None:
    assert list(suite(["gsm8k", "mmlu"])) == ["gsm8k", "mmlu"]
    assert list(resolve(compose(["task=gsm8k,mmlu"])).task.suite) == ["gsm8k", "mmlu"]


@pytest.mark.parametrize(("typed", "count"), [("steps=64", 64), ("steps=48", 48), ("steps=default", None)])
def test_steps(typed: str, count: int | None) -> None:
    assert resolve(compose([typed])).steps.count == count


def parts() -> list[Any]:
    """Every part that a method or model file holds, with the key it lies at."""
    found = []
    for group in ("method", "model"):
        for name in choices(group):
            config = resolve(compose([f"{group}={name}"]))
            nodes = as_part(config.method) if group == "method" else {"sampler": config.model.sampler}
            found += [pytest.param(part, id=f"{name}.{key}") for key, part in parts_in(nodes)]
    return found


def parts_in(nodes: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The parts among some keys, those inside mappings and parts included."""
    for key, node in nodes.items():
        if isinstance(node, dict):
            if "_target_" in node:
                yield key, node
            yield from ((f"{key}.{name}", part) for name, part in parts_in(node))


@pytest.mark.parametrize("part", parts())
def test_files_list_every_option_of_a_part(part: dict[str, Any]) -> None:
    """An option that a file leaves out could not be set without +."""
    assert set(part) - set(RESERVED) == set(inspect.signature(locate(part["_target_"])).parameters)


def test_select_serves_a_loaded_model() -> None:
    model = resolve(compose(["model=llada_8b_base", "model.path=/somewhere"])).model
    chosen = select(method="rtn", bits=4, model=model, overrides=["calib.samples=3"])
    assert (chosen.method.name, chosen.bits.name, chosen.model.path) == ("rtn", "w4a16", "/somewhere")
    assert (chosen.calib.text, chosen.calib.samples) == ("wikitext2", 3)
    assert select(method="fp16", bits="w16a16").bits.name == "w16a16"


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, int, True),
        (True, int, False),
        (1, float, True),
        ("1", float, False),
        (None, float, False),
        (None, float | None, True),
        ("a", str | None, True),
        ("gptq", Rounding | None, False),
        ({"_target_": "x"}, Rounding | None, True),
        (3, Any, True),
    ],
)
def test_fits(value: Any, hint: Any, expected: bool) -> None:
    assert fits(value, hint) is expected


def test_compose_inside_another_hydra_application() -> None:
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        outer = GlobalHydra.instance().hydra
        assert compose(["bits=4"]).bits.weight.bits == 4
        assert GlobalHydra.instance().hydra is outer


# ---- launch.py -----------------------------------------------------------------------------------------------


def test_help_lists_groups_and_choices() -> None:
    done = launch("--help")
    assert done.returncode == 0, done.stderr
    for group in GROUPS:
        (line,) = [i for i, text in enumerate(done.stdout.splitlines()) if text.split()[:1] == [group]]
        listed = " ".join(done.stdout.splitlines()[line : line + 4])
        assert all(choice in listed for choice in choices(group))
    assert "bits=4 " in done.stdout
    assert "-m method=rtn,gptq bits=2,3,4" in done.stdout


def test_a_teams_own_folder(tmp_path: Path) -> None:
    (tmp_path / "method").mkdir()
    (tmp_path / "experiment").mkdir()
    (tmp_path / "method" / "ours.yaml").write_text("defaults: [gptq]\nname: ours\nrounding: {damping: 0.5}\n")
    (tmp_path / "experiment" / "preset.yaml").write_text(
        "# @package _global_\ndefaults: [{override /method: ours}, {override /bits: w2}]\nseed: 7\n"
    )
    shown = launch("experiment=preset", "--cfg", "job", "--resolve", DQX_CONFIG_PATH=str(tmp_path))
    assert "name: ours" in shown.stdout, shown.stderr
    assert "damping: 0.5" in shown.stdout
    assert "name: w2a16" in shown.stdout
    assert "seed: 7" in shown.stdout
    direct = launch("method=ours", f"hydra.searchpath=[file://{tmp_path}]", "--cfg", "job")
    assert "name: ours" in direct.stdout, direct.stderr
    assert "ours" in launch("--help", DQX_CONFIG_PATH=str(tmp_path)).stdout


def test_a_missing_team_folder_stops() -> None:
    done = launch("--cfg", "job", DQX_CONFIG_PATH="/no/such/folder")
    assert done.returncode == 2
    assert "/no/such/folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_quick_experiment() -> None:
    config = resolve(compose(["experiment=quick", "method=rtn"]))
    assert (config.task.limit, config.calib.samples, config.method.name) == (2, 4, "rtn")


def test_what_no_run_of_a_sweep_can_do_stops_it(tmp_path: Path) -> None:
    """A preset that is a sweep, with one width from the command line."""
    done = launch("experiment=nano_weight_only", "bits=4", "seed=-1", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert done.returncode == 2, done.stderr
    assert done.stderr == "cannot run: seed=-1 must be 0 or more\n"
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_may_mix_null_with_names_of_parts(tmp_path: Path) -> None:
    """Nothing is wrong with the parts: each run has its own, or none."""
    parts = ["method.clip=null,weight_mse", "method.kv=per_head,null"]
    done = launch("-m", "method=quarot", "bits=3", *parts, "seed=-1", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert done.stderr == "cannot run: seed=-1 must be 0 or more\n"


def test_runs_that_cannot_work_are_told_before_the_first_starts_and_left_out(tmp_path: Path) -> None:
    """One run of eight can: it is done, and the others are told twice, at the beginning with what they share."""
    widths = ["bits.blocks.b0.weight=4,9", "steps=8,-1", "seed=0,-1"]
    quick = ["method=rtn", "task=nano_sums", "task.limit=1", "outliers.samples=0", "fidelity.samples=0"]
    places = [f"hydra.sweep.dir={tmp_path}", f"cache_dir={tmp_path / 'cache'}", "wandb.mode=disabled"]
    places += ["hydra.sweep.subdir=${hydra.job.num}-${run_name:}"]  # without a value until a run has its number
    done = launch("-m", *widths, *quick, *places)
    assert done.returncode == 2, done.stderr
    told, _, rest = done.stderr.partition("7 of 8 runs failed:\n")
    assert told.startswith("7 of 8 runs cannot work and are left out:\n  1. seed=-1 must be 0 or more [")
    assert told.count("bits.blocks.b0.weight=9 is no width dqx has") == 1
    assert "++bits.blocks.b0.weight=9 steps.count=-1 seed=-1" in told
    assert "  1-nano_llada-rtn-" in rest
    assert "(and 1 more)" in rest
    assert (tmp_path / "0-nano_llada-rtn-w3a16-b0w4-8steps" / "results.json").exists()
    assert len(list(tmp_path.glob("*/failure.json"))) == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["method=gptx"], "method=gptx is no choice; did you mean gptq or gptaq?"),
        (
            ["-m", "method=rtn,gptx", "bits=w3,w99"],
            "  2. method=gptx is no choice; did you mean gptq or gptaq? [method=",
        ),
        (["-m", "--cfg", "job"], "Only one of"),
        (["bits=[w4a4]"], "bits=[w4a4]: a run has one choice of this group"),
    ],
)
def test_mistakes_on_the_command_line(arguments: list[str], message: str) -> None:
    done = launch(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "broken.yaml").write_text("name: [broken\n")
    done = launch("method=broken", "--cfg", "job", DQX_CONFIG_PATH=str(tmp_path))
    assert done.returncode == 2
    assert "broken.yaml" in done.stderr
    assert "Traceback" not in done.stderr


def test_problems_are_numbered() -> None:
    assert str(ConfigProblems(["one", "two"])) == "1. one\n2. two"


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("method.rounding=gptaq", "method/rounding=gptaq"),
        ("method.clip=weight_mse,null", "method.clip=weight_mse,null"),
        ("method.kv=null", "method.kv=null"),
        ("+method.transforms.smooth=smooth", "+method/transforms@method.transforms.smooth=smooth"),
        ("+method.rounding_by_role.down=rtn", "+method/rounding@method.rounding_by_role.down=rtn"),
        ("method.rounding.levels=daq", "method/levels@method.rounding.levels=daq"),
        ("method.kv.value_clip=attention", "method/value_clip@method.kv.value_clip=attention"),
        ("method.rounding.alpha=1", "method.rounding.alpha=1"),
        ("method.name=mine", "method.name=mine"),
    ],
)
def test_parts_by_name(typed: str, expected: str) -> None:
    assert normalize([typed]) == [expected]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["method=quarot", "method.rounding=gptaq"], {"rounding": "GPTAQ", "kv": "KeysValues"}),
        (["method=quarot", "method.rounding=rtn", "method.kv=null", "method.clip=null"], {"rounding": "RTN"}),
        (["method=gptq", "+method.transforms.smooth=smooth"], {"transforms": {"smooth": "Smooth"}}),
        (["method=awq", "method.rounding=gptq"], {"rounding": "GPTQ", "clip": "OutputMSE"}),
        (["method=awq", "~method.transforms.scale"], {"transforms": {}, "rounding": "RTN"}),
        (["method=rtn", "method.clip=weight_mse", "method.clip.power=2"], {"clip": "WeightMSE"}),
        (["method=gptq", "+method.rounding_by_role.down=rtn"], {"rounding_by_role": {"down": "RTN"}}),
        (["method=smoothquant", "method.activation=static"], {"activation": "Static"}),
    ],
)
def test_methods_are_recombined_on_the_command_line(overrides: list[str], expected: dict[str, Any]) -> None:
    """Every part of a method can be exchanged, added and taken away, and the result is a method that can run."""
    config = resolve(compose([*overrides, "bits=w4a16" if "method=awq" in overrides else "bits=w4a4"]))
    method = build(config.method)
    for slot, names in expected.items():
        found = getattr(method, slot)
        if isinstance(names, dict):
            assert {key: type(part).__name__ for key, part in found.items()} == names
        else:
            assert type(found).__name__ == names
    assert problems(config) == []


def test_parts_of_older_configurations_are_found_where_they_are_now() -> None:
    for old, new in MOVED.items():
        name = new.rpartition(".")[2]
        assert part_problems({"_target_": old}, "part") == []
        assert type(build_part({"_target_": old})) is type(build_part({"_target_": new})) is locate(new)
        assert locate(old).__name__ == name


@pytest.mark.parametrize(
    ("verbose", "mode", "level"),
    [(0, "RUN", "WARNING"), (1, "RUN", "INFO"), (1, "MULTIRUN", "WARNING"), (2, "MULTIRUN", "DEBUG")],
)
def test_verbose_says_which_messages_reach_the_terminal(verbose: int, mode: str, level: str) -> None:
    cfg = compose([f"verbose={verbose}", f"hydra.mode={mode}"], with_hydra=True)
    assert cfg.hydra.job_logging.handlers.console.level == level
    assert cfg.hydra.job_logging.loggers.dqx.level == "DEBUG"  # of run.log, which has all
