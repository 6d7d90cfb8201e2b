"""Which version of a dataset on the hub is read: part of what a result depends on.

`datasets` reads the newest commit of a repository where the hub can be reached, and the newest copy in its own cache
where it cannot. Such a copy lies in a folder that has the commit's name, so that both are told by one string.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

TIMEOUT = 10.0  # seconds for the hub to answer
Named = tuple[str, str | None]  # a dataset `OWNER/NAME` and one of its configurations


def revisions(wanted: Iterable[Named]) -> dict[str, str | None]:
    """The commit that each configuration is read from, by `OWNER/NAME CONFIG`.

    None where neither the hub nor the cache has it. Looked up once, until `look_again`.
    """
    return {
        f"{dataset} {config or ''}".rstrip(): _newest(dataset) or _cached(dataset, config) for dataset, config in wanted
    }


def look_again() -> None:
    """A new run reads what there is by now."""
    _newest.cache_clear()
    _cached.cache_clear()


@functools.cache
def _newest(dataset: str) -> str | None:
    """The repository's newest commit; None where the hub does not say."""
    import datasets  # a second: not before there is something to read
    from huggingface_hub import HfApi

    if datasets.config.HF_HUB_OFFLINE:
        return None
    try:
        return HfApi(endpoint=datasets.config.HF_ENDPOINT).dataset_info(dataset, timeout=TIMEOUT).sha
    except Exception:  # many kinds, of whichever client the hub's library has
        return None


@functools.cache
def _cached(dataset: str, config: str | None) -> str | None:
    """The commit of the newest copy in the cache of `datasets`."""
    import datasets  # as above

    try:
        with _offline():
            return str(datasets.load_dataset_builder(dataset, name=config).hash)
    except (OSError, ValueError):  # a ConnectionError is an OSError
        return None


@contextmanager
def _offline() -> Iterator[None]:
    """`datasets` looks into its cache and nowhere else, and does not say so: it will when it reads."""
    import datasets  # as above

    before, datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE, True
    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity_error()
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
        datasets.logging.set_verbosity(level)
