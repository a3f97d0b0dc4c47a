"""Plots of fits: panels, titles, legends and curves."""

import itertools
import sys
import types

import matplotlib as mpl
import numpy as np
import pymc as pm
import pytest
import xarray as xr
from numpy.testing import assert_allclose

from pymc_flows import NormalizingFlow, diagnose
from pymc_flows.assess.plots import (
    plot_compare,
    plot_forest,
    plot_loss,
    plot_pairs,
    plot_quantiles,
    plot_warp,
    plot_weights,
)

mpl.use("Agg")

from matplotlib import pyplot as plt

SCHOOLS = ["Choate", "Deerfield", "Hotchkiss"]


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def normal(loc=0.0, scale=1.0, *, draws=400, shape=(), seed=0):
    return np.random.default_rng(seed).normal(loc, scale, size=(draws, *shape))


def schools(shift=0.0, draws=400, seed=0):
    """A result with an exact mu, and a theta whose error grows from school to school."""
    theta = normal(shift * np.arange(3), draws=draws, shape=(3,), seed=seed)
    return xr.DataTree.from_dict(
        {
            "posterior": xr.Dataset(
                {
                    "mu": (("chain", "draw"), normal(draws=draws, seed=seed + 1)[None]),
                    "theta": (("chain", "draw", "school"), theta[None]),
                },
                coords={"school": SCHOOLS},
            )
        }
    )


def panels(collection):
    """Axes of a plot by title, in order."""
    figure = collection.viz["figure"].item()
    return {axes.get_title(): axes for axes in figure.axes if axes.axison}


def legend_of(collection):
    (legend,) = collection.viz["figure"].item().legends
    return [text.get_text() for text in legend.get_texts()], legend


def test_panels_are_titled_by_parameter_and_the_legend_names_methods():
    results = {"nuts": schools(), "flow": schools(seed=2), "mean-field": schools(seed=4)}
    collection = plot_compare(results)
    assert list(panels(collection)) == ["mu", *(f"theta[{name}]" for name in SCHOOLS)]
    names, legend = legend_of(collection)
    assert names == ["nuts", "flow", "mean-field"]
    colors = [line.get_color() for line in legend.get_lines()]
    assert len(set(colors)) == 3
    for axes in panels(collection).values():
        assert [line.get_color() for line in axes.lines] == colors


def test_with_a_reference_the_largest_distances_come_first_and_the_reference_is_black():
    results = {"flow": schools(shift=2.0, seed=2), "nuts": schools()}
    collection = plot_compare(results, reference="nuts", max_panels=2)
    assert list(panels(collection)) == ["theta[Hotchkiss]", "theta[Deerfield]"]
    names, legend = legend_of(collection)
    black = [
        name
        for name, line in zip(names, legend.get_lines(), strict=True)
        if line.get_color() == "black"
    ]
    assert black == ["nuts"]


@pytest.mark.parametrize(("var_names", "count"), [(None, 12), ("x", 15)])
def test_number_of_panels_has_a_limit_that_is_higher_for_chosen_variables(var_names, count):
    results = {"a": {"x": normal(shape=(15,))}, "b": {"x": normal(shape=(15,), seed=1)}}
    assert len(panels(plot_compare(results, var_names=var_names))) == count


def test_max_panels_may_exceed_arvizs_limit():
    results = {"a": {"x": normal(draws=50, shape=(45,))}}
    assert len(panels(plot_compare(results, max_panels=41, backend="matplotlib"))) == 41


def test_var_names_selects_the_panels():
    collection = plot_compare({"nuts": schools(), "flow": schools(seed=2)}, var_names=["mu"])
    assert list(panels(collection)) == ["mu"]


def test_densities_match_the_draws_for_any_number_of_draws():
    results = {"few": {"x": normal(3.0, 2.0, draws=500)}, "many": {"x": normal(-3.0, draws=5000)}}
    lines = panels(plot_compare(results))["x"].lines
    for line, loc, scale in zip(lines, (3.0, -3.0), (2.0, 1.0), strict=True):
        x, y = line.get_data()
        assert abs(np.trapezoid(y, x) - 1) < 0.03
        assert abs(np.trapezoid(x * y, x) - loc) < 0.3
        assert_allclose(y.max(), 0.399 / scale, rtol=0.15)
        assert x.min() < loc - 2.5 * scale
        assert x.max() > loc + 2.5 * scale


def test_heavy_tails_do_not_stretch_the_axis():
    rng = np.random.default_rng(5)
    drawn = rng.normal(size=4000)
    drawn[:4] = 1e6
    axes = panels(plot_compare({"flow": {"x": drawn}}))["x"]
    assert np.abs(axes.get_xlim()).max() < 10


def test_long_labels_are_wrapped_and_no_text_overlaps():
    kinds = [f"{floor}, with a garden" for floor in ("first floor", "second floor", "attic")]
    counties = ["Blue Earth", "Lac Qui Parle", "Yellow Medicine"]
    values = -9e4 * normal(2.0, shape=(3, 3))
    dims = ("chain", "draw", "county", "kind")
    coords = {"county": counties, "kind": kinds}
    posterior = xr.Dataset({"sigma_of": (dims, values[None])}, coords=coords)
    result = xr.DataTree.from_dict({"posterior": posterior})
    collection = plot_compare({"nuts": result, "mean-field": result})
    assert all(title.startswith("sigma_of\n[") for title in panels(collection))
    assert [title.replace("\n", " ").replace(" [", "[") for title in panels(collection)] == [
        f"sigma_of[{county}, {kind}]" for county, kind in itertools.product(counties, kinds)
    ]
    figure = collection.viz["figure"].item()
    figure.canvas.draw()
    texts = [axes.title for axes in panels(collection).values()]
    for axes in panels(collection).values():
        low, high = axes.get_xlim()
        texts += [text for text in axes.get_xticklabels() if low <= text.get_position()[0] <= high]
        texts.append(axes.xaxis.get_offset_text())
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    boxes.append(legend_of(collection)[1].get_window_extent())
    assert len(boxes) > 9 * 4
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    for box in boxes:
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1


@pytest.mark.parametrize(("loc", "scale"), [(0.0, 2e5), (0.0, 2e-4), (-123456.0, 300.0)])
def test_tick_labels_do_not_overlap(loc, scale):
    collection = plot_compare({"flow": {"x": normal(loc, scale, shape=(12,))}})
    collection.viz["figure"].item().canvas.draw()
    for axes in panels(collection).values():
        low, high = axes.get_xlim()
        ticks = [text for text in axes.get_xticklabels() if low <= text.get_position()[0] <= high]
        boxes = [text.get_window_extent() for text in ticks]
        assert len(boxes) > 1
        assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))


def test_constants_have_no_panel():
    constant = np.full(400, 0.1)
    results = {
        "a": {"x": normal(), "c": constant, "d": constant},
        "b": {"x": normal(seed=1), "c": constant, "d": normal(seed=2)},
    }
    collection = plot_compare(results)
    assert list(panels(collection)) == ["x", "d"]
    curves = [np.isfinite(line.get_ydata()).any() for line in panels(collection)["d"].lines]
    assert curves == [False, True]
    with pytest.raises(ValueError, match=r"constant in every result: \['c'\]"):
        plot_compare(results, var_names="c")


def test_keyword_arguments_are_passed_to_arviz():
    collection = plot_compare(
        {"a": {"x": normal()}}, kind="ecdf", figure_kwargs={"figsize": (9, 4)}
    )
    (line,) = panels(collection)["x"].lines
    assert_allclose(line.get_ydata().max(), 1.0)
    assert tuple(collection.viz["figure"].item().get_size_inches()) == (9, 4)


def test_backend_none_does_not_need_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    collection = plot_compare({"a": {"x": normal()}}, backend="none")
    assert collection.backend == "none"


@pytest.mark.parametrize(
    ("results", "options", "message"),
    [
        ({}, {}, "at least 1 result"),
        ({"a": {"x": normal()}}, {"max_panels": 0}, "max_panels must be at least 1, got 0"),
        ({"nuts": {"x": normal()}}, {"reference": "nits"}, "did you mean nuts"),
        ({"nuts": {"x": normal()}}, {"backend": "matplot"}, "backend; did you mean matplotlib"),
    ],
)
def test_errors_of_plot_compare(results, options, message):
    with pytest.raises(ValueError, match=message):
        plot_compare(results, **options)


def test_error_without_matplotlib_names_the_extra(monkeypatch):
    for module in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = r'pip install "pymc-flows\[plots\]"'
    with pytest.raises(ImportError, match=message):
        plot_compare({"a": {"x": normal()}})
    with pytest.raises(ImportError, match=message):
        plot_loss(types.SimpleNamespace(hist=normal()))


def test_error_without_another_backend_names_its_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "bokeh", None)
    with pytest.raises(ImportError, match='pip install "bokeh"'):
        plot_compare({"a": {"x": normal()}}, backend="bokeh")


def fit(hist):
    return types.SimpleNamespace(hist=np.asarray(hist, dtype=float))


def axes_of(collection):
    """Matplotlib axes of a plot's panels, in order."""
    return [axes for axes in collection.viz["figure"].item().axes if axes.get_visible()]


def test_loss_and_running_median_are_plotted_against_steps_from_one():
    loss = 20.0 + normal(draws=1000) + 5 * np.exp(-np.arange(1000) / 100)
    loss[500] = 1e3
    (axes,) = axes_of(plot_loss(fit(loss), window=51))
    drawn, trend = axes.lines
    assert_allclose(drawn.get_xdata(), np.arange(1, 1001))
    assert_allclose(drawn.get_ydata(), loss)
    assert_allclose(trend.get_ydata()[500], np.median(loss[475:526]))
    assert axes.get_xlabel() == "step"
    assert "nats" in axes.get_ylabel()


def test_steps_without_a_finite_loss_are_left_blank():
    (axes,) = axes_of(plot_loss(fit([4.0, np.nan, 3.0, np.inf, 2.0]), window=3))
    drawn, trend = axes.lines
    assert_allclose(drawn.get_ydata(), [4.0, np.nan, 3.0, np.nan, 2.0])
    assert_allclose(trend.get_ydata(), [4.0, 3.5, 3.0, 2.5, 2.0])


def test_high_early_losses_do_not_flatten_the_rest():
    loss = 300 + normal(draws=2000) + 1e6 * np.exp(-np.arange(2000) / 4)
    (axes,) = axes_of(plot_loss(fit(loss)))
    low, high = axes.get_ylim()
    assert 290 < low < 297
    assert 303 < high < 310
    assert "starts at 1e+06" in axes.get_title()


@pytest.mark.parametrize("start", [0.0, 20.0])
def test_a_loss_that_starts_near_its_end_is_shown_whole(start):
    loss = 300 + normal(draws=2000) + start * np.exp(-np.arange(2000) / 4)
    (axes,) = axes_of(plot_loss(fit(loss)))
    low, high = axes.get_ylim()
    assert low < loss.min() < loss.max() < high
    assert axes.get_title() == ""


def test_stages_are_marked_and_the_title_says_why_the_fit_ended():
    approx = fit(normal(draws=300))
    approx.fit_stats = {
        "stages": [{"first_step": 0}, {"first_step": 120}, {"first_step": 200}],
        "stopped": "the importance weights are even",
    }
    (axes,) = axes_of(plot_loss(approx))
    assert [line.get_xdata()[0] for line in axes.lines[2:]] == [120, 200]
    assert axes.get_title() == "the importance weights are even"


def test_quantiles_of_equal_draws_lie_on_the_diagonal():
    results = {"flow": {"x": normal(draws=4000), "y": normal(3.0, draws=4000, seed=1)}}
    results["nuts"] = {"x": normal(draws=4000), "y": normal(0.0, draws=4000, seed=1)}
    worst, best = axes_of(plot_quantiles(results, reference="nuts"))
    assert worst.get_title() == "y"
    flow, diagonal = worst.lines
    assert_allclose(flow.get_ydata() - flow.get_xdata(), 3)
    assert_allclose(diagonal.get_ydata(), diagonal.get_xdata())
    flow, _ = best.lines
    assert_allclose(flow.get_ydata(), flow.get_xdata())


def test_pairs_show_all_methods_in_each_panel():
    results = {"flow": schools(draws=300), "nuts": schools(draws=200, seed=5)}
    collection = plot_pairs(results, reference="nuts", max_parameters=3, draws=150)
    panels = axes_of(collection)
    assert len(panels) == 3
    for axes in panels:
        assert len(axes.collections) == 2
        for points in axes.collections:
            assert np.isfinite(points.get_offsets()).all(axis=1).sum() == 150
        assert axes.get_xlabel()
        assert axes.get_ylabel()
    assert len({(axes.get_xlabel(), axes.get_ylabel()) for axes in panels}) == 3


def test_a_forest_has_a_row_for_each_parameter():
    collection = plot_forest({"flow": schools(draws=300), "nuts": schools(seed=5)}, max_rows=3)
    assert set(collection.data.data_vars) == {"mu", "theta[Choate]", "theta[Deerfield]"}


def weighted(slope):
    """Draws whose weights have a Pareto tail with a given index."""
    log_p = slope * np.random.default_rng(1).exponential(size=(1, 4000))
    stats = xr.Dataset(
        {"log_p": (("chain", "draw"), log_p), "log_q": (("chain", "draw"), 0 * log_p)}
    )
    posterior = xr.Dataset({"x": (("chain", "draw"), normal(draws=4000)[None])})
    return xr.DataTree.from_dict({"posterior": posterior, "sample_stats": stats})


@pytest.mark.parametrize("tail", [0.3, 0.9])
def test_slope_of_the_weights_tail_is_its_index(tail):
    (axes,) = axes_of(plot_weights(weighted(tail)))
    (line,) = axes.lines
    x, y = line.get_xdata(), line.get_ydata()
    known = np.isfinite(y)
    slope, _ = np.polyfit(x[known], y[known], 1)
    assert abs(slope + tail) < 0.15
    assert "k-hat" in axes.get_title()
    again = diagnose(weighted(tail))
    assert axes.get_title() == axes_of(plot_weights(again))[0].get_title()


def test_warp_is_the_flows_image_of_the_grid(python):
    with pm.Model():
        pm.Normal("x", shape=2)
        approx = NormalizingFlow("scale-loc", random_seed=1)
    approx.params[0].set_value(np.arange(approx.params[0].get_value().size) / 4)
    (axes,) = axes_of(plot_warp(approx, n_lines=3, extent=2.0))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("x[0]", "x[1]")
    noise = np.stack([np.full(201, -2.0), np.linspace(-2, 2, 201)], axis=1)
    x, _ = approx.flow_function(201)(noise)
    (grid,) = axes.lines
    drawn = np.stack(grid.get_data(), axis=1)
    assert_allclose(drawn[:201], x)
    assert np.isnan(drawn).all(axis=1).sum() == 6


@pytest.mark.parametrize("backend", ["bokeh", "plotly", "none"])
def test_every_plot_is_drawn_by_every_backend(backend, python):
    results = {"flow": schools(draws=100), "nuts": schools(draws=100, seed=5)}
    with pm.Model():
        pm.Normal("x", shape=2)
        approx = NormalizingFlow("scale-loc", random_seed=1)
    collections = [
        plot_compare(results, reference="nuts", max_panels=2, backend=backend),
        plot_forest(results, backend=backend),
        plot_pairs(results, max_parameters=2, backend=backend),
        plot_quantiles(results, reference="nuts", max_panels=2, backend=backend),
        plot_weights(weighted(0.3), backend=backend),
        plot_warp(approx, n_lines=2, backend=backend),
        plot_loss(fit([3.0, 2.0, 1.0]), backend=backend),
    ]
    assert all(type(collection).__name__ == "PlotCollection" for collection in collections)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plot_warp(fit([])), "approx must have 2 dimensions"),
        (lambda: plot_pairs({"a": {"x": normal()}}), "at least 2 parameters that vary, got"),
        (lambda: plot_forest({"a": {"x": normal()}}, max_rows=0), "max_rows must be at least 1"),
        (
            lambda: plot_quantiles({"a": {"x": normal()}}, reference="a"),
            "at least 2 results to compare",
        ),
        (lambda: plot_weights(weighted(0.3), backend="bokhe"), "did you mean bokeh"),
    ],
)
def test_errors_name_the_rule(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("approx", "options", "message"),
    [
        (types.SimpleNamespace(), {}, "got none in 0 steps.*score=True"),
        (fit([]), {}, "got none in 0 steps"),
        (fit([np.nan, np.inf]), {}, "got none in 2 steps"),
        (fit([1.0]), {"window": 0}, "window must be at least 1, got 0"),
    ],
)
def test_errors_of_plot_loss(approx, options, message):
    with pytest.raises(ValueError, match=message):
        plot_loss(approx, **options)
