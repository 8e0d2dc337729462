"""Mistakes in steps, increments, derivatives and curves."""

import torch
from mistakes import mistake

from funcprobe import Affine
from funcprobe.calculus.tree import tree_map

ADAMW = "test_step.py::test_adamw_is_torchs"
SGD = "test_step.py::test_sgd_is_torchs"

# Steps


@mistake("calculus.step.adamw", f"{ADAMW}[2-None-False]")
def moments_are_not_corrected_for_their_bias(right, grads, params, state, **options):
    late = {name: torch.full_like(count, 1e6) for name, count in state.count.items()}
    return right(grads, params, state._replace(count=late), **options)


@mistake("calculus.step.adamw", f"{ADAMW}[2-None-False]")
def the_bias_correction_is_that_of_the_step_before(right, grads, params, state, **options):
    before = {name: count - 1 for name, count in state.count.items()}
    return right(grads, params, state._replace(count=before), **options)


@mistake("calculus.step.adamw", f"{ADAMW}[2-None-False]")
def the_parameters_grow_by_their_decay(right, *args, **options):
    step = right(*args, **options)
    return step._replace(decay={name: -d for name, d in step.decay.items()})


@mistake("calculus.step.adamw", f"{ADAMW}[2-None-False]")
def decay_passes_through_the_moments(right, grads, params, state, *, weight_decay, **options):
    decay = weight_decay if isinstance(weight_decay, dict) else dict.fromkeys(params, weight_decay)
    grads = {n: None if g is None else g + decay[n] * params[n] for n, g in grads.items()}
    return right(grads, params, state, weight_decay=0.0, **options)


@mistake("calculus.step.adamw", f"{ADAMW}[2-None-False]")
def momentum_is_left_out_of_the_step(right, *args, **options):
    step = right(*args, **options)
    return step._replace(momentum={n: torch.zeros_like(m) for n, m in step.momentum.items()})


@mistake("calculus.step.adamw", f"{ADAMW}[2-None-True]")
def amsgrad_divides_by_the_present_moment(right, *args, amsgrad=False, **options):
    return right(*args, amsgrad=False, **options)


@mistake("calculus.step.adamw", f"{ADAMW}[2-0.5-False]")
def gradients_are_not_clipped(right, *args, max_grad_norm=None, **options):
    return right(*args, max_grad_norm=None, **options)


@mistake("calculus.tree.norm", f"{ADAMW}[2-0.5-False]")
def gradients_are_clipped_by_the_largest_tensors_norm(right, tree):
    return torch.stack([right({name: leaf}) for name, leaf in tree.items()]).max()


@mistake("calculus.step.sgd", f"{SGD}[options4-None-3]")
def nesterov_is_forgotten(right, *args, nesterov=False, **options):
    return right(*args, **options)


@mistake("calculus.step.sgd", f"{SGD}[options2-None-0]")
def dampening_acts_at_the_first_step(right, grads, params, buffer=None, **options):
    zero = {name: torch.zeros_like(p) for name, p in params.items()}
    return right(grads, params, buffer or zero, **options)


@mistake("calculus.step.decompose", "test_step.py::test_the_parts_of_a_step_add_up_to_it")
def the_rows_share_the_decay(right, step: Affine, row_grads):
    momentum, decay, rows = right(step, row_grads)
    return momentum, decay, {n: r + decay[n] / len(r) for n, r in rows.items()}


@mistake(
    "calculus.gradients.gradient",
    "test_gradients.py::test_gradients_are_those_of_backward_on_the_live_module[llama]",
)
def the_gradient_of_the_mean_instead_of_the_sum(right, fn, params, batch, **options):
    grads = right(fn, params, batch, **options)
    return {name: g / len(batch.response) for name, g in grads.items()}


# Lines

LOOP = "test_line.py::test_a_sweep_is_the_loop_over_in_place_writes[llama]"


@mistake(
    "calculus.line.sweep", "test_line.py::test_a_sweep_is_the_loop_over_in_place_writes[llama]"
)
def the_step_is_taken_backwards(right, fn, params, v, etas, batch, **options):
    return right(fn, params, {name: -d for name, d in v.items()}, etas, batch, **options)


@mistake(
    "calculus.line.sweep", "test_line.py::test_a_sweep_is_the_loop_over_in_place_writes[llama]"
)
def a_sweep_holds_values_instead_of_changes(right, *args, **options):
    out = right(*args, **options)
    return out._replace(change=tree_map(lambda c, b: c + b, out.change, out.base))


@mistake("calculus.results.join", "test_line.py::test_blocks_by_length_join_into_the_sweep[20]")
def blocks_are_joined_in_the_order_of_their_lengths(right, parts, order=None):
    return right(parts)


@mistake("calculus.tree.shift", "test_laws.py::test_shifts_add_up")
def a_shift_scales_the_parameters_too(right, params, v, eta):
    return right({name: p * (1 + 1e-6 * eta) for name, p in params.items()}, v, eta)


@mistake("calculus.tree.dot", "test_line.py::test_dot_and_norm_are_those_of_the_flat_vectors")
def the_inner_product_misses_a_tensor(right, a, b):
    rest = list(a)[1:]
    return right({name: a[name] for name in rest}, {name: b[name] for name in rest})


# Increments

ROW_RULES = "test_increment.py::test_row_rules_at_every_size"
INCREMENTS = "calculus.transforms.increment.RULES"


@mistake(INCREMENTS, f"{ROW_RULES}[1.0-dtype0-product]", key=torch.mul)
def a_products_increment_is_its_first_order(right, op, a, b, *args, **kwargs):
    value, change = right(op, a, b, *args, **kwargs)
    return value, change - a.d * b.d


@mistake(INCREMENTS, f"{ROW_RULES}[1.0-dtype0-matmul]", key=torch.matmul)
def a_matrix_products_increment_is_its_first_order(right, op, a, b):
    value, change = right(op, a, b)
    return value, change - op(a.d, b.d)


@mistake(INCREMENTS, f"{ROW_RULES}[1.0-dtype0-division]", key=torch.div)
def a_quotients_increment_is_over_the_old_denominator(right, op, a, b, **kwargs):
    value, change = right(op, a, b, **kwargs)
    return value, change * (b.x + b.d) / b.x


@mistake(
    INCREMENTS,
    "test_increment.py::test_elementwise_rules_at_every_size_and_sign[dtype0-exp]",
    key=torch.exp,
)
def an_exponential_is_subtracted(right, op, a):
    return op(a.x), op(a.x + a.d) - op(a.x)


@mistake("calculus.transforms.elementwise.d_logsumexp", f"{ROW_RULES}[1.0-dtype0-logsumexp]")
def a_logsumexps_increment_is_its_mean(right, p, d, dim):
    return (p * d).sum(dim, keepdim=True)


# Derivatives

ORDERS = "test_taylor.py::test_each_order_is_the_derivative_of_the_one_before[llama]"


@mistake("calculus.transforms.jet.derivatives", ORDERS)
def derivatives_lack_their_factorials(right, fn, params, v, order):
    value, first, *rest = right(fn, params, v, order)
    return [value, first, *(tree_map(lambda leaf: leaf / 2, term) for term in rest)]


@mistake("calculus.transforms.nested_jvp.nested", "test_jet.py::test_rules_against_nested_jvp")
def the_jvp_is_along_twice_the_direction(right, fn, at, v, order):
    terms = right(fn, at, v, order)
    return [tree_map(lambda leaf, k=k: leaf * 2**k, term) for k, term in enumerate(terms)]


@mistake("calculus.transforms.power_series.chain", "test_jet.py::test_rules_against_nested_jvp")
def the_chain_rule_of_series_lacks_its_weights(right, x, g, k):
    terms = [x[j] * g[k - j] for j in range(1, k + 1) if x[j] is not None and g[k - j] is not None]
    return sum(terms[1:], start=terms[0]) if terms else None


@mistake(
    "calculus.taylor.taylor",
    "test_taylor.py::test_the_derivative_is_the_limit_of_central_differences[llama]",
)
def the_derivative_is_a_forward_difference(right, fn, params, v, batch, **options):
    value, _, *rest = right(fn, params, v, batch, **options)
    there = {name: p + 1e-6 * v[name] for name, p in params.items()}
    return value, tree_map(lambda a, b: (a - b) / 1e-6, fn(there, batch), value), *rest


# Curves

KNOWN = "test_interpolation.py::test_a_known_function_is_interpolated_within_the_bound"
BOUND = "test_interpolation.py::test_the_bound_holds_for_fast_and_slow_curves"


@mistake("calculus.interpolation.interpolate", f"{KNOWN}[span0]")
def the_curve_is_not_multiplied_by_eta(right, start, at, etas, *args):
    out = right(start, at, etas, *args)
    eta = torch.where(etas == 0, 1.0, etas)
    return out._replace(
        change=tree_map(lambda c: c / eta.view(-1, *[1] * (c.ndim - 1)), out.change)
    )


@mistake("calculus.interpolation.interpolate", f"{KNOWN}[span0]")
def a_straight_line_between_the_ends(right, start, at, etas, *args):
    out = right(start, at, etas, *args)
    share = (etas - etas[0]) / (etas[-1] - etas[0])

    def line(c):
        return c[0] + share.view(-1, *[1] * (c.ndim - 1)) * (c[-1] - c[0])

    return out._replace(change=tree_map(line, out.change))


@mistake("calculus.interpolation.interpolate", BOUND)
def the_bound_lacks_its_margin(right, *args):
    out = right(*args)
    return out._replace(bound=out.bound / 100)


# Blocks and rates

ROWS = "test_blocks.py::test_a_function_whose_rows_depend_on_each_other_is_refused_in_blocks"


@mistake("calculus.separable.checked", ROWS)
def dependent_rows_are_cut_into_blocks(right, parts, fn, params):
    yield from parts


@mistake("calculus.separable._distance", ROWS)
def only_the_mean_of_the_rows_is_compared(right, whole, parts):
    return right(whole.mean(0, keepdim=True), parts.mean(0, keepdim=True))


@mistake(
    "calculus.line._check_underflow",
    "test_faults.py::test_rates_that_underflow_or_overflow_are_named",
)
def a_rate_may_underflow(right, v, params, etas):
    pass


@mistake(
    "calculus.derivatives.check_derivative",
    "families/test_false_derivative.py::test_a_false_derivative_is_named_and_refused_where_it_is_used",
)
def a_false_derivative_is_taken_for_a_true_one(right, where, fn):
    return None


@mistake(
    "calculus.transforms.elementwise.d_norm",
    "test_derivative.py::test_doras_secant_is_its_slope[dtype0-1e-08]",
)
def the_change_of_a_norm_is_that_of_its_square(right, y, *args):
    return right(y, *args) * y


@mistake(
    "calculus.derivatives._embedding",
    "test_influence.py::test_padding_within_a_row_of_a_trained_embedding",
)
def a_pullback_leaves_the_padding_out_as_a_trainer_does(right, *args, **options):
    return torch.nn.functional.embedding(*args, **options)


@mistake(
    "calculus.changes._in_turns",
    "test_looped.py::test_a_sweep_that_vmap_refuses_runs_one_lane_at_a_time",
)
def lanes_alone_are_counted_from_the_base(right, at, deltas, lanes, before=0):
    return right(at, deltas, lanes, 0 if lanes == 1 else before)
