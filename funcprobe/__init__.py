"""funcprobe: what one optimizer step does to a language model's entropy, measured and predicted.

The model is a pair of pure functions and two dicts; the update direction v an affine map of the
gradient; everything measurable a function of ``params + eta * v``. Importing this package changes
no global state.
"""

from .calculus.curve import EVALUATED, INTERPOLATED, LAW
from .calculus.increment import RULES, Increment, increment
from .calculus.line import Sweep, changes, join, sweep, sweep_blocks
from .calculus.rows import evaluate
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
from .calculus.tree import add_scaled, dot, norm, shift, stack
from .checkpoint import Checkpoint, load_checkpoint
from .encoding import fingerprint
from .ground_truth import GroundTruth, ground_truth
from .language import readouts
from .language.batch import Batch, by_length, collate
from .language.model import Model, assemble, logits, split
from .language.objectives import RECIPES, Recipe, objective, prepare
from .language.score import Readings, Sampling, Scores, scorer, with_value
from .parallel import sharded
from .probe import probe
from .records import read_batch, write_batch
from .report import Report, plot, plot_ratio
from .resume import resumable
from .rollout import rollout
from .statistics.change import entropy_change, entropy_covector, entropy_series
from .statistics.importance import pareto_khat, pareto_smooth
from .statistics.orders import OddEven, odd_even, takeover
from .statistics.planning import Comparison, compare, prompts_needed
from .statistics.resampling import Bootstrap, Jackknife, bootstrap, jackknife
from .statistics.results import Estimate, Series
from .statistics.rounding import Rounding, rounding
from .statistics.uncertainty import band
from .statistics.validity import Linearity, Ratio, linearity, ratio
