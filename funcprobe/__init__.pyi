"""The public names of funcprobe for type checkers; `__init__.py` imports them on first use."""

from . import (
    calculus as calculus,
    language as language,
    rollouts as rollouts,
    runtime as runtime,
    statistics as statistics,
    study as study,
    training as training,
)
from .calculus.blocks import RowFn as RowFn, evaluate as evaluate
from .calculus.changes import changes as changes
from .calculus.gradients import gradient as gradient, row_gradients as row_gradients
from .calculus.influence import pullback as pullback
from .calculus.interpolation import EVALUATED as EVALUATED, INTERPOLATED as INTERPOLATED, LAW as LAW
from .calculus.line import sweep as sweep, sweep_blocks as sweep_blocks
from .calculus.results import Sweep as Sweep, join as join
from .calculus.step import (
    AdamState as AdamState,
    Affine as Affine,
    adamw as adamw,
    decompose as decompose,
    direction as direction,
    sgd as sgd,
)
from .calculus.taylor import taylor as taylor
from .calculus.transforms.increment import (
    RULES as RULES,
    Increment as Increment,
    increment as increment,
)
from .calculus.tree import (
    Terms as Terms,
    add_scaled as add_scaled,
    dot as dot,
    norm as norm,
    shift as shift,
    stack as stack,
)
from .language import readouts as readouts
from .language.batch import Batch as Batch, by_length as by_length, collate as collate
from .language.model.split import (
    Model as Model,
    assemble as assemble,
    logits as logits,
    split as split,
)
from .language.objectives import objective as objective, prepare as prepare
from .language.recipes import RECIPES as RECIPES, Recipe as Recipe
from .language.sampling import Sampling as Sampling
from .language.score import (
    Readings as Readings,
    Scores as Scores,
    scorer as scorer,
    with_value as with_value,
)
from .rollouts.ground_truth import GroundTruth as GroundTruth
from .rollouts.policy import Policy as Policy
from .rollouts.records import read_batch as read_batch, write_batch as write_batch
from .runtime.distributed import sharded as sharded
from .runtime.resume import resumable as resumable
from .runtime.serialize import fingerprint as fingerprint
from .statistics.change import (
    entropy_change as entropy_change,
    entropy_covector as entropy_covector,
    entropy_series as entropy_series,
)
from .statistics.estimators import Estimator as Estimator
from .statistics.linearity import (
    Linearity as Linearity,
    Ratio as Ratio,
    linearity as linearity,
    ratio as ratio,
)
from .statistics.odd_even import OddEven as OddEven, odd_even as odd_even, takeover as takeover
from .statistics.planning import (
    Comparison as Comparison,
    compare as compare,
    prompts_needed as prompts_needed,
)
from .statistics.policy_test import PolicyTest as PolicyTest, policy_test as policy_test
from .statistics.resampling import (
    Bootstrap as Bootstrap,
    Jackknife as Jackknife,
    bootstrap as bootstrap,
    jackknife as jackknife,
)
from .statistics.results import Diagnostics as Diagnostics, Estimate as Estimate, Series as Series
from .statistics.rounding import Rounding as Rounding, rounding as rounding
from .statistics.uncertainty import band as band
from .statistics.weights import pareto_khat as pareto_khat, pareto_smooth as pareto_smooth
from .study.plots import plot as plot, plot_ratio as plot_ratio
from .study.probe import probe as probe
from .study.report import Report as Report
from .study.sampling import ground_truth as ground_truth, rollout as rollout
from .training.checkpoint import Checkpoint as Checkpoint, load_checkpoint as load_checkpoint

__version__: str
__all__: list[str]
