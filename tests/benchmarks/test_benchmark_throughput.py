"""The benchmark of throughput: quantized sides beside the model at full precision, with their answers and sizes."""

import json

import pytest
import torch

from dqx.benchmarks import throughput
from dqx.quant.backends.choice import untrusted

SMALL = ["--models", "nano_llada", "--bits", "w8a8", "--batches", "2", "--answers", "8", "--prompt", "8"]
SMALL += ["--rounds", "2", "--dtype", "float32"]


def figures(tmp_path, *more):
    file = tmp_path / "figures.json"
    throughput.main([*SMALL, *more, "--json", str(file)])
    (found,) = json.loads(file.read_text())["models"]
    return {row["side"]: row for row in found["figures"]}, found["left_out"]


def test_sides_write_the_answers_of_their_simulation(tmp_path, capsys):
    rows, left_out = figures(tmp_path)
    refused = untrusted("int8", torch.device("cpu"))
    assert left_out == ({} if refused is None else {"w8a8 int8": refused})
    assert set(rows) | set(left_out) == {"full precision", "w8a8 simulated", "w8a8 int8"}
    for row in rows.values():
        assert row["steps"] == 2  # of four tokens each
        assert row["forwards_per_token"] == pytest.approx(2 * 2 / (2 * 8))  # two answers of two steps, of eight tokens
        assert len(row["seconds"]) == len(row["ratios"]) == 2
        assert row["ratio"]["lowest"] <= row["ratio"]["median"] <= row["ratio"]["highest"]
        assert row["tokens_per_second"] * row["seconds_per_step"] == pytest.approx(2 * 8 / 2)
        assert row["disk"] > 0
    base, simulated = rows["full precision"], rows["w8a8 simulated"]
    assert base["ratios"] == [1, 1]
    assert base["equal_to_base"] == 1
    assert simulated["equal_to_simulation"] is None
    assert base["disk"] > 4 * 1e6  # about 2.2 million numbers of four bytes
    if refused is None:
        int8 = rows["w8a8 int8"]
        assert int8["equal_to_simulation"] == 1
        assert int8["disk"] == simulated["disk"]
        assert int8["memory"] < simulated["memory"]  # codes in place of weights
    assert "w8a8 simulated" in capsys.readouterr().out


def test_what_cannot_run_is_named_with_the_reason(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(throughput, "untrusted", lambda backend, device: f"{backend} adds up wrongly here")
    rows, left_out = figures(
        tmp_path, "--models", "random", "--scale", "32", "--blocks", "1", "--bits", "w8a8,gguf_q4_0"
    )
    assert set(rows) == {"full precision", "w8a8 simulated"}
    assert left_out["w8a8 int8"] == "int8 adds up wrongly here"
    assert "tokenizer" in left_out["gguf_q4_0 llama.cpp"]
    assert "left out: w8a8 int8: int8 adds up wrongly here" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--answers=6", "must divide the answers; 6 is no multiple"),
        ("--batches=1,0", "must be numbers of at least 1"),
        ("--bits=w9", "w9 is unknown"),
        ("--scale=3", "leaves no whole groups"),
    ],
)
def test_mistakes_are_told_at_once(option, told, capsys):
    with pytest.raises(SystemExit):
        throughput.main([option])
    assert told in capsys.readouterr().err
