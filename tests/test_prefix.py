"""Prefix weights against loops and closed forms, and the coverage of their intervals."""

import pytest
import torch
from arrays import N, R, arrays, swept
from reference import stderr

from funcprobe import Scores, entropy_change, entropy_series


def by_hand(base, change, response, per, normalised=True):
    """The estimator's two values in loops: at eta and at 0, each with its influence values."""
    out = []
    for moved in (False, True):
        total, alive, u = 0.0, 0.0, []
        for k in range(R):
            omega = [float(change.logp[i, :k].sum().exp()) if moved else 1.0 for i in range(N)]
            z = sum(omega) / N if normalised else 1.0
            for i in range(N):
                if response[i, k]:
                    h = float(base.entropy[i, k]) + (float(change.entropy[i, k]) if moved else 0.0)
                    total += omega[i] / z * h
                    alive += omega[i] / z
            u.append([w / z for w in omega])
        value = total / (alive if per == "token" else N)
        psi = []
        for i in range(N):
            row = 0.0
            for k in range(R):
                inside = []
                for j in range(N):
                    h = float(base.entropy[j, k]) + (float(change.entropy[j, k]) if moved else 0.0)
                    h -= value if per == "token" else 0.0
                    inside.append(u[k][j] * h if response[j, k] else 0.0)
                row += inside[i] - u[k][i] * sum(inside) / N
            psi.append(row / (alive / N if per == "token" else 1.0))
        out.append((value, torch.tensor(psi, dtype=torch.float64)))
    return out[1][0] - out[0][0], out[1][1] - out[0][1]


@pytest.mark.parametrize("per", ["token", "sequence"])
@pytest.mark.parametrize("eta", [0.0, 0.1, 1.0, -2.0])
def test_the_change_and_its_influence_are_the_loops(per, eta):
    terms, rows = arrays()
    sweep = swept(terms, [eta])
    got = entropy_change(sweep, rows, weights="prefix", per=per)
    change = Scores(sweep.change.logp[0], sweep.change.entropy[0])
    value, psi = by_hand(terms[0], change, rows.response, per)
    assert float(got.value[0]) == pytest.approx(value, abs=1e-12)
    # The loops' influence values leave out the constant that makes those of the base sum to 0.
    psi = psi - psi.mean()
    assert float(got.stderr[0]) == pytest.approx(stderr(psi, rows.group), abs=1e-12)


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_slope_and_curvature_are_the_closed_forms(per):
    (base, d1, d2), rows = arrays()
    a, total = rows.response, float(rows.response.sum())
    ratio = base.entropy.sum() / total if per == "token" else 0.0
    size = total if per == "token" else N
    c = d1.logp.cumsum(1) - d1.logp
    r1 = c - c.mean(0)
    m2 = c * c + d2.logp.cumsum(1) - d2.logp
    r2 = m2 - m2.mean(0) - 2 * c.mean(0) * r1
    h = base.entropy - ratio
    slope = (a * (d1.entropy + r1 * h)).sum() / size
    turn = 2 * slope * (a * r1).sum() if per == "token" else 0.0
    curvature = ((a * (d2.entropy + 2 * r1 * d1.entropy + r2 * h)).sum() - turn) / size
    got = entropy_series((base, d1, d2), rows, weights="prefix", per=per)
    assert torch.allclose(got.value, torch.stack([slope, curvature]), rtol=1e-10)
    y = a * h
    spread = (d1.entropy + (y - y.mean(0)) * r1).sum(1)
    if per == "token":
        drift = (a * r1).sum() / total
        spread = spread - drift * (y.sum(1)) - slope * a.double().sum(1)
        spread = spread / (total / N)
    else:
        spread = spread - slope
    assert float(got.stderr[0]) == pytest.approx(stderr(spread, rows.group), rel=1e-10)


@pytest.mark.parametrize("per", ["token", "sequence"])
@pytest.mark.parametrize("weights", ["sequence", "prefix"])
def test_the_line_is_the_limit_and_what_remains_falls_fourfold(weights, per):
    terms, rows = arrays()
    law = entropy_series(terms, rows, weights=weights, per=per)
    tiny = entropy_change(swept(terms, [1e-9]), rows, weights=weights, per=per)
    assert float(tiny.value[0] / 1e-9) == pytest.approx(float(law.value[0]), rel=1e-7)
    etas = torch.tensor([2e-3, 1e-3, 5e-4], dtype=torch.float64)
    rest = entropy_change(swept(terms, etas), rows, weights=weights, per=per).value
    rest = rest - etas * law.value[0]
    assert torch.allclose(rest[:-1] / rest[1:], torch.full((2,), 4.0).double(), rtol=0.01)


def test_huge_weights_do_not_overflow():
    terms, rows = arrays()
    low = [terms[0], Scores(torch.where(rows.response, -15.0, 0.0), terms[1].entropy), terms[2]]
    assert entropy_change(swept(low, [1.0]), rows, weights="prefix").value.isfinite().all()
    for size in (100.0, 2000.0, -2000.0):
        huge = entropy_change(swept(terms, [size]), rows, weights="prefix")
        assert huge.value.isfinite().all() and huge.stderr.isfinite().all()
