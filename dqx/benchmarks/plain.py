"""GPTQ, AWQ and DuQuant written down as their papers state them: the yardstick for speed and for equal results.

One linear at a time, nothing shared, no step taken that the formulas do not name. Not used by `dqx.quant`.
Sources: Frantar et al. 2023 (arXiv:2210.17323, Algorithm 1), Lin et al. 2024 (arXiv:2306.00978, section 3.2, and the
clip search of the authors' release), Lin et al. 2024 (arXiv:2406.01721, section 3.2, with the stopping rule of the
authors' release).

N = tokens, O = outputs, I = inputs, G = groups per row, W = inputs per group, Q = codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SCALES, CLIPS, CLIP_TOKENS = 20, 10, 512  # AWQ's candidates for a scale and a threshold, tokens that judge the latter


@dataclass(frozen=True)
class Rounded:
    """Codes [O, I] with `w = scale * (codes - zero_point)`, one scale and zero_point [O, G] per group."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def dequantize(self) -> Tensor:
        width = self.codes.shape[1] // self.scale.shape[1]
        scale, zero = (t.repeat_interleave(width, dim=1) for t in (self.scale, self.zero_point))
        return scale * (self.codes.to(scale.dtype) - zero)


def asymmetric_range(w: Tensor, bits: int, include_zero: bool) -> tuple[Tensor, Tensor]:
    """scale and zero_point of the values along the last dimension, which is kept with size 1."""
    lo, hi = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    if include_zero:
        lo, hi = torch.minimum(lo, torch.zeros_like(lo)), torch.maximum(hi, torch.zeros_like(hi))
    scale = (hi - lo) / (2**bits - 1)
    return scale, torch.round(-lo / scale)


def round_to(w: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Codes of w, as floating point numbers."""
    return torch.clamp(torch.round(w / scale) + zero_point, 0, 2**bits - 1)


def rtn(w_OI: Tensor, bits: int, group_size: int, *, include_zero: bool = False, clip_ratio: float = 1.0) -> Rounded:
    """Round to nearest, one range per row and group; `clip_ratio` multiplies both ends of every range."""
    width = w_OI.shape[1] if group_size == -1 else group_size
    w = w_OI.reshape(len(w_OI), -1, width)
    scale, zero = asymmetric_range(w * clip_ratio, bits, include_zero)
    codes = round_to(w, scale, zero, bits)
    return Rounded(codes.reshape(w_OI.shape).to(torch.uint8), scale.squeeze(-1), zero.squeeze(-1))


def gptq(w_OI: Tensor, x_NI: Tensor, bits: int, group_size: int, damping: float = 0.01, chunk: int = 128) -> Rounded:
    """GPTQ of one linear from its own input, with asymmetric ranges that hold zero."""
    w = w_OI.clone()
    hessian = w.new_zeros(w.shape[1], w.shape[1])
    for x in x_NI.split(chunk):
        hessian.addmm_(x.T, x, alpha=2 / len(x_NI))
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    w[:, dead] = 0
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    u = torch.linalg.cholesky(hessian)
    del hessian
    u = torch.cholesky_inverse(u)
    u = torch.linalg.cholesky(u, upper=True)

    codes, scales, zeros = torch.zeros_like(w), [], []
    for start in range(0, w.shape[1], chunk):
        end = min(start + chunk, w.shape[1])
        block = w[:, start:end].clone()
        errors = torch.zeros_like(block)
        for j in range(start, end):
            if j % group_size == 0:
                scale, zero = asymmetric_range(w[:, j : j + group_size], bits, include_zero=True)
                scales.append(scale)
                zeros.append(zero)
            i = j - start
            column = block[:, i : i + 1]
            codes[:, j : j + 1] = round_to(column, scale, zero, bits)
            error = (column - scale * (codes[:, j : j + 1] - zero)) / u[j, j]
            block[:, i:] -= error @ u[j : j + 1, j:end]
            errors[:, i : i + 1] = error
        w[:, end:] -= errors @ u[start:end, end:]
    return Rounded(codes.to(torch.uint8), torch.cat(scales, 1), torch.cat(zeros, 1))


@torch.no_grad()
def awq_scale(
    linears: Sequence[nn.Linear], x: Tensor, judge: Callable[[Tensor], Tensor], bits: int, group_size: int
) -> tuple[Tensor, list[float]]:
    """AWQ's channel scale [I] of linears that read the same input x [B, T, I], and the loss of every exponent.

    `judge` is the module whose output counts; it contains `linears`, whose weights are as before on return.
    """
    mean = x.abs().reshape(-1, x.shape[-1]).mean(0)
    kept = [linear.weight.clone() for linear in linears]
    wanted = judge(x)
    losses, scales = [], []
    for step in range(SCALES):
        s = mean.pow(step / SCALES).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        for linear, weight in zip(linears, kept, strict=True):
            linear.weight.copy_(rtn(weight * s, bits, group_size).dequantize() / s)
        losses.append(float((judge(x) - wanted).square().mean()))
        scales.append(s)
    for linear, weight in zip(linears, kept, strict=True):
        linear.weight.copy_(weight)
    return scales[losses.index(min(losses))], losses


def awq_clip(w_OI: Tensor, x_NI: Tensor, bits: int, group_size: int, *, rows: int = 16, matmul: bool = False) -> Tensor:
    """Thresholds [O, G] for |w| that change the group's partial outputs least. `rows` are worked on at a time.

    A partial output is the sum of the products of one token, row and group, and is computed as that, like in the
    authors' code; with `matmul` as a matrix product.
    """
    n_out, n_in = w_OI.shape
    x = x_NI[:: max(1, len(x_NI) // CLIP_TOKENS)].reshape(-1, n_in // group_size, group_size)  # [N, G, W]

    def outputs(w_OGW: Tensor) -> Tensor:  # [O, N, G]
        return torch.einsum("ngw,ogw->ong", x, w_OGW) if matmul else (x * w_OGW[:, None]).sum(-1)

    chosen = []
    for w in w_OI.reshape(n_out, -1, group_size).split(rows):  # [O, G, W]
        absmax = w.abs().amax(-1, keepdim=True)
        wanted = outputs(w)
        best = torch.full_like(absmax, float("inf"))
        threshold = absmax.clone()
        for step in range(CLIPS):
            limit = absmax * (1 - step / (2 * CLIPS))
            clamped = torch.minimum(torch.maximum(w, -limit), limit)
            scale, zero = asymmetric_range(clamped, bits, include_zero=False)
            rounded = scale * (round_to(clamped, scale, zero, bits) - zero)
            loss = (outputs(rounded) - wanted).square().mean(1)[..., None]
            better = loss < best
            best, threshold = torch.where(better, loss, best), torch.where(better, limit, threshold)
        chosen.append(threshold.squeeze(-1))
    return torch.cat(chosen)


def clamp_groups(w_OI: Tensor, threshold_OG: Tensor) -> Tensor:
    """The weight with every group clamped to plus or minus its threshold."""
    limit = threshold_OG.repeat_interleave(w_OI.shape[1] // threshold_OG.shape[1], dim=1)
    return torch.minimum(torch.maximum(w_OI, -limit), limit)


@dataclass(frozen=True)
class Rotation:
    """Steps of DuQuant's greedy search that were kept: channels swapped to the front, and their product [W, W]."""

    channels: list[int]
    matrix: Tensor


def duquant_rotation(x_NI: Tensor, base_WW: Tensor, steps: int, *, by_row: bool = False) -> Rotation:
    """Greedy rotation of tiles of W channels: in each step the tile channel that holds the largest absolute entry is
    swapped to the front and every tile of every token is multiplied with the base matrix so swapped; the prefix of
    steps after which max - min was smallest is kept. `by_row` takes the index of the tile in place of the channel's,
    as the authors' release does.
    """
    width = len(base_WW)
    x = x_NI.reshape(-1, width)
    matrices, channels, peaks = [], [], []
    for _ in range(steps):
        top, bottom = int(x.argmax()), int(x.argmin())
        hi, lo = float(x.view(-1)[top]), float(x.view(-1)[bottom])
        peaks.append(hi - lo)
        place = top if abs(hi) > abs(lo) else bottom
        channel = place // width if by_row else place % width
        order = torch.arange(width)
        order[0], order[channel % width] = channel % width, 0
        matrices.append(base_WW[order][:, order])
        channels.append(channel)
        x = x @ matrices[-1]
    peaks.append(float(x.max() - x.min()))
    n = peaks.index(min(peaks))
    product = torch.eye(width, dtype=x.dtype)
    for matrix in matrices[:n]:
        product = product @ matrix
    return Rotation(channels[:n], product)


def zigzag(x_NI: Tensor, width: int) -> Tensor:
    """Permutation [I]: channels by descending absmax, dealt to the tiles forth and back."""
    n_tiles = x_NI.shape[1] // width
    tiles: list[list[int]] = [[] for _ in range(n_tiles)]
    for place, channel in enumerate(x_NI.abs().amax(0).argsort(descending=True, stable=True).tolist()):
        lap, step = divmod(place, n_tiles)
        tiles[step if lap % 2 == 0 else n_tiles - 1 - step].append(channel)
    return torch.tensor([channel for tile in tiles for channel in tile])


def rotate_tiles(x: Tensor, matrix: Tensor) -> Tensor:
    """x [..., I] with every tile of W channels multiplied by the matrix [W, W]."""
    return (x.reshape(-1, len(matrix)) @ matrix).reshape(x.shape)


def duquant(
    x_NI: Tensor, bases: tuple[Tensor, Tensor], steps: int, *, by_row: bool = False
) -> tuple[Rotation, Tensor, Rotation]:
    """Rotation, permutation, rotation found on the input of one linear."""
    first = duquant_rotation(x_NI, bases[0], steps, by_row=by_row)
    x = rotate_tiles(x_NI, first.matrix)
    order = zigzag(x, len(bases[0]))
    return first, order, duquant_rotation(x[:, order], bases[1], steps, by_row=by_row)


def duquant_apply(w_OI: Tensor, parts: tuple[Rotation, Tensor, Rotation]) -> Tensor:
    """The columns of a weight (or the channels of an input) under what `duquant` found."""
    first, order, second = parts
    return rotate_tiles(rotate_tiles(w_OI, first.matrix)[:, order], second.matrix)
