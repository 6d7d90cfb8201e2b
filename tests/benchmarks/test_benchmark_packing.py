"""The benchmark of packing: sizes are those of the codes, and what is read is what was written."""

import json

import pytest
import torch

from dqx.benchmarks import packing
from dqx.benchmarks.common import in_turns


def test_a_quick_run(tmp_path, capsys):
    file = tmp_path / "figures.json"
    packing.main(["--quick", "--bits", "w4a16,fp8", "--json", str(file)])
    report = json.loads(file.read_text())
    assert report["settings"]["scale"] == 16
    base, w4, fp8 = report["figures"]
    assert [row["side"] for row in (base, w4, fp8)] == ["bfloat16", "w4a16", "fp8"]
    for row in (base, w4, fp8):
        assert row["equal"]
        assert len(row["write"]) == len(row["read"]) == 2
        assert min(row["write"] + row["read"]) > 0
        assert row["memory_to_write"] >= 0
    weights = 4 * 256 * 256 + 3 * 256 * 768
    assert base["disk"] == pytest.approx(2 * weights, rel=0.01)
    assert w4["disk"] == pytest.approx((4 + 32 / 128 + 4 / 128) / 8 * weights, rel=0.02)  # scales and zero points
    assert fp8["disk"] == pytest.approx(weights, rel=0.03)
    assert "medians of 2 rounds in turns" in " ".join(capsys.readouterr().out.split())


def test_what_differs_is_seen():
    arch = packing.architecture(32, 1)
    one, other = (packing.block_of_side("w4a16", arch) for _ in range(2))
    assert packing.same(one, other)
    with torch.no_grad():
        other.up.weight[3, 5] *= 1.01
    assert not packing.same(one, other)


def test_turns_are_shared_out():
    turns = list(in_turns("abc", 4))
    assert [side for _, side in turns] == list("abcbcacababc")
    assert [turn for turn, _ in turns] == [turn for turn in range(4) for _ in "abc"]


def test_mistakes_are_told_at_once(capsys):
    for wrong, said in (("--bits=w9", "w9 is unknown"), ("--scale=3", "leaves no whole"), ("--rounds=0", "at least 1")):
        with pytest.raises(SystemExit):
            packing.main([wrong])
        assert said in capsys.readouterr().err
