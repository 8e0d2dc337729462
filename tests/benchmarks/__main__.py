"""The whole suite, one benchmark after another: `python tests/benchmarks [OUTPUT]`.

Writes a JSON file for each into OUTPUT, by default results/DEVICE beside this file. On a CPU on
SmolLM2, half an hour on two cores; on a GPU sweeps of a model of Qwen2.5-1.5B's shape too.
"""

import subprocess
import sys
from pathlib import Path

import workload as w

HERE = Path(__file__).parent
SUITE = {
    "sweep": ["sweep.py"],
    "sweep-groups": ["sweep.py", "--responses", "4", "--etas", "16"],
    "precision": ["precision.py"],
    "gradients": ["gradients.py"],
}
LARGE = {
    f"sweep-1.5b-r{rank}": ["sweep.py", "--model", "qwen1.5b", "--rank", str(rank), "--rows", "64"]
    for rank in (16, 64)
}


def main() -> None:
    """Runs each in a process of its own."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results" / w.DEVICE.type
    out.mkdir(parents=True, exist_ok=True)
    for name, words in (SUITE | (LARGE if w.DEVICE.type == "cuda" else {})).items():
        print(f"\n== {' '.join(words)}", flush=True)
        words = [sys.executable, HERE / words[0], *words[1:], "--out", out / f"{name}.json"]
        subprocess.run(words, check=True)


if __name__ == "__main__":
    main()
