"""Plans from a pilot: errors fall with the root of the number of prompts."""

from types import SimpleNamespace

import pytest
import torch
from arrays import arrays, swept

import funcprobe as fp


def repeated(terms, rows, times):
    """The same rows under `times` as many prompts: the error falls by about sqrt(times)."""
    many = [fp.Scores(*(x.repeat(times, 1) for x in term)) for term in terms]
    prompts = len(rows.group.unique())
    group = torch.cat([rows.group + prompts * j for j in range(times)])
    return many, SimpleNamespace(response=rows.response.repeat(times, 1), group=group)


@pytest.mark.parametrize("source", ["change", "series"])
def test_the_planned_number_of_prompts_gives_the_wanted_error(source):
    terms, rows = repeated(*arrays(), 20)

    def pilot(terms, rows):
        if source == "change":
            return fp.entropy_change(swept(terms, [0.0, 0.5]), rows)
        return fp.entropy_series(terms, rows)

    def relative(made):
        at = torch.tensor([0.5]).double()
        value, error = (
            (made.value[1], made.stderr[1])
            if source == "change"
            else (made.predict(at)[0], made.predict_stderr(at)[0])
        )
        return abs(float(error / value))

    now = relative(pilot(terms, rows))
    assert fp.prompts_needed(pilot(terms, rows), 0.5, now) == 60
    want = fp.prompts_needed(pilot(terms, rows), 0.5, now / 2)
    assert want == 240
    assert relative(pilot(*repeated(terms, rows, 4))) == pytest.approx(now / 2, rel=0.01)


def test_two_prompts_are_a_pilot():
    terms, rows = arrays()
    rows.group = (rows.group > 0).long()
    pilot = fp.entropy_change(swept(terms, [0.5]), rows)
    now = abs(float(pilot.stderr[0] / pilot.value[0]))
    assert fp.prompts_needed(pilot, 0.5, now / 3) == 18


def test_what_cannot_be_planned_is_refused():
    terms, rows = arrays()
    pilot = fp.entropy_change(swept(terms, [0.0, 0.5]), rows)
    with pytest.raises(ValueError, match="a swept eta was expected, 0.4 is none of"):
        fp.prompts_needed(pilot, 0.4, 0.1)
    with pytest.raises(ValueError, match="Choose an eta other than 0"):
        fp.prompts_needed(pilot, 0.0, 0.1)
    rows.group = torch.zeros_like(rows.group)
    with pytest.raises(ValueError, match="the pilot has one"):
        fp.prompts_needed(fp.entropy_change(swept(terms, [0.5]), rows), 0.5, 0.1)


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_estimators_stand_side_by_side(per):
    terms, rows = arrays()
    sweep = swept(terms, [0.0, 0.5])
    got = fp.compare(sweep, rows, per=per)
    assert list(got.estimates) == ["sequence", "prefix", "prefix_raw"]
    for weights, estimate in got.estimates.items():
        alone = fp.entropy_change(sweep, rows, weights=weights, per=per)
        assert torch.equal(estimate.value, alone.value) and torch.equal(estimate.psi, alone.psi)
    lines = str(got).splitlines()
    assert len(lines) == 3 and len({len(line) for line in lines}) == 1 and len(lines[0]) < 100
    assert lines[0].split() == ["eta", "sequence", "prefix", "prefix_raw", "ESS"]
    assert f"{float(got.estimates['prefix'].value[1]):+.3e} +- " in lines[2]
