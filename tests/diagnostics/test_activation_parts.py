"""Statistics by token class and denoising step, and the tensors kept, against stored activations; flat memory."""

from weakref import WeakSet

import pytest
import torch
from test_outliers import ARCH, batches, model, stored
from tiny import SITES

from dqx.diagnostics.activations import OutlierStats, Thresholds, default_blocks, measure_activations, meter
from dqx.diagnostics.activations.measure import surface
from dqx.diagnostics.activations.meter import PART_MANTISSA_BITS, PartMeter, SiteMeter
from dqx.diagnostics.activations.moments import Moments
from dqx.diagnostics.activations.sketch import LogHistogram
from dqx.diffusion.rollout import TOKEN_CLASSES, State

SETTINGS = Thresholds(channel_ratio=3.0, massive_absolute=2.0, massive_relative=6.0)
PROMPT, ANSWER, WINDOWS = 5, 6, 3


def states(count=4, windows=WINDOWS, seed=2):
    """An answer that is written from left to right, a token or two per step."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(1, 62, (windows, PROMPT + ANSWER), generator=generator)
    found = []
    for i in range(count):
        ids, written = text.clone(), i * ANSWER // count
        ids[:, PROMPT + written :] = ARCH.mask_token_id
        found.append(State(ids, 2 * i, PROMPT, 1 - written / ANSWER, ARCH.mask_token_id))
    return found


def classes(state):
    """The class of every token, in rows as `stored` has them."""
    found = torch.full(state.ids.shape, -1)
    for i, name in enumerate(TOKEN_CLASSES):
        found[state.token_class(name)] = i
    return found.flatten()


def check(part, row, x, ids, settings):
    """Everything that a part says, against its tokens' activations x [N, C]."""
    size = x.abs()
    assert part.tokens == len(x)
    assert part.abs_max == size.max()
    centred = x - x.mean()
    assert part.kurtosis == pytest.approx(float(centred.pow(4).mean() / centred.pow(2).mean() ** 2), rel=1e-9)
    ordered = size.flatten().sort().values
    for name, share in (("median", 0.5), ("p99", 0.99), ("p999", 0.999)):
        truth = float(ordered[-int(-share * len(ordered) // 1) - 1])
        assert getattr(part, name) == pytest.approx(truth, rel=2.0 ** -(PART_MANTISSA_BITS + 1))
    for kind, threshold in (("massive", row.massive_threshold), ("relative", row.relative_threshold)):
        assert getattr(part, f"{kind}_values") == int((size >= threshold).sum())
        assert getattr(part, f"{kind}_tokens") == int((size >= threshold).any(1).sum())
    hits = (size > settings.channel_ratio * size.median(dim=1, keepdim=True).values).double().mean(0)
    assert part.outlier_channels == int((hits >= settings.channel_share).sum())
    assert set(part.channels) <= set((hits >= settings.channel_share).nonzero()[:, 0].tolist())
    assert [abs(t.value) for t in part.top_tokens] == size.max(1).values.sort(descending=True).values[:4].tolist()
    for token in part.top_tokens:
        found = ((x == token.value).any(1) & (ids[:, 0] == token.sequence) & (ids[:, 1] == token.position)).nonzero()
        assert len(found) >= 1
        assert ids[found[0], 2] == token.token_id
        assert x[found[0], token.channel] == token.value


@pytest.mark.parametrize("chunk", [2**17, 5 * 48], ids=["whole", "in chunks"])
def test_parts_equal_brute_force(monkeypatch, chunk):
    monkeypatch.setitem(meter.CHUNK, "cpu", chunk)
    net, shown = model(), states()
    net.blocks[1].mlp_norm.weight[5] = 40.0
    net.blocks[0].attn_norm.weight[[3, 17]] = 8.0
    stats = measure_activations(net, batches(), SETTINGS, states=shown)
    by_state = [stored(net, [state]) for state in shown]
    row, column = torch.meshgrid(torch.arange(WINDOWS), torch.arange(PROMPT + ANSWER), indexing="ij")
    ids = [torch.stack((row, column, state.ids), dim=-1).flatten(0, 1) for state in shown]
    kinds = torch.cat([classes(state) for state in shown])
    found = {(p.block, p.site, p.token_class, p.step): p for p in stats.parts}
    assert len(found) == len(stats.parts) == 2 * 4 * (3 + len(shown))
    outlying = 0
    for block, site in by_state[0]:
        of_site = stats.at(block, site)
        x = torch.cat([activations[block, site] for activations in by_state])
        for i, name in enumerate(TOKEN_CLASSES):
            part = found[block, site, name, None]
            assert part.mask_ratio is None
            check(part, of_site, x[kinds == i], torch.cat(ids)[kinds == i], SETTINGS)
        for state, activations, places in zip(shown, by_state, ids, strict=True):
            part = found[block, site, "all", state.step]
            assert part.mask_ratio == state.mask_ratio
            check(part, of_site, activations[block, site], places, SETTINGS)
            outlying += part.outlier_channels
        for count in ("tokens", "massive_values", "massive_tokens", "relative_values", "relative_tokens"):
            parts = [p for p in stats.parts if (p.block, p.site) == (block, site)]
            by_class = sum(getattr(p, count) for p in parts if p.step is None)
            assert by_class == sum(getattr(p, count) for p in parts if p.step is not None)
    assert outlying
    assert sum(p.massive_values for p in stats.parts)


def test_rows_do_not_depend_on_states():
    assert measure_activations(model(), batches(), states=states()).rows == measure_activations(model(), batches()).rows
    assert measure_activations(model(), batches()).parts == []


def test_a_class_without_tokens_has_no_part():
    stats = measure_activations(
        model(), batches(), states=states(count=1)
    )  # before the first step nothing is committed
    assert {p.token_class for p in stats.parts} == {"prompt", "masked", "all"}


def test_values_that_are_not_finite_are_left_out_of_parts():
    net = model()
    net.blocks[1].mlp_norm.weight[4] = torch.inf
    stats = measure_activations(net, batches(count=1), states=states(count=2))
    part = next(p for p in stats.parts if (p.block, p.site, p.step) == (1, "mlp_in", 0))
    x = stored(net, states(count=1))[1, "mlp_in"]
    kept = x[:, [c for c in range(32) if c != 4]]
    assert part.abs_max == kept.abs().max()
    assert part.median == pytest.approx(float(kept.abs().flatten().sort().values[len(kept) * 31 // 2]), rel=0.05)
    last = next(p for p in stats.parts if (p.block, p.site, p.step) == (1, "mlp_out", 0))
    assert last.tokens == WINDOWS * (PROMPT + ANSWER)
    assert last.median != last.median  # nothing left
    assert last.kurtosis is None


def test_surfaces_and_channel_profiles():
    net, data = model(), batches(count=2)
    stats = measure_activations(net, data, surfaces=[1])
    kept = stored(net, data)
    assert set(stats.maps) == {f"{b}/{s}/channel_max" for b, s in kept} | {f"1/{s}/surface" for s in SITES}
    for (block, site), x in kept.items():
        assert torch.equal(stats.maps[f"{block}/{site}/channel_max"].double(), x.abs().amax(0))
        if block == 1:
            assert torch.equal(stats.maps[f"1/{site}/surface"].double(), x[:11].abs())
    assert all(t.dtype == torch.float32 for t in stats.maps.values())


def test_surfaces_are_pooled_to_a_size_that_can_be_kept():
    x = torch.randn(600, 1100, generator=torch.Generator().manual_seed(0))
    x[599, 1099] = -50.0
    found = surface(x)
    assert found.shape == (120, 220)  # patches of 5 x 5
    assert found[119, 219] == 50.0
    assert found[7, 11] == x[35:40, 55:60].abs().max()
    assert surface(x[:257, :513]).shape == (86, 171)  # of 3 x 3, the last narrower
    assert surface(x[:128, :256]).shape == (128, 256)
    assert default_blocks(32) == [0, 16, 31]
    assert default_blocks(1) == [0]


def tensors(thing, seen):
    """All tensors that an object holds, however deep, each once."""
    if isinstance(thing, torch.Tensor):
        seen[id(thing)] = thing
    elif isinstance(thing, dict):
        for value in thing.values():
            tensors(value, seen)
    elif isinstance(thing, (list, tuple)):
        for value in thing:
            tensors(value, seen)
    elif isinstance(thing, (SiteMeter, PartMeter, Moments, LogHistogram, meter.Top)):
        tensors(vars(thing), seen)


def test_memory_is_flat(monkeypatch):
    """Ten times the text and ten times the steps: not a byte more in the meters, and no more of them at a time."""
    alive, most = WeakSet(), 0
    for kind in (SiteMeter, PartMeter):
        create = kind.__init__

        def counted(self, *args, create=create):
            create(self, *args)
            alive.add(self)

        monkeypatch.setattr(kind, "__init__", counted)
        update = kind.update

        def weighed(self, *args, update=update):
            nonlocal most
            update(self, *args)
            seen = {}
            tensors(list(alive), seen)
            most = max(most, sum(t.numel() * t.element_size() for t in seen.values()))

        monkeypatch.setattr(kind, "update", weighed)

    def held(times):
        nonlocal most
        alive.clear()
        most = 0
        measure_activations(model(), (b for b in batches(count=2 * times)), states=states(count=times))
        return most

    assert held(1) == held(10) > 0


def test_records_without_parts_are_read():
    written = measure_activations(model(), batches(count=1)).to_dict()
    for key in ("parts", "parts_relative_error", "token_texts"):
        del written[key]
    for row in written["rows"]:
        for key in ("massive_channels", "massive_token_ids", "n_massive_channels", "n_massive_token_ids"):
            del row[key]
    found = OutlierStats.from_dict(written)
    assert found.parts == []
    assert found.at(1, "mlp_in").abs_max == measure_activations(model(), batches(count=1)).at(1, "mlp_in").abs_max


def test_parts_and_texts_survive_a_file():
    stats = measure_activations(model(), batches(count=1), states=states(), surfaces=[0]).with_token_texts(
        lambda token: f"<{token}>"
    )
    again = OutlierStats.from_dict(stats.to_dict(), stats.maps)
    assert again == stats
    assert again.maps is stats.maps
    token = stats.rows[0].top_tokens[0].token_id
    assert again.token_texts[token] == f"<{token}>"


def test_moments_keep_their_digits_far_from_zero():
    x = torch.randn(64, 50, generator=torch.Generator().manual_seed(0)).double() + 1e4
    x[:, 0] += 30
    found, member = Moments(2), torch.stack((torch.arange(64) % 2 == 0, torch.arange(64) % 2 == 1))
    for start in range(0, 64, 16):
        found.add(x[start : start + 16], None, member[:, start : start + 16])
    for group, mine in enumerate(member):
        part = x[mine] - x[mine].mean()
        mean, std, kurtosis = found.of(group)
        assert mean == pytest.approx(float(x[mine].mean()), rel=1e-12)
        assert std == pytest.approx(float(part.pow(2).mean().sqrt()), rel=1e-10)
        assert kurtosis == pytest.approx(float(part.pow(4).mean() / part.pow(2).mean() ** 2), rel=1e-8)
    whole, merged = x - x.mean(), Moments()
    merged.merge(found)
    assert merged.of()[2] == pytest.approx(float(whole.pow(4).mean() / whole.pow(2).mean() ** 2), rel=1e-8)
