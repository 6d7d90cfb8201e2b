"""Figures show the numbers of their records, are there only with their data, and keep their words within the page."""

import itertools
import math
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib import rcParams
from records import contrast, record, task_result
from tiny import SITES

from dqx.diagnostics.activations import PartStats
from dqx.diagnostics.activations.measure import surface as measured_surface
from dqx.record import words
from dqx.record.significance import t_interval
from dqx.report import figures
from dqx.report.figures import errors, sheet, style, surface
from dqx.report.figures.axes import masked
from dqx.report.figures.pareto import front

BLOCKS, STEPS = 2, (0, 12)
TOKENS, CHANNELS = 12, 16  # of a window of `record`, and of most of its sites
LONG = "a-" + "very-" * 20 + "long-name"


def part(side, block, site, token_class, step, **changes):
    """Numbers that tell every part from every other one."""
    abs_max = 1.0 + 100 * side + 10 * block + list(SITES).index(site) + 0.1 * (step or 0)
    basics = {
        "mask_ratio": None if step is None else 1 - step / 16, "tokens": 50, "abs_max": abs_max, "median": 0.5,
        "p99": 2.0, "p999": 3.0, "kurtosis": 3.0, "outlier_channels": 0, "massive_values": 0,
        "massive_tokens": 5 if site == "mlp_out" and not side else 0, "relative_values": 0, "relative_tokens": 0,
    }  # fmt: skip
    return PartStats(block, site, token_class, step, **(basics | changes))


def parts(side, **changes):
    kinds = [("prompt", None), ("committed", None), ("masked", None), *(("all", step) for step in STEPS)]
    return [part(side, b, s, *kind, **changes) for b in range(BLOCKS) for s in SITES for kind in kinds]


def activations(top=(40.0, 20.0)):
    found = {}
    for side, highest in zip(style.SIDES, top, strict=True):
        for block in range(BLOCKS):
            for site in SITES:
                ramp = torch.linspace(0.1, highest, 24 if site == "mlp_out" else CHANNELS)
                found[f"{side.key}/{block}/{site}/channel_max"] = ramp.roll(3)
        values = torch.full((TOKENS, CHANNELS), 0.1)
        values[4, 7] = highest
        found[f"{side.key}/1/mlp_in/surface"] = values
    return found


def full(**changes):
    """A record with the data of every figure."""
    basic = record()
    outliers = {side: replace(stats, parts=parts(i)) for i, (side, stats) in enumerate(basic.outliers.items())}
    return record(**({"outliers": outliers, "activations": activations()} | changes))


@pytest.fixture(scope="module")
def drawn():
    return figures.of_run(full())


def run(method, bits, average, scores, seed=0, steps=None, activation=16):
    """A run of which only the quantized scores of one task matter."""
    config = record().config | {
        "seed": seed, "method": {"name": method}, "steps": {"count": steps},
        "bits": {"name": bits, "activation": {"bits": activation, "format": "int"}},
    }  # fmt: skip
    sides = {
        "full_precision": {"sums": task_result("sums", [1] * 8)},
        "quantized": {"sums": task_result("sums", scores)},
    }
    return record(config=config, quantization={"average_bits": average, "linears": []}, **sides)


def sweep(steps=(None,)):
    return [
        run(method, f"w{bits}a{a}", bits + 0.15, [1] * (8 - lost - i) + [0] * (lost + i), steps=count, activation=a)
        for i, method in enumerate(("gptq", "rtn"))
        for bits, lost in ((4, 0), (2, 4))
        for a in (16, 4)
        for count in steps
    ]


def line(axes, label=None):
    """The data of a line, by its label or the first one."""
    return next(each.get_ydata() for each in axes.get_lines() if label in (None, each.get_label()))


def test_every_figure_with_its_data_and_none_without(drawn):
    assert set(drawn) == {
        "surface_1_mlp_in", "channel_maxima", "outliers_by_step", "massive_by_step", "outliers_by_class",
        "massive_by_class", "sqnr", "divergence_by_step", "divergence_by_mask_ratio",
    }  # fmt: skip
    assert figures.of_run(record(outliers={}, fidelity={})) == {}
    old = {key: value for key, value in record().fidelity.items() if key in ("by_mask_ratio", "answers")}
    assert set(figures.of_run(record(outliers={}, fidelity=old))) == {"divergence_by_mask_ratio"}
    assert figures.of_runs([]) == {}


def dot(view, token, channel, height):
    """Where in a painted picture the middle of a bar is at some height: row and column."""
    x, y = surface.FINE * (view.at((channel + 0.5, token + 0.5, height)) - (surface.LEFT, surface.BELOW))
    return round(y), round(x + surface.FINE * surface.WIDE / 2)


def test_a_surface_has_a_bar_for_every_value(drawn):
    view = surface.View(CHANNELS, TOKENS, 40.0)  # one scale
    for axes, top in zip(drawn["surface_1_mlp_in"].axes, (40.0, 20.0), strict=True):
        (picture,) = (image.get_array() for image in axes.images)
        shown = picture[..., 3] > 0
        (foot, column), (head, _) = (dot(view, 4, 7, height) for height in (0.0, top))
        assert abs(shown[:, column].sum() - (head - foot)) <= 1
        assert (picture[foot + 1 : head - 1, column] == surface.PALETTE(top / 40, bytes=True)).all()
        assert shown.any(axis=0).sum() in (3, 4)  # dots that are a bar wide: lower values are the floor
    flat = surface.surfaces(full(activations=activations(top=(400.0, 2.0))))["surface_1_mlp_in"]
    assert [max(float(text.get_text()) for text in axes.texts[-5:-1]) for axes in flat.axes] == [400.0, 2.0]
    assert sum("its own scale" in text.get_text() for text in flat.texts) == 2


def test_nearer_bars_hide_those_behind():
    values = np.random.default_rng(0).random((9, 120)) ** 4
    view = surface.View(120, 9, 1.0)
    picture = view.painted(surface.Surface(values, (1, 1)))
    expected, wide = np.zeros_like(picture), surface.FINE * surface.WIDE
    for token, channel in itertools.product(reversed(range(9)), range(120)):
        height = values[token, channel]
        (x, foot), (_, head) = surface.FINE * (
            view.at([(channel + 0.5, token + 0.5, z) for z in (0, height)]) - (surface.LEFT, surface.BELOW)
        )
        if height >= surface.LOWEST:
            columns = slice(math.ceil(x), math.ceil(x + wide))
            expected[round(foot) : round(head), columns] = 1 + int(height * (surface.PALETTE.N - 1))
    assert (picture != expected).mean() < 0.002  # edges that are rounded to another dot


def test_pooling_keeps_the_largest():
    values = np.random.default_rng(0).random((259, 700))
    values[200, 611] = 9.0
    pooled = surface.Surface(values, (1, 2)).pooled()
    assert (pooled.values.shape, pooled.patch) == ((87, 234), (3, 6))
    assert pooled.values[200 // 3, 611 // 3] == pooled.top == 9.0
    assert pooled.values[5, 6] == values[15:18, 18:21].max()
    view = surface.View(1400, 259, 9.0)
    rows, columns = (view.painted(pooled) == surface.PALETTE.N).nonzero()
    row, column = dot(view, 200, 2 * 611, 9.0)
    assert abs(rows.max() - row) <= 3
    assert abs(columns.mean() - column) <= 3


def test_what_is_kept_of_a_surface_is_what_is_drawn():
    """A window of the bundled model: whole, as records had it, and as they have it."""
    whole = torch.from_numpy(np.random.default_rng(0).pareto(1.5, (256, 512)).astype(np.float32))
    kept = measured_surface(whole)
    assert 4 * kept.numel() == whole.numel()
    drawn = [surface.Surface(values.numpy(), patch) for values, patch in ((whole, (1, 1)), (kept, (2, 2)))]
    before, after = (values.pooled() for values in drawn)
    assert before.patch == after.patch
    assert drawn[0].top == drawn[1].top
    np.testing.assert_array_equal(before.values, after.values)


def test_channels_are_sorted_and_the_largest_named(drawn):
    axes = drawn["channel_maxima"].axes[0]
    expected = np.sort(activations()["full_precision/0/attn_in/channel_max"].numpy())[::-1]
    np.testing.assert_allclose(line(axes, "full precision"), expected)
    assert axes.texts[0].get_text() == "2, 1, 0"


def test_outliers_by_step_are_those_of_the_record(drawn):
    maps = [axes for axes in drawn["outliers_by_step"].axes if axes.images]
    assert len(maps) == 2 * len(SITES)
    for i, site in enumerate(SITES):
        for side, axes in enumerate(maps[2 * i : 2 * i + 2]):
            expected = [[part(side, b, site, "all", step).abs_max for step in STEPS] for b in range(BLOCKS)]
            np.testing.assert_allclose(axes.images[0].get_array(), expected)
        assert maps[2 * i].images[0].norm is maps[2 * i + 1].images[0].norm  # both sides are compared by one scale
    shares = [axes.images[0].get_array() for axes in drawn["massive_by_step"].axes if axes.images]
    np.testing.assert_allclose(shares, [np.full((2, 2), 10.0), np.zeros((2, 2))])  # of the one site that has any


def test_outliers_by_class_are_those_of_the_record(drawn):
    axes = drawn["outliers_by_class"].axes
    assert axes[5].get_yscale() == "log"
    np.testing.assert_allclose(
        line(axes[5], "masked"), [part(1, b, "attn_out", "masked", None).abs_max for b in (0, 1)]
    )


def test_sqnr_is_the_record_and_exact_blocks_are_grey(drawn):
    found = drawn["sqnr"].axes[0].images[0]
    assert found.get_array().mask.tolist() == [[True, False], [False, False]]
    assert found.get_array().compressed().tolist() == [41.5, 18.25, 22.0]
    assert "grey: no error" in drawn["sqnr"].texts[2].get_text().replace("\n", " ")
    profile = drawn["sqnr"].axes[1].get_lines()[0]
    assert profile.get_xdata().tolist() == [41.5, 20.125]


def test_predictions_are_those_of_the_record(drawn):
    kl, top1, commits, answers = drawn["divergence_by_step"].axes[:4]
    assert line(kl).tolist() == [1.5, 0.0123]
    assert kl.get_lines()[0].get_xdata().tolist() == [0, 12]
    assert line(top1).tolist() == [50, 96.875]
    assert line(commits, "commits: another token").tolist() == [25, 0]
    assert line(commits, "commits: stay masked").tolist() == [50, 0]
    shares = line(answers)
    assert (shares[0], shares[3], shares[4], shares[9], shares[16]) == pytest.approx(
        (100, 100, 200 / 3, 100 / 3, 100 / 3)
    )
    random = drawn["divergence_by_mask_ratio"].axes[0]
    assert line(random, "random masks").tolist() == [0.0123, 1.5]


def test_many_steps_are_points_and_lines_are_means_with_intervals():
    """A step has a few tokens: a line from one to the next would show chance as if it were a course."""
    rng, steps = np.random.default_rng(0), 16
    row = record().fidelity["by_step"][0]
    shares = {key: rng.integers(0, 5, steps) / 4 for key in ("agreement", "commit_flips", "commit_delays")}
    rows = [
        row | {"step": i, "mask_ratio": 1 - i / steps, "divergence": float(rng.exponential())}
        | {key: float(values[i]) for key, values in shares.items()}
        for i in range(steps)
    ]  # fmt: skip
    rows[15] |= {"commit_flips": None, "commit_delays": None}
    found = figures.of_run(record(outliers={}, fidelity=record().fidelity | {"by_step": rows}))
    panels = [(axes, "step", 1) for axes in found["divergence_by_step"].axes[:3]]
    panels += [(axes, "mask_ratio", 100) for axes in found["divergence_by_mask_ratio"].axes[:3]]
    for number, (axes, key, unit) in enumerate(panels):
        drawn = [each for each in axes.get_lines() if each.get_label() != "random masks"]
        points = [each for each in drawn if each.get_linestyle() == "None"]
        lines = [each for each in drawn if each.get_linestyle() != "None"]
        bars = axes.collections
        assert len(points) == len(lines) == len(bars) == (2 if number % 3 == 2 else 1)
        for raw, means, intervals in zip(points, lines, bars, strict=True):
            assert len(raw.get_xdata()) == steps
            whole = [pair for pair in raw.get_xydata().tolist() if math.isfinite(pair[1])]
            members = [part.tolist() for part in np.array_split(whole, errors.MOST_MEANS)]
            np.testing.assert_allclose(means.get_xydata(), [np.mean(part, axis=0) for part in members])
            for part, (low, high) in zip(members, intervals.get_segments(), strict=True):
                expected = t_interval([y for _, y in part])
                most = math.inf if number % 3 == 0 else 100
                assert (low[1], high[1]) == pytest.approx((max(0, expected[0]), min(most, expected[1])))
        assert points[0].get_xdata().tolist() == [unit * each[key] for each in rows]


def test_numbers_that_are_not_there_or_not_finite():
    lost = record().fidelity
    lost["by_step"][0] |= {"divergence": "Infinity", "commit_flips": None, "commit_delays": None}
    lost["by_mask_ratio"][1]["divergence"] = "NaN"
    lost["layers"]["sqnr_db"] = [[None, None], [None, None]]
    nan = {"abs_max": math.nan, "massive_tokens": 0}
    outliers = {side: replace(stats, parts=parts(0, **nan)) for side, stats in record().outliers.items()}
    dead = {name: torch.full_like(value, math.nan) for name, value in activations().items()}
    found = figures.of_run(full(fidelity=lost, outliers=outliers, activations=dead))
    assert "sqnr" not in found
    assert {"surface_1_mlp_in", "channel_maxima", "divergence_by_step"} <= set(found)
    assert masked([[1.0, None], [math.inf, math.nan]]).count() == 1


def test_accuracy_by_bits_is_the_cells():
    figure = figures.of_runs(sweep())["accuracy_by_bits"]
    assert [axes.get_title() for axes in figure.axes] == ["activations of 16 bits", "activations of 4 bits"]
    bars = [(bar.get_label(), bar) for bar in figure.axes[0].containers]
    points = sorted((name, *point) for name, bar in bars for point in zip(*bar.lines[0].get_data(), strict=True))
    assert points == [("gptq", 2.15, 50.0), ("gptq", 4.15, 100.0), ("rtn", 2.15, 37.5), ("rtn", 4.15, 87.5)]
    delta = run("rtn", "w2a16", 2.15, [1] * 3 + [0] * 5).deltas[-1]
    rtn = [segment for name, bar in bars if name == "rtn" for segment in bar.lines[2][0].get_segments()]
    (_, low), (_, high) = next(segment for segment in rtn if segment[0, 0] == 2.15)
    assert (low, high) == pytest.approx((100 * (1 + delta.low), 100 * (1 + delta.high)))
    assert line(figure.axes[0], "full precision") == [100, 100]
    best = next(each for each in figure.axes[0].get_lines() if each.get_label() == "Pareto front")
    assert best.get_xydata()[:2].tolist() == [[2.15, 50.0], [4.15, 100.0]]


def crowded():
    """Runs at two widths whose scores and intervals lie close together, as those of good methods do."""
    lost = {"gptq": (1, 4), "rtn": (3, 6), "awq": (1, 5), "quarot": (0, 4), "smoothquant": (2, 4), "duquant": (0, 2)}
    return [
        run(method, f"w{bits}a16", bits + 0.15 + 0.0001 * i, [1] * (8 - n) + [0] * n)
        for i, (method, by_width) in enumerate(lost.items())
        for bits, n in zip((4, 2), by_width, strict=True)
    ]


def test_the_front_goes_through_markers_and_none_beats_it():
    """As drawn, in dots: a marker that was moved aside to be seen lies neither above nor left of the front."""
    for runs in (sweep(), crowded()):
        figure = figures.of_runs(runs)["accuracy_by_bits"]
        for axes in figure.axes:
            best = next(each for each in axes.get_lines() if each.get_label() == "Pareto front")
            front = best.get_transform().transform(best.get_xydata())
            bars = [bar.lines for bar in axes.containers]
            markers = [m for marks, *_ in bars for m in marks.get_transform().transform(marks.get_xydata()).tolist()]
            middles = [
                e.mean(axis=0) for _, _, (bar,) in bars for e in map(bar.get_transform().transform, bar.get_segments())
            ]
            np.testing.assert_allclose(
                [x for x, _ in middles], [x for x, _ in markers]
            )  # an interval goes with its marker
            for vertex in front[:-1]:
                assert min(np.hypot(*(vertex - marker)) for marker in markers) < 0.01
            for x, y in markers:
                reached = [height for bits, height in front if bits <= x + 0.01]
                assert reached, "left of the whole front"
                assert y <= reached[-1] + 0.01
            assert len({(round(x), round(y)) for x, y in markers}) == len(markers)  # each is seen
            assert best.get_xydata()[-1, 0] == axes.get_xlim()[1]  # a front of one point is a line, too


def test_no_legend_lies_over_data(drawn):
    for figure in (*drawn.values(), *figures.of_runs(sweep(steps=(16, 32))).values()):
        assert [axes for axes in figure.axes if axes.get_legend()] == []
        renderer = figure.canvas.get_renderer()
        for box in (each.get_window_extent(renderer) for each in figure.legends):
            assert not [axes for axes in figure.axes if axes.get_tightbbox(renderer).overlaps(box)]
    names = [text.get_text() for text in drawn["divergence_by_step"].legends[0].get_texts()]
    assert names == ["commits: another token", "commits: stay masked"]


def test_names_of_colours_stand_above_their_bars(drawn):
    """Beside a bar, on the side of the next panel, they would read as the name of that panel's axis."""
    figures_of = (*drawn.values(), *figures.of_runs(sweep(steps=(16, 32))).values())
    bars = [axes for figure in figures_of for axes in figure.axes if axes.get_label() == "<colorbar>"]
    assert len(bars) == len(SITES) + 3
    assert [bar.get_ylabel() for bar in bars] == [""] * len(bars)
    first = [
        figure.axes[[axes.get_label() for axes in figure.axes].index("<colorbar>")]
        for figure in figures_of
        if any(axes.get_label() == "<colorbar>" for axes in figure.axes)
    ]
    assert [bar.texts[0].get_text() for bar in first] == ["largest |x|", "tokens, %", "SQNR, dB", "points"]
    assert drawn["sqnr"].axes[1].get_ylabel() == "block"


def test_titles_count_what_was_looked_at(drawn):
    """Statistics and predictions are of windows and of answers: no document of a task has a part in them."""
    for name, figure in drawn.items():
        title, ran, foot = (text.get_text().replace("\n", " ") for text in figure.texts[:3])
        assert "document" not in f"{title} {ran}", name
        wanted = (
            "2 calibration windows"
            if name == "channel_maxima"
            else "calibration window"
            if "surface" in name
            else "3 answers"
        )
        if name != "divergence_by_mask_ratio":
            assert wanted in foot, name
    ran = figures.of_runs(sweep())["accuracy_by_bits"].texts[1].get_text()
    assert "sums: 8 documents" in ran
    sides = {"a": task_result("a", [1, 0]), "b": task_result("b", [1, 0])}
    both = record(full_precision=sides, quantized=sides)
    assert "a, b: 2 documents each" in figures.of_runs([both])["accuracy_by_bits"].texts[1].get_text()
    both.config["task"]["limit"] = 1
    assert words.evaluation(record(config=both.config).settings) == "nano_llada, first document of each task"


def test_front():
    points = [(4.0, 90.0), (2.0, 50.0), (3.0, 95.0), (3.0, 60.0), (8.0, 95.0)]
    assert front(points) == [(2.0, 50.0), (3.0, 95.0)]
    assert front([(2.0, 3.0), (4.0, 2.0), (8.0, 2.5)], lower_is_better=True) == [(2.0, 3.0), (4.0, 2.0)]


def test_steps_by_bits_where_there_are_several():
    found = figures.of_runs(sweep(steps=(16, None)))
    assert {name.split("_nano")[0] for name in found} == {"accuracy_by_bits", "steps_by_bits"}
    figure = found["steps_by_bits"]
    maps = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in maps] == ["gptq", "rtn"]
    assert [label.get_text() for label in maps[0].get_yticklabels()] == ["16", "own"]
    widths = [label.get_text() for label in maps[0].get_xticklabels()]
    assert widths == ["full", "w4a16", "w4a4", "w2a16", "w2a4"]
    np.testing.assert_allclose(maps[1].images[0].get_array(), [[0, -12.5, -12.5, -62.5, -62.5]] * 2)
    assert {"100.0", "87.5\n(-12.5)"} <= {text.get_text() for text in maps[1].texts}


def test_svg_has_both_palettes(drawn, tmp_path):
    """Every colour of ink and paper is exchanged on a dark page, and can be read there; those of lines on both."""
    found = set()
    for figure in (*drawn.values(), *figures.of_runs(sweep(steps=(16, 32))).values()):
        figures.save(figure, tmp_path, "one", ["svg"])
        head, _, body = (tmp_path / "one.svg").read_text().partition("</style>")
        assert head.count("prefers-color-scheme: dark") == 1
        assert "<metadata" not in head
        found |= {colour.upper() for colour in re.findall(r"(?:fill|stroke): (#\w{6})", body)}
    lines = {each["color"] for each in style.CYCLE} - {style.INK}
    assert found <= lines | set(style.DARK), found
    assert {style.INK, style.PAPER, style.GRID, style.QUIET, style.ON_LIGHT} <= found
    dark = style.DARK[style.PAPER]
    assert all(contrast(colour, ground) > 2 for colour in lines for ground in (style.PAPER, dark))
    assert all(contrast(style.DARK[ink], dark) > 4.5 for ink in (style.INK, style.QUIET))
    assert contrast(style.DARK[style.ON_LIGHT], style.ON_DARK) < 1.3  # as the pictures that they stand on are turned


def test_same_record_same_bytes(tmp_path):
    for place in "ab":
        with style.applied():
            (figure,) = surface.surfaces(full()).values()
        figures.save(figure, tmp_path / place, "surface")
    for name in ("surface.png", "surface.svg", "surface.pdf"):
        first, second = ((tmp_path / place / name).read_bytes() for place in "ab")
        assert first == second
        assert b"Date" not in first
        assert b"atplotlib.org" not in first


def outside(figure):
    """What reaches out of a figure, with its corners in inches: axes with all their words, captions, legends."""
    renderer, (width, height) = figure.canvas.get_renderer(), figure.get_size_inches()
    boxes = [(axes, axes.get_tightbbox(renderer)) for axes in figure.axes]
    boxes += [(words, words.get_window_extent(renderer)) for words in (*figure.texts, *figure.legends)]
    corners = [(what, *(box.extents / figure.dpi)) for what, box in boxes if box is not None]
    return [c for c in corners if min(c[1:3]) < -0.01 or c[3] > width + 0.01 or c[4] > height + 0.01]


def test_no_word_leaves_the_page(drawn):
    long = record().config | {"method": {"name": LONG}, "bits": {"name": LONG}}
    layers = {"layers": record().fidelity["layers"]}
    named = record(config=long, model={"name": LONG, "fingerprint": "0"}, outliers={}, fidelity=layers)
    many = sweep(steps=(16, 32)) + [run(f"{LONG}{i}", "w3a16", 3.15, [1] * 8, steps=16) for i in range(4)]
    for figure in (*drawn.values(), *figures.of_run(named).values(), *figures.of_runs(many).values()):
        assert outside(figure) == [], figure.texts[0].get_text()
        ends = [words.get_window_extent().x1 / figure.dpi for words in figure.texts]
        assert max(ends) <= figure.get_figwidth() - sheet.MARGIN / 2  # captions keep their margin


def test_words_are_broken_to_the_width():
    lines = sheet.wrapped(f"one two {LONG} three", 1.0, 6)
    assert "".join(lines).replace(" ", "") == f"onetwo{LONG}three"
    assert all(sheet.measured(each, 6) <= 1.0 for each in lines)
    short = sheet.shortened(LONG, 1.0, 6)
    assert sheet.measured(short, 6) <= 1.0
    assert (short[:2], short[-2:]) == ("a-", "me")


def test_nothing_is_left_behind(drawn):
    assert "matplotlib.pyplot" not in sys.modules
    assert rcParams["font.size"] == 10.0


def test_control_characters_are_written_out():
    figure = sheet.sheet(sheet.Caption("a\x1bb", "c\x07", ""), 1.0)
    assert [words.get_text() for words in figure.texts[:2]] == ["a\\x1bb", "c\\x07"]


def test_a_method_looks_the_same_in_every_figure():
    known = ["awq", "gptq", "rtn"]
    alone, together = style.look(["rtn"], known), style.look(["awq", "gptq", "gptq, mcs", "mine", "rtn"], known)
    assert alone["rtn"] == together["rtn"]
    assert together["gptq, mcs"] == together["gptq"] | {"fillstyle": "none"}
    assert len({look["color"] for look in together.values()}) == 4
    many = style.look([f"own{i}" for i in range(20)])
    assert len({tuple(map(str, look.items())) for look in many.values()}) == 20
