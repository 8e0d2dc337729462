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
from .ground_truth import GroundTruth, ground_truth
from .language import readouts
from .language.batch import Batch, by_length, collate
from .language.model import Model, assemble, logits, split
from .language.objectives import RECIPES, Recipe, objective, prepare
from .language.score import Readings, Sampling, Scores, scorer, with_value
from .probe import probe
from .records import read_batch, write_batch
from .report import Report, plot, plot_ratio
from .rollout import rollout
from .statistics.change import Estimate, Series, entropy_change, entropy_series
from .statistics.validity import Ratio, ratio
