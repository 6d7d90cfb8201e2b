"""Which classes a configuration may name, and that nothing else is even imported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dqx.common import parts
from dqx.common.parts import Untrusted, build_part, locate, part_problems, trust

CALLS = (
    {"_target_": "sympy.sympify", "a": "__import__('os').system('touch {}')"},
    {"_target_": "torch.hub.load", "repo_or_dir": "someone/something", "model": "x"},
    {"_target_": "os.system", "command": "touch {}"},
    {"_target_": "builtins.eval", "source": "open('{}', 'w')"},
    {"_target_": "subprocess.Popen", "args": ["touch", "{}"]},
    {"_target_": "hydra.utils.instantiate", "config": {"_target_": "os.getcwd"}},
)
NO_PARTS = (
    "dqx.quant.rounding.gptq.Tensor",  # torch's
    "dqx.quant.rounding.rtn.rtn_round",  # a function
    "dqx.quant.loop.quantize",
    "dqx.quant.registry.import_module",
    "dqx.quantum.leap",
    "dqx",
    "",
)


@pytest.mark.parametrize("part", CALLS, ids=lambda part: str(part["_target_"]))
@pytest.mark.parametrize("place", ["itself", "an option", "a named part", "a list", "a list in a list"])
def test_nothing_but_parts_is_built(part: dict[str, object], place: str, tmp_path: Path) -> None:
    written = tmp_path / "written"
    harm = {key: value.replace("{}", str(written)) if isinstance(value, str) else value for key, value in part.items()}
    inside = {
        "itself": harm,
        "an option": {"_target_": "dqx.quant.method.Method", "rounding": harm},
        "a named part": {"_target_": "dqx.quant.method.Method", "transforms": {"x": harm}},
        "a list": {"_target_": "dqx.quant.method.Method", "transforms": [harm]},
        "a list in a list": {"_target_": "dqx.quant.method.Method", "clip": [[harm]]},
    }[place]
    told = "\n".join(part_problems(inside, "method"))
    assert f"_target_={part['_target_']} is no part of dqx" in told
    assert "parts=[" in told
    with pytest.raises(Untrusted):
        build_part(inside)
    assert not written.exists()


@pytest.mark.parametrize("target", NO_PARTS)
def test_what_stands_beside_parts_is_none(target: str) -> None:
    with pytest.raises((Untrusted, ImportError)):
        locate(target)
    assert part_problems({"_target_": target}, "method")


def test_own_parts_are_built_once_their_module_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "our_team").mkdir()
    (tmp_path / "our_team" / "__init__.py").write_text("")
    (tmp_path / "our_team" / "methods.py").write_text("from os import system\nclass Ours:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(parts, "TRUSTED", set())
    part = {"_target_": "our_team.methods.Ours"}
    assert "parts=[our_team.methods]" in part_problems(part, "method.rounding")[0]
    assert "our_team.methods" not in sys.modules
    trust(["our_team"])
    assert part_problems(part, "method.rounding") == []
    assert type(build_part(part)).__name__ == "Ours"
    assert part_problems({"_target_": "our_team.methods.system"}, "x") == [
        "x._target_=our_team.methods.system is no class that describes a part; see conf/ for examples"
    ]
