"""The package's surface: lazy, complete, and the same for people, type checkers and pickle."""

import ast
import importlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import funcprobe

ROOT = Path(funcprobe.__file__).parent


def reexported():
    """(home, name) of each name that `__init__.pyi` shows to type checkers."""
    tree = ast.parse((ROOT / "__init__.pyi").read_text())
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                assert alias.asname == alias.name
                yield node.module, alias.name


def test_type_checkers_see_the_public_names():
    modules = {"calculus", "language", "rollouts", "runtime", "statistics", "study", "training"}
    shown = list(reexported())
    assert {name for home, name in shown if home is None} == modules
    public = {name: home for home, name in shown if home is not None}
    assert sorted(public) == funcprobe.__all__ == sorted(set(funcprobe.__all__))
    for name, home in public.items():
        module = importlib.import_module(f"funcprobe.{home}")
        if name == "readouts":
            module = importlib.import_module("funcprobe.language")
        assert getattr(funcprobe, name) is getattr(module, name)
    for name in modules:
        assert getattr(funcprobe, name) is importlib.import_module(f"funcprobe.{name}")


def test_dir_shows_the_public_names():
    assert dir(funcprobe) == sorted([*funcprobe.__all__, "__version__"])
    with pytest.raises(AttributeError, match="no attribute 'prob'"):
        funcprobe.prob  # noqa: B018


def test_everything_can_be_imported_at_once_and_pickled():
    scope = {}
    exec("from funcprobe import *", scope)
    assert set(funcprobe.__all__) <= set(scope)
    assert pickle.loads(pickle.dumps(scope["sweep"])) is funcprobe.sweep
    assert pickle.loads(pickle.dumps(funcprobe.Sampling(0.5))) == funcprobe.Sampling(0.5)


def test_importing_is_quick():
    code = "import sys, funcprobe; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n"
