"""Pictures of fits: what the panels, titles, legends and curves show."""

import itertools
import sys
import types

import matplotlib as mpl
import numpy as np
import pytest
import xarray as xr
from numpy.testing import assert_allclose

from pymc_flows.plots import plot_compare, plot_loss

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
    """A result of mu, which is exact, and theta, which is off by more from school to school."""
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
    """Give the axes of a picture by their titles, in order."""
    figure = collection.viz["figure"].item()
    return {axes.get_title(): axes for axes in figure.axes if axes.axison}


def legend_of(collection):
    (legend,) = collection.viz["figure"].item().legends
    return [text.get_text() for text in legend.get_texts()], legend


def test_panels_are_titled_by_the_models_names_and_the_legend_by_methods():
    results = {"nuts": schools(), "flow": schools(seed=2), "mean-field": schools(seed=4)}
    collection = plot_compare(results)
    assert list(panels(collection)) == ["mu", *(f"theta[{name}]" for name in SCHOOLS)]
    names, legend = legend_of(collection)
    assert names == ["nuts", "flow", "mean-field"]
    colors = [line.get_color() for line in legend.get_lines()]
    assert len(set(colors)) == 3
    for axes in panels(collection).values():
        assert [line.get_color() for line in axes.lines] == colors


def test_with_a_reference_the_worst_come_first_and_the_reference_is_black():
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
def test_the_number_of_panels_is_bounded_unless_variables_are_chosen(var_names, count):
    results = {"a": {"x": normal(shape=(15,))}, "b": {"x": normal(shape=(15,), seed=1)}}
    assert len(panels(plot_compare(results, var_names=var_names))) == count


def test_more_panels_than_arvizs_limit_can_be_asked_for():
    results = {"a": {"x": normal(draws=50, shape=(45,))}}
    assert len(panels(plot_compare(results, max_panels=41, backend="matplotlib"))) == 41


def test_var_names_chooses_the_panels():
    collection = plot_compare({"nuts": schools(), "flow": schools(seed=2)}, var_names=["mu"])
    assert list(panels(collection)) == ["mu"]


def test_densities_are_those_of_the_draws_whatever_their_number():
    results = {"few": {"x": normal(3.0, 2.0, draws=500)}, "many": {"x": normal(-3.0, draws=5000)}}
    lines = panels(plot_compare(results))["x"].lines
    for line, loc, scale in zip(lines, (3.0, -3.0), (2.0, 1.0), strict=True):
        x, y = line.get_data()
        assert abs(np.trapezoid(y, x) - 1) < 0.03
        assert abs(np.trapezoid(x * y, x) - loc) < 0.3
        assert_allclose(y.max(), 0.399 / scale, rtol=0.15)
        assert x.min() < loc - 2.5 * scale
        assert x.max() > loc + 2.5 * scale


def test_heavy_tails_leave_room_for_the_rest():
    rng = np.random.default_rng(5)
    drawn = rng.normal(size=4000)
    drawn[:4] = 1e6
    axes = panels(plot_compare({"flow": {"x": drawn}}))["x"]
    assert np.abs(axes.get_xlim()).max() < 10


def test_long_labels_are_broken_and_no_text_overlaps():
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
def test_numbers_under_the_axes_do_not_overlap(loc, scale):
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


def test_settings_reach_arviz():
    collection = plot_compare(
        {"a": {"x": normal()}}, kind="ecdf", figure_kwargs={"figsize": (9, 4)}
    )
    (line,) = panels(collection)["x"].lines
    assert_allclose(line.get_ydata().max(), 1.0)
    assert tuple(collection.viz["figure"].item().get_size_inches()) == (9, 4)


def test_the_backend_none_draws_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    collection = plot_compare({"a": {"x": normal()}}, backend="none")
    assert collection.backend == "none"


@pytest.mark.parametrize(
    ("results", "options", "message"),
    [
        ({}, {}, "at least 1 result"),
        ({"a": {"x": normal()}}, {"max_panels": 0}, "max_panels must be at least 1, got 0"),
        ({"nuts": {"x": normal()}}, {"reference": "nits"}, "did you mean 'nuts'"),
        ({"nuts": {"x": normal()}}, {"backend": "matplot"}, "backend; did you mean 'matplotlib'"),
    ],
)
def test_errors_of_plot_compare(results, options, message):
    with pytest.raises(ValueError, match=message):
        plot_compare(results, **options)


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    for module in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = r'pip install "pymc-flows\[plots\]"'
    with pytest.raises(ImportError, match=message):
        plot_compare({"a": {"x": normal()}})
    with pytest.raises(ImportError, match=message):
        plot_loss(types.SimpleNamespace(hist=normal()))


def test_another_backends_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bokeh", None)
    with pytest.raises(ImportError, match='pip install "bokeh"'):
        plot_compare({"a": {"x": normal()}}, backend="bokeh")


def fit(hist):
    return types.SimpleNamespace(hist=np.asarray(hist, dtype=float))


def test_the_loss_and_its_running_median_against_steps_from_one():
    loss = 20.0 + normal(draws=1000) + 5 * np.exp(-np.arange(1000) / 100)
    loss[500] = 1e3
    axes = plot_loss(fit(loss), window=51)
    drawn, trend = axes.lines
    assert_allclose(drawn.get_xdata(), np.arange(1, 1001))
    assert_allclose(drawn.get_ydata(), loss)
    assert_allclose(trend.get_ydata()[500], np.median(loss[475:526]))
    assert axes.get_xlabel() == "step"
    assert "nats" in axes.get_ylabel()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "loss",
        "median of 51 steps",
    ]


def test_steps_without_a_finite_loss_are_left_blank():
    axes = plot_loss(fit([4.0, np.nan, 3.0, np.inf, 2.0]), window=3)
    drawn, trend = axes.lines
    assert_allclose(drawn.get_ydata(), [4.0, np.nan, 3.0, np.nan, 2.0])
    assert_allclose(trend.get_ydata(), [4.0, 3.5, 3.0, 2.5, 2.0])


def test_a_high_start_does_not_flatten_the_rest():
    loss = 300 + normal(draws=2000) + 1e6 * np.exp(-np.arange(2000) / 4)
    axes = plot_loss(fit(loss))
    low, high = axes.get_ylim()
    assert 290 < low < 297
    assert 303 < high < 310
    assert "starts at 1e+06" in axes.get_title(loc="left")


@pytest.mark.parametrize("start", [0.0, 20.0])
def test_a_loss_that_starts_near_its_end_is_shown_whole(start):
    loss = 300 + normal(draws=2000) + start * np.exp(-np.arange(2000) / 4)
    axes = plot_loss(fit(loss))
    low, high = axes.get_ylim()
    assert low < loss.min() < loss.max() < high
    assert axes.get_title(loc="left") == ""


def test_the_loss_goes_where_it_is_asked_to():
    _, axes = plt.subplots()
    assert plot_loss(fit([3.0, 2.0]), ax=axes) is axes


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
