"""Token ids and the model's vocabulary: a model has an embedding for each id below its size, and for no other.

A tokenizer may have more tokens than that: tokens that were added to it for nothing, or for another model. Such a
checkpoint works as long as no text spells one of them, so it is loaded, and the text is refused where it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

AROUND = 30  # characters of a text, shown on either side of a token


def limit(tokenizer: Any, size: int) -> None:
    """Have `text_ids` refuse tokens outside the vocabulary of `size`; a tokenizer that has none stays as it is.

    Raises ValueError where a token of the tokenizer's own vocabulary, which texts cannot avoid, lies outside.
    """
    ids = tokenizer.get_vocab().values()
    outside = {token for token in ids if token >= size}
    if outside - set(tokenizer.get_added_vocab().values()):
        raise ValueError(f"the tokenizer has {max(ids) + 1} tokens, the model's vocabulary only {size}")
    if outside:
        tokenizer.model_vocabulary = size


def text_ids(tokenizer: Any, text: str, *, plain: bool = False) -> list[int]:
    """Token ids of a text, nothing added; with `plain`, tokens with a meaning of their own are read as ordinary text.

    Raises ValueError where the text spells a token that the model's vocabulary does not have (see `limit`).
    """
    how = {"split_special_tokens": True} if plain else {}
    ids = list(tokenizer(text, add_special_tokens=False, **how).input_ids)
    check(tokenizer, ids, text)
    return ids


def check(tokenizer: Any, ids: Sequence[int], text: str) -> None:
    """Raise ValueError for ids of `text` that the model's vocabulary does not have."""
    size = getattr(tokenizer, "model_vocabulary", None)
    if size is None or max(ids, default=0) < size:
        return
    outside = next(token for token in ids if token >= size)
    name = str(tokenizer.convert_ids_to_tokens(outside))
    at = max(0, text.find(name))
    shown = text[max(0, at - AROUND) : at + len(name) + AROUND]
    raise ValueError(
        f"the text {shown!r} holds the token {name!r} with the id {outside}, but the model's vocabulary has {size} "
        f"tokens, ids 0 to {size - 1}: take {name!r} out of the text, or use the tokenizer that belongs to the model"
    )


def id_problems(ids: Any, size: int) -> list[str]:
    """What is wrong with token ids, a tensor of any shape, for a model with a vocabulary of `size`."""
    if not ids.numel():
        return []
    low, high = ids.aminmax()
    if low >= 0 and high < size:
        return []
    return [f"{int(low if low < 0 else high)} is no token of the model; ids go from 0 to {size - 1}"]
