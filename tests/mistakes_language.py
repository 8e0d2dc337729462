"""Mistakes in scores, objectives and the layout of rows."""

import sys
from dataclasses import replace

import torch
from mistakes import mistake
from torch.utils._pytree import tree_leaves

from funcprobe.language.recipes import as_recipe
from funcprobe.language.sampling import Sampling

# Scores

SCORES = "test_score.py::test_scores_are_those_of_full_logits_row_by_row"
SOFTMAX = "test_score.py::test_slices_of_the_vocabulary_give_what_all_of_it_gives"


@mistake("language.head.softmax.head_scores", f"{SCORES}[llama-1.0]")
def the_entropy_is_the_sampled_tokens_surprise(right, *args, **options):
    logp, _ = right(*args, **options)
    return logp, -logp


@mistake("language.head.softmax.head_scores", f"{SCORES}[llama-1.0]")
def the_entropy_is_in_bits(right, *args, **options):
    logp, entropy = right(*args, **options)
    return logp, entropy / torch.tensor(2.0).log()


@mistake("language.head.softmax.logp_and_entropy", SOFTMAX)
def every_slice_of_the_vocabulary_is_a_softmax_of_its_own(right, slices, target):
    parts = [right([part], target.clamp(max=part.shape[-1] - 1)) for part in slices]
    return tuple(torch.stack(part).sum(0) for part in zip(*parts, strict=True))


@mistake("language.score.scorer", f"{SCORES}[llama-0.5]")
def logits_are_multiplied_by_the_temperature(right, *args, sampling=Sampling(), **options):
    upside_down = replace(sampling, temperature=1 / sampling.temperature)
    return right(*args, sampling=upside_down, **options)


@mistake(
    "language.sampling.nucleus",
    "test_truncation.py::test_the_nucleus_is_hugging_faces_on_random_logits",
)
def the_nucleus_stops_short_of_its_probability(right, logits, top_p):
    inside = right(logits, top_p)
    least = logits.masked_fill(~inside, torch.inf).argmin(-1, keepdim=True)
    return inside & ~torch.zeros_like(inside).scatter(-1, least, inside.sum(-1, keepdim=True) > 1)


TRUNCATED = "test_truncation.py::test_the_possible_tokens_are_those_of_generate"


@mistake("language.sampling.likeliest", f"{TRUNCATED}[0.0-1.0-3]")
def ties_with_the_last_of_the_likeliest_are_dropped(right, logits, top_k):
    first = logits.topk(min(top_k, logits.shape[-1]), -1).indices
    return torch.zeros_like(right(logits, top_k)).scatter(-1, first, True)


@mistake("language.sampling.near_likeliest", f"{TRUNCATED}[0.5-1.0-0]")
def min_p_is_a_probability_of_its_own(right, logits, min_p):
    return right(logits, min_p) & (logits.softmax(-1) >= min_p)


@mistake("language.score.scorer", "test_truncation.py::test_estimates_are_exact_when_enumerated")
def the_possible_tokens_move_with_the_policy(right, *args, support=None, **options):
    def score(params, batch):
        return right(*args, support=params, **options)(params, batch)

    return score


@mistake("language.batch.targets", f"{SCORES}[llama-1.0]")
def scores_are_of_the_token_before(right, batch):
    return right(batch).roll(1, -1)


@mistake(
    "language.readouts.expected_kl",
    "test_readouts.py::test_readouts_are_those_of_full_logits_row_by_row[llama-1.0]",
)
def the_divergence_is_to_the_policy_itself(right, logits, target, reference):
    return right(reference, target, logits)


# Objectives

LOSS = "test_objectives.py::test_a_recipe_is_its_trainers_loss_and_gradient"


@mistake("language.objectives.objective", f"{LOSS}[grpo-0.0]")
def ratios_are_not_clipped(right, score, recipe):
    return right(score, replace(as_recipe(recipe), clip_low=1.0, clip_high=1e9))


@mistake("language.objectives.objective", f"{LOSS}[dapo-0.0]")
def ratios_are_clipped_alike_above_and_below(right, score, recipe):
    recipe = as_recipe(recipe)
    return right(score, replace(recipe, clip_high=recipe.clip_low))


@mistake("language.objectives.objective", f"{LOSS}[grpo-0.0]")
def the_old_policy_is_the_present_one(right, score, recipe):
    loss = right(score, recipe)
    return lambda params, batch: loss(
        params, batch._replace(old_logp=score(params, batch).logp.detach())
    )


@mistake("language.objectives.objective", f"{LOSS}[grpo-0.3]")
def the_penalty_is_the_log_ratio(right, score, recipe):
    recipe = as_recipe(recipe)
    loss = right(score, replace(recipe, beta=0.0))

    def wrong(params, batch):
        gap = score(params, batch).logp - torch.where(batch.response, batch.ref_logp, 0.0)
        return loss(params, batch) + recipe.beta * gap * batch.weight

    return wrong


@mistake(
    "study.setup._loss_sampling",
    "test_setup.py::test_the_loss_is_scored_at_the_temperature_of_us_lines",
)
def the_loss_scores_u_as_e_was_drawn(right, sampling, update, given):
    return sampling, ()


ROWS = "test_rows.py::test_copies_are_told_from_responses_that_recur"


@mistake("study.rows.chance_of_repeat", ROWS)
def responses_are_taken_to_recur_by_their_mean_token(right, batch, logp, draws):
    return right(batch, logp / batch.response.sum(1, keepdim=True), draws)


@mistake("study.rows._often", ROWS)
def every_response_that_recurs_is_a_copy(right, further, others, chance):
    return further > 0


@mistake("language.objectives.prepare", f"{LOSS}[dapo-0.0]")
def tokens_are_averaged_over_the_padding_too(right, batch, recipe, **options):
    out = right(batch, recipe, **options)
    return out._replace(weight=out.weight * out.response.double().mean())


@mistake(
    "language.objectives.prepare",
    "test_objectives.py::test_the_constant_divisor_is_the_longest_response_allowed",
)
def the_constant_divisor_is_the_longest_response(right, *args, max_length=None, **options):
    return right(*args, **options)


@mistake(
    "language.advantages.advantages",
    "test_objectives.py::test_advantages_are_those_of_loops[loo-none]",
)
def the_baseline_holds_the_rows_own_reward(right, reward, group, recipe):
    baseline = "mean" if recipe.baseline == "loo" else recipe.baseline
    return right(reward, group, replace(recipe, baseline=baseline))


@mistake(
    "language.advantages.advantages",
    "test_objectives.py::test_advantages_are_those_of_loops[mean-group]",
)
def the_scale_is_that_of_the_batch(right, reward, group, recipe):
    scale = "batch" if recipe.scale == "group" else recipe.scale
    return right(reward, group, replace(recipe, scale=scale))


# Shared prompts

PACKED = "test_packing.py::test_shared_prompts_change_no_score"
LAYOUT = "test_packing.py::test_the_layout_is_the_one_drawn_by_hand"


@mistake("language.packing.pack", f"{PACKED}[llama]", LAYOUT)
def positions_run_on_from_one_response_to_the_next(right, *args, **options):
    layout = right(*args, **options)
    if layout.place is None:
        return layout
    width = layout.tokens.shape[1]
    return layout._replace(place=torch.arange(width).expand_as(layout.tokens))


@mistake("language.packing.visible", f"{PACKED}[llama]")
def responses_to_a_prompt_see_each_other(right, segment, dtype):
    return right(torch.zeros_like(segment), dtype)


@mistake("language.batch.by_length", "test_line.py::test_blocks_by_length_join_into_the_sweep[20]")
def blocks_come_with_the_order_of_the_rows_as_they_were(right, batch, **options):
    blocks, order = right(batch, **options)
    return blocks, torch.arange(len(order))


@mistake(
    "language.objectives.clipped",
    "test_faults.py::test_clipped_tokens_are_those_without_a_gradient",
)
def every_ratio_outside_the_range_is_clipped(right, logp, batch, recipe):
    outside = right(logp, batch._replace(advantage=batch.advantage.abs()), recipe)
    return outside | right(logp, batch._replace(advantage=-batch.advantage.abs()), recipe)


CAUGHT = "test_derivative.py::test_dora_is_caught_on_a_bfloat16_base"


@mistake("language.model.derivative._reason", CAUGHT)
def every_derivative_is_that_of_the_values(right, *args):
    return ""


# What a model relies on

SILENT = "families/test_silent.py"


@mistake("language.model.checks.slices_alike", f"{SILENT}::test_trained_tokens_of_a_tied_head")
def every_head_may_be_read_in_slices(right, *args):
    return True


@mistake("language.model.checks.longest_shared", f"{SILENT}::test_prompts_in_a_band")
def prompts_are_shared_whatever_the_attention(right, *args):
    return sys.maxsize


@mistake("language.model.masks._longest", f"{SILENT}::test_prompts_in_a_band[mistral]")
def no_mask_has_a_band(right, *args):
    return sys.maxsize


@mistake(
    "language.model.checks.check_causal",
    f"{SILENT}::test_attention_to_later_tokens[gemma3_bidirectional]",
)
def later_tokens_may_be_seen(right, *args):
    pass


@mistake(
    "language.model.checks.check_state",
    "test_checks.py::test_a_table_that_grows_beyond_the_rows_tried_is_refused",
)
def a_module_may_remember(right, *args):
    pass


@mistake(
    "language.model.hooks.check_hooks",
    "test_hooks.py::test_a_hook_on_a_part_that_the_pure_model_passes_by_is_refused",
)
def hooks_are_left_out_in_silence(right, *args):
    pass


@mistake(
    "language.model.hooks._differs",
    "test_hooks.py::test_a_hook_that_changes_a_number_is_refused_by_name",
)
def a_hook_is_looked_at_by_the_number_of_its_values(right, before, values):
    return len(before) != len(tree_leaves(values))


@mistake(
    "language.model.rotary.limit",
    "test_rotary.py::test_rows_beyond_the_limit_are_refused_by_the_ropes_name",
)
def a_rotary_embedding_has_no_limit(right, skeleton):
    return None


@mistake(
    "language.model.positions._has_table",
    "test_positions.py::test_rows_beyond_a_table_are_refused_when_they_are_scored[gpt2]",
)
def no_table_of_positions_ends(right, skeleton):
    return False
