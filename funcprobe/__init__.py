"""funcprobe: what one optimizer step does to a language model's entropy, measured and predicted.

The model is a pair of pure functions and two dicts. The update direction v is an affine map of the
gradient, and everything measurable is a function of ``params + eta * v``.

Importing this package changes no global state, and is quick: a public name is imported from its
module when it is first used. `__init__.pyi` lists the same names for type checkers.
"""

import sys
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "calculus.blocks": ("RowFn", "evaluate"),
    "calculus.changes": ("changes",),
    "calculus.gradients": ("gradient", "row_gradients"),
    "calculus.influence": ("pullback",),
    "calculus.interpolation": ("EVALUATED", "INTERPOLATED", "LAW"),
    "calculus.line": ("sweep", "sweep_blocks"),
    "calculus.results": ("Sweep", "join"),
    "calculus.step": ("AdamState", "Affine", "adamw", "decompose", "direction", "sgd"),
    "calculus.taylor": ("taylor",),
    "calculus.transforms.increment": ("RULES", "Increment", "increment"),
    "calculus.tree": ("Terms", "add_scaled", "dot", "norm", "shift", "stack"),
    "language.batch": ("Batch", "by_length", "collate"),
    "language.model.split": ("Model", "assemble", "logits", "split"),
    "language.objectives": ("objective", "prepare"),
    "language.recipes": ("RECIPES", "Recipe"),
    "language.sampling": ("Sampling",),
    "language.score": ("Readings", "Scores", "scorer", "with_value"),
    "rollouts.ground_truth": ("GroundTruth",),
    "rollouts.policy": ("Policy",),
    "rollouts.records": ("read_batch", "write_batch"),
    "runtime.distributed": ("sharded",),
    "runtime.resume": ("resumable",),
    "runtime.serialize": ("fingerprint",),
    "statistics.change": ("entropy_change", "entropy_covector", "entropy_series"),
    "statistics.estimators": ("Estimator",),
    "statistics.linearity": ("Linearity", "Ratio", "linearity", "ratio"),
    "statistics.odd_even": ("OddEven", "odd_even", "takeover"),
    "statistics.planning": ("Comparison", "compare", "prompts_needed"),
    "statistics.policy_test": ("PolicyTest", "policy_test"),
    "statistics.resampling": ("Bootstrap", "Jackknife", "bootstrap", "jackknife"),
    "statistics.results": ("Diagnostics", "Estimate", "Series"),
    "statistics.rounding": ("Rounding", "rounding"),
    "statistics.uncertainty": ("band",),
    "statistics.weights": ("pareto_khat", "pareto_smooth"),
    "study.plots": ("plot", "plot_ratio"),
    "study.probe": ("probe",),
    "study.report": ("Report",),
    "study.sampling": ("ground_truth", "rollout"),
    "training.checkpoint": ("Checkpoint", "load_checkpoint"),
}
_HOME = {name: module for module, names in _EXPORTS.items() for name in names}
_MODULES = {
    "readouts": "language.readouts",
    **{
        name: name
        for name in (
            "calculus",
            "language",
            "rollouts",
            "runtime",
            "statistics",
            "study",
            "training",
        )
    },
}

__all__ = sorted([*_HOME, "readouts"])


def __getattr__(name: str) -> Any:
    """A public name or a sub-package, imported on first use (PEP 562)."""
    if name in _HOME:
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    elif name in _MODULES:
        value = import_module(f"{__name__}.{_MODULES[name]}")
    else:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message, name=name, obj=sys.modules[__name__])
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
