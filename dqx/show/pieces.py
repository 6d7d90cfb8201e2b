"""The text of an answer token by token, where some of its tokens are not written yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer writes for half a character


class Tokenizer(Protocol):
    """What is asked of one."""

    def decode(self, token_ids: list[int], /) -> str | list[str]: ...


def pieces(tokenizer: Tokenizer, ids: Sequence[int | None]) -> list[str]:
    """What each token adds to the text, "" for None; together, without gaps, they are the text.

    A character that is spread over several tokens belongs to the last of them.
    """
    texts: list[str] = []
    run: list[int] = []  # the tokens since the last gap from which the next one's text follows
    known = ""  # their text, as far as it has been given out
    for token in ids:
        if token is None:
            texts.append("")
            run, known = [], ""
            continue
        run.append(token)
        whole = str(tokenizer.decode(run))
        if whole.endswith(INCOMPLETE) and len(run) < 8:
            texts.append("")
            continue
        texts.append(whole[len(known) :])
        run = [token]
        known = str(tokenizer.decode(run))
        if known.endswith(INCOMPLETE) or not whole.endswith(known):  # a token that has no text of its own
            run, known = [], ""
    return texts
