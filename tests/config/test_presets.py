"""The presets of the published tables: expanded by Hydra's own sweeper, their runs give every published cell once."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from goldens import FAMILIES, cases, golden, tiny
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from records import record
from tiny import ROLES, Batch

from dqx.common.names import method_label
from dqx.common.parts import part_problems
from dqx.config.compose import as_part, build, resolve, run_name
from dqx.config.schema import CONF_DIR
from dqx.models.transformer import shift_logits
from dqx.quant import quantize
from dqx.record import words
from dqx.report.published import TABLES, published_cells
from dqx.report.terminal import print_sweep

RUNS = {1: 8, 2: 12, 3: 8, 4: 12, 5: 4}
METHODS = ("gptq", "awq", "smoothquant", "quarot", "duquant")


@pytest.fixture(scope="module", autouse=True)
def conf() -> Iterator[None]:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        yield


def jobs(preset: str) -> list[list[str]]:
    """The overrides of every run that `python launch.py experiment=PRESET` starts."""
    hydra = compose("config", [f"experiment={preset}"], return_hydra_config=True).hydra
    assert hydra.mode.name == "MULTIRUN"
    typed = [*(f"{group}={values}" for group, values in hydra.sweeper.params.items()), f"experiment={preset}"]
    (batch,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(typed), None)
    return batch


@pytest.mark.parametrize("table", RUNS)
def test_a_preset_is_its_table_cell_by_cell(table: int) -> None:
    """Quantized cells come from exactly one run each, fp16 cells from the runs' full-precision side."""
    wanted = [cell for cell in published_cells() if cell.table == table]
    started = jobs(f"qdlm_table{table}")
    suite = resolve(compose("config", started[0])).task.suite  # the next line: no run has others
    assert all([o.split("=")[0] for o in job] == ["model", "method", "bits", "experiment"] for job in started)
    quantized = Counter((*(o.split("=")[1] for o in job[:3]), task) for job in started for task in suite)
    full_precision = {(model, task) for model, _, _, task in quantized}
    assert len(started) == RUNS[table]
    assert quantized == Counter((c.model, c.method, c.bits, c.task) for c in wanted if c.method != "fp16")
    assert {(c.model, c.task) for c in wanted if c.method == "fp16"} <= full_precision


@pytest.mark.parametrize("bits", ["w4a16", "w3a16", "w8a8", "w4a4"])
def test_widths_are_what_the_tables_call_them(bits: str) -> None:
    config = resolve(compose("config", [f"bits={bits}", "method=rtn"])).bits
    assert (config.name, f"w{config.weight.bits}a{config.activation.bits}") == (bits, bits)


@pytest.mark.parametrize("table", RUNS)
def test_the_published_variant_differs_in_the_method_alone(table: int) -> None:
    meant, published = jobs(f"qdlm_table{table}"), jobs(f"qdlm_table{table}_as_published")
    renamed = [[o if not o.startswith("method=") else f"{o}_as_published" for o in job[:-1]] for job in meant]
    assert [job[:-1] for job in published] == renamed
    first, other = (resolve(compose("config", job[0])) for job in (meant, published))
    other.method, other.sweep, other.bits = first.method, first.sweep, first.bits
    assert other == first


@pytest.mark.parametrize("method", METHODS)
def test_a_published_variant_is_the_method_with_other_settings(method: str) -> None:
    plain, variant = (resolve(compose("config", [f"method={m}"])).method for m in (method, f"{method}_as_published"))
    assert (variant.name, variant.variant) == (method, "as_published")
    assert method_label(variant.name, variant.variant) == f"{method}_as_published"
    assert part_problems(as_part(variant), "method") == []
    assert set(variant.transforms) == set(plain.transforms)
    assert {**vars(variant), "variant": ""} != vars(plain)


def test_the_record_names_the_variant() -> None:
    cfg = compose("config", ["method=gptq_as_published", "bits=w4a16"])
    assert run_name(_root_=cfg) == "nano_llada-gptq_as_published-w4a16"
    assert run_name(_root_=compose("config", ["method=gptq", "bits=w4a16"])) == "nano_llada-gptq-w4a16"
    plain = record()
    variant = record(config=plain.config | {"method": {"name": "gptq", "variant": "as_published"}})
    assert (plain.results()["method"], plain.results()["variant"]) == ("gptq", None)
    assert (variant.results()["method"], variant.results()["variant"]) == ("gptq", "as_published")
    assert words.title(variant).startswith("nano_llada, gptq_as_published w3a16")
    out = io.StringIO()
    print_sweep([("0", plain), ("1", variant)], out)
    assert "gptq w3a16" in out.getvalue()
    assert "gptq_as_published w3a16" in out.getvalue()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_smoothquant_as_published_equals_the_published_code(family: str) -> None:
    """The preset's method, as composed from its files, on the recorded models: the recorded logits at W4A4."""
    file = "smoothquant" if family == "llada" else "smoothquant_dream"
    data, model = golden(file), tiny(family)
    config = resolve(compose("config", ["method=smoothquant_as_published", "bits=w4a4", f"model=nano_{family}"]))
    quantize(model, build(config.method), config.bits, [Batch(data["calibration_ids"])], progress=False)
    ours = torch.cat([model(row) for row in data["input_ids"].split(1)])
    theirs = data["logits.w4a4"] if family == "llada" else shift_logits(data["logits.w4a4"])
    (case,) = (c for c in cases(file) if (c["w_bits"], c["a_bits"], c.get("smooth", True)) == (4, 4, True))
    assert (ours - theirs).square().mean() <= 0.02 * case["mse_vs_original"]


def test_gptq_as_published_leaves_out_what_the_published_code_left_out() -> None:
    """On LLaDA the three linears that its module list misnamed; on Dream none. Grids are symmetric on both."""
    for family, left_out in {"llada": {"q", "k", "v"}, "dream": set()}.items():
        config = resolve(compose("config", ["method=gptq_as_published", "bits=w4a16", f"model=nano_{family}"]))
        method = build(config.method)
        assert {role for role in ROLES if method.rounding_of(role) is None} == left_out
        assert {method.rounding_of(role) for role in ROLES} - {None} == {method.rounding}
        assert config.bits.weight.symmetric
    typed = ["method=gptq_as_published", "bits=w4a16", "bits.weight.symmetric=false"]
    assert not resolve(compose("config", typed)).bits.weight.symmetric


def test_awq_as_published_judges_by_the_block_on_llada_alone() -> None:
    judges = {
        family: resolve(compose("config", ["method=awq_as_published", f"model=nano_{family}"])).method.transforms[
            "scale"
        ]["judge"]
        for family in FAMILIES
    }
    assert judges == {"llada": "block", "dream": "sublayer"}


def test_quarot_as_published_changes_the_function_and_leaves_keys_alone() -> None:
    config = resolve(compose("config", ["method=quarot_as_published", "bits=w4a4"]))
    assert config.method.transforms["fold"]["subtract_embedding_mean"]
    kv = build(config.method).kv
    assert (kv.keys, kv.values, kv.queries) == (None, "token", False)


def test_duquant_as_published_looks_at_rows_and_clips_keys_and_queries() -> None:
    method = build(resolve(compose("config", ["method=duquant_as_published", "bits=w4a4"])).method)
    assert (method.transforms["rotate"].index, method.transforms["smooth"].one_linear) == ("row", True)
    assert (method.kv.queries, method.kv.rotate, method.kv.key_clip_ratio, method.kv.value_clip_ratio) == (
        True,
        True,
        0.9,
        1.0,
    )


def test_published_data_is_whole() -> None:
    """Row counts and shapes of the tables, and one number of each as printed."""
    cells = published_cells()
    assert Counter(c.table for c in cells) == {1: 60, 2: 60, 3: 40, 4: 48, 5: 20}
    printed = {(c.table, c.model, c.method, c.bits, c.task): c.accuracy for c in cells}
    assert len(printed) == len(cells)
    assert printed[1, "llada_8b_base", "awq", "w3a16", "hellaswag"] == 66.4
    assert printed[2, "llada_8b_base", "smoothquant", "w4a4", "mmlu"] == 27.1
    assert printed[3, "llada_8b_instruct", "gptq", "w4a16", "gsm8k"] == 78.8
    assert printed[4, "llada_8b_instruct", "duquant", "w4a4", "mbpp"] == 29.2
    assert printed[5, "dream_7b_base", "gptq", "w3a16", "arc_easy"] == 73.4


@pytest.mark.parametrize("task", yaml.safe_load(TABLES.read_text())["tasks"])
def test_tasks_have_the_published_settings(task: str) -> None:
    wanted = yaml.safe_load(TABLES.read_text())["tasks"][task]
    spec = resolve(compose("config", [f"task={task}"])).task.suite[task]
    assert {key: getattr(spec, key) for key in wanted} == wanted


@pytest.mark.parametrize("method", METHODS)
def test_methods_calibrate_as_published(method: str) -> None:
    settings = yaml.safe_load(TABLES.read_text())["settings"][method]
    config = resolve(compose("config", [f"method={method}", "model=llada_8b_base"])).calib
    assert config.text == settings["calib"].removesuffix("val")
    assert (config.samples, config.length) == (settings["nsamples"], settings["seqlen"])


def test_presets_are_documented_by_their_own_command() -> None:
    for path in sorted(Path(CONF_DIR, "experiment").glob("qdlm_*.yaml")):
        assert f"#   python launch.py experiment={path.stem}\n" in path.read_text()
