"""Where calibration activations lie: in memory up to a limit, in files beyond it.

Tensors come and go in rows: the inputs of a block, one per calibration sequence, or what the linears of a site read. A
row is a plain list where nothing bounds memory. Rows that an interrupted quantization continues from are in files.
"""

from __future__ import annotations

import os
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


class ActivationStore:
    """How many bytes of activations may be held, and the folder for the rest; without a folder there is no bound."""

    def __init__(self, folder: Path | None = None, limit: int | None = None):
        self.folder, self.limit = folder, limit
        self.held = 0

    def row(self, *, keep: bool = False) -> Row:
        """An empty row. One to `keep` is complete on disk, in `Shelf.folder`, and stays there; others vanish."""
        if self.folder is None:
            return []
        taken = [int(path.name) for path in self.folder.iterdir()] if self.folder.is_dir() else []
        folder = self.folder / f"{max(taken, default=-1) + 1:05d}"
        folder.mkdir(parents=True)
        return Shelf(self, folder, keep=keep)

    def fits(self, size: int) -> bool:
        return self.limit is None or self.held + size <= self.limit


class Shelf:
    """A row of tensors that may lie in files; they come back to the device they were on."""

    def __init__(
        self, store: ActivationStore, folder: Path, *, keep: bool, device: torch.device | str = "cpu", length: int = 0
    ):
        self.store, self.folder, self.keep = store, folder, keep
        self.device = torch.device(device)
        self._tensors: list[Tensor | None] = [None] * length  # None: in a file
        weakref.finalize(self, _release, store, self._tensors, None if keep else folder)

    def append(self, x: Tensor) -> None:
        self.device = x.device
        fits = self.store.fits(x.nbytes)
        if self.keep or not fits:
            self._write(x)
        if fits:
            self.store.held += x.nbytes
        self._tensors.append(x.detach().cpu() if fits else None)

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, index: int) -> Tensor:
        tensor = self._tensors[index]
        if tensor is None:
            return load_file(self._path(index % len(self)), device=str(self.device))["x"]
        return tensor.to(self.device)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:05d}.safetensors"

    def _write(self, x: Tensor) -> None:
        path = self._path(len(self))
        save_file({"x": x.detach().cpu().contiguous()}, path)
        if self.keep:
            with path.open("rb") as f:
                os.fsync(f.fileno())


def _release(store: ActivationStore, tensors: list[Tensor | None], folder: Path | None) -> None:
    store.held -= sum(tensor.nbytes for tensor in tensors if tensor is not None)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


#: Tensors in a row: `append`, `len`, indices and iteration.
Row = list[Tensor] | Shelf
