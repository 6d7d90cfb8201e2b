"""ABMP, the adaptive block-wise mixed precision of Quant-dLLM: groups that matter little pay for those that matter.

arXiv:2510.03274. A group of columns scores `sum of W^2 / u_j^2` over its elements, u the diagonal of U (H^-1 = U^T U):
the loss of leaving it out. The lowest m groups get a term less than the others, the highest m one more, so that the
average number of signs per weight stays what it is.

G = groups.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dqx.formats.bits import UNQUANTIZED
from dqx.quant.protocols import Context
from dqx.quant.rounding.levels import levels_of


@dataclass(frozen=True)
class ABMP:
    """Allocates terms to groups by what they matter; see `terms_by_score`."""

    ratio: float = 0.05  # share of the groups that get a term more, and of those that get one less

    def __call__(self, score_G: Tensor, usual: int) -> list[int]:
        return terms_by_score(score_G, usual, self.ratio)

    def problems(self, where: str, context: Context) -> list[str]:
        if not 0 < self.ratio <= 0.5:
            return [f"{where}.ratio={self.ratio} must lie above 0 and not above 0.5; the authors have 0.05 and 0.1"]
        whole = []
        for role in context.arch.roles:
            levels, weight = levels_of(context.method.rounding_of(role)), context.widths.weight[role]
            mine = levels is not None and levels.allocation is self
            if mine and weight.bits != UNQUANTIZED and weight.group_size == -1:
                whole.append(role)
        if whole:
            return [
                f"{where} deals terms out to groups of inputs, but {', '.join(whole)} have one group per row; write "
                f"bits.weight.group_size=128, or {where}=null"
            ]
        return []


def terms_by_score(score_G: Tensor, usual: int, ratio: float) -> list[int]:
    """One term less for the lowest `ratio` of the groups, one more for the highest; `usual` for the others.

    With fewer than 1 / ratio groups all get `usual`.
    """
    n_groups = len(score_G)
    m = min(int(n_groups * ratio), n_groups // 2)
    order = score_G.argsort(stable=True).tolist()
    terms = [usual] * n_groups
    for g in order[:m]:
        terms[g] = usual - 1
    for g in order[n_groups - m :]:
        terms[g] = usual + 1
    return terms
