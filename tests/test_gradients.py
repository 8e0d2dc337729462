"""Gradients against torch's own on the live module, whole and row by row."""

import cases
import pytest
import reference
import torch

import funcprobe as fp


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_gradients_are_those_of_backward_on_the_live_module(family):
    case, loss, batch = cases.loss(family)
    ours = fp.gradient(loss, case.params, batch)
    rows = fp.row_gradients(loss, case.params, batch)
    module = cases.module64(family)
    weights = {n: p for n, p in module.named_parameters() if p.requires_grad}
    with reference.float64(module):
        logp, _ = reference.scores(module, batch)
        losses = [
            reference.loss("reinforce", *(x[i : i + 1] for x in (logp, batch.response)),
                           batch.reward[i : i + 1], batch.group[i : i + 1]) / len(logp)
            for i in range(len(logp))
        ]  # fmt: skip
        for i, value in enumerate(losses):
            slopes = torch.autograd.grad(
                value, list(weights.values()), retain_graph=True, allow_unused=True
            )
            for n, g in zip(weights, slopes, strict=True):
                g = torch.zeros_like(rows[n][i]) if g is None else g
                torch.testing.assert_close(rows[n][i], g, rtol=1e-9, atol=1e-13)
    for n, g in ours.items():
        torch.testing.assert_close(g, rows[n].sum(0), rtol=1e-11, atol=1e-14)


def test_rows_change_no_gradient():
    case, loss, batch = cases.loss()
    whole = fp.gradient(loss, case.params, batch)
    single = fp.row_gradients(loss, case.params, batch)
    for rows in (1, 3, 8, 100, "all"):
        for n, g in fp.gradient(loss, case.params, batch, rows=rows).items():
            torch.testing.assert_close(g, whole[n], rtol=1e-11, atol=1e-14)
        for n, g in fp.row_gradients(loss, case.params, batch, rows=rows).items():
            assert len(g) == len(batch.tokens)
            torch.testing.assert_close(g, single[n], rtol=1e-11, atol=1e-14)


def test_gradients_leave_no_graph_and_work_without_grad_mode():
    case, loss, batch = cases.loss()
    with torch.no_grad():
        grads = fp.gradient(loss, case.params, batch)
    assert not any(g.requires_grad for g in grads.values())
    assert not any(p.requires_grad for p in case.params.values())


def test_a_gradient_that_is_not_finite_is_refused():
    case, _, batch = cases.loss()

    def broken(params, batch):
        return (params[next(iter(params))].sum() * batch.reward / 0.0).unsqueeze(-1)

    for fn in (fp.gradient, fp.row_gradients):
        with pytest.raises(ValueError, match=f"{fn.__name__}: the direction must be finite"):
            fn(broken, case.params, batch)


def test_a_batch_without_rows_is_refused():
    case, loss, batch = cases.loss()
    for fn in (fp.gradient, fp.row_gradients):
        with pytest.raises(ValueError, match=f"{fn.__name__}: a batch of at least one row"):
            fn(loss, case.params, batch.rows([]))
