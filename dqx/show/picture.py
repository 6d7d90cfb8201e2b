"""A screen as an SVG file: text that stays text, no fonts from elsewhere."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

from rich.console import Console, RenderableType
from rich.terminal_theme import SVG_EXPORT_THEME

WIDTH = 100


def svg(screen: Callable[[Console], RenderableType], title: str, width: int = WIDTH) -> str:
    """The picture of what `screen` draws for a terminal of `width` columns."""
    console = Console(
        record=True,
        width=width,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
        highlight=False,
        emoji=False,
        legacy_windows=False,
    )
    console.print(screen(console))
    drawn = console.export_svg(title=title, theme=SVG_EXPORT_THEME, unique_id="dqx")
    drawn = re.sub(r"@font-face\s*\{.*?\}\s*", "", drawn, flags=re.DOTALL)
    return drawn.replace("<text ", '<text xml:space="preserve" ')  # some viewers drop spaces in front
