"""Deliberate mistakes: functions of the package replaced by wrong ones, which tests must catch.

A mistake is a function that takes the right function and its arguments, and computes what a
programmer's slip would have computed. It stands for the right one wherever that was imported, so
neither the formatting nor the inside of the right function matters. `hunt` lets pytest collect the
tests that are named beside the mistakes, and runs each as it is and then under every mistake.

    python tests/mistakes.py            prints which test caught which mistake
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
SUBJECTS = ("statistics", "calculus", "language")


@dataclass(frozen=True)
class Mistake:
    """A wrong function, what it stands for, and the tests of which one must turn red."""

    name: str
    wrong: Callable[..., Any]  # (right, *arguments) -> what the slip computes
    target: str  # module.function below funcprobe
    tests: tuple[str, ...]  # file.py::function, or one of its cases
    key: Any  # where the target is a table, the entry of it

    @contextmanager
    def planted(self) -> Iterator[None]:
        """Puts the wrong function in the place of the right one, and takes it out again."""
        module, _, attribute = self.target.rpartition(".")
        right = getattr(import_module(f"funcprobe.{module}"), attribute)
        right = right if self.key is None else right[self.key]

        @wraps(right)
        def wrong(*args, **kwargs):
            return self.wrong(right, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            for holder in list(sys.modules.values()):
                if not _is_ours(holder):
                    continue
                for name, value in list(vars(holder).items()):
                    if value is right:
                        patch.setattr(holder, name, wrong)
                    elif isinstance(value, dict):
                        for key in [key for key, entry in value.items() if entry is right]:
                            patch.setitem(value, key, wrong)
            yield


def _is_ours(module: Any) -> bool:
    file = getattr(module, "__file__", None)
    return module.__name__.startswith("funcprobe") or (file and Path(file).parent == TESTS)


MISTAKES: dict[str, Mistake] = {}


def mistake(target: str, *tests: str, key: Any = None) -> Callable:
    """Registers a wrong function under its own name, read as a sentence."""

    def register(wrong: Callable[..., Any]) -> Callable[..., Any]:
        name = wrong.__name__.replace("_", " ").strip()
        assert tests and name not in MISTAKES, name
        MISTAKES[name] = Mistake(name, wrong, target, tests, key)
        return wrong

    return register


def load() -> dict[str, Mistake]:
    """All mistakes; the modules that hold them register them when they are imported."""
    for subject in SUBJECTS:
        import_module(f"mistakes_{subject}")
    return MISTAKES


class Hunter:
    """A pytest plugin that runs each named test as it is, then under every mistake it may catch."""

    def __init__(self, mistakes: dict[str, Mistake]):
        self.mistakes = mistakes
        self.caught: dict[str, str] = {}  # mistake -> the test that turned red
        self.missed = dict.fromkeys(mistakes, "no such test")  # mistake -> why it is not caught

    def pytest_collection_modifyitems(self, items):
        """Keeps the tests that a mistake names."""
        items[:] = [item for item in items if self._of(item)]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item):
        """Skips a test that can catch nothing more."""
        if all(mistake.name in self.caught for mistake in self._of(item)):
            pytest.skip("all its mistakes are caught")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        """Runs a test, which must pass, and again under its mistakes, until they are caught."""
        try:
            yield
        except BaseException as error:
            self.missed |= {m.name: f"red without it: {error!r}" for m in self._of(item)}
            raise
        for mistake in self._of(item):
            if mistake.name in self.caught:
                continue
            try:
                with mistake.planted():
                    item.runtest()
                self.missed[mistake.name] = "no test turned red"
            except (AssertionError, pytest.fail.Exception):
                self.caught[mistake.name] = item.nodeid
            except Exception as error:
                self.missed[mistake.name] = f"it raises {error!r}"

    def _of(self, item) -> list[Mistake]:
        name = f"{item.path.relative_to(TESTS)}::{item.nodeid.partition('::')[2]}"
        names = {name, name.partition("[")[0]}
        return [m for m in self.mistakes.values() if names & set(m.tests)]


def hunt() -> dict[str, str]:
    """What became of each mistake: the test that caught it, or after a "!" why none did."""
    hunter = Hunter(load())
    files = {test.partition("::")[0] for m in hunter.mistakes.values() for test in m.tests}
    options = ["--assert=plain", "-p", "no:cacheprovider", "-p", "no:terminal"]
    pytest.main([*options, *(str(TESTS / file) for file in sorted(files))], plugins=[hunter])
    return {name: hunter.caught.get(name, f"! {hunter.missed[name]}") for name in hunter.mistakes}


if __name__ == "__main__":
    # Under the name that the other files import, so that there is one table.
    print(json.dumps(import_module("mistakes").hunt(), indent=1))
