"""The command line as a subprocess: what it writes, and one clear line on bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

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
        ({"etas": "nan"}, "finite etas"),
        ({"recipe": "ppo2"}, "unknown recipe 'ppo2'"),
        ({"checkpoint": "nowhere"}, "no such folder"),
        ({"update": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"evaluation": None}, "go together"),
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
    [("etass: 1x", "unknown options"), ("[1, 2", "not YAML"), ("7", "mapping")],
)
def test_a_bad_config_is_named(tmp_path, text, complaint):
    (tmp_path / "c.yaml").write_text(text)
    result = run(tmp_path, "probe", "--config", "c.yaml")
    assert result.returncode == 2 and complaint in result.stderr


def test_help_and_unknown_commands(tmp_path):
    assert "usage: funcprobe probe" in run(tmp_path).stdout
    result = run(tmp_path, "prob")
    assert result.returncode == 2 and "unknown command 'prob'" in result.stderr
    assert "--evaluation" in run(tmp_path, "probe", "--help").stdout


def test_etas_are_multiples_or_absolute():
    assert parse_etas("0.5x, 2e-6,-1x", 1e-3) == [5e-4, 2e-6, -1e-3]
    with pytest.raises(ValueError, match="found ''"):
        parse_etas("1x,,2x", 1.0)
