"""What is recorded of activations: rows per block and site, their parts by token class and denoising step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor  # takes a second to import, which reading a record does not need

ALL = "all"  # the token class of rows that are over all of them
MOST_CELLS = (128, 256)  # tokens and channels of a surface: the bars that a figure has room for, and no more are kept


@dataclass(frozen=True)
class Thresholds:
    """What counts as an outlier; see the package's text."""

    channel_ratio: float = 6.0
    channel_share: float = 0.5
    massive_absolute: float = 100.0
    massive_relative: float = 1000.0
    top: int = 16  # channels and tokens listed per site


@dataclass(frozen=True)
class ChannelRow:
    """One large channel: its maximum, its mean |x|, and the share of tokens where it stands out."""

    channel: int
    abs_max: float
    mean_abs: float
    share: float


@dataclass(frozen=True)
class TokenRow:
    """A token and its largest value. `sequence` counts rows over all batches, of denoising states windows."""

    sequence: int
    position: int
    token_id: int
    channel: int
    value: float


@dataclass(frozen=True)
class SiteStats:
    """One block and site. `massive_*` need both conditions, `relative_*` only that on the median."""

    block: int
    site: str
    channels: int
    tokens: int
    not_finite: int  # NaN or infinite values, left out of everything below
    abs_max: float
    mean: float
    std: float
    kurtosis: float | None  # fourth standardised moment over all values, 3 for a normal distribution
    median: float  # of |x|, as the percentiles
    p99: float
    p999: float
    p9999: float
    outlier_channels: int
    top_channels: list[ChannelRow]  # by share, then by maximum: outlier channels first, then the runners-up
    massive_threshold: float
    massive_values: int
    massive_tokens: int
    massive_token_share: float
    relative_threshold: float | None  # None where the median is 0: nothing can be judged by it
    relative_values: int
    relative_tokens: int
    relative_token_share: float
    top_tokens: list[TokenRow]  # the tokens with the largest |x|, massive or not
    histogram: dict[str, list[float]]  # |x| by powers of two: `edges`, one more than `counts`
    massive_channels: list[TokenRow] = field(default_factory=list)  # largest value of each channel that has any
    massive_token_ids: list[int] = field(default_factory=list)  # that have massive values; both lists largest first
    n_massive_channels: int = 0
    n_massive_token_ids: int = 0

    @property
    def max_over_median(self) -> float | None:
        return self.abs_max / self.median if self.median else None


@dataclass(frozen=True)
class PartStats:
    """One block and site on denoising states: a class of tokens over all steps, or all tokens at one step.

    `massive_*` and `relative_*` are counted with the thresholds of the site's row, so that parts add up. Values that
    are not finite are left out.
    """

    block: int
    site: str
    token_class: str  # prompt, committed, masked, or all
    step: int | None  # from 0; None: all steps
    mask_ratio: float | None  # share of the answers' tokens that are masked at this step
    tokens: int
    abs_max: float
    median: float
    p99: float
    p999: float
    kurtosis: float | None
    outlier_channels: int
    massive_values: int
    massive_tokens: int
    relative_values: int
    relative_tokens: int
    channels: list[int] = field(default_factory=list)  # the outlier channels, at most 16
    top_tokens: list[TokenRow] = field(default_factory=list)  # the tokens with the largest |x|, at most 4


@dataclass(frozen=True)
class OutlierStats:
    """Statistics of every block and site, in data-flow order, and the settings they were made with."""

    thresholds: Thresholds
    sequences: int
    tokens: int
    rows: list[SiteStats]
    relative_error: float  # of the percentiles
    parts: list[PartStats] = field(default_factory=list)  # empty without denoising states
    parts_relative_error: float = 0.0  # of their percentiles
    token_texts: dict[int, str] = field(default_factory=dict)  # how the token ids above read, see `with_token_texts`
    #: Tensors, in a file of their own: BLOCK/SITE/channel_max [C] and, of chosen blocks, BLOCK/SITE/surface [T', C'].
    maps: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def __repr__(self) -> str:
        largest = max(self.rows, key=lambda row: row.abs_max)
        return (
            f"OutlierStats({len(self.rows)} rows over {self.tokens} tokens; largest |x| {largest.abs_max:.3g} at "
            f"{largest.site} of block {largest.block})"
        )

    @property
    def sites(self) -> list[str]:
        """The sites in data-flow order."""
        return list(dict.fromkeys(row.site for row in self.rows))

    def at(self, block: int, site: str) -> SiteStats:
        """The row of one block and site. Raises KeyError."""
        for row in self.rows:
            if (row.block, row.site) == (block, site):
                return row
        raise KeyError((block, site))

    def worst(self, site: str) -> SiteStats:
        """The block whose largest value at this site is the largest; values that are not finite are larger than any."""
        return max((row for row in self.rows if row.site == site), key=lambda row: (row.not_finite, row.abs_max))

    def with_token_texts(self, text: Callable[[int], str]) -> OutlierStats:
        """The same with the texts of all token ids that are mentioned."""
        rows: list[SiteStats | PartStats] = [*self.rows, *self.parts]
        named = {token.token_id for row in rows for token in row.top_tokens}
        for site in self.rows:
            named |= {token.token_id for token in site.massive_channels} | set(site.massive_token_ids)
        return replace(self, token_texts={token_id: text(token_id) for token_id in sorted(named)})

    def to_dict(self) -> dict[str, Any]:
        """Everything but the tensors."""
        data = asdict(replace(self, maps={}))
        del data["maps"]
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any], maps: dict[str, Tensor] | None = None) -> OutlierStats:
        """The statistics that `to_dict` wrote, also those of versions without parts."""
        return cls(
            thresholds=Thresholds(**data["thresholds"]),
            sequences=data["sequences"],
            tokens=data["tokens"],
            rows=[_row(SiteStats, row) for row in data["rows"]],
            relative_error=data["relative_error"],
            parts=[_row(PartStats, row) for row in data.get("parts", ())],
            parts_relative_error=data.get("parts_relative_error", 0.0),
            token_texts={int(token): text for token, text in data.get("token_texts", {}).items()},
            maps=maps or {},
        )


#: Lists of rows within a row.
_NESTED: dict[str, type] = {"top_channels": ChannelRow, "top_tokens": TokenRow, "massive_channels": TokenRow}


def _row(kind: type, row: dict[str, Any]) -> Any:
    """A row of JSON, where NaN is a string. Keys that a later version has added are passed over."""
    known = {f.name for f in fields(kind)}
    values: dict[str, Any] = {
        key: float(value) if value == "NaN" else value for key, value in row.items() if key in known
    }
    for name in _NESTED.keys() & values.keys():
        values[name] = [_NESTED[name](**inner) for inner in values[name]]
    return kind(**values)
