"""What explains the difference between E's recorded log-probabilities and the checkpoint's."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from typing import Any, Literal, NamedTuple

from torch import Tensor

from ..calculus.blocks import evaluate
from ..calculus.results import Sweep, join
from ..calculus.tree import Terms
from ..language.batch import Batch, unknown_rows
from ..language.sampling import Sampling
from ..statistics.change import entropy_change, entropy_series
from ..statistics.uncertainty import standard_error
from .setup import Setup, evenly, scored_under

SAMPLED = 12  # rows of E that are scored with other settings
SAME = 1e-3  # nats a token, below which recorded log-probabilities are the checkpoint's
ROUNDING = 0.1  # nats a token: engines in bfloat16 scatter by less
TRUNCATIONS: tuple[dict[str, Any], ...] = (
    *({"top_p": p} for p in (0.99, 0.95, 0.9, 0.8, 0.7, 0.5)),
    *({"top_k": k} for k in (100, 50, 20)),
    *({"min_p": p} for p in (0.01, 0.05, 0.1)),
)

Cause = Literal["sampling", "rounding", "another model"]
LogpAt = Callable[[Sampling], Tensor]  # log-probabilities [T] of the same tokens under settings


class Explanation(NamedTuple):
    """The sampling settings that explain recorded log-probabilities best."""

    sampling: Sampling
    residual: float  # nats a token, root mean square
    explains: bool  # whether they leave a quarter of the difference or less, and only rounding


class Records(NamedTuple):
    """What E's recorded log-probabilities are, if not the checkpoint's. It prints as a sentence.

    The biases are those of taking E for the checkpoint's own draws: the estimate as it stands less
    the one that weights rows by what they record, on the same rows.
    """

    cause: Cause
    sampling: Sampling  # the settings that explain the records best
    residual: float  # nats a token that these settings leave, root mean square; nan: not measured
    mean: float  # nats a token, of recorded less scored
    scatter: float  # nats a token about that mean
    largest: float  # nats, of any token
    entropy_bias: float  # nats a token or a sequence; nan if a row lacks records
    entropy_bias_stderr: float
    slope_bias: float
    slope_bias_stderr: float

    def settings(self) -> dict[str, float]:
        """The settings that explain the records, as a batch's lines hold them."""
        usual, named = asdict(Sampling()), asdict(self.sampling)
        temperature = float(f"{float(named['temperature']):.3g}")
        truncation = {name: x for name, x in named.items() if x != usual[name]}
        return {**truncation, "temperature": temperature}

    def difference(self) -> str:
        """How far the records are from the checkpoint's log-probabilities."""
        return (
            f"they scatter by {self.scatter:.2g} nats a token around the checkpoint's with mean "
            f"{self.mean:+.2g}, at most {self.largest:.2g}"
        )

    def bias(self) -> str:
        """What the difference does to the estimates; "" if it is not known."""
        if math.isnan(self.entropy_bias):
            return ""
        return (
            f" Taking E for the checkpoint's own draws biases H by {self.entropy_bias:+.2g} +- "
            f"{self.entropy_bias_stderr:.1g} and the slope by {self.slope_bias:+.2g} +- "
            f"{self.slope_bias_stderr:.1g}."
        )

    def __str__(self) -> str:
        if self.cause == "rounding":
            return (
                "E's recorded log-probabilities are best explained by rounding: "
                f"{self.difference()}, as those of an engine in bfloat16 do, which is the policy "
                f"that E was drawn from.{self.bias()} off_policy=True weights E by what it "
                "records, without that bias."
            )
        explained = (
            f"best explained by {self._named()} (residual {self.residual:.2g} nats a token)"
            if self.cause == "sampling"
            else "explained by no temperature, top-p, top-k or min-p: another model or checkpoint"
        )
        return f"E's recorded log-probabilities are {explained}; {self.difference()}.{self.bias()}"

    def __repr__(self) -> str:
        return str(self)

    def _named(self) -> str:
        """The settings in words; a temperature of 1 goes without saying beside a truncation."""
        settings = self.settings()
        temperature = settings.pop("temperature")
        named = [f"{name} {value:g}" for name, value in settings.items()]
        if temperature != 1 or not named:
            named.insert(0, f"temperature {temperature:.2f}")
        return " and ".join(named)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Records":
        """The object that was saved as these plain values."""
        known: dict[str, Any] = {name: math.nan if x is None else x for name, x in data.items()}
        return cls(**known | {"sampling": Sampling(**data["sampling"])})


def explain(setup: Setup) -> Explanation | None:
    """The sampling settings that explain a sample of E's recorded log-probabilities best.

    Returns:
        None if nothing is recorded, if the sampled rows' records are the checkpoint's, or if E is
        weighted by what it records.
    """
    batch = setup.evaluation
    known = (~unknown_rows(batch, "old_logp")).nonzero().flatten()
    if setup.settings.off_policy or not len(known):
        return None
    rows = batch.rows(known[evenly(len(known), SAMPLED)])
    recorded = rows.old_logp[rows.response]
    scored = setup.checkpoint.sampling
    at = _scored_at(setup, rows)
    if _rms(at(scored) - recorded) <= SAME:
        return None
    return explanation(at, recorded, scored)


def explanation(at: LogpAt, recorded: Tensor, scored: Sampling) -> Explanation:
    """Sampling settings whose log-probabilities are closest to the recorded ones.

    A temperature is fitted by least squares, then a few truncations are tried, then both together.
    Settings under which a token is impossible are no explanation.

    Args:
        at: the tokens' log-probabilities [T] under settings.
        recorded: [T] nats.
        scored: the settings that E is scored with.
    """
    off = _rms(at(scored) - recorded)
    plain = Sampling(scored.temperature)
    truncated = [replace(plain, **truncation) for truncation in TRUNCATIONS]

    def closest(candidates: Iterable[Sampling], best: Explanation) -> Explanation:
        for candidate in candidates:
            residual = _rms(at(candidate) - recorded)
            if residual < best.residual:
                explains = residual <= max(min(off / 4, ROUNDING), SAME)
                best = Explanation(candidate, residual, explains)
        return best

    def fitted(starts: Iterable[Sampling]) -> Iterator[Sampling]:
        return (_with_temperature(at, recorded, start) for start in starts)

    best = Explanation(scored, off, explains=False)
    for candidates in (fitted(dict.fromkeys((scored, plain, Sampling()))), (plain, *truncated)):
        best = closest(candidates, best)
        if best.residual <= max(off / 20, SAME):
            return best
    # Where neither helps, both together do not, and rounding is often the cause.
    return closest(fitted(truncated), best) if best.residual < 0.7 * off else best


def _with_temperature(at: LogpAt, recorded: Tensor, start: Sampling) -> Sampling:
    """The least-squares temperature, by Gauss-Newton steps in its logarithm."""
    log_t, step = math.log(float(start.temperature)), 1e-3
    for _ in range(8):
        here = at(replace(start, temperature=math.exp(log_t)))
        near = at(replace(start, temperature=math.exp(log_t + step)))
        slope = (near - here) / step
        if not slope.isfinite().all() or not slope.any():
            return start
        move = float((slope * (recorded - here)).sum() / slope.square().sum())
        log_t += max(min(move, 0.7), -0.7)
        if abs(move) < 1e-4:
            break
    return replace(start, temperature=math.exp(log_t))


def difference(evaluation: Batch, swept: Sweep) -> Tensor:
    """E's recorded log-probabilities less the checkpoint's, of the tokens that have both, [T]."""
    width = swept.base.logp.shape[-1]
    off = evaluation.old_logp[:, :width] - swept.base.logp.double()
    off = off[evaluation.response[:, :width]]
    return off[~off.isnan()]


def alike(evaluation: Batch, swept: Sweep) -> bool:
    """Whether E records the checkpoint's own log-probabilities."""
    off = difference(evaluation, swept)
    return len(off) > 0 and _rms(off) <= SAME


def records(setup: Setup, swept: Sweep, terms: Terms, best: Explanation | None) -> Records | None:
    """What E's records are and what taking E for the checkpoint's own draws does to the estimates.

    They are explained by sampling settings that leave at most a quarter of the difference and at
    most 0.1 nats a token; else by rounding, where they scatter by at most 0.1 nats a token with a
    mean near 0; else by nothing but another model. A checkpoint a step away cannot be
    told from rounding, and its bias is the same.

    Returns:
        None if nothing is recorded, the records are the checkpoint's, or E is weighted by them.
    """
    off = difference(setup.evaluation, swept)
    if setup.settings.off_policy or not len(off) or _rms(off) <= SAME:
        return None
    mean, scatter = float(off.mean()), float(off.std(correction=0))
    cause: Cause = "another model"
    if best is not None and best.explains:
        cause = "sampling"
    elif scatter <= ROUNDING and abs(mean) <= SAME + scatter / 4:
        cause = "rounding"
    return Records(
        cause,
        setup.checkpoint.sampling if best is None else best.sampling,
        math.nan if best is None else best.residual,
        mean,
        scatter,
        float(off.abs().max()),
        *_biases(setup, swept, terms),
    )


def _biases(setup: Setup, swept: Sweep, terms: Terms) -> tuple[float, float, float, float]:
    """Of the entropy and of the slope, the estimate as it stands less that of weighted rows."""
    batch, settings = setup.evaluation, setup.settings
    if unknown_rows(batch, "old_logp").any():
        return (math.nan,) * 4
    first = swept._replace(
        etas=swept.etas[:1], change=type(swept.change)(*(x[:1] for x in swept.change))
    )
    options: dict[str, Any] = {"weights": settings.weights, "per": settings.per}
    plain, weighted = (
        (
            entropy_change(first, batch, **options, behaviour=behaviour),
            entropy_series(terms[:2], batch, **options, behaviour=behaviour),
        )
        for behaviour in (None, batch.old_logp)
    )
    return (
        float(plain[0].base - weighted[0].base),
        float(standard_error(plain[0].base_psi - weighted[0].base_psi)),
        float(plain[1].value[0] - weighted[1].value[0]),
        float(standard_error(plain[1].psi[0] - weighted[1].psi[0])),
    )


def _scored_at(setup: Setup, rows: Batch) -> LogpAt:
    """The log-probabilities of the rows' response tokens [T] under settings, on every rank."""
    checkpoint, stream = setup.checkpoint, setup.stream
    blocks, order = stream.cut(rows)

    def at(sampling: Sampling) -> Tensor:
        score = scored_under(checkpoint, sampling)
        parts = stream.map(
            "E's records",
            lambda block: evaluate(score, checkpoint.params, block, rows="all"),
            blocks,
            asdict(sampling),
        )
        logp = join(parts, order).logp.double()
        return logp[rows.response[:, : logp.shape[1]]]

    return at


def _rms(off: Tensor) -> float:
    """The root mean square; infinite where a value is."""
    mean = float(off.square().mean())
    return math.sqrt(mean) if math.isfinite(mean) else math.inf
