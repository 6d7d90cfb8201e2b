"""The benchmark of start-up, on commands that answer at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dqx.benchmarks import startup


def test_every_command_is_measured_on_both_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(startup, "COMMANDS", {"nothing": ("-c", ""), "help": ("-m", "dqx", "--help")})
    startup.main(["--repeat", "1", "--before", str(startup.CHECKOUT), "--json", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures) == {"nothing", "help"}
    assert all(set(sides) == {"before", "now"} and min(sides.values()) > 0 for sides in figures.values())
    assert "before" in capsys.readouterr().out


def test_a_command_that_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no such thing"):
        startup.seconds(startup.CHECKOUT, ("-c", "raise SystemExit('no such thing')"), tmp_path)


def test_a_folder_without_a_checkout_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        startup.main(["--before", str(tmp_path)])
    assert "has no launch.py" in capsys.readouterr().err


def test_commands_that_compute_nothing_import_nothing_that_computes(tmp_path: Path) -> None:
    """What keeps the figures small: no command but those that judge a model's shapes imports it."""
    code = "import sys, runpy; sys.argv = {argv}\ntry: runpy.run_{how}\nexcept SystemExit: pass\n"
    code += "print([name for name in ('torch', 'transformers', 'datasets', 'numpy', 'scipy') if name in sys.modules])"
    for name, arguments in startup.COMMANDS.items():
        if arguments[0] == "-c" or name.endswith("in a setting"):
            continue
        if arguments[0] == startup.LAUNCH:
            argv, how = list(arguments), f"path({str(startup.CHECKOUT / startup.LAUNCH)!r}, run_name='__main__')"
        else:
            argv, how = ["dqx", *arguments[2:]], "module('dqx', run_name='__main__')"
        script = tmp_path / "script.py"
        script.write_text(code.format(argv=argv, how=how))
        startup.seconds(startup.CHECKOUT, (str(script),), tmp_path)
        told = (tmp_path / "told").read_text().splitlines()[-1]
        assert told == "[]" or (told == "['numpy']" and "report" in arguments), (name, told)
