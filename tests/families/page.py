"""Writes docs/families.md from the table of cells: `python tests/families/page.py`."""

from pathlib import Path

import zoo
from cells import CELLS, Cell

PAGE = Path(__file__).parents[2] / "docs" / "families.md"

_HEAD = """# Families and adapters

What becomes of tiny models of many architectures, with many adapters, under `split` and all that
follows: scores and entropies here and at moved parameters, with shared prompts, ragged rows and
rows longer than any window; gradients; derivatives along a direction; increments; lanes. The tests
hold every cell to the live module in float64, its weights written in place, one row at a time and
without padding. `python tests/families/page.py` writes these tables from the cells that are tested.

## Architectures, with LoRA on all linear layers

"""

_MIDDLE = """
## Adapters, on llama, qwen2, gemma3 and gpt2

"""

_FOOT = """

PEFT itself refuses MiSS, RoAd, HRA, LoKr, BOFT, DeLoRA, OFT, C3A and LoHa on the attention of
GPT-2, which is no `nn.Linear`.

## What the words mean

- **Increments** are `change="increment"`. Where they subtract in an operation that has no rule, the
  sweep names it (`Sweep.fallbacks`), and a change smaller than rounding is noise; without
  increments, use `change="direct"`.
- **The derivative of the backward pass is not that of the values** where a layer detaches a part,
  as DoRA does with the norm of its weight. `Model.false_derivative` says so. `gradient` gives what
  a trainer takes, and sweeps and increments are exact; `taylor`, `pullback` and all that needs the
  true derivative refuse it.
- **Rows up to n tokens** (`Model.longest`): a rotary embedding that follows the length of the rows
  is right for rows up to the original length, and longer rows are refused when they are scored.
  So are rows beyond the end of a table of positions (gpt2, gpt_neo, gptj, opt, biogpt and others).
- **Refused** is a ValueError of `split` that names the cause. `split` refuses any module whose
  hidden states depend on later tokens, on other rows or on an earlier call, whose hooks change what
  a layer says, and whose adapter acts on the tokens (aLoRA, prompt learning).
- **One lane at a time**: `vmap` cannot stack lanes of an operation that writes in place. A sweep
  then computes them one by one, which takes longer, and says so (`Sweep.looped`).
- Mixtures of experts are not supported, and refused.
"""


_ORDER = ["right", "right;", "refused:", "not"]


def outcome(cell: Cell) -> str:
    """What becomes of a cell, in words."""
    if cell.raises:
        return "not supported"
    if cell.refused:
        return f"refused: {cell.says}"
    parts = ["right"]
    if cell.longest:
        parts.append(f"rows up to {cell.longest} tokens")
    if cell.false_derivative:
        parts.append("but the derivative of the backward pass is not that of the values")
    if cell.increments:
        parts.append("no increments")
    if cell.looped:
        parts.append("one lane at a time")
    if cell.fallbacks:
        parts.append(f"increments subtract in {', '.join(f'`{f}`' for f in cell.fallbacks)}")
    return "; ".join(parts)


def _grouped(pairs: list[tuple[str, str]]) -> dict[str, list[str]]:
    """The names by outcome, in the order in which the outcomes appear."""
    groups: dict[str, list[str]] = {}
    for name, what in pairs:
        groups.setdefault(what, []).append(name)
    return groups


def _table(title: str, pairs: list[tuple[str, str]]) -> str:
    groups = sorted(_grouped(pairs).items(), key=lambda group: _ORDER.index(group[0].split()[0]))
    rows = [f"| {what} | {', '.join(names)} |" for what, names in groups]
    return "\n".join([f"| outcome | {title} |", "|---|---|", *rows]) + "\n"


def page() -> str:
    """The whole of docs/families.md."""
    families = [(c.family, outcome(c)) for c in CELLS if c.adapter == "LoRA"]
    adapters = []
    for adapter in zoo.ADAPTERS:
        cells = [c for c in CELLS if c.adapter == adapter and c.family in zoo.NAMES]
        for what, names in _grouped([(c.family, outcome(c)) for c in cells]).items():
            if len(names) == len(cells) or (what != "not supported" and len(names) == 3):
                adapters.append((adapter, what))
            elif not any(
                "not supported, currently" in c.raises for c in cells if c.family in names
            ):
                adapters.append((f"{adapter} ({', '.join(names)})", what))
    return _HEAD + _table("families", families) + _MIDDLE + _table("adapters", adapters) + _FOOT


if __name__ == "__main__":
    PAGE.write_text(page())
