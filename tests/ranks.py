"""One rank of a test's torchrun: the command line, watched, with what goes wrong on rank 1.

    torchrun ... tests/ranks.py FOLDER fine|raise|die probe ...

It appends to FOLDER/rankN.jsonl the rows that its sweeps take, those that it moves to a device,
and in the end its exit status and whether it got a report.
"""

import importlib
import json
import os
import signal
import sys
from pathlib import Path

from funcprobe import Batch, cli, read_batch


def main() -> None:
    folder, fault, *words = sys.argv[1:]
    rank = int(os.environ["RANK"])
    log = Path(folder) / f"rank{rank}.jsonl"
    composed = importlib.import_module("funcprobe.study.probe")
    sweep, probe, to = composed.sweep, composed.probe, Batch.to
    swept = 0

    def note(what, value):
        with log.open("a") as file:
            file.write(json.dumps([what, value]) + "\n")

    def rows(batch):
        return [row[mask].tolist() for row, mask in zip(batch.tokens, batch.attention, strict=True)]

    def watched_sweep(score, params, v, etas, block, **options):
        nonlocal swept
        swept += 1
        note("sweep", rows(block))
        if rank == 1 and swept == 3:
            if fault == "raise":
                raise ValueError("the third block is bad")
            if fault == "die":
                os.kill(os.getpid(), signal.SIGKILL)
        return sweep(score, params, v, etas, block, **options)

    def watched_to(batch, device):
        note("to", rows(batch))
        return to(batch, device)

    def watched_probe(checkpoint, update, evaluation, *rest, **options):
        note("E", rows(read_batch(evaluation)))
        report = probe(checkpoint, update, evaluation, *rest, **options)
        note("report", report is not None)
        return report

    if fault == "files":  # this host's E is another one
        at = words.index("--evaluation") + 1
        words[at] = words[at] if rank == 0 else str(Path(folder) / "other.jsonl")
    composed.sweep, composed.probe, Batch.to = watched_sweep, watched_probe, watched_to
    status = cli.main(words)
    note("status", status)
    sys.exit(status)


if __name__ == "__main__":
    main()
