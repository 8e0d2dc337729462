"""Mistakes in the estimators, their errors and what is made of them."""

from statistics import NormalDist
from types import SimpleNamespace

import torch
from mistakes import mistake
from torch.nn.functional import pad

from funcprobe.statistics.estimators import Sums, prefix_weights
from funcprobe.statistics.uncertainty import standard_error

EXACT = "test_estimators.py::test_every_estimator_gives_the_exact_change"
DEFINED = "test_estimators.py::test_value_and_influence_are_the_definitions"

# Estimators


def of_sequences(g, logp, dx):
    """Of each row its weight, the quantity over the response, and its change there."""
    x, dx = (torch.where(g.response, y, 0.0).sum(-1) for y in (g.x, dx))
    return torch.where(g.response, logp, 0.0).sum(-1).exp(), x, dx


@mistake("statistics.estimators.change_sums", f"{EXACT}[sequence-token]")
def the_denominator_is_not_reweighted(right, g, logp, dx, weights, **options):
    w, x, dx = of_sequences(g, logp, dx)
    terms = torch.stack(torch.broadcast_tensors(w * (x + dx), x, g.size), -1)
    return Sums(terms, lambda s: (s[..., 0] - s[..., 1]) / s[..., 2])


@mistake("statistics.estimators.change_sums", f"{EXACT}[sequence-token]")
def the_bases_ratio_is_missing_from_the_numerator(right, g, logp, dx, weights, **options):
    w, x, dx = of_sequences(g, logp, dx)
    terms = torch.stack([w * dx + (w - 1) * x, w * g.size], -1)
    return Sums(terms, lambda s: s[..., 0] / s[..., 1])


@mistake(
    "statistics.estimators.change_sums",
    "test_statistics.py::test_the_change_and_its_influence_are_the_hand_formulas[0.3-token]",
)
def the_bases_ratio_is_taken_as_fixed_in_the_error(right, g, logp, dx, weights, **options):
    w, x, dx = of_sequences(g, logp, dx)
    terms = torch.stack([w * dx + (w - 1) * (x - g.level * g.size), w * g.size], -1)
    return Sums(terms, lambda s: s[..., 0] / s[..., 1])


@mistake("statistics.estimators.change_sums", f"{DEFINED}[1.0-prefix-token-False]")
def the_normalisation_is_taken_as_fixed_in_the_error(right, g, logp, dx, weights, **options):
    _, rho = prefix_weights(torch.where(g.response, logp, 0.0))
    rho = torch.where(g.response, rho, 0.0)
    parts = (rho * (g.x + dx)).sum(-1), rho.sum(-1), g.x.sum(-1), g.size
    terms = torch.stack(torch.broadcast_tensors(*parts), -1)
    return Sums(terms, lambda s: s[..., 0] / s[..., 1] - s[..., 2] / s[..., 3])


@mistake("statistics.estimators.change_sums", f"{EXACT}[prefix-sequence]")
def ended_rows_are_left_out_of_a_positions_mean(right, g, logp, dx, weights, **options):
    _, rho = prefix_weights(torch.where(g.response, logp, 0.0), normalised=False)
    rho = torch.where(g.response, rho, 0.0)
    rho = rho * g.response.sum(0).clamp(min=1) / rho.sum(-2, keepdim=True).clamp(min=1e-300)
    moved = torch.where(g.response, rho * (g.x + dx) - g.x, 0.0).sum(-1)
    return Sums(torch.stack([moved, torch.ones_like(moved)], -1), lambda s: s[..., 0] / s[..., 1])


@mistake("statistics.inputs.read", f"{EXACT}[sequence-token]")
def the_eos_is_dropped(right, *args, **kwargs):
    def shorter(batch):
        response = pad(batch.response[:, 1:], (0, 1))
        return SimpleNamespace(response=response, group=batch.group)

    return right(*(shorter(x) if hasattr(x, "response") else x for x in args), **kwargs)


@mistake("statistics.estimators.prefix_weights", f"{EXACT}[prefix-token]")
def a_prefix_weight_holds_its_own_token(right, logp, normalised=True):
    return tuple(weights[..., 1:] for weights in right(pad(logp, (0, 1)), normalised))


@mistake(
    "statistics.estimators.ground",
    "test_estimators.py::test_a_base_weight_of_two_is_the_row_twice[sequence-token]",
)
def base_weights_are_forgotten(right, x, response, per, logb=None):
    return right(x, response, per)


@mistake("statistics.estimators.change_sums", f"{EXACT}[prefix_raw-token]")
def the_control_variate_has_a_mean(right, g, logp, dx, weights, *, control=None, **options):
    if control is not None:
        dx = dx + torch.where(g.response, control * (torch.expm1(logp) - logp), 0.0)
    return right(g, logp, dx, weights, control=control, **options)


# Errors and bands


@mistake(
    "statistics.uncertainty.standard_error", "test_statistics.py::test_the_error_is_that_of_a_mean"
)
def the_error_of_a_sum_instead_of_a_mean(right, psi):
    return psi.shape[-1] * right(psi)


@mistake(
    "statistics.uncertainty.standard_error", "test_statistics.py::test_the_error_is_that_of_a_mean"
)
def a_variance_over_G_instead_of_G_less_1(right, psi):
    return (psi * psi).sum(-1).sqrt()


@mistake(
    "statistics.uncertainty.by_group",
    "test_statistics.py::test_copies_within_a_prompt_do_not_shrink_the_error",
)
def responses_of_a_prompt_are_taken_as_independent(right, psi, group):
    return psi


BAND = (
    "test_uncertainty.py::"
    "test_a_band_over_one_point_is_students_interval_and_grows_with_independent_ones"
)


@mistake("statistics.uncertainty.band", BAND)
def a_pointwise_band(right, psi, **options):
    return torch.cat([right(row[None], **options) for row in psi])


@mistake("statistics.uncertainty.band", BAND)
def a_normal_band_for_few_prompts(right, psi, *, level=0.95, **options):
    if len(psi) > 1:
        return right(psi, level=level, **options)
    return NormalDist().inv_cdf((1 + level) / 2) * standard_error(psi)


@mistake(
    "statistics.resampling.jackknife",
    "test_uncertainty.py::test_the_jackknife_really_leaves_prompts_out[sequence-token]",
)
def the_jackknifes_bias_is_off_by_a_factor(right, sweep, batch, **options):
    g = len(batch.group.unique())
    out = right(sweep, batch, **options)
    return out._replace(bias=out.bias * g / (g - 1))


DRAW = "test_uncertainty.py::test_each_draw_of_the_bootstrap_is_the_estimator_on_repeated_rows"


@mistake("statistics.resampling.bootstrap", f"{DRAW}[sequence-token-True]")
def quantiles_of_the_bootstrap_t_are_not_swapped(right, *args, studentised=False, **options):
    out = right(*args, studentised=studentised, **options)
    low, high = out.value - (out.high - out.value), out.value + (out.value - out.low)
    return out._replace(low=low, high=high) if studentised else out


# Verdicts and orders


@mistake(
    "statistics.linearity.ratio",
    "test_linearity.py::"
    "test_the_ratios_influence_is_its_derivative_in_the_rows_weight[sequence-token]",
)
def the_slopes_noise_is_left_out_of_the_ratio(right, change, series):
    line = change.etas * series.value[0]
    return right(change, series)._replace(psi=change.psi / line[:, None])


@mistake(
    "statistics.linearity.linearity", "test_linearity.py::test_a_point_beyond_a_gap_is_not_reached"
)
def a_point_beyond_a_gap_counts(right, *args, **options):
    out = right(*args, **options)
    inside = [
        abs(eta)
        for eta, says in zip(out.etas.tolist(), out.verdicts, strict=True)
        if says == "holds"
    ]
    return out._replace(holds=max(inside, default=0.0))


@mistake(
    "statistics.odd_even.odd_even",
    "test_linearity.py::test_odd_and_even_parts_are_slope_and_curvature[token]",
)
def the_curvature_lacks_its_factor_of_2(right, change):
    out = right(change)
    return out._replace(curvature=out.curvature / 2)


# Importance weights

ARVIZ = "test_uncertainty.py::test_khat_and_smoothed_weights_are_those_of_arviz"


@mistake("statistics.weights.pareto_khat", ARVIZ)
def a_tail_of_another_length(right, logw):
    return right(torch.cat([logw, logw.amin(-1, keepdim=True).expand(*logw.shape[:-1], 5)], -1))


@mistake("statistics.weights.pareto_smooth", ARVIZ)
def the_largest_weight_is_not_smoothed(right, logw):
    largest = logw.argmax(-1, keepdim=True)
    return right(logw).scatter(-1, largest, logw.gather(-1, largest))


@mistake(
    "statistics.weights.effective_sample_size",
    "test_statistics.py::test_the_effective_sample_size_is_kishs",
)
def the_sample_size_of_the_mean_weight(right, logw):
    return logw.logsumexp(-1).exp()


@mistake("statistics.weights.kl", "test_uncertainty.py::test_the_kl_is_the_enumerated_one")
def the_divergence_the_other_way_round(right, logw, logb=None):
    return (logw.softmax(-1) * (logw - logw.mean(-1, keepdim=True))).sum(-1)


# Whose draws the rows are

POLICY = "test_policy_test.py::test_the_test_by_hand"


@mistake("statistics.policy_test.policy_test", POLICY)
def responses_of_a_prompt_are_independent_draws_of_the_policy(right, scores, batch):
    alone = SimpleNamespace(response=batch.response, group=torch.arange(len(batch.group)))
    return right(scores, alone)


@mistake("statistics.policy_test.policy_test", POLICY)
def likelier_rows_have_the_wrong_sign(right, scores, batch):
    out = right(scores, batch)
    return out._replace(t=-out.t, nats=-out.nats)


@mistake(
    "statistics.policy_test.least_variance",
    "test_policy_test.py::test_equal_sums_do_not_make_a_certain_alarm",
)
def a_spread_by_chance_too_small_is_believed(right, entropy):
    return 0 * right(entropy)


@mistake(
    "statistics.uncertainty.t_pvalue",
    "test_policy_test.py::test_students_p_is_the_closed_form",
)
def a_normal_p_for_few_prompts(right, t, df):
    return 2 * NormalDist().cdf(-abs(t)) if df > 0 else right(t, df)


# Tails


@mistake(
    "statistics.tails.skewness",
    "test_tails.py::test_the_skewness_does_not_change_with_scale_or_order_and_counts_prompts_from_20_on",
)
def prompts_are_taken_for_independent_rows(right, psi, group):
    return right(psi, torch.zeros_like(group))


@mistake(
    "statistics.tails.heavy_weights",
    "test_tails.py::test_a_tail_of_weights_that_hardly_move_leaves_no_point_out",
)
def weights_that_hardly_move_are_doubted(right, khat, ess, rows):
    return right(khat, torch.zeros_like(ess), rows)


@mistake(
    "statistics.tails.lopsided",
    "test_tails.py::test_points_whose_error_hangs_on_few_responses_are_left_out_unless_it_cannot_matter",
)
def only_one_side_of_an_error_is_doubted(right, skew):
    return right(skew.clamp(min=0))
