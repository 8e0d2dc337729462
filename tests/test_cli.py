"""The command line as a subprocess: what it writes, and one clear line on bad input."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import funcprobe as fp
from funcprobe import cli
from funcprobe.cli import bundled, parse_etas


def run(folder: Path, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "funcprobe", *map(str, words)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def head(path: Path, rows: int, target: Path) -> Path:
    target.write_text("".join(path.read_text().splitlines(keepends=True)[:rows]))
    return target


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("inputs")
    checkpoint, update, evaluation = bundled()
    return {
        "checkpoint": str(checkpoint),
        "update": str(head(update, 32, folder / "u.jsonl")),
        "evaluation": str(head(evaluation, 64, folder / "e.jsonl")),
    }


def flags(settings: dict) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def test_without_arguments_it_probes_the_bundled_checkpoint(tmp_path):
    result = run(tmp_path, "probe")
    assert result.returncode == 0, result.stderr
    assert "The line is within 10%" in result.stdout
    names = sorted(path.name for path in (tmp_path / "probe").iterdir())
    assert names == ["report.json", "report.png", "report.safetensors"]
    report = json.loads((tmp_path / "probe" / "report.json").read_text())
    assert (
        report["about"]["weights"]["same"] and report["about"]["checkpoint"]["dtype"] == "float32"
    )
    assert report["etas"][3]["change"] < 0
    assert "sweep over E" in result.stderr


def test_a_config_file_and_flags_that_override_it(tmp_path, inputs):
    config = inputs | {"etas": ["1x", 1e-6], "per": "sequence", "output": "from-config"}
    (tmp_path / "probe.yaml").write_text(yaml.safe_dump(config))
    result = run(tmp_path, "probe", "--config", "probe.yaml", "--per", "token")
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "from-config" / "report.json").read_text())
    assert report["unit"] == "nats/token"
    assert [row["eta"] for row in report["etas"]] == pytest.approx([report["lr"], 1e-6])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"etas": "1x,fast"}, "found 'fast'"),
        ({"etas": "nan"}, "found 'nan'"),
        ({"recipe": "ppo2"}, "invalid choice: 'ppo2'"),
        ({"max_length": "2.5"}, "invalid int value: '2.5'"),
        ({"off_policy": "maybe"}, "true or false was expected, not 'maybe'"),
        ({"etass": "1x"}, "unrecognized arguments: --etass"),
        ({"checkpoint": "nowhere"}, "no such folder"),
        ({"update": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"evaluation": None}, "go together"),
        ({"nodes": "2"}, "nodes must be"),
        ({"max_length": "-5"}, "max_length must be at least 1, not -5"),
        ({"tokens": "0"}, "tokens must be at least 1, not 0"),
        ({"format": "png,gif"}, "--format: any of png, pdf, svg"),
    ],
)
def test_bad_input_gives_one_line_and_writes_nothing(tmp_path, inputs, change, complaint):
    settings = {name: value for name, value in (inputs | change).items() if value is not None}
    result = run(tmp_path, "probe", *flags(settings))
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if line.startswith("funcprobe: ")]
    assert len(lines) == 1 and complaint in lines[0]
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("etass: 1x", "unknown options"),
        ("[1, 2", "not YAML"),
        ("7", "mapping"),
        ("lr: [1, 2]", "lr must be one value"),
        ("max_length: 2.5", "invalid int value"),
    ],
)
def test_a_bad_config_is_named(tmp_path, text, complaint):
    (tmp_path / "c.yaml").write_text(text)
    result = run(tmp_path, "probe", "--config", "c.yaml")
    assert result.returncode == 2 and complaint in result.stderr


def test_help_is_printed_and_unknown_commands_are_refused(tmp_path):
    assert "usage: funcprobe probe" in run(tmp_path).stdout
    result = run(tmp_path, "prob")
    assert result.returncode == 2 and "unknown command 'prob'" in result.stderr
    text = run(tmp_path, "probe", "--help").stdout
    assert "--evaluation" in text and "--max-length" in text
    assert all(name in text for name in fp.RECIPES)
    assert run(tmp_path, "--version").stdout == f"funcprobe {fp.__version__}\n"


@pytest.mark.parametrize("words", [[], ["--version"], ["probe", "--help"], ["probe", "--lr", "x"]])
def test_help_and_bad_flags_need_no_torch(words):
    """They answer in a moment, since nothing heavy is imported for them."""
    code = (
        "import sys; from funcprobe import cli\n"
        f"try: cli.main({words})\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'yaml'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines()[-1] == "[]"


def test_figures_and_the_direction_on_request(tmp_path, inputs):
    words = flags(inputs | {"etas": "1x", "format": "svg,pdf"})
    assert run(tmp_path, "probe", *words, "--save_direction").returncode == 0
    names = sorted(path.name for path in (tmp_path / "probe").iterdir())
    assert names == ["report.json", "report.pdf", "report.safetensors", "report.svg"]
    loaded = fp.Report.load(tmp_path / "probe")
    assert loaded.direction and loaded.to_dict()["etas"][0]["learning_rates"] == 1


def test_quiet_prints_nothing_and_writes_the_files(tmp_path, inputs):
    result = run(tmp_path, "probe", *flags(inputs | {"etas": "1x"}), "--quiet")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    names = sorted(path.name for path in (tmp_path / "probe").iterdir())
    assert names == ["report.json", "report.png", "report.safetensors"]


def test_etas_are_multiples_or_absolute():
    assert parse_etas("0.5x, 2e-6,-1x", 1e-3) == [5e-4, 2e-6, -1e-3]
    assert parse_etas("1e-6, -1x:1x:5", 1e-3) == [1e-6, -1e-3, -5e-4, 0.0, 5e-4, 1e-3]
    assert 0.0 in parse_etas("-1x:1x:41", 1.3333e-3)
    for bad in ("", "0:1x:0", "0:1x", "0:1x:2:3", "0:1x:few", "0:1x:-2", "0:inf:3", "x"):
        with pytest.raises(ValueError, match=f"found '{bad}'"):
            parse_etas(f"1x,{bad},2x", 1.0)


@pytest.fixture
def called(monkeypatch):
    """Runs `funcprobe probe` in this process up to the probe: (what it got, standard error)."""

    def call(capsys, settings):
        got = {}

        def probe(checkpoint, update, evaluation, etas, **options):
            got.update(options, checkpoint=checkpoint, U=update, E=evaluation, etas=etas)
            raise RuntimeError("that is all")

        monkeypatch.setattr(importlib.import_module("funcprobe.study.probe"), "probe", probe)
        assert cli.main(["probe", *flags(settings)]) == 2
        assert capsys.readouterr().err.splitlines()[-1] == "funcprobe: that is all"
        return got

    return call


def test_every_option_arrives(inputs, called, capsys):
    settings = inputs | {
        "etas": "2x,3e-7",
        "recipe": "grpo",
        "weights": "prefix",
        "per": "sequence",
        "max_length": 31,
        "dtype": "float64",
        "change": "direct",
        "nodes": "auto",
        "tol": 1e-4,
        "device": "cpu",
        "optimizer": "fresh",
        "lr": 0.25,
        "max_grad_norm": 0.5,
        "tokens": 99,
    }
    got = called(capsys, settings)
    options = ("recipe", "weights", "per", "max_length", "change", "nodes", "tol", "tokens")
    assert {name: got[name] for name in options} == {name: settings[name] for name in options}
    checkpoint = got["checkpoint"]
    assert next(iter(checkpoint.params.values())).dtype == torch.float64
    assert checkpoint.match == "fresh optimizer"
    assert checkpoint.adamw["lr"] == 0.25
    assert checkpoint.adamw["max_grad_norm"] == 0.5
    assert got["etas"](0.25) == [0.5, 3e-7]
    assert (str(got["U"]), str(got["E"])) == (inputs["update"], inputs["evaluation"])


def test_options_left_out_have_their_defaults(inputs, called, capsys):
    got = called(capsys, inputs | {"max_grad_norm": 0})
    assert got["checkpoint"].adamw["max_grad_norm"] is None
    assert got["checkpoint"].match != "fresh optimizer"
    assert got["max_length"] is None and got["tokens"] is None and got["nodes"] is None
    assert next(iter(got["checkpoint"].params.values())).dtype == torch.float32
    assert called(capsys, {})["max_length"] == cli.BUNDLED_MAX_LENGTH


def test_the_base_model_given_is_the_one_loaded(inputs, capsys):
    assert cli.main(["probe", *flags(inputs | {"base_model": "/no/such/base"})]) == 2
    assert "/no/such/base" in capsys.readouterr().err


def test_a_config_is_held_to_the_flags_choices(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("per: word")
    assert cli.main(["probe", "--config", str(tmp_path / "c.yaml")]) == 2
    assert "per must be one of token, sequence" in capsys.readouterr().err


def test_a_config_is_read_as_flags_are(tmp_path, called, capsys):
    """Where YAML would make a number in base 60 of a range, or None of an option."""
    (tmp_path / "c.yaml").write_text(
        "etas: 1:4:50\nlr: 2e-5\nmax_length: 48\noff_policy: true\nnodes: null\ndtype:\n"
    )
    got = called(capsys, {"config": str(tmp_path / "c.yaml")})
    assert len(got["etas"](2e-5)) == 50
    assert got["checkpoint"].adamw["lr"] == 2e-5
    assert (got["max_length"], got["off_policy"], got["nodes"]) == (48, True, None)
    assert next(iter(got["checkpoint"].params.values())).dtype == torch.float32
