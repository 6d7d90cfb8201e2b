"""Where a generated answer ends: at its first end token and before its first stop string."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from transformers import PreTrainedTokenizerBase


class Ending:
    """The text of an answer, and whether its beginning decides it.

    An answer ends at the first of the `tokens`, or of the `strings` that are special tokens; its text ends before the
    first of the `strings`. Special tokens are left out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens: Collection[int], strings: Sequence[str]):
        special = tokenizer.get_added_vocab()
        self.tokenizer = tokenizer
        self.strings = [string for string in strings if string]
        self.tokens = {*tokens, *(special[string] for string in strings if string in special)}

    def text(self, ids: Sequence[int]) -> str:
        """The answer's text, from all its tokens or from those after which it is `settled`."""
        end = next((i for i, token in enumerate(ids) if token in self.tokens), len(ids))
        text = self._decode(ids[:end])
        return text[: self._cut(text)]

    def settled(self, ids: Sequence[int]) -> bool:
        """Whether tokens after `ids` cannot change the answer's text.

        So it is after an end token, and after a stop string unless another, begun before it, may still be completed.
        """
        if not self.tokens.isdisjoint(ids):
            return True
        text = self._decode(ids).rstrip("\ufffd")  # a character whose last bytes are to come
        cut = self._cut(text)
        return cut is not None and not any(
            string.startswith(text[start:]) for string in self.strings for start in range(cut)
        )

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode([*ids], skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _cut(self, text: str) -> int | None:
        """Where the first stop string begins; None: there is none."""
        return min((at for string in self.strings if (at := text.find(string)) >= 0), default=None)
