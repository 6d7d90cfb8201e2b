"""How log p(target | prefix) of a model that writes block by block is a sum of terms, one for each block.

What is before a block is final, so that

    log p(target | prefix) = sum over blocks of log p(the block's target tokens | all tokens before the block)

and each term is bounded by masks inside the block, as `likelihood.py` bounds that of a whole target: the masked tokens
see their own block, with its unmasked tokens, and the final text before it (block diffusion, arXiv 2503.09573, equation
8). Where the first token of a block is predicted by the last final row before it, as in an autoregressive model, its
term is exact, and the block's masks are those of its other tokens, which see it: a sampler writes it before it denoises
the block. With blocks of one token all terms are of that kind: the autoregressive likelihood.

A block is as a sampler sees it: of the same length always. Its tokens behind the end of the target are masks, and are
not scored.

Shapes: P prefix, L target, S states, W tokens of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dqx.diffusion.batches import Piece, Request
from dqx.models.architecture import FULL, Architecture, Attention


@dataclass(frozen=True)
class Factorization:
    """The blocks of a target, and what predicts their tokens; a sampler names its own (`Sampler.factorization`)."""

    block: int  # tokens of a block, which see each other
    final: Attention  # of final tokens
    from_prefix: bool = False  # whether blocks are counted from the end of the prefix; else from position 0
    ahead: bool = False  # whether the last final row predicts a block's first token; else that is masked like others
    shift: bool = False  # whether row i - 1 of a block predicts its token i; row 0 also predicts token 0

    def problems(self, request: Request) -> list[str]:
        """What is wrong with a request."""
        if self.ahead and self.from_prefix and len(request.target) and not len(request.prefix):
            return ["a target without a token before it has nothing that predicts its first token; give a prefix"]
        return []

    def pieces(self, request: Request) -> list[Piece]:
        """The terms of a request: its blocks in order, then all tokens that final rows predict."""
        begin, end = len(request.prefix), request.length
        tokens, found = torch.cat((request.prefix, request.target)), []
        by_final = torch.zeros(len(request.target), dtype=torch.bool)
        first = begin if self.from_prefix else begin // self.block * self.block
        for number, start in enumerate(range(first, end, self.block)):
            known = max(start, begin)
            if self.ahead and start == known > 0:
                by_final[start - begin] = True
                known += 1
            stop = min(start + self.block, end)
            if known < stop:
                key = (*request.key, "block", number)
                found.append(Piece(tokens[:known], tokens[known:stop], key, start))
        if by_final.any():
            last = int(by_final.nonzero()[-1])
            found.append(
                Piece(request.prefix, request.target[: last + 1], request.key, begin + last, by_final[: last + 1])
            )
        return found

    def work(self, request: Request, samples: int) -> int:
        """Tokens through the model that a request takes at most, its text counted once."""
        pieces = self.pieces(request)
        states = sum(min(samples, 2 ** len(p.target) - 1) for p in pieces if p.by_final is None)
        return max((p.start for p in pieces), default=0) + states * self.block

    def blocks(self, piece: Piece, rows: Tensor, mask_token_id: int) -> Tensor:
        """The blocks [S, W] of a piece, for `rows` [S, L] of its target with masks."""
        blocks = torch.full((len(rows), self.block), mask_token_id)
        known = len(piece.prefix) - piece.start
        blocks[:, :known] = piece.prefix[piece.start :]
        blocks[:, known : known + rows.shape[1]] = rows
        return blocks


def factorization_problems(
    arch: Architecture, factorization: Factorization | None, cfg_scale: float = 0.0
) -> list[str]:
    """What is wrong with a likelihood of a model that is computed so."""
    if factorization is None and arch.attention != FULL:
        return [
            "this model's attention is block by block, so its likelihood is a sum over blocks; give "
            "factorization=sampler.factorization() of its sampler"
        ]
    if factorization is not None and cfg_scale:
        return [
            f"cfg_scale={cfg_scale} guides a model that sees all of a sequence; block by block there is no guidance"
        ]
    return []
