"""Artefacts as JSON files, one per key: facts, checksum, content. They appear whole or not at all.

What is too large for JSON stands beside it under the same name, tensors in a `.safetensors` file, quantized models in
a folder; the JSON has their digest. A file that is damaged, or whose facts are not those of its name, is reported,
ignored and written anew. Who computes an artefact holds its lock, which the system frees when the holder dies; a second
run of the same waits and then reuses. Where the folder cannot be written, this is reported and the run goes on, without
keeping anything.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from dqx.common.digest import digest
from dqx.common.files import jsonable, write_json
from dqx.common.heartbeat import beat
from dqx.common.tensors import tensor_digest
from dqx.evaluate.journal import Journal
from dqx.study.cache.key import Key
from dqx.study.cache.owned import mark

if TYPE_CHECKING:  # torch is imported where tensors are read or written: `dqx cache` does without
    from torch import Tensor

log = logging.getLogger(__name__)
WAIT = 1.0  # seconds between two signs of life
T = TypeVar("T")


class Store:
    """A folder of artefacts. `warnings` has what went wrong with its files, for the record."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.warnings: list[str] = []

    def read(self, key: Key, parse: Callable[[Any], T]) -> T | None:
        """The artefact as `parse` makes it of its content; None where it has to be computed."""
        path = self._place(key, ".json")
        if not path.exists():
            return None
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["facts"] != key.facts:
                raise ValueError("it was made with other settings than its name says")
            if stored["digest"] != digest(stored["content"]):
                raise ValueError("its content does not match its checksum")
            content = parse(stored["content"])
            self.touch(path)
            return content
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
            self.warn(f"{path} is damaged and was computed again ({reason})")
            return None

    def write(self, key: Key, content: Any) -> bool:
        """Keep an artefact. Returns whether it is kept."""
        path, stored = self._place(key, ".json"), jsonable(content)
        try:
            write_json(path, {"facts": key.facts, "digest": digest(stored), "content": stored})
        except OSError as error:
            self.warn(f"{path} could not be kept ({error.strerror or error})")
            return False
        return True

    def read_tensors(self, key: Key) -> dict[str, Tensor] | None:
        """The tensors that `write_tensors` kept, on the CPU; None where they have to be computed."""
        path, expected = self._place(key, ".safetensors"), self.read(key, lambda content: str(content["tensors"]))
        if expected is None or not path.exists():
            return None
        from safetensors.torch import load_file

        try:
            tensors = load_file(path)
            if tensor_digest(sorted(tensors.items())) != expected:
                raise ValueError("its content does not match its checksum")
        except (OSError, ValueError, SafetensorError) as error:
            self.warn(f"{path} is damaged and was computed again ({error})")
            return None
        self.touch(path)
        return tensors

    def has_tensors(self, key: Key) -> bool:
        """Whether tensors are kept, which nobody has looked at."""
        paths = [self._place(key, suffix) for suffix in (".json", ".safetensors")]
        for path in paths:
            self.touch(path)
        return all(path.exists() for path in paths)

    def write_tensors(self, key: Key, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors; the JSON, with their digest, last."""
        from safetensors.torch import save_file

        path = self._place(key, ".safetensors")
        temporary = path.with_name(f".{path.name}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
            with temporary.open("rb") as f:
                os.fsync(f.fileno())
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):  # what a full disk took of it
                temporary.unlink(missing_ok=True)
            self.warn(f"{path} could not be kept ({error})")
            return
        self.write(key, {"tensors": tensor_digest(sorted(tensors.items()))})

    def folder_of(self, key: Key) -> Path:
        """Where a quantized model is kept, if it is."""
        return self._place(key)

    def write_folder(self, key: Key, write: Callable[[Path], object]) -> None:
        """Keep the folder that `write` makes, in place of an earlier one. The caller holds the lock."""
        folder = self.folder_of(key)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            self.remove_folder(key)
            write(folder)
        except (OSError, ValueError, SafetensorError) as error:
            self.warn(f"{folder} could not be kept ({error})")

    def remove_folder(self, key: Key) -> None:
        """Remove a kept folder and what killed runs left of it. The caller holds the lock."""
        folder = self.folder_of(key)
        for path in [*folder.parent.glob(f".{folder.name}.*"), folder]:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)

    @staticmethod
    def touch(path: Path) -> None:
        """Note that an artefact was used: what was not for longest goes first when space is short."""
        with suppress(OSError):
            os.utime(path)

    @contextmanager
    def lock(self, key: Key) -> Iterator[None]:
        """Be the only one to compute an artefact; waits, and says so, while another run does."""
        lock = FileLock(self._place(key, ".lock"), is_singleton=True)
        try:
            self._place(key, ".lock").parent.mkdir(parents=True, exist_ok=True)
            mark(self.folder)
            try:
                lock.acquire(blocking=False)
            except Timeout:
                log.info(f"  another run computes {key.name}, with the same settings: waiting for it")
                while not lock.is_locked:
                    beat()  # who waits does not hang
                    with suppress(Timeout):
                        lock.acquire(timeout=WAIT)
        except OSError as error:
            self.warn(f"{lock.lock_file} cannot be locked: other runs may compute the same ({error})")
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def reading(self, key: Key) -> Iterator[None]:
        """Keep an artefact from being replaced or removed; several runs may read at a time, none while one writes."""
        with ExitStack() as held:
            with suppress(OSError):  # where nothing can be locked, the digest tells what was read
                file = held.enter_context(self._place(key, ".lock").open("rb"))
                while not _shared(file):
                    beat()
                    time.sleep(WAIT)
            yield

    def journal(self, key: Key, rank: int = 0) -> Journal:
        """What is finished of an artefact that is being computed."""
        return Journal(self._place(key), key.facts, rank, self.warn)

    def warn(self, message: str) -> None:
        self.warnings.append(message)
        log.warning(message)

    def _place(self, key: Key, suffix: str = "") -> Path:
        path = self.folder / key.path
        return path.with_name(path.name + suffix)


def _shared(file: IO[bytes]) -> bool:
    """Whether a lock file could be locked for reading: nobody has it for writing (`FileLock`, which is `flock` too)."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
