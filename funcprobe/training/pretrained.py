"""Models and tokenizers from a folder, a hub id or a .gguf file."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from .refusal import explained, listed, refusal

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_pretrained(
    source: str | Path, dtype: torch.dtype, revision: str | None = None
) -> nn.Module:
    """The causal language model at `source`, with every weight loaded, in this dtype.

    Raises:
        ValueError: there is no such model, or some of its weights do not load.
    """
    where, gguf = _location(source)
    if gguf and hasattr(transformers, "GgufConfig"):
        # Otherwise the weights may stay packed, and the model is marked as quantised.
        gguf["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with explained(
        f"a causal language model was expected at {source}",
        "it has moved, is damaged or is no such model",
        "Pass base_model=, a folder, hub id, .gguf file or module.",
    ):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            where, dtype=dtype, revision=revision or "main", output_loading_info=True, **gguf
        )
        module, info = loaded
    lost = [*info["missing_keys"], *info["mismatched_keys"]]
    if lost:
        raise refusal(
            f"every weight was expected at {source}, but {len(lost)} do not load: {listed(lost)}",
            "the save was cut short",
            "Use another copy.",
        )
    return module


def load_tokenizer(*sources: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the first of these places that has one, or None.

    A hub id or a .gguf file is taken to have one.

    Raises:
        ValueError: its files cannot be read.
    """
    for source in sources:
        where, gguf = _location(source)
        on_disk = not gguf and Path(where).is_dir()
        if not on_disk or any((Path(where) / name).is_file() for name in _TOKENIZER):
            with explained(
                f"a tokenizer was expected at {source}",
                "one of its files is damaged",
                f"Use another copy of {', '.join(_TOKENIZER[:2])}.",
            ):
                return AutoTokenizer.from_pretrained(where, **gguf)
    return None


def _location(source: str | Path) -> tuple[str, dict[str, Any]]:
    """Where transformers looks for a model, and the keywords that name a .gguf file in there."""
    path = Path(source)
    if path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name}
    return str(source), {}
