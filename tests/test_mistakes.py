"""Each deliberate mistake turns a test red."""

import json
import subprocess
import sys
from functools import cache

import mistakes
import pytest


@cache
def hunted() -> dict[str, str]:
    """What became of each mistake, in a process of its own, which they cannot leave."""
    run = [sys.executable, "mistakes.py"]
    done = subprocess.run(run, capture_output=True, text=True, cwd=mistakes.TESTS, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", mistakes.load())
def test_a_mistake_turns_a_test_red(name):
    assert not hunted()[name].startswith("!"), hunted()[name]
