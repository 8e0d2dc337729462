"""What rows show by themselves: which could not be draws, and which are not independent."""

import torch

import funcprobe as fp
from funcprobe.calculus.tree import merge
from funcprobe.study.rows import copied_rows, divided_prompts, no_draws, prompts_of


def test_draws_end_with_eos_or_at_the_limit_of_their_prompt():
    prompts = [[5], [5], [6, 6], [6, 6]]
    right = [
        [[7, 2], [7, 7, 7], [2], [7, 2]],  # ended, or cut at three tokens
        [[7, 7, 7], [7, 2, 9][:2], [7, 7], [7, 7]],
        [[7, 7, 7], [7, 7, 8], [7, 7], [7, 8]],  # cut where the row holds four tokens
    ]
    for responses in right:
        assert no_draws("E", fp.collate(prompts, responses), [2]) == ""
    for responses, words in (
        ([[7, 2], [7, 2, 2], [2], [7, 2]], "1 rows of E go on after an end-of-sequence token (id "),
        ([[7, 2], [], [2], [7, 2]], "1 rows of E have no response tokens, the first is row 1"),
        ([[7], [7, 8], [7], [7]], "no response of E ends with an end-of-sequence token (id 2, 3)"),
    ):
        assert no_draws("E", fp.collate(prompts, responses), [2, 3]).startswith(words)
    # A model without such a token never ends a response, and the end may be another than a pad.
    assert no_draws("E", fp.collate(prompts, [[7], [7, 8], [7], [7]]), []) == ""
    assert no_draws("E", fp.collate(prompts, [[7, 2], [3], [2], [3]], pad_id=2), [2, 3]) == ""


def test_copies_are_told_from_responses_that_recur():
    n = 40
    batch = fp.collate([[5]] * n + [[6]] * n, [[7, 2]] * n + [[8 + i, 2] for i in range(n)])
    likely = torch.full(batch.response.shape, -0.2)
    assert copied_rows("E", batch, likely) == ""
    twice = merge([batch, batch])
    rare = torch.where(torch.arange(2 * n)[:, None] < n, -0.2, -4.0).expand(batch.response.shape)
    assert copied_rows("E", batch, rare) == ""
    assert copied_rows("U", twice, torch.cat([rare, rare])).startswith(
        "At least 40 rows of U are copies"
    )
    # A response of probability 0.013 recurs in 15 draws now and then, but not eight times.
    some = fp.collate([[5]] * 16, [[7, 2]] * 2 + [[8 + i, 2] for i in range(14)])
    score = torch.full(some.response.shape, -2.17)
    assert copied_rows("E", some, score) == ""
    eight = fp.collate([[5]] * 16, [[7, 2]] * 9 + [[8 + i, 2] for i in range(7)])
    assert copied_rows("E", eight, score).startswith("At least 8 rows of E are copies")
    assert copied_rows("E", eight, score + 1.2) == ""  # p = 0.14: a lower temperature


def test_rows_of_one_prompt_are_not_independent():
    batch = fp.collate([[5], [5], [6], [6], [6, 6]], [[7]] * 5)
    assert prompts_of(batch) == [(5,), (5,), (6,), (6,), (6, 6)]
    assert divided_prompts(batch) == ""
    assert divided_prompts(batch._replace(group=torch.tensor([0, 1, 2, 3, 4]))) == ""
    apart = batch.rows(slice(0, 4))._replace(group=torch.arange(4))
    assert divided_prompts(apart).startswith("E has 4 groups but 2 different prompts")
