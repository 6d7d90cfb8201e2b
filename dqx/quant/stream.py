"""Calibration activations on their way through the network, one block at a time; the only place that knows hooks.

B sequences of a batch, T tokens, D hidden.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dqx.models.kv_cache import Pair
from dqx.models.layout import Passes
from dqx.models.tokens import Tokens
from dqx.models.transformer import Block, MaskedDiffusionTransformer, Reuse
from dqx.quant.activations_store import ActivationStore, Row
from dqx.quant.protocols import Tables, own_tables
from dqx.quant.stats import Collector, collectors

MEAN_POSITIONS = 64  # of all sequences, embedded at a time

Seen = Callable[[Tensor], Tensor]


def as_is(x: Tensor) -> Tensor:
    return x


class Stream:
    """The inputs of the current block [1, T, D], one per calibration sequence, in one version of the model.

    Sequences run one at a time whatever the batches were, so the result does not depend on batching, to the bit.
    With `mean` there is one sequence, the mean of the others position by position; they must be equally long, and its
    tokens have no weights. Inputs lie where `store` has room for them; those of a later block than the first may be
    given. `weights` are those of each sequence's tokens [1, T], for statistics that are averages. `passes` are as in
    `CalibBatch`, one for each tensor of ids; none where all sequences are text.
    """

    def __init__(
        self,
        model: MaskedDiffusionTransformer,
        ids: Sequence[Tensor],
        *,
        mean: bool = False,
        store: ActivationStore | None = None,
        inputs: Row | None = None,
        weights: Row | None = None,
        passes: Sequence[Tensor | None] = (),
    ):
        self.model, self.store = model, store or ActivationStore()
        self.ids = [row for batch in ids for row in batch.split(1)]
        self.passes = passes_of(ids, passes)
        if mean and len({row.shape for row in self.ids}) > 1:
            raise ValueError(
                "stream=mean needs calibration sequences of one length; make them equal, or set stream=quantized"
            )
        if mean and not all(alike(self.passes[0], other) for other in self.passes):
            raise ValueError(
                "stream=mean needs calibration sequences that the sampler writes in the same passes; set "
                "stream=quantized"
            )
        if inputs is None:
            inputs = self.store.row(keep=True)
            for x in _mean_embedding(model, self.ids) if mean else map(model.embed, self.ids):
                inputs.append(x)
        self.ids = self.ids[: len(inputs)]
        self.n_tokens = sum(row.shape[1] for row in self.ids)
        self.inputs = inputs
        self.weights = None if mean else weights
        self.outputs: Row | None = None

    def tables(self, i: int) -> Tables:
        """What blocks need besides the input of sequence i."""
        passes = self.passes[i]
        return self.model.context(self.ids[i]) if passes is None else self.model.tables(passes.layout)

    def forward(self, block: Block, i: int) -> Tensor:
        """The output of `block` for sequence i: of passes, what each computes over what those before it have stored."""
        passes = self.passes[i]
        if passes is None or not block.stored:
            return block(self.inputs[i], *self.tables(i))
        return block(self.inputs[i], *self.model.tables(passes.apart), reuse=stored_behind(block, passes))

    def weight(self, i: int) -> Tensor | None:
        """The weights [1, T] of sequence i's tokens."""
        return None if self.weights is None else self.weights[i]

    def advance(self, block: Block) -> None:
        """Move on to the input of the next block."""
        if self.outputs is None:
            self.outputs = self.store.row(keep=True)
            for i in range(len(self.inputs)):
                self.outputs.append(self.forward(block, i))
        self.inputs, self.outputs = self.outputs, None

    def collect(
        self, block: Block, needs: Mapping[str, frozenset[str]], seen: Seen = as_is, *, keep_outputs: bool = False
    ) -> dict[str, dict[str, Any]]:
        """Statistics of the inputs of `block`'s sites, by site and name, in one pass over the sequences.

        `seen` maps a linear's input to what its matmul sees. A pass ends at the last site that is asked for, unless
        the block's outputs are kept for `advance`.
        """
        wanted = {site: collectors(names, self.n_tokens, self.store) for site, names in needs.items() if names}
        if not wanted:
            return {}

        weight: Tensor | None = None  # of the sequence on its way

        def add(site: str, x: Tensor) -> None:
            for collector in wanted[site].values():
                collector.see(seen(x), weight=weight)

        stop_at = None if keep_outputs else [site for site in block.arch.sites if site in wanted][-1]
        outputs = self.store.row(keep=True) if keep_outputs else []
        with listening(block, wanted, add, stop_at):
            for i in range(len(self.inputs)):
                weight = self.weight(i)
                if (output := self._forward_to(block, i)) is not None:
                    outputs.append(output)
        if keep_outputs:
            self.outputs = outputs
        return {site: values(by_name) for site, by_name in wanted.items()}

    def input_at(self, block: Block, i: int, site: str) -> Tensor:
        """What the linears of `site` read for sequence i."""
        heard: list[Tensor] = []
        with listening(block, [site], lambda _, x: heard.append(x), site):
            self._forward_to(block, i)
        return heard[0]

    def heads(self, block: Block, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [1, H, T, E], and keys and values [1, K, T, E] of sequence i, as attention reads them."""
        heard: dict[str, Tensor] = {}

        def hear(part: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            heard[part] = output
            if len(heard) == 3:
                raise _Reached

        places = {"q": block.heads["q"], "k": block.sequence["k"], "v": block.sequence["v"]}
        hooks = [module.register_forward_hook(partial(hear, part)) for part, module in places.items()]
        try:
            self._forward_to(block, i)
        finally:
            for hook in hooks:
                hook.remove()
        return heard["q"], heard["k"], heard["v"]

    def _forward_to(self, block: Block, i: int) -> Tensor | None:
        """The block's output, or None where the pass ended at a site."""
        with suppress(_Reached):
            return self.forward(block, i)
        return None


def collect_paired(
    quantized: Stream,
    block: Block,
    intact: Stream,
    intact_block: Block,
    site: str,
    needs: frozenset[str],
    seen: Seen = as_is,
    intact_seen: Seen = as_is,
) -> dict[str, Any]:
    """Statistics of one site from both streams in lockstep, sequence by sequence."""
    by_name = collectors(needs, quantized.n_tokens, quantized.store)
    for i in range(len(quantized.inputs)):
        x = seen(quantized.input_at(block, i, site))
        wanted = intact_seen(intact.input_at(intact_block, i, site))
        for collector in by_name.values():
            collector.see(x, wanted, quantized.weight(i))
    return values(by_name)


def collect_outputs(
    stream: Stream, block: Block, intact_block: Block, after: nn.Module, needs: frozenset[str]
) -> dict[str, Any]:
    """Statistics of what `after` makes of the outputs of two versions of a block on one stream's inputs."""
    by_name = collectors(needs, stream.n_tokens, stream.store)
    for i in range(len(stream.inputs)):
        x, wanted = (after(stream.forward(version, i)) for version in (block, intact_block))
        for collector in by_name.values():
            collector.see(x, wanted, stream.weight(i))
    return values(by_name)


@torch.no_grad()
def block_statistics(
    block: Block, inputs: Tensor | Sequence[Tensor], needs: Iterable[str] | Mapping[str, Iterable[str]]
) -> dict[str, dict[str, Any]]:
    """Statistics of what the linears of a single block read, without the model around it.

    Args:
        block: in full precision or quantized.
        inputs: of the block [B, T, D], or several such tensors; sequences run one at a time.
        needs: names of `dqx.quant.stats.COLLECTORS`, such as "hessian", for all sites or by site.

    Returns the statistics by site and name: `block_statistics(block, x, ["absmax"])["mlp_in"]["absmax"]` [D]. Raises
    ValueError for an unknown statistic, or one that compares two models.
    """
    sequences = [x for batch in ([inputs] if isinstance(inputs, Tensor) else inputs) for x in batch.split(1)]
    by_site = needs if isinstance(needs, Mapping) else dict.fromkeys(block.arch.sites, tuple(needs))
    n_tokens = sum(x.shape[1] for x in sequences)
    wanted = {site: collectors(names, n_tokens) for site, names in by_site.items()}

    def add(site: str, x: Tensor) -> None:
        for collector in wanted[site].values():
            collector.add(x)

    with listening(block, wanted, add):
        for x in sequences:
            block(x, *own_tables(block.arch, x))
    return {site: values(by_name) for site, by_name in wanted.items()}


def passes_of(ids: Sequence[Tensor], passes: Sequence[Tensor | None]) -> list[Passes | None]:
    """Those of each sequence, from those of batches ids [B, T]."""
    tables = passes or [None] * len(ids)
    rows: list[Passes | None] = []
    for batch, table in zip(ids, tables, strict=True):
        rows += [None] * len(batch) if table is None else [Passes(row.to(batch.device)) for row in table.split(1)]
    return rows


def alike(one: Passes | None, other: Passes | None) -> bool:
    """Whether tokens see each other in the same way."""
    return one is other is None or (one is not None and other is not None and torch.equal(one.table, other.table))


def stored_behind(block: Block, passes: Passes) -> Reuse:
    """Puts behind the keys and values that a block computes those that a store would hold, for `Passes.apart`.

    Where these are rounded by what all tokens are that one forward stores, pass by pass.
    """
    number = passes.table[:, 1]
    together = any(getattr(module, "whole_sequence", False) for module in block.stored.values())

    def reuse(k: Tensor, v: Tensor, stored: Callable[..., Pair] | None) -> Pair:
        assert stored is not None
        if not together:
            kept = stored()
        else:
            kept = k.clone(), v.clone()
            for one in number[passes.table[:, 2] > 0].unique():
                columns = number[0] == one
                for whole, part in zip(kept, stored(Tokens(columns[None])), strict=True):
                    whole[:, :, columns] = part[:, :, columns]
        return torch.cat((k, kept[0]), dim=2), torch.cat((v, kept[1]), dim=2)

    return reuse


def values(by_name: Mapping[str, Collector]) -> dict[str, Any]:
    return {name: collector.value() for name, collector in by_name.items()}


def _mean_embedding(model: MaskedDiffusionTransformer, ids: Sequence[Tensor]) -> list[Tensor]:
    """The mean over sequences [1, T, D], a few positions at a time."""
    parts = torch.cat(list(ids)).split(MEAN_POSITIONS, dim=1)
    return [torch.cat([model.embed(part).mean(0, keepdim=True) for part in parts], dim=1)]


@contextmanager
def listening(
    block: Block, sites: Iterable[str], call: Callable[[str, Tensor], None], stop_at: str | None = None
) -> Iterator[None]:
    """A context in which `call(site, x)` hears every input x of the sites; reaching `stop_at` ends the pass."""

    def hear(site: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        call(site, args[0])
        if site == stop_at:
            raise _Reached

    first = {site: getattr(block, block.arch.sites[site][0]) for site in sites}
    hooks = [linear.register_forward_pre_hook(partial(hear, site)) for site, linear in first.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Reached(Exception):
    """Ends a forward pass at the input that was asked for."""


def snapshot(module: nn.Module) -> Any:
    """A copy of a module tree that shares its tensors: replacing parts of the original does not reach the copy."""
    twin = copy.copy(module)
    twin._parameters = dict(module._parameters)
    twin._buffers = dict(module._buffers)
    twin._modules = {name: None if child is None else snapshot(child) for name, child in module._modules.items()}
    twin._forward_pre_hooks = OrderedDict()
    return twin
