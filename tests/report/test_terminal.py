"""The tables as they are printed: whole lines, plain characters, and the numbers of the record."""

import io
import re
from dataclasses import replace

import pytest
import rich.console
from records import fidelity, outlier_stats, record, task_result

from dqx.record.deltas import level
from dqx.record.words import points, short
from dqx.report.terminal import print_copy, print_sweep, print_table


def printed(run, folder="runs/x", width=None, monkeypatch=None):
    if width:
        monkeypatch.setenv("COLUMNS", str(width))
    out = io.StringIO()
    print_table(run, folder, file=out)
    print_copy(run, file=out)
    return out.getvalue()


def test_every_number_of_the_comparison_is_there():
    text = printed(record())
    assert "nano_llada, gptq w3a16, 3.15 bits per weight on average" in text
    assert "calibrated on nano (clean, 128 x 256 tokens), each task's own steps, seed 0" in text
    few = {**record().config, "task": {"limit": 8}}
    assert ", first 8 documents of each task, seed 0" in printed(record(config=few))
    one = {"a": task_result("a", [1, 0])}
    assert ", first 8 documents, seed 0" in printed(record(config=few, full_precision=one, quantized=one))
    (line,) = [x for x in text.split("\n") if x.startswith("nano_sums")]
    assert re.split(r"\s+", line.strip()) == [
        "nano_sums", "4", "75.0", "25.0", "-50.0", "[-93.0,", "+26.3]", "66.7", "significant", "2/0", "unclear"
    ]  # fmt: skip
    (line,) = [x for x in text.split("\n") if x.startswith("average")]
    assert re.split(r"\s+", line.strip())[1:5] == ["6", "87.5", "37.5", "-50.0"]


def test_levels_are_not_taken_for_a_test_of_chance():
    """A "significant" drop that could be chance needs a word; the limits it names are those in use."""
    text = " ".join(printed(record()).split())
    assert "Level: the relative drop alone, below 1 % negligible, up to 4 % moderate, above significant" in text
    assert "Verdict: unclear where chance could explain the difference" in text
    assert [level(drop) for drop in (0.0099, 0.01, 0.04, 0.0401)] == [
        "negligible",
        "moderate",
        "moderate",
        "significant",
    ]


def test_outliers_of_both_models_are_there():
    run = record()
    rows = {tuple(x.split()[:2]): x.split() for x in printed(run).split("\n") if x[:4] in ("attn", "mlp_")}
    assert len(rows) == 8
    planted = rows["mlp_in", "after"]
    assert planted[2] == "1"  # the block
    assert planted[3] == short(run.outliers["quantized"].at(1, "mlp_in").abs_max)
    assert planted[6] == "1/16"
    assert rows["mlp_in", "before"][6] == "0/16"


def test_predictions_against_full_precision_are_there():
    lines = [re.sub(r" +", " ", line) for line in printed(record()).split("\n")]
    assert "Against full precision masked: 10 % 90 %" in lines
    assert "divergence, nats per masked token 0.0123 1.5" in lines
    assert "same token most probable 97 % 50 %" in lines
    assert "Answers of 16 tokens: 75 % of the tokens are the same, 2 of 3 answers differ." in lines
    assert "The first differs after step 4 of 16." in lines
    assert "On full precision's states: 12 % other commits; SQNR by block 42 to 20 dB." in lines
    exact = fidelity() | {"layers": {"steps": [0], "mask_ratios": [1.0], "sqnr_db": [[None], [None]]}}
    assert "On full precision's states: 12 % other commits." in printed(record(fidelity=exact))
    earlier = {key: value for key, value in fidelity().items() if key not in ("by_step", "layers")}
    assert "On full precision's" not in printed(record(fidelity=earlier))
    assert "Against full precision" not in printed(record(fidelity={}))


def test_category_averages_are_rows():
    names = {"a": "general", "b": "general", "c": "code"}
    fp = {n: task_result(n, [1, 1, 0, 1], c) for n, c in names.items()}
    q = {n: task_result(n, [1, 0, 1, 1], c) for n, c in names.items()}
    text = printed(record(full_precision=fp, quantized=q, outliers={}))
    assert re.search(r"^general average +8 +75\.0 +75\.0 +0\.0 \[", text, re.M)
    assert "1/1" in text
    assert "linear" not in text  # no outlier table where nothing was measured


@pytest.mark.parametrize("width", [40, 80, 200])
def test_nothing_is_cut_or_folded(width, monkeypatch):
    run = record(
        warnings=["a long warning " * 12], mirror={"state": "written", "mode": "offline", "folder": "runs/" + "w" * 90}
    )
    text = printed(run, "runs/" + "x" * 120, width, monkeypatch)
    assert text.isascii()
    assert "\x1b" not in text
    assert "runs/" + "x" * 120 + "\n" in text
    assert "wandb sync runs/" + "w" * 90 in text
    assert "a long warning " * 12 in text
    assert "Again:   python launch.py method=gptq bits=3\n" in text
    assert printed(run, "runs/" + "x" * 120) == text  # the same at every width
    tables = [x for x in text.split("\n") if x and not x.startswith(("Note", "Record", "W&B"))]
    assert max(len(x.rstrip()) for x in tables) <= 84


def test_a_terminal_gets_colours_but_the_same_text(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    coloured = printed(record())
    assert "\x1b[31msignificant" in coloured
    plain = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
    monkeypatch.delenv("FORCE_COLOR")
    assert plain == printed(record())
    assert rich.console.Console(file=io.StringIO()).is_terminal is False


def test_a_sweep_is_one_table_below_its_full_precision():
    names = {"a": "math", "b": "code"}
    fp = {n: task_result(n, [1, 1, 0, 1], c) for n, c in names.items()}
    worse = {n: task_result(n, [1, 0, 0, 0], c) for n, c in names.items()}
    same = {"full_precision": fp, "command": None}
    out = io.StringIO()
    print_sweep([record(quantized=fp, **same), record(quantized=worse, **same), record()], file=out)
    matches = [re.match(r" *(nano_llada|gptq w3a16) +(.*)", x) for x in out.getvalue().split("\n")]
    rows = [(match[1], match[2].split()) for match in matches if match]
    assert [name for name, _ in rows] == ["nano_llada", "gptq w3a16", "gptq w3a16", "nano_llada", "gptq w3a16"]
    assert rows[0][1] == ["16", "75.0", "75.0", "-", "-", "75.0"]
    assert rows[1][1][1:5] == ["75.0", "75.0", "-", "-"]
    assert rows[2][1][1:7] == ["25.0", "25.0", "-", "-", "25.0", "-50.0"]
    assert rows[2][1][-2:] == ["significant", "unclear"]
    assert rows[3][1][1:5] == ["-", "-", "75.0", "100.0"]


def test_texts_are_in_nats_and_what_the_sample_could_show_is_said():
    fp = {"a": task_result("a", [1] * 50), "text": replace(task_result("text", [2.0, 3.0] * 5, "text"), metric="nll")}
    worse = replace(task_result("text", [2.1, 3.3] * 5, "text"), metric="nll")
    text = printed(record(full_precision=fp, quantized=fp | {"text": worse}, outliers={}))
    assert re.search(r"^text +10 +2\.500 +2\.700 +\+0\.200 \[\+0\.1\d\d, \+0\.2\d\d\] +- +- +10/0 worse", text, re.M)
    assert "Texts: nats per token, lower is better" in text
    assert "A sample like this finds a difference of 15.4 points in a four times in five." in text
    alone = printed(record(full_precision={"text": fp["text"]}, quantized={"text": worse}, outliers={}))
    assert "In percent" not in alone
    assert re.search(r"finds a difference of 0\.1\d\d nats in text four times", alone)
    out = io.StringIO()
    print_sweep([record(full_precision=fp, quantized=fp | {"text": worse}, command=None)], file=out)
    assert re.search(r"gptq w3a16 +\S+ +100\.0 +2\.700 +100\.0", out.getvalue())


def test_what_is_missing_is_said():
    run = record(
        full_precision={"a": task_result("a", [0, 0])},
        quantized={"a": task_result("a", [0, 1])},
        mirror={"state": "failed", "message": "the package wandb cannot be imported"},
        command=None,
    )
    text = printed(run, None)
    assert re.search(r"^a +2 +0\.0 +50\.0 +\+50\.0 \[.*\] +- +- +0/1 unclear", text, re.M)
    assert "W&B:     not written, the package wandb cannot be imported; the record is complete without it" in text
    assert "Record:" not in text
    assert "Again:" not in text


def test_values_that_are_not_finite_show():
    text = printed(record(outliers={"quantized": outlier_stats(gain=float("nan"))}))
    assert "not finite" in text


def test_numbers():
    assert [points(x) for x in (0.0, -0.0004, 0.0005, -0.1, 0.25)] == ["0.0", "0.0", "+0.1", "-10.0", "+25.0"]
    assert [short(x) for x in (0.00012345, 3.14159, 123.4, 12345.6, 2.5e7)] == [
        "0.000123",
        "3.14",
        "123",
        "12346",
        "2.5e+07",
    ]
