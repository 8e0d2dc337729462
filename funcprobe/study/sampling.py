"""Sampling from a checkpoint or from its path: here rollouts meet what training leaves behind."""

from collections.abc import Callable
from functools import update_wrapper
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from ..rollouts import ground_truth as _ground_truth
from ..rollouts import sample as _sample
from ..rollouts.policy import Policy
from ..training.checkpoint import as_checkpoint

Rest = ParamSpec("Rest")
Result = TypeVar("Result")


def _accepts_path(
    fn: Callable[Concatenate[Policy, Rest], Result],
) -> Callable[Concatenate[Policy | str | Path, Rest], Result]:
    """`fn`, whose policy may also be a checkpoint's path, which is loaded with the defaults."""

    def accepting(policy: Any, *args: Any, **kwargs: Any) -> Any:
        return fn(as_checkpoint(policy), *args, **kwargs)

    wrapped: Any = update_wrapper(accepting, fn)
    return wrapped


rollout = _accepts_path(_sample.rollout)
ground_truth = _accepts_path(_ground_truth.ground_truth)
