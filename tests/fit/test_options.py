"""Fit options are declared once: limits, defaults, and the signature of methods that take them."""

import inspect

import pytest

from pymc_flows import NFVI
from pymc_flows.fit.options import OPTION_NAMES, FitOptions, takes_fit_options


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n": -1}, ValueError, "n must be at least 0, got -1"),
        ({"annealing": -1}, ValueError, "annealing must be at least 0, got -1"),
        ({"kl_warmup": -2}, ValueError, "kl_warmup must be at least 0, got -2"),
        ({"obj_n_mc": 0}, ValueError, "obj_n_mc must be at least 1, got 0"),
        ({"patience": -1}, ValueError, "patience must be at least 0, got -1"),
        ({"n_restarts": 0}, ValueError, "n_restarts must be at least 1, got 0"),
        ({"n": 10, "annealing": 10}, ValueError, "annealing must be below n=10, got 10"),
        ({"annealing": 5, "kl_warmup": 5}, ValueError, "kl_warmup must be 0 with annealing=5"),
        ({"gradient": "score"}, ValueError, "gradient must be one of .* got 'score'"),
        (
            {"learning_rate": 0.1, "obj_optimizer": len},
            TypeError,
            "learning_rate must not be given",
        ),
    ],
)
def test_a_value_out_of_range_is_named(options, error, message):
    with pytest.raises(error, match=message):
        FitOptions(**options)


def test_defaults():
    options = FitOptions()
    assert (options.n, options.n_draws, options.peak_rate, options.window) == (5000, 64, 0.01, 50)
    assert options.may_grow
    assert options.compiling == {"backend": None, "compile_kwargs": None}


def test_draws_and_optimizers_of_the_user_stay():
    assert not FitOptions(obj_n_mc=8).may_grow
    with_optimizer = FitOptions(obj_optimizer=len)
    assert not with_optimizer.may_grow
    assert with_optimizer.window == 0


def test_no_steps_allow_any_annealing():
    assert FitOptions(n=0, annealing=500).annealing == 500


def test_a_method_shows_the_options_as_its_own():
    @takes_fit_options
    def fit(self, *args, **kwargs):
        """Fit.

        {options}
        """

    assert list(inspect.signature(fit).parameters) == ["self", *OPTION_NAMES]
    assert "learning_rate : float" in (fit.__doc__ or "")


def test_the_fit_of_nfvi_takes_all_options():
    assert set(OPTION_NAMES) <= set(inspect.signature(NFVI.fit).parameters)


@pytest.mark.parametrize("name", ["kl_warmup", "patience", "n_restarts", "n"])
def test_none_is_refused_where_it_has_no_meaning(name):
    with pytest.raises(TypeError, match=f"{name} must be a whole number of at least .*, got None"):
        FitOptions(**{name: None})


def test_callbacks_of_an_iterator_are_kept():
    assert FitOptions(callbacks=iter([print])).callbacks == (print,)


@pytest.mark.parametrize(
    ("score", "records"), [(None, True), (True, True), (False, False), (0, False)]
)
def test_score_says_whether_losses_are_recorded(score, records):
    assert FitOptions(score=score).records_losses is records
