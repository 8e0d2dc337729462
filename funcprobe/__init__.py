"""funcprobe: what one optimizer step does to a language model's entropy, measured and predicted.

The model is a pair of pure functions and two dicts; the update direction v an affine map of the
gradient; everything measurable a function of ``params + eta * v``. Importing this package changes
no global state.
"""

from .calculus.blocks import evaluate
from .calculus.interpolation import EVALUATED, INTERPOLATED, LAW
from .calculus.line import Sweep, changes, join, sweep, sweep_blocks
from .calculus.step import (
    AdamState,
    Affine,
    adamw,
    decompose,
    direction,
    gradient,
    row_gradients,
    sgd,
)
from .calculus.taylor import taylor
from .calculus.transforms.increment import RULES, Increment, increment
from .calculus.tree import add_scaled, dot, norm, shift, stack
from .language import readouts
from .language.batch import Batch, by_length, collate
from .language.model.split import Model, assemble, logits, split
from .language.objectives import RECIPES, Recipe, objective, prepare
from .language.score import Readings, Sampling, Scores, scorer, with_value
from .rollouts.ground_truth import GroundTruth, ground_truth
from .rollouts.records import read_batch, write_batch
from .rollouts.sample import rollout
from .runtime.distributed import sharded
from .runtime.resume import resumable
from .runtime.serialize import fingerprint
from .statistics.change import entropy_change, entropy_covector, entropy_series
from .statistics.linearity import Linearity, Ratio, linearity, ratio
from .statistics.odd_even import OddEven, odd_even, takeover
from .statistics.planning import Comparison, compare, prompts_needed
from .statistics.resampling import Bootstrap, Jackknife, bootstrap, jackknife
from .statistics.results import Estimate, Series
from .statistics.rounding import Rounding, rounding
from .statistics.uncertainty import band
from .statistics.weights import pareto_khat, pareto_smooth
from .study.probe import probe
from .study.report import Report, plot, plot_ratio
from .training.checkpoint import Checkpoint, load_checkpoint

__version__ = "0.1.0"
