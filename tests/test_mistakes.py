"""Deliberate mistakes in the statistics: each must turn a test red."""

import importlib
import inspect
import sys
from types import ModuleType

import pytest
import test_estimators
import test_linearity
import test_prefix
import test_statistics
import test_uncertainty

PACKAGE = "funcprobe.statistics"

# What goes wrong, in which module, the text that is right, the text that is wrong, and a test.
MISTAKES = {
    "the denominator is not reweighted": (
        "estimators",
        "terms = [g.size, h, w * g.size,",
        "terms = [g.size, h, g.size.expand_as(w),",
        lambda: test_estimators.test_every_estimator_gives_the_exact_change("sequence", "token"),
    ),
    "the denominator's term is dropped from the numerator": (
        "estimators",
        "(moved - h / size * tilt) / norm",
        "(moved + g.level * tilt) / norm",
        lambda: test_estimators.test_every_estimator_gives_the_exact_change("sequence", "token"),
    ),
    "the EOS is dropped": (
        "inputs",
        "response = response[:, :width].to(logp.device)",
        "response = torch.nn.functional.pad(response[:, 1:width], (0, 1))",
        lambda: test_estimators.test_every_estimator_gives_the_exact_change("sequence", "token"),
    ),
    "a prefix weight holds its own token": (
        "estimators",
        "before = logp.cumsum(-1) - logp",
        "before = logp.cumsum(-1)",
        lambda: test_estimators.test_every_estimator_gives_the_exact_change("prefix", "token"),
    ),
    "ended rows are left out of a position's mean": (
        "estimators",
        "by_position = [r if normalised else zero,",
        "by_position = [alive * r if normalised else zero,",
        lambda: test_estimators.test_every_estimator_gives_the_exact_change("prefix", "sequence"),
    ),
    "the normalisation is taken as fixed in the error": (
        "estimators",
        "mean = drift / n\n",
        "mean = (drift / n).detach()\n",
        lambda: test_estimators.test_value_and_influence_are_the_definitions(
            "prefix", "token", False, 1.0
        ),
    ),
    "the base's ratio is taken as fixed in the error": (
        "estimators",
        "return (moved - h / size * tilt) / norm",
        "return moved / norm",
        lambda: test_statistics.test_the_change_and_its_influence_are_the_hand_formulas(
            "token", 0.3
        ),
    ),
    "base weights are forgotten": (
        "estimators",
        "if behaviour is None else (behaviour - behaviour.max()).exp()",
        "if behaviour is None else torch.ones_like(size)",
        lambda: test_estimators.test_a_base_weight_of_two_is_the_row_twice("sequence", "token"),
    ),
    "the control variate has a mean": (
        "estimators",
        "moved = moved - b * rho * torch.expm1(logp)",
        "moved = moved - b * rho * logp",
        lambda: test_estimators.test_every_estimator_gives_the_exact_change("prefix_raw", "token"),
    ),
    "a sum's error for a mean's": (
        "uncertainty",
        "return (g / (g - 1) * (psi * psi).sum(-1)).sqrt()",
        "return g * (g / (g - 1) * (psi * psi).sum(-1)).sqrt()",
        test_statistics.test_the_error_is_that_of_a_mean,
    ),
    "a variance over G": (
        "uncertainty",
        "return (g / (g - 1) * (psi * psi).sum(-1)).sqrt()",
        "return (psi * psi).sum(-1).sqrt()",
        test_statistics.test_the_error_is_that_of_a_mean,
    ),
    "responses of a prompt are taken as independent": (
        "uncertainty",
        "return total.index_add(-1, index, psi)",
        "return psi",
        test_statistics.test_copies_within_a_prompt_do_not_shrink_the_error,
    ),
    "a pointwise band": (
        "uncertainty",
        "largest = (xi @ unit.T).abs().amax(-1) / s",
        "largest = (xi @ unit.T).abs()[:, 0] / s",
        test_uncertainty.test_a_band_over_one_point_is_students_interval_and_grows_with_independent_ones,
    ),
    "a normal band for few prompts": (
        "uncertainty",
        "largest = (xi @ unit.T).abs().amax(-1) / s",
        "largest = (xi @ unit.T).abs().amax(-1)",
        test_uncertainty.test_a_band_over_one_point_is_students_interval_and_grows_with_independent_ones,
    ),
    "the jackknife's bias is off by G / (G - 1)": (
        "resampling",
        "biases.append((g - 1) * (without",
        "biases.append(g * (without",
        lambda: test_uncertainty.test_the_jackknife_really_leaves_prompts_out("sequence", "token"),
    ),
    "bootstrap-t with its quantiles not swapped": (
        "resampling",
        ".flip(0)).nan_to_num(0.0)",
        ").nan_to_num(0.0)",
        lambda: test_uncertainty.test_each_draw_of_the_bootstrap_is_the_estimator_on_repeated_rows(
            "sequence", "token", True
        ),
    ),
    "the slope's noise is left out of the ratio": (
        "linearity",
        " - (change.value / (line * slope))[:, None] * series.psi[0]",
        "",
        lambda: test_linearity.test_the_ratios_influence_is_its_derivative_in_the_rows_weight(
            "sequence", "token"
        ),
    ),
    "a point beyond a gap counts": (
        "linearity",
        "run = inside[side].long().cumprod(0).sum()",
        "run = inside[side].sum()",
        test_linearity.test_reach_needs_every_smaller_point,
    ),
    "the curvature without its factor of 2": (
        "odd_even",
        "(x[up] + x[down]) / (size * size)",
        "(x[up] + x[down]) / (2 * size * size)",
        lambda: test_linearity.test_odd_and_even_parts_are_slope_and_curvature("token"),
    ),
    "a tail of another length": (
        "weights",
        "size = math.floor(min(n / 5, 3 * math.sqrt(n)))",
        "size = math.ceil(min(n / 5, 3 * math.sqrt(n)))",
        lambda: test_uncertainty.test_khat_and_smoothed_weights_are_those_of_arviz(
            *test_uncertainty.ARVIZ[-1]
        ),
    ),
    "smoothed beyond the largest weight": (
        "weights",
        "smoothed = (cutoff + torch.log1p(quantile)).clamp(max=0)",
        "smoothed = cutoff + torch.log1p(quantile)",
        lambda: test_uncertainty.test_khat_and_smoothed_weights_are_those_of_arviz(
            *test_uncertainty.ARVIZ[3]
        ),
    ),
}


def wrong(monkeypatch, module, right, mistaken):
    """The package with one text of one module replaced, wherever its functions were imported."""
    original = importlib.import_module(f"{PACKAGE}.{module}")
    source = inspect.getsource(original)
    assert source.count(right) == 1, "the table is out of date"
    mutant = ModuleType(original.__name__)
    mutant.__package__ = PACKAGE
    exec(compile(source.replace(right, mistaken), original.__file__, "exec"), mutant.__dict__)
    own = {
        name: value
        for name, value in vars(original).items()
        if inspect.isfunction(value) and value.__module__ == original.__name__
    }
    for other in [m for n, m in sys.modules.items() if n.startswith("funcprobe")]:
        for name, value in own.items():
            if getattr(other, name, None) is value:
                monkeypatch.setattr(other, name, vars(mutant)[name])
    for tests in (test_estimators, test_prefix, test_statistics, test_uncertainty, test_linearity):
        for name, value in own.items():
            if getattr(tests, name, None) is value:
                monkeypatch.setattr(tests, name, vars(mutant)[name])


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_turns_a_test_red(mistake, monkeypatch):
    module, right, mistaken, check = MISTAKES[mistake]
    check()
    wrong(monkeypatch, module, right, mistaken)
    with pytest.raises(AssertionError):
        check()
