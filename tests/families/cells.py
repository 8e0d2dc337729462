"""The table of cells, a family with an adapter each, and what becomes of them.

A cell is right unless its entry says otherwise. The tests hold each cell to its entry, and
docs/families.md, which `page` writes, to the table.
"""

from typing import Any, NamedTuple

import zoo


class Cell(NamedTuple):
    """A family with an adapter, and what is expected of it. A pattern is "" where none is."""

    family: str
    adapter: str = "LoRA"
    refused: str = ""  # the pattern of the ValueError of `split`
    raises: str = ""  # the pattern of another library's error, or of one that nobody planned
    false_derivative: str = ""  # the pattern of `Model.false_derivative`
    increments: str = ""  # the pattern of the ValueError of increments
    looped: str = ""  # the pattern of what the default sweep says where vmap cannot stack lanes
    fallbacks: tuple[str, ...] = ()  # the operations whose increments are subtractions
    longest: int | None = None  # the longest rows, `Model.longest`
    says: str = ""  # a refusal in a few words, for the page

    @property
    def id(self) -> str:
        return f"{self.family}-{self.adapter}".replace(" ", "_")


_LINEAR_ONLY = dict(raises="is not supported|not supported, currently only")
_WRITES = "writes a changing tensor"
_NO_GRADIENT = dict(refused="gradient torch.func can take", says="torch.func has no gradient of it")

EXPECTED: dict[tuple[str, str], dict[str, Any]] = {
    # Increments are subtractions in the operations that have no rule.
    ("lfm2", "LoRA"): dict(fallbacks=("conv1d",)),
    ("bamba", "LoRA"): dict(fallbacks=("conv1d", "einsum", "softplus")),
    ("zamba2", "LoRA"): dict(fallbacks=("concatenate", "conv1d", "einsum", "softplus")),
    ("diffllama", "LoRA"): dict(fallbacks=("rms_norm",)),
    # No increments.
    ("gemma3n", "LoRA"): dict(increments=_WRITES),
    ("qwen3_5", "LoRA"): dict(increments=_WRITES),
    ("apertus", "LoRA"): dict(increments="gt of a changing tensor"),
    # Refused, because the model sees more than a causal policy may.
    ("gemma3_bidirectional", "LoRA"): dict(refused="later", says="it sees later tokens"),
    ("xlm", "LoRA"): dict(refused="later", says="it sees later tokens"),
    ("hrm", "LoRA"): dict(false_derivative="derivative of the logits"),
    ("llama_dynamic", "LoRA"): dict(longest=64),
    ("qwen2_dynamic", "LoRA"): dict(longest=64),
    ("phi3_long", "LoRA"): dict(longest=64),
    # Architectures that are not supported.
    ("llama4", "LoRA"): dict(refused="no decoder below", says="its decoder is not found"),
    ("gpt_oss", "LoRA"): dict(
        refused="expected to run.*RuntimeError.*mat_a", says="it has experts and attention sinks"
    ),
} | {
    (family, adapter): expected
    for family in zoo.NAMES
    for adapter, expected in {
        "tokens": dict(fallbacks=("index_copy",)),
        "tokens alone": dict(fallbacks=("index_copy",)),
        "tokens new": dict(fallbacks=("index_copy",)),
        "HRA": dict(fallbacks=("norm",)),
        "LoKr": dict(fallbacks=("kron",)),
        "LoKr head": dict(fallbacks=("kron",)),
        "BOFT": dict(fallbacks=("block_diag", "linalg_solve", "to")),
        "BOFT head": dict(fallbacks=("block_diag", "linalg_solve", "to")),
        "VBLoRA": dict(fallbacks=("__getitem__",)),
        "VBLoRA head": dict(fallbacks=("__getitem__",)),
        "DoRA": dict(false_derivative="DoRA"),
        "DoRA last": dict(false_derivative="DoRA"),
        "DoRA head": dict(false_derivative="DoRA"),
        "DeLoRA": dict(increments=_WRITES, looped="broadcast shape"),
        "OFT": dict(increments=_WRITES, looped="vmap: index_put_"),
        "C3A": _NO_GRADIENT,
        "LoHa": _NO_GRADIENT,
        "aLoRA": dict(refused="aLoRA", says="it reads the tokens"),
        "aLoRA beside": dict(refused="aLoRA", says="it reads the tokens"),
        "prompt": dict(refused="prompt learning", says="it changes the tokens"),
    }.items()
} | {
    # PEFT does not put these on GPT-2's own linear layer.
    ("gpt2", adapter): _LINEAR_ONLY
    for adapter in (
        "MiSS", "RoAd", "HRA", "LoKr", "BOFT", "DeLoRA", "OFT", "C3A", "LoHa",
        "MiSS head", "RoAd head", "LoKr head", "BOFT head",
    )
}  # fmt: skip

# What every run of the tests examines: one cell of each mechanism.
CORE = {
    ("llama_tied", "LoRA"),
    ("llama_yarn", "LoRA"),
    ("ministral3", "LoRA"),
    ("qwen2_window", "LoRA"),
    ("gemma2", "LoRA"),
    ("gemma3", "LoRA"),
    ("gpt2", "LoRA"),
    ("falcon_alibi", "LoRA"),
    ("cohere2", "LoRA"),
    ("phi", "LoRA"),
    ("lfm2", "LoRA"),
    ("nemotron", "LoRA"),
    ("llama", "embedding"),
    ("llama", "IA3"),
    ("llama", "VeRA"),
    ("gpt2", "bias all"),
    ("qwen2", "LN"),
}


# Those of them whose fresh adapters every run splits: LoRA on plain families is in test_derivative.
FRESH = {pair for pair in CORE if pair[1] != "LoRA"} | {
    ("ministral3", "LoRA"),
    ("falcon_alibi", "LoRA"),
    ("lfm2", "LoRA"),
}


def _pairs() -> list[tuple[str, str]]:
    """All families with LoRA, and all adapters on the families whose layers `zoo.NAMES` names."""
    families = [(family, "LoRA") for family in zoo.FAMILIES]
    adapters = [(family, adapter) for family in zoo.NAMES for adapter in zoo.ADAPTERS]
    return list(dict.fromkeys(families + adapters))


CELLS = [Cell(*pair, **EXPECTED.get(pair, {})) for pair in _pairs()]
