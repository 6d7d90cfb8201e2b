"""dqx generate: what is drawn of a frame, what is printed where nobody watches, what is refused."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console
from rich.text import Text

import dqx
from dqx.common.problems import ConfigProblems
from dqx.diffusion.frames import Frame
from dqx.engines import llama_cpp
from dqx.show import command
from dqx.show.drawing import LEVELS, Moment, Pane, answer, screen
from dqx.show.pieces import pieces
from dqx.study.source import full_precision

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "80"}
COMMAND = [sys.executable, "-m", "dqx", "generate"]
MASK, END = 0, 1
WORDS = {2: "def f():", 3: "\n", 4: "    return", 5: " 1", 6: "\x1b[2J"}


class Words:
    """A tokenizer of WORDS."""

    def decode(self, token_ids: list[int]) -> str:
        return "".join(WORDS[token] for token in token_ids)


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8."""

    def decode(self, token_ids: list[int]) -> str:
        return bytes(token_ids).decode(errors="replace")


def frame(ids: list[int], probability: list[float | None], committed: list[int] | None = None, stop: int = 9) -> Frame:
    return Frame(0, ids, probability, committed or [], [], (0, stop), step=2, forwards=3)


def pane(title: str = "model") -> Pane:
    return Pane(title, Words(), frozenset({END}), MASK, steps=8)


def printed(*frames: Frame, width: int = 80, height: int | None = None, prompt: str = "# f\n") -> list[str]:
    """The lines of a terminal."""
    console = Console(width=width, height=25, file=io.StringIO(), force_terminal=True)
    panes = [(pane(f"model {i}"), Moment(one, 0.5)) for i, one in enumerate(frames)]
    console.print(screen(prompt, panes, console, height=height))
    return [line.rstrip() for line in Text.from_ansi(console.file.getvalue()).plain.split("\n")]  # type: ignore


def test_text_token_by_token() -> None:
    text = "aé€\n😀b"
    assert "".join(pieces(Bytes(), list(text.encode()))) == text
    assert pieces(Bytes(), list("é€".encode())) == ["", "é", "", "", "€"]
    assert pieces(Bytes(), [97, None, 98]) == ["a", "", "b"]
    assert pieces(Bytes(), ["é".encode()[0], None, 98]) == ["", "", "b"]  # half a character, so far


@pytest.mark.parametrize("name", ["nano_llada", "nano_block"])
def test_pieces_are_the_text(name: str) -> None:
    tokenizer = dqx.load(name, device="cpu").tokenizer
    for text in (command.PROMPT, "naïve 漢字 😀\n\n  x", " 1 3  7"):
        assert "".join(pieces(tokenizer, tokenizer(text)["input_ids"])) == text


def test_an_answer_is_its_tokens_and_masks() -> None:
    one = frame([2, 3, 4, MASK, END, MASK], [0.99, 0.7, 0.2, None, 0.95, None], [2], stop=4)
    text = answer(pane(), one)
    assert text.plain == "def f():\n    return░·░"
    styles = [span.style for span in text.spans]
    assert [style.color.name for style in styles[:3]] == [name for _, name, _ in LEVELS]
    assert [bool(style.reverse) for style in styles] == [False, False, True, False, False, False]
    assert [bool(style.dim) for style in styles] == [False, False, False, False, True, True]
    assert not any(span.style.reverse for span in answer(pane(), one, now=False).spans)
    other = answer(pane(), one, frame([2, 3, 5, 4, MASK, 5], [None] * 6))
    assert [bool(span.style.underline) for span in other.spans] == [False, False, True, False, False, False]


def test_what_would_steer_the_terminal_is_escaped() -> None:
    shown = "\n".join(printed(frame([6, 5], [0.9, 0.9]), prompt="\x1b]0;title\x07"))
    assert "\\x1b[2J 1" in shown
    assert "\\x1b]0;title\\x07" in shown


def test_a_screen() -> None:
    shown = printed(frame([2, 3, 4, MASK], [0.9] * 3 + [None]))
    assert shown[:5] == ["model 0", "# f", "def f():", "    return░", "step 3/8, 3 forwards, 1.0 tokens each, 0.5 s"]
    assert shown[5].startswith("░ mask, · special; probability when written: above 90 %, 50 to 90 %, below")
    beside = printed(frame([2], [0.9]), frame([5], [0.9]))
    assert beside[0].split() == ["model", "0", "model", "1"]
    assert beside[2].startswith("def f():  ")
    assert beside[2].endswith("   1")
    below = printed(frame([2], [0.9]), frame([5], [0.9]), width=40)
    assert [line for line in below if line.startswith("model")] == ["model 0", "model 1"]
    assert max(map(len, below)) <= 40


def test_a_long_text_is_shown_where_it_is_written() -> None:
    ids = [5, 3] * 20 + [MASK, 3] * 20
    shown = printed(frame(ids, [0.9 if token else None for token in ids], stop=41), height=14)
    assert len(shown) <= 14
    assert shown[1:-3].count("░") == 1
    assert shown.count(" 1") > 2
    assert printed(frame(ids, [None] * len(ids))).count("░") == 20


def test_a_terminal_that_has_ascii_alone() -> None:
    class Ascii(io.StringIO):
        encoding = "ascii"

    console = Console(width=80, file=Ascii(), force_terminal=True)
    console.print(screen("", [(pane(), Moment(frame([MASK, END], [None, 0.9]), 0.0))], console))
    assert "_" in console.file.getvalue()  # type: ignore
    assert console.file.getvalue().isascii()  # type: ignore


def generated(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], cwd=folder, env=ENVIRONMENT, capture_output=True, encoding="utf-8")


def test_without_a_terminal_the_text_alone(tmp_path: Path) -> None:
    done = generated("nano_llada", "--svg", "a.svg", "--at", "25", folder=tmp_path)
    expected = dqx.load("nano_llada", device="cpu").generate(command.PROMPT, gen_length=40, block_length=20)
    assert (done.returncode, done.stdout) == (0, f"{expected}\n")
    picture = (tmp_path / "a.svg").read_text(encoding="utf-8")
    text = "".join(ElementTree.fromstring(picture).itertext()).replace("\xa0", " ")
    assert "step 25/40, 25 forwards, 1.0 tokens each" in text
    assert text.count("░") == 40 - 25 + 1  # and one of the legend
    assert "url(http" not in picture
    assert len(picture) < 60_000


def test_on_a_terminal_every_frame_and_a_clean_end(tmp_path: Path) -> None:
    """The cursor is hidden meanwhile and shown again, and the last screen is the whole answer."""
    ours, theirs = pty.openpty()
    line = [*COMMAND, "nano_block", "--delay", "0"]
    with subprocess.Popen(line, cwd=tmp_path, env=ENVIRONMENT, stdin=theirs, stdout=theirs, stderr=theirs) as running:
        os.close(theirs)
        seen = b""
        try:
            while part := os.read(ours, 65536):
                seen += part
        except OSError:  # the other end is closed
            pass
    os.close(ours)
    shown = seen.decode()
    assert running.returncode == 0, shown
    assert "░" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") >= 1
    last = Text.from_ansi(shown.rpartition("nano_block, full precision")[2].replace("\r", "")).plain
    assert "    return xs" in last


def test_two_side_by_side(tmp_path: Path) -> None:
    lm, before = (dqx.load("nano_llada", device="cpu") for _ in range(2))
    lm.quantize("rtn", "w3a16")
    lm.save(tmp_path / "saved")
    done = generated("saved", "--compare", "--gen-length", "16", "--steps", "8", folder=tmp_path)
    one, other = (str(each.generate(command.PROMPT, gen_length=16, steps=8)) for each in (before, lm))
    titles = "nano_llada, full precision:", f"nano_llada, {lm.facts()['precision']}:"
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{titles[0]}\n{one}\n{titles[1]}\n{other}\n"
    with pytest.raises(ConfigProblems, match="is at full precision"):
        full_precision("nano_llada", before)


def test_what_is_quantized_already_is_refused_before_weights_load(tmp_path: Path, monkeypatch, capsys) -> None:
    lm = dqx.load("nano_llada", device="cpu")
    lm.quantize("rtn", "w3a16")
    lm.save(tmp_path / "saved")
    for shard in (tmp_path / "saved").glob("*.safetensors"):
        shard.unlink()
    monkeypatch.setattr(sys, "argv", ["dqx generate", str(tmp_path / "saved"), "--bits", "w4a16"])
    with pytest.raises(SystemExit):
        command.main()
    assert "saved is quantized already; leave out --method and --bits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nano_lada"], "did you mean nano_llada"),
        (["nano_llada", "--gen-length", "0"], "--gen-length=0 is not a positive integer"),
        (
            ["nano_llada", "--delay=-1", "--at=2"],
            "1. --delay=-1.0 is not a number at least 0\n2. --at chooses the frame",
        ),
        (["nano_llada", "--svg", "no/where.svg"], "--svg no/where.svg: there is no such folder"),
        (["nano_block", "--svg", "{}/a.svg", "--at", "99"], "--at 99: there are 11 frames"),
        (["nano_llada", "--method", "gptx"], "did you mean gptq or gptaq?"),
        (["nano_llada", "--steps", "7"], "steps=7 cannot be shared equally by 2 blocks"),
        (["nano_dream", "--threshold", "0.9"], "the sampler of nano_dream (entropy) has no threshold"),
        (["nano_llada", "--gguf", "a.gguf", "--bits", "3"], "--gguf FILE is quantized already"),
        (["nano_llada", "--gguf", "a.gguf"], "a.gguf" if not llama_cpp.problems() else "llama-cpp-python is missing"),
        (["nano_llada", "--compare"], "nano_llada is at full precision, and there is nothing to compare it with"),
    ],
)
def test_what_is_refused(arguments, told, monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(sys, "argv", ["dqx generate", *(argument.format(tmp_path) for argument in arguments)])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
