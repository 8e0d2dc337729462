"""What results hold by which name, and how a terminal and a notebook display them."""

import re
from types import SimpleNamespace

import pytest
import torch
from arrays import arrays, swept

import funcprobe as fp
from funcprobe.statistics.results import Diagnostics

SCREEN = 24  # lines of a terminal


def test_old_names_read_what_is_nested():
    terms, rows = arrays()
    old = terms[0].logp - 0.1
    got = fp.entropy_change(swept(terms, [0.0, 0.5]), rows, per="sequence", behaviour=old)
    for name in Diagnostics._fields:
        assert getattr(got, name) is getattr(got.diagnostics, name)
    assert (got.weights, got.per, got.off_policy) == ("sequence", "sequence", True)
    assert got.estimator.behaviour is old and got.quantity == "entropy"
    names = (
        "etas base value psi base_psi ess khat skew mean_weight weight_range mean_weight_z spread "
        "largest_share kl clipped adjusted"
    )
    assert list(got.tensors()) == names.split()
    again = fp.Estimate.from_tensors(got.tensors(), rows=got.rows, estimator=got.estimator)
    for name, tensor in got.tensors().items():
        assert getattr(again, name) is tensor
    assert str(again) == str(got)


# Displays


@pytest.fixture(scope="module")
def results():
    """One result of each type over forty learning rates of both signs, and one over few."""
    terms, rows = arrays()
    many = [0.0, *(s * 0.01 * k for k in range(1, 21) for s in (1, -1))]
    sweep = swept(terms, many)
    change, series = fp.entropy_change(sweep, rows), fp.entropy_series(terms, rows)
    off = fp.Scores(*(1e-9 * x for x in terms[1]))
    sample = dict(index=torch.arange(9), batch=rows, series=series, eta=0.1, proportional=True)
    return {
        "Estimate": change,
        "Series": series,
        "Ratio": fp.ratio(change, series),
        "Linearity": fp.linearity(change, series),
        "Comparison": fp.compare(sweep, rows),
        "Rounding": fp.rounding(terms[0], off, **sample),
        "OddEven": fp.odd_even(change),
        "Jackknife": fp.jackknife(sweep, rows),
        "Bootstrap": fp.bootstrap(sweep, rows, draws=20),
    }


NAMES = [
    "Estimate", "Series", "Ratio", "Linearity", "Comparison", "Rounding", "OddEven", "Jackknife",
    "Bootstrap",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_result_is_displayed_on_one_screen(results, name):
    result = results[name]
    assert type(result).__name__ == name
    shown = repr(result)
    assert "tensor(" not in shown and len(shown.splitlines()) <= SCREEN
    whole = str(result).splitlines()
    lines = [line for line in shown.splitlines() if line.strip(" .")]
    assert set(lines) <= set(whole)
    if len(whole) <= 16:
        assert shown == str(result)
    else:
        assert (lines[0], lines[-1]) == (whole[0], whole[-1]) and len(lines) < len(whole)
        assert any(set(line.strip()) <= {".", " "} for line in shown.splitlines())


@pytest.mark.parametrize("name", NAMES)
def test_a_result_is_a_table_in_a_notebook(results, name):
    html = results[name]._repr_html_()
    columns = html.count("<th>")
    rows = re.findall(r"<tr>((?:<td>.*?</td>)+)</tr>", html)
    assert 0 < len(rows) <= SCREEN and columns > 1
    assert all(row.count("<td>") == columns for row in rows)
    assert "tensor(" not in html


def test_numbers_in_a_notebook_are_those_of_the_text(results):
    change = results["Estimate"]
    html = change._repr_html_()
    assert f"<td>{float(change.value[0]):+.3e}</td>" in html and "dH [nats/token]" in html
    assert results["Linearity"].describe() in results["Linearity"]._repr_html_()
    assert f"{float(results['Series'].value[0]):+.4e}" in results["Series"]._repr_html_()


def test_one_prompt_is_said_in_every_display():
    terms, rows = arrays()
    rows = SimpleNamespace(response=rows.response, group=torch.zeros_like(rows.group))
    sweep = swept(terms, [0.01 * k for k in range(30)])
    for result in (fp.entropy_change(sweep, rows), fp.jackknife(sweep, rows)):
        for text in (str(result), repr(result), result._repr_html_()):
            assert "all rows share one prompt" in text


def test_a_series_says_its_unit(results):
    first, second = str(results["Series"]).splitlines()
    assert re.fullmatch(r"d\^1H/d eta\^1 = [+-]\S+ \+- \S+ nats/token per unit of eta", first)
    assert second.endswith("nats/token per unit of eta^2")
    terms, rows = arrays()
    value = fp.entropy_series([fp.Readings(*t) for t in terms], rows, per="sequence")
    assert str(value).splitlines()[0].endswith(" per sequence per unit of eta")
