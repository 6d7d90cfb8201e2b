"""The tables as they are printed: whole lines, plain characters, and the numbers of the record."""

import io
import re
from dataclasses import replace

import pytest
import rich.console
from records import fidelity, outlier_stats, record, task_result

from dqx.record.deltas import level
from dqx.record.words import meanings, points, short
from dqx.report import tables
from dqx.report.terminal import fitted, print_copy, print_line, print_run, print_sweep


def printed(run, folder="runs/x", width=None, monkeypatch=None):
    if width:
        monkeypatch.setenv("COLUMNS", str(width))
    out = io.StringIO()
    print_run(run, folder, file=out)
    print_copy(run, file=out)
    return out.getvalue()


def named(*runs):
    return [(str(i), run) for i, run in enumerate(runs)]


def test_every_number_of_the_comparison_is_there():
    text = printed(record())
    assert "nano_llada, gptq w3a16, 3.15 bits per weight on average" in text
    assert "calibrated on nano (clean, 128 x 256 tokens), each task's own steps, seed 0" in " ".join(text.split())
    few = {**record().config, "task": {"limit": 8}}
    assert ", first 8 documents of each task, seed 0" in " ".join(printed(record(config=few)).split())
    one = {"a": task_result("a", [1, 0])}
    alone = record(config=few, full_precision=one, quantized=one)
    assert ", first 8 documents, seed 0" in " ".join(printed(alone).split())
    (line,) = [x for x in text.split("\n") if x.startswith("nano_sums")]
    assert re.split(r"\s+", line.strip()) == [
        "nano_sums", "4", "75.0", "25.0", "-50.0", "[-93.0,", "+26.3]", "0.50", "(1)", "unclear", ">", "4", "%"
    ]  # fmt: skip
    (line,) = [x for x in text.split("\n") if x.startswith("average")]
    assert re.split(r"\s+", line.strip())[1:5] == ["6", "87.5", "37.5", "-50.0"]


def test_levels_are_not_taken_for_a_test_of_chance():
    """The size of a drop and what chance allows are two columns, and no word of one can be taken for the other."""
    text = " ".join(printed(record()).split())
    assert "it says nothing of chance" in text
    assert "Verdict: better or worse where p, corrected, is at most 5 % and the interval leaves out 0." in text
    assert "significant" not in text
    assert [level(drop) for drop in (0.0099, 0.01, 0.04, 0.0401)] == ["< 1 %", "1-4 %", "1-4 %", "> 4 %"]


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
    assert max(len(x.rstrip()) for x in tables) <= 80


def test_a_terminal_gets_colours_but_the_same_text(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    coloured = printed(record())
    assert "\x1b[33munclear" in coloured
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
    print_sweep(named(record(quantized=fp, **same), record(quantized=worse, **same), record()), file=out)
    matches = [re.match(r" *(nano_llada|gptq w3a16) +(.*)", x) for x in out.getvalue().split("\n")]
    rows = [(match[1], match[2].split()) for match in matches if match]
    names = ["nano_llada", "gptq w3a16", "gptq w3a16", "nano_llada", "gptq w3a16"]
    assert [name for name, _ in rows] == [*names, *names]  # averages and verdicts, then the tasks
    assert rows[0][1] == ["16", "75.0"]
    assert rows[2][1][1:3] == ["25.0", "-50.0"]
    assert rows[2][1][-4:] == ["unclear", ">", "4", "%"]
    assert rows[5][1] == ["75.0", "75.0", "-", "-"]
    assert rows[6][1] == ["75.0", "75.0", "-", "-"]
    assert rows[7][1] == ["25.0", "25.0", "-", "-"]
    assert rows[8][1] == ["-", "-", "75.0", "100.0"]
    assert max(map(len, out.getvalue().split("\n"))) <= 80


def test_texts_are_in_nats_and_what_the_sample_could_show_is_said():
    fp = {"a": task_result("a", [1] * 50), "text": replace(task_result("text", [2.0, 3.0] * 5, "text"), metric="nll")}
    worse = replace(task_result("text", [2.1, 3.3] * 5, "text"), metric="nll")
    text = printed(record(full_precision=fp, quantized=fp | {"text": worse}, outliers={}))
    row = r"^text +10 +2\.500 +2\.700 +\+0\.200 \[\+0\.1\d\d, \+0\.2\d\d\] +0\.002 \(0\.004\) worse +- *$"
    assert re.search(row, text, re.M)
    assert "Texts: nats per token, lower is better" in text
    assert "A sample like this finds a difference of 15.4 points in a four times in five." in text
    alone = printed(record(full_precision={"text": fp["text"]}, quantized={"text": worse}, outliers={}))
    assert "In percent" not in alone
    assert re.search(r"finds a difference of 0\.1\d\d nats in text four times", alone)
    out = io.StringIO()
    print_sweep(named(record(full_precision=fp, quantized=fp | {"text": worse}, command=None)), file=out)
    assert re.search(r"gptq w3a16 +3\.15 +100\.0 +2\.700", out.getvalue())


def test_a_run_of_a_sweep_is_one_line():
    out = io.StringIO()
    print_line(record(timings={"evaluate": 41.2}), "3-nano_llada-gptq-w3a16", out)
    line = "3-nano_llada-gptq-w3a16: 37.5, -50.0 [-71.7, +11.9], p 0.25, unclear, 41 s\n"
    assert re.sub(r"\[.*?\]", "[]", out.getvalue()) == re.sub(r"\[.*?\]", "[]", line)


def test_widths_that_differ_by_method_are_said_once():
    runs = [("w3", "gptq", "w3a16"), ("w3", "duquant", "w3a3"), ("w4", "gptq", "w4a16"), ("w3", "awq", "w3a16")]
    told = "bits=3 means w3a16 for gptq and awq, w3a3 for duquant; bits=w3a16 means the same for all."
    assert meanings(runs) == [told]
    choices = record().choices | {"bits": "w3"}
    duquant = record(choices=choices)
    duquant.settings = replace(duquant.settings, method="duquant", bits="w3a3")
    out = io.StringIO()
    print_sweep([("0", record(choices=choices)), ("1", duquant)], file=out)
    assert " ".join(out.getvalue().split()).count("bits=3 means w3a16 for gptq, w3a3 for duquant;") == 1


def test_a_note_of_many_runs_is_printed_once():
    out = io.StringIO()
    noted = record(warnings=["the sandbox lacks Landlock"])
    print_sweep([("0-rtn", noted), ("1-gptq", noted), ("2-awq", record(warnings=["slow"]))], file=out)
    assert out.getvalue().count("the sandbox lacks Landlock") == 1
    assert "Note:    the sandbox lacks Landlock (0-rtn and 1-gptq)\n" in out.getvalue()


def test_a_table_of_many_tasks_becomes_several():
    """Study tables have up to 12 tasks; 80 columns hold six."""
    tasks = {f"task{i}": task_result(f"task{i}", [1, 1, 0, 1], "general") for i in range(24)}
    runs = [record(full_precision=tasks, quantized=tasks) for _ in range(2)]
    pieces = fitted(tables.sweep(runs))
    shown = [name for piece in pieces for name in piece.columns]
    assert [name for name in shown if name.startswith("task")] == list(tasks)
    assert all(piece.columns[0] == "run" for piece in pieces)
    assert len(pieces) == 4


def test_what_is_missing_is_said():
    run = record(
        full_precision={"a": task_result("a", [0, 0])},
        quantized={"a": task_result("a", [0, 1])},
        mirror={"state": "failed", "message": "the package wandb cannot be imported"},
        command=None,
    )
    text = printed(run, None)
    assert re.search(r"^a +2 +0\.0 +50\.0 +\+50\.0 \[.*\] +1 unclear +-", text, re.M)
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
