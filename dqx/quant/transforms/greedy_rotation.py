"""DuQuant's greedy search for one rotation that flattens the outliers of all tiles of an activation.

Lin et al. 2024, arXiv:2406.01721, section 3.2, equations 3 and 4. A tile is a run of B neighbouring channels of one
token, and every tile is multiplied by the same orthogonal matrix. One step finds the entry of largest magnitude,
swaps its channel to the front, multiplies by a fixed orthogonal matrix and swaps back; of all prefixes of the steps
the one with the smallest `max - min` is kept. The paper swaps the *channel* of the entry; the authors' code swaps
`row % B`, the position of its tile in the list of tiles. Both are here (`index`).

The search multiplies and scans all tiles at every step in the authors' code. Here it looks at few of them:

- The tiles are not carried along: step t needs the extremes of `X Q_t`, where Q_t is the product of the steps so
  far. Tiles are sorted by norm, which no rotation changes. No entry exceeds the norm of its tile, so the scan ends
  at the first tile whose norm lies below the extremes found so far.
- On CPUs with 8-bit dot products the scan is done on an int8 copy of the tiles, with a bound on the rounding error
  of that copy. Only columns of a chunk of tiles that may hold the extreme within that bound are multiplied exactly.

On an accelerator all tiles are looked at in every step: that takes less time than asking which to leave out
(`SearchOnDevice`).

Both bounds are rigorous, so the extremes are those of the whole of `X Q_t` in float32. A plain search has the same
numbers but for the rounding errors it gathers step by step (about 1e-6, relative): it takes the same decisions unless
two entries come that close. Of equal entries the first in X counts, as in a plain argmax. With equal decisions the
rotation is the same to the bit: steps are multiplied from left to right, in the dtype of the base matrix.

N tokens, C channels, B tile width, M = N * C / B tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dqx.common.accelerator import captured

INDICES = ("channel", "row")
ROUNDING = 1e-4  # relative slack of every bound, for products in float32 of hundreds of matrices


class GreedyResult(NamedTuple):
    rotation_BB: Tensor  # in the dtype of the base matrix; tiles are multiplied by it from the right
    indices: list[int]  # of the steps kept: channels, or positions of tiles for index="row"


def greedy_rotation(
    x_NC: Tensor, base_BB: Tensor, steps: int, index: str = "channel", *, chunk: int = 1024
) -> GreedyResult:
    """The product of the first steps R_1 R_2 ... that makes `max - min` of all rotated tiles smallest.

    R is `base_BB` with rows and columns 0 and e exchanged, e the channel (or tile position modulo B) of the entry of
    largest magnitude. The product may be empty: then it is the identity. `chunk` tiles are looked at together, which
    is only about speed. Raises ValueError if B does not divide C or x holds NaN or infinity.
    """
    width = len(base_BB)
    if x_NC.shape[-1] % width:
        raise ValueError(f"tiles of {width} channels do not divide {x_NC.shape[-1]} channels")
    if index not in INDICES:
        raise ValueError(f"index={index!r} is unknown; it is one of {', '.join(INDICES)}")
    x_MB = x_NC.reshape(-1, width).float()
    if x_NC.device.type != "cpu":
        return SearchOnDevice(x_MB, base_BB, steps, index, chunk * 256).result()
    tiles = (Int8Tiles if len(x_MB) > 2 * chunk and _fast_int8(x_NC.device) else Tiles)(x_MB, base_BB, chunk)
    product = torch.eye(width, dtype=base_BB.dtype)
    indices: list[int] = []
    smallest, kept, rotation = float("inf"), 0, product
    for step in range(steps + 1):
        highest, lowest = tiles.extremes(product)
        if highest.value + lowest.value < smallest:
            smallest, kept, rotation = highest.value + lowest.value, step, product
        tile, channel = divmod((highest if highest.value > lowest.value else lowest).position, width)
        indices.append(channel if index == "channel" else tile)
        product = product @ exchanged(base_BB, indices[-1] % width)
    return GreedyResult(rotation, indices[:kept])


def exchanged(base_BB: Tensor, e: int) -> Tensor:
    """`base_BB` with rows 0 and e and columns 0 and e exchanged."""
    swapped = base_BB.clone()
    swapped[[0, e]] = base_BB[[e, 0]]
    swapped[:, [0, e]] = swapped[:, [e, 0]]
    return swapped


def base_rotation(width: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix [B, B], float64: A diag(1, Z), where Z is random and A has a constant first row."""
    gaussian = torch.randn(width - 1, width - 1, generator=generator, dtype=torch.float64)
    spread = spreading_rotation(width)
    return torch.cat((spread[:, :1], spread[:, 1:] @ torch.linalg.qr(gaussian).Q), dim=1)


def spreading_rotation(width: int) -> Tensor:
    """A fixed orthogonal matrix [B, B], float64, whose first row is 1 / sqrt(B) everywhere.

    Plane rotations of coordinates (0, 1), (1, 2), ... spread the last coordinate evenly over all; then the first and
    the last coordinate are exchanged.
    """
    matrix = torch.eye(width, dtype=torch.float64)
    for i in range(width - 1):
        cos, sin = (i + 2) ** -0.5, ((i + 1) / (i + 2)) ** 0.5
        plane = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
        matrix[i : i + 2] = plane @ matrix[i : i + 2]
    return exchanged(matrix, width - 1)


class Extreme(NamedTuple):
    """The largest entry of a matrix [M, B], or minus the smallest: its value and its first position row by row."""

    value: float = -float("inf")
    position: int = -1

    def or_larger(self, entries: Tensor, starts: Tensor, columns: Tensor) -> Extreme:
        """The larger of this and the largest of `entries`, the `columns` of the rows that begin at `starts`."""
        of_rows = entries.amax(1)
        largest = of_rows.max()
        if (value := float(largest)) < self.value:
            return self
        rows = (of_rows == largest).nonzero()[:, 0]
        among, column = (entries[rows] == largest).nonzero(as_tuple=True)
        first = int((starts[rows[among]] + columns[column]).min())
        return Extreme(value, first if value > self.value else min(first, self.position))


class SearchOnDevice:
    """The search with all that it finds kept on the device, so that a step may be replayed as a graph.

    X is gone through in order, in chunks that bound the memory for `X Q`.
    """

    def __init__(self, x_MB: Tensor, base_BB: Tensor, steps: int, index: str, chunk: int):
        if not torch.isfinite(x_MB).all():
            raise ValueError("the activations hold NaN or infinity")
        self.chunks, self.base, self.steps, self.index = x_MB.split(chunk), base_BB, steps, index
        device, self.width = base_BB.device, len(base_BB)
        self.columns = torch.arange(self.width, device=device)
        self.signs = torch.tensor([1.0, -1.0], device=device)
        self.product = torch.eye(self.width, dtype=base_BB.dtype, device=device)
        self.rotation = self.product.clone()
        self.smallest = torch.full((1,), torch.inf, dtype=torch.float64, device=device)
        self.step, self.kept = torch.zeros(2, 1, dtype=torch.long, device=device)
        self.indices = torch.zeros(steps + 1, dtype=torch.long, device=device)

    def result(self) -> GreedyResult:
        advance = captured(self._advance, self.base.device)
        for _ in range(self.steps + 1):
            advance()
        kept, *indices = torch.cat((self.kept, self.indices)).tolist()
        return GreedyResult(self.rotation, indices[:kept])

    def _advance(self) -> None:
        """Look at the product of the steps so far, then multiply it by the next one."""
        highest, lowest, where_highest, where_lowest = self._extremes()
        spread = highest.double() + lowest.double()
        better = spread < self.smallest
        self.smallest.copy_(torch.where(better, spread, self.smallest))
        self.kept.copy_(torch.where(better, self.step, self.kept))
        self.rotation.copy_(torch.where(better, self.product, self.rotation))
        position = torch.where(highest > lowest, where_highest, where_lowest)
        channel, tile = position % self.width, position // self.width
        chosen = channel if self.index == "channel" else tile
        self.indices.index_copy_(0, self.step, chosen)
        self.step.add_(1)
        e = chosen % self.width
        order = self.columns.masked_fill(self.columns == e, 0)
        order[:1] = e
        self.product.copy_(self.product @ self.base[order][:, order])  # `exchanged`

    def _extremes(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The largest entry of `X Q` and minus the smallest, and the first position of each; all [1]."""
        product = self.product.float()
        found: list[Tensor] = []
        start = 0
        for tiles in self.chunks:
            rotated = (tiles @ product).flatten()
            at = torch.stack((rotated.argmax(), rotated.argmin()))  # of equal entries the first
            values, places = rotated.take(at) * self.signs, at + start
            if found:
                later = values > found[0]
                values, places = torch.where(later, values, found[0]), torch.where(later, places, found[1])
            found = [values, places]
            start += len(rotated)
        (highest, lowest), (where_highest, where_lowest) = (pair.split(1) for pair in found)
        return highest, lowest, where_highest, where_lowest


class Tiles:
    """All tiles by descending norm, in chunks; finds the extremes of `X Q` for orthogonal Q in float32."""

    def __init__(self, x_MB: Tensor, base_BB: Tensor, chunk: int):
        norm, order = torch.linalg.vector_norm(x_MB, dim=1).sort(descending=True, stable=True)
        if not torch.isfinite(norm[:1]).all():  # NaN sorts first
            raise ValueError("the activations hold NaN or infinity")
        self.width = x_MB.shape[1]
        self.chunks = x_MB[order].split(chunk)
        self.starts = (order * self.width).split(chunk)  # where each tile starts in X
        self.norms = (norm[::chunk] * (1 + ROUNDING)).tolist()  # no entry of the chunk can be larger

    def extremes(self, product_BB: Tensor) -> tuple[Extreme, Extreme]:
        """The largest entry of `X Q`, and minus the smallest."""
        product = product_BB.float()
        columns = torch.arange(self.width, device=product.device)
        highest, lowest = Extreme(), Extreme()
        for tiles, starts, norm in zip(self.chunks, self.starts, self.norms, strict=True):
            if norm < min(highest.value, lowest.value):
                break
            rotated = tiles @ product
            highest = highest.or_larger(rotated, starts, columns)
            lowest = lowest.or_larger(-rotated, starts, columns)
        return highest, lowest


class Int8Tiles(Tiles):
    """The same, with a copy of the tiles in int8 that says which columns of which chunks can hold the extremes.

    The copy is of `X base`: rotated tiles have no outliers that would leave their other entries few codes.
    """

    GROUP = 4  # chunks between two looks at whether the scan can end

    def __init__(self, x_MB: Tensor, base_BB: Tensor, chunk: int):
        super().__init__(x_MB, base_BB, chunk)
        self.base = base_BB
        self.codes, steps, errors = [], [], []
        for tiles in self.chunks:
            codes, step, missed = _int8(tiles @ base_BB.float())
            self.codes.append(codes)
            steps.append(step)
            errors.append(torch.linalg.vector_norm(missed, dim=1).max())
        self.steps, self.errors = torch.stack(steps), torch.stack(errors)[:, None]
        self.norm = torch.tensor(self.norms)[:, None]
        self.coarse = torch.empty(2, len(steps), self.width, dtype=torch.int32)  # largest, smallest of the columns

    def extremes(self, product_BB: Tensor) -> tuple[Extreme, Extreme]:
        codes, steps, missed = _int8((self.base.T @ product_BB).float(), dim=0)
        # |x q - x' q'| <= |x - x'| |q'| + |x| |q - q'|, where x' and q' are what the codes stand for
        lengths = torch.linalg.vector_norm(codes * steps, dim=0)
        slack = self.errors * lengths + self.norm * (torch.linalg.vector_norm(missed, dim=0) + ROUNDING)
        units = self.steps[:, None] * steps
        sure = torch.full((2,), -float("inf"))  # the extremes are at least this
        bounds = []  # and the entries of a chunk's columns at most this [2, chunks, B]
        for start in range(0, len(self.chunks), self.GROUP):
            if self.norms[start] < sure.min():
                break
            group = slice(start, start + self.GROUP)
            for coded, largest, smallest in zip(self.codes[group], *self.coarse[:, group], strict=True):
                rotated = torch._int_mm(coded, codes)
                torch.amax(rotated, 0, out=largest)
                torch.amin(rotated, 0, out=smallest)
            values = self.coarse[:, group] * units[group]
            values[1].neg_()
            bounds.append(values + slack[group])
            sure = torch.maximum(sure, (values - slack[group]).amax((1, 2)))
        highest, lowest = torch.cat(bounds, dim=1)
        product, least = product_BB.float(), sure.tolist()
        return self._exact(1, product, highest, least[0]), self._exact(-1, product, lowest, least[1])

    def _exact(self, sign: int, product_BB: Tensor, bounds: Tensor, sure: float) -> Extreme:
        """The largest entry of `sign * X Q`: at least `sure`, and per chunk and column at most `bounds` [chunks, B]."""
        extreme = Extreme()
        per_chunk, order = bounds.amax(1).sort(descending=True)
        for bound, i in zip(per_chunk.tolist(), order.tolist(), strict=True):
            least = max(extreme.value, sure)
            if bound < least:
                break
            columns = (bounds[i] >= least).nonzero()[:, 0]
            entries = self.chunks[i] @ (sign * product_BB[:, columns])
            extreme = extreme.or_larger(entries, self.starts[i], columns)
        return extreme


def _int8(x: Tensor, dim: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """int8 codes of x, their step (one, or one for each column with dim=0), and the rest: `x = step * codes + rest`."""
    largest = x.abs().amax(dim) if dim is not None else x.abs().max()
    step = (largest / 127).clamp_(min=torch.finfo(torch.float32).tiny)
    codes = torch.round(x / step).clamp_(-127, 127)
    return codes.to(torch.int8), step, x - codes * step


def _fast_int8(device: torch.device) -> bool:
    """True on CPUs where a product of int8 matrices is several times faster than one of float32 matrices."""
    return device.type == "cpu" and torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()
