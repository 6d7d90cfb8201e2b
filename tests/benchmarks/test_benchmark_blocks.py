"""The benchmark of block diffusion: three sides, one text."""

import json

from dqx.benchmarks import blocks


def test_three_sides_write_the_same(tmp_path, capsys):
    file = tmp_path / "figures.json"
    small = ["--prompts", "2", "--prompt", "16", "--answer", "8", "--blocks", "2", "--lengths", "4", "--threads", "1"]
    blocks.main([*small, "--json", str(file)])
    recomputed, stored, engine = json.loads(file.read_text())
    assert recomputed["equal"] == stored["equal"] == engine["equal"] == 2
    assert recomputed["forwards"] == stored["forwards"] == engine["forwards"]
    assert recomputed["tokens"] > stored["tokens"] == engine["tokens"]
    shown = capsys.readouterr().out
    assert "recomputed" in shown
    assert "2 prompts of 8 to 16 tokens" in shown
