"""The report of a probe: what it says, what it saves, and that it comes back as it was."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import funcprobe as fp
from funcprobe.study import report as report_module
from funcprobe.study.about import About, BatchSummary, CheckpointSummary, UpdateSummary


@pytest.fixture
def saved(report, tmp_path):
    report.save(tmp_path / "saved", formats=())
    return tmp_path / "saved"


def test_the_report_saves_what_it_shows(report, tmp_path):
    paths = report.save(tmp_path / "new" / "folder")
    assert sorted(p.name for p in paths) == ["report.json", "report.png", "report.safetensors"]
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == sorted(
        p.name for p in paths
    )
    data = json.loads(paths[1].read_text())
    assert data == report.to_dict()
    assert [row["learning_rates"] for row in data["etas"]] == pytest.approx([0, 0.25, 0.5, 1, 2, 4])
    assert data["etas"][0]["khat"] is None and data["about"]["weights"]["same"] is True
    arrays = load_file(paths[0])
    assert torch.equal(arrays["change.value"], report.change.value)
    assert arrays["change.logp"].shape == (6, *arrays["response"].shape)


def test_the_table_shows_every_eta_and_the_verdict(report):
    text = str(report)
    assert len([line for line in text.splitlines() if f"/{report.change.rows}" in line]) == 6
    assert "The line is within 10%" in text and "nats/token" in text
    assert max(map(len, text.splitlines()[:9])) <= 115


def test_the_report_states_how_far_the_line_holds(report):
    law = fp.linearity(report.change, report.series)
    data = report.to_dict()
    for stated, tolerance in zip(data["linearity"], (0.1, 0.25), strict=True):
        want = fp.linearity(report.change, report.series, tolerance=tolerance)
        assert stated["tolerance"] == tolerance and stated["verdict"] == want.verdict
        assert stated["holds"] == want.holds
        assert stated["fails"] == (None if want.fails == math.inf else want.fails)
    low, high = data["slope_interval"]
    assert low < data["slope"] - 1.9 * data["slope_stderr"] < data["slope"] < high
    for k, row in enumerate(data["etas"]):
        assert row["change_interval"] == report.change.interval()[k].tolist()
        assert row["excluded"] == law.excluded[k] and row["line"] == law.verdicts[k]
        if not row["excluded"]:
            assert row["over_line_band"] == [float(law.low[k]), float(law.high[k])]
        assert row["kl"] == float(report.change.kl[k]) >= 0
        z = row["mean_weight_z"]
        assert z is None if row["eta"] == 0 else abs(z) < 4
    assert law.describe(report.lr, " lr") in report.verdict() in str(report)


def test_a_loaded_report_is_the_saved_one(report, saved, tmp_path):
    loaded = fp.Report.load(saved)
    assert str(loaded) == str(report) and repr(loaded) == repr(report)
    assert loaded._repr_html_() == report._repr_html_()
    assert loaded.verdict() == report.verdict() and loaded.flags == report.flags
    assert loaded.about == report.about and loaded.to_dict() == report.to_dict()
    assert loaded.change.estimator == report.change.estimator
    assert loaded.holds_within(0.05).describe() == report.holds_within(0.05).describe()
    assert loaded.save(tmp_path / "again")[-1].name == "report.png"
    for name in ("report.json", "report.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


def test_a_report_of_weighted_rows_is_loaded_with_their_weights(checkpoint, small, tmp_path):
    options = {"off_policy": True, "weights": "prefix", "per": "sequence"}
    report = fp.probe(checkpoint, *small, [0.0, 1e-5], change="direct", **options)
    report.save(tmp_path)
    loaded = fp.Report.load(tmp_path)
    assert str(loaded) == str(report)
    assert loaded.change.estimator == loaded.series.estimator == report.change.estimator
    assert loaded.change.off_policy and loaded.change.weights == "prefix"
    extra = set(load_file(tmp_path / "report.safetensors")) - set(report._tensors(False))
    assert not extra and set(loaded.arrays) == set(report.arrays)


def test_a_rounding_error_at_every_eta_comes_back(report, tmp_path):
    hopeless = report.rounding._replace(floor=math.inf)
    other = dataclasses.replace(report, rounding=hopeless)
    other.save(tmp_path, formats=())
    assert fp.Report.load(tmp_path).rounding == hopeless
    dataclasses.replace(report, rounding=None).save(tmp_path, formats=())
    assert fp.Report.load(tmp_path).rounding is None


def edited(folder, edit):
    data = json.loads((folder / "report.json").read_text())
    edit(data)
    (folder / "report.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda folder: (folder / "report.json").unlink(), "none that can be read"),
        (lambda folder: (folder / "report.json").write_text("[1,"), "none that can be read"),
        (lambda folder: (folder / "report.json").write_text("[1]"), "schema None"),
        (
            lambda folder: (folder / "report.safetensors").write_bytes(b"short"),
            "none that can be read",
        ),
        (lambda folder: edited(folder, lambda data: data.pop("schema")), "schema 1"),
        (lambda folder: edited(folder, lambda data: data.update(schema=99)), "schema 99"),
        (lambda folder: edited(folder, lambda data: data.pop("lr")), "does not hold.*lr"),
        (
            lambda folder: edited(folder, lambda data: data["about"].pop("date")),
            "does not hold.*date",
        ),
        (
            lambda folder: edited(folder, lambda data: data["etas"][1].update(change=0.5)),
            "different numbers",
        ),
        (lambda folder: save_file({}, folder / "report.safetensors"), "does not hold"),
    ],
)
def test_a_folder_that_is_no_report_is_refused_in_one_line(saved, damage, complaint):
    damage(saved)
    with pytest.raises(ValueError, match=f"Report.load: a folder .*{complaint}") as refusal:
        fp.Report.load(saved)
    assert str(saved) in str(refusal.value) and "\n" not in str(refusal.value)


def test_figures_come_in_the_formats_asked_for(report, tmp_path):
    paths = report.save(tmp_path, formats=("pdf", "svg"))
    assert [path.name for path in paths[2:]] == ["report.pdf", "report.svg"]
    assert paths[2].read_bytes().startswith(b"%PDF") and b"<svg" in paths[3].read_bytes()
    for wrong in (("png", "gif"), "png"):
        with pytest.raises(ValueError, match="formats: a tuple of png, pdf, svg was expected"):
            report.save(tmp_path / "not", formats=wrong)
    assert not (tmp_path / "not").exists()


def test_the_direction_is_saved_where_it_is_asked_for(report, stepped, tmp_path):
    without = report.save(tmp_path / "without", formats=())[0]
    report.save(tmp_path / "with", formats=(), direction=True)
    plain, more = (load_file(p) for p in (without, tmp_path / "with" / "report.safetensors"))
    v = {name.removeprefix("v."): x for name, x in more.items() if name not in plain}
    assert set(v) == set(report.direction) == set(stepped[1])
    assert all(torch.equal(v[name], report.direction[name]) for name in v)
    loaded = fp.Report.load(tmp_path / "with")
    assert all(torch.equal(x, v[name]) for name, x in loaded.direction.items())
    assert set(loaded.arrays) == set(report.arrays)
    with pytest.raises(ValueError, match="needs a report with its direction"):
        fp.Report.load(tmp_path / "without").save(tmp_path / "not", direction=True)


def test_rows_are_scalars_for_pandas(report):
    rows, data = report.rows(), report.to_dict()["etas"]
    assert len(rows) == len(data) == 6
    for row, told in zip(rows, data, strict=True):
        assert {type(value) for value in row.values()} <= {float, str}
        for name, value in told.items():
            if isinstance(value, list):
                stem = name.removesuffix("_interval").removesuffix("_band")
                pairs = zip((row[f"{stem}_low"], row[f"{stem}_high"]), value, strict=True)
            else:
                pairs = [(row[name], value)]
            assert all(a == b or (b is None and math.isnan(a)) for a, b in pairs), name


def test_each_band_is_drawn_once(report, monkeypatch):
    calls = []
    linearity = report_module.linearity

    def counted(*args, **options):
        calls.append(options["tolerance"])
        return linearity(*args, **options)

    monkeypatch.setattr(report_module, "linearity", counted)
    fresh = dataclasses.replace(report)
    for _ in range(2):
        str(fresh), repr(fresh), fresh._repr_html_(), fresh.to_dict(), fresh.rows()
    assert sorted(calls) == [0.1, 0.25]


def test_a_notebook_shows_a_screen(checkpoint, small):
    etas = torch.linspace(0, 1e-3, 65, dtype=torch.float64)
    report = fp.probe(checkpoint, *small, etas, nodes="auto")
    assert len(str(report).splitlines()) > 65 and len(repr(report).splitlines()) < 30
    html = report._repr_html_()
    assert html.count("<tr>") < 60 and "The line is within 10%" in html
    assert len(repr(report.about).splitlines()) < 30


# Names that report.json's `about` had before it had a schema, for whoever reads older files.
FIRST_SCHEMA = {
    "optimizer state": (CheckpointSummary, "optimizer_state"),
    "trainable parameters": (CheckpointSummary, "trainable_parameters"),
    "response tokens": (BatchSummary, "response_tokens"),
    "max length": (UpdateSummary, "max_length"),
    "gradient norm": (UpdateSummary, "gradient_norm"),
    "norm of v": (UpdateSummary, "v_norm"),
    "norm of v from momentum": (UpdateSummary, "v_norm_momentum"),
    "norm of v from decay": (UpdateSummary, "v_norm_decay"),
    "interpolation's error of a token, nats, at most": (About, "interpolation_bound"),
    "importance weights": (About, "importance_weights"),
    "off policy": (About, "off_policy"),
    "positions of a block": (About, "block_positions"),
}


def keys(node):
    if isinstance(node, dict):
        for key, value in node.items():
            yield key
            yield from keys(value)
    elif isinstance(node, list):
        for item in node:
            yield from keys(item)


def test_the_keys_of_the_json_are_identifiers(report):
    found = set(keys(report.to_dict()))
    assert all(key.isidentifier() for key in found)
    for owner, name in FIRST_SCHEMA.values():
        assert name in {field.name for field in dataclasses.fields(owner)} and name in found


def test_about_names_versions_and_the_time(report):
    data = report.to_dict()
    assert data["schema"] == 3 and data["about"]["date"].endswith("+00:00")
    assert data["about"]["versions"]["torch"] == torch.__version__
    assert data["about"]["versions"]["funcprobe"] == fp.__version__
