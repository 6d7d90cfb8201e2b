"""How a frame looks: the prompt, the answer with its masks, a line of numbers, a legend. Pure functions of frames.

A written token has the colour of the probability that the model gave it; one that this forward wrote is inverted. The
three colours are told apart with every kind of colour vision, and seen on dark and on light.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.console import Console, Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from dqx.diffusion.frames import Frame
from dqx.record.words import visible
from dqx.show.pieces import Tokenizer, pieces

MASK, SPECIAL = "░", "·"
ASCII = str.maketrans({MASK: "_", SPECIAL: "."})  # for terminals that can show nothing else
#: Probability from which a colour holds, the colour, what the legend says.
LEVELS = ((0.9, "#009e73", "above 90 %"), (0.5, "#a89600", "50 to 90 %"), (0.0, "#d55e00", "below 50 %"))
GAP = 3  # columns between two answers
AROUND = 8  # lines beside those of an answer: title, numbers, legend
NARROW = 64  # columns below which two answers stand one above the other


@dataclass(frozen=True)
class Pane:
    """One answer: whose it is, and what reads its tokens."""

    title: str
    tokenizer: Tokenizer
    special: frozenset[int]  # tokens that the text leaves out
    mask_token_id: int
    steps: int


@dataclass(frozen=True)
class Moment:
    """A frame and how long it took the model to come there, in seconds."""

    frame: Frame
    seconds: float


def colour(probability: float | None) -> str:
    """The colour of a token; none where its probability is not known."""
    if probability is None or math.isnan(probability):
        return ""
    return next(name for least, name, _ in LEVELS if probability >= least)


def answer(pane: Pane, frame: Frame, against: Frame | None = None, *, now: bool = True) -> Text:
    """The answer as it is at a frame. Tokens that differ from those of `against` are underlined.

    With `now` what this forward wrote is inverted.
    """
    readable = [None if i == pane.mask_token_id or i in pane.special else i for i in frame.ids]
    texts, text = pieces(pane.tokenizer, readable), Text()
    first, stop = frame.block
    for i, token in enumerate(frame.ids):
        if token == pane.mask_token_id:
            text.append(MASK, Style(dim=not first <= i < stop))
            continue
        other = against is not None and against.ids[i] not in (token, pane.mask_token_id)
        style = Style(
            color=colour(frame.probability[i]) or None,
            reverse=now and i in frame.committed,
            underline=other,
            dim=token in pane.special and not other,
        )
        text.append(SPECIAL if token in pane.special else visible(texts[i]), style)
    return text


def numbers(pane: Pane, moment: Moment) -> str:
    """Step, forwards, tokens for each, and the time."""
    frame = moment.frame
    written = sum(token != pane.mask_token_id for token in frame.ids)
    parts = (
        f"step {min(frame.step + 1, pane.steps)}/{pane.steps}",  # a block shared with the prompt is one more
        f"{frame.forwards} forward{'s' * (frame.forwards != 1)}",
        f"{written / frame.forwards:.1f} tokens each",
        f"{moment.seconds:.1f} s",
    )
    return ", ".join(parts)


def legend(console: Console, underlined: bool = False) -> Text:
    """What signs and colours mean."""
    text = Text(f"{MASK} mask, {SPECIAL} special; probability when written: ", style="dim")
    for i, (_, name, words) in enumerate(LEVELS):
        text.append(", " * (i > 0)).append(words, Style(color=name, dim=False))
    return encodable(text.append("; underlined: differs" if underlined else ""), console)


def screen(
    prompt: str,
    panes: Sequence[tuple[Pane, Moment]],
    console: Console,
    *,
    height: int | None = None,
    now: bool = True,
) -> RenderableType:
    """One answer below its prompt, or two side by side, the second compared with the first.

    Texts longer than `height` lines, all in all, are shown where they are being written.
    """
    beside = len(panes) > 1 and console.width >= NARROW
    columns = (console.width - GAP) // 2 if beside else console.width
    room = None if height is None else (height - AROUND) // (1 if beside else len(panes))
    given, reference = Text(visible(prompt), style="dim"), panes[0][1].frame
    parts: list[tuple[RenderableType, ...]] = []
    for i, (pane, moment) in enumerate(panes):
        text = given.copy().append_text(answer(pane, moment.frame, reference if i else None, now=now))
        current = replace(moment.frame, ids=moment.frame.ids[: moment.frame.block[1]])
        shown = seen(text, len(given) + len(answer(pane, current)), columns, console, room)
        parts.append((Text(visible(pane.title), "bold"), shown, Text(numbers(pane, moment), "dim")))
    table = Table.grid(padding=(0, GAP, 0, 0), pad_edge=False)
    for _ in parts if beside else parts[:1]:
        table.add_column(width=columns, overflow="fold")
    for row in zip(*parts, strict=True) if beside else ((part,) for pane_parts in parts for part in pane_parts):
        table.add_row(*row)
    return Group(table, legend(console, len(panes) > 1))


def seen(text: Text, until: int, width: int, console: Console, height: int | None) -> Text:
    """The text in lines of `width`; of more than `height` those up to the character `until`."""
    lines = list(text.wrap(console, width, overflow="fold", tab_size=4))
    if height is not None and len(lines) > height:
        last = len(text[:until].wrap(console, width, overflow="fold", tab_size=4))
        first = max(0, last - max(1, height))
        lines = lines[first : first + max(1, height)]
    return encodable(Text("\n").join(lines), console)


def encodable(text: Text, console: Console) -> Text:
    """The text with other signs for those that a terminal cannot show."""
    if console.options.ascii_only:
        text = text.copy()
        text.plain = text.plain.translate(ASCII)
    return text
