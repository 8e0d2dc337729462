"""What is drawn: points, line, bands, and hatches where nothing is to be trusted."""

import math
import subprocess
import sys

import pytest
import torch

import funcprobe as fp


def test_what_is_left_out_is_hatched_and_the_band_drawn(report):
    import matplotlib.figure

    khat = torch.tensor([math.nan, 0.1, 0.1, 0.1, 0.1, 0.9])
    change = report.change._replace(diagnostics=report.change.diagnostics._replace(khat=khat))
    law = fp.linearity(change, report.series)
    assert law.excluded[5].startswith("k-hat above")
    left, right = matplotlib.figure.Figure().subplots(1, 2)
    fp.plot(change, report.series, law, ax=left)
    fp.plot_ratio(change, report.series, law, ax=right)
    for ax in (left, right):
        hatched = [patch for patch in ax.patches if patch.get_hatch()]
        assert len(hatched) == 1
        ends = hatched[0].get_x(), hatched[0].get_x() + hatched[0].get_width()
        middle = float(change.etas[4] + change.etas[5]) / 2
        assert ends == pytest.approx((middle, float(change.etas[5])))
    names = [text.get_text() for text in right.get_legend().get_texts()]
    assert {"within 10% of the line", "95% band", "not trusted", "measured"} <= set(names)
    trusted = fp.plot(report.change, report.series, ax=matplotlib.figure.Figure().subplots())
    assert not [patch for patch in trusted.patches if patch.get_hatch()]


def test_plot_takes_axes_and_draws_points_line_and_band(report):
    import matplotlib.figure

    ax = matplotlib.figure.Figure().subplots()
    assert fp.plot(report.change, report.series, ax=ax) is ax
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["predicted", "measured"]
    line = next(line for line in ax.lines if line.get_label() == "predicted")
    x, y = line.get_data()
    assert float(y[-1] / x[-1]) == pytest.approx(float(report.series.value[0]))
    alone = fp.plot(report.change, ax=matplotlib.figure.Figure().subplots())
    assert len(alone.get_legend().get_texts()) == 1


def test_many_points_are_a_curve(report):
    import matplotlib.figure

    k = torch.arange(6).repeat(4)
    change = report.change._replace(
        etas=report.change.etas[k], value=report.change.value[k], psi=report.change.psi[k]
    )
    few, many = (matplotlib.figure.Figure().subplots() for _ in range(2))
    fp.plot(report.change, ax=few)
    fp.plot(change, ax=many)
    labels = [[line.get_label() for line in ax.lines] for ax in (few, many)]
    assert "measured" not in labels[0] and "measured" in labels[1]


def test_a_report_is_saved_without_matplotlib(report, tmp_path):
    report.save(tmp_path / "saved", formats=())
    code = (
        "import sys; sys.modules['matplotlib'] = None; import funcprobe as fp;"
        f"names = fp.Report.load({str(tmp_path / 'saved')!r}).save({str(tmp_path / 'new')!r});"
        "print([path.name for path in names])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "['report.safetensors', 'report.json']", done.stderr
