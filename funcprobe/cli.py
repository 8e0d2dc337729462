"""The command line: ``funcprobe probe``, on the bundled checkpoint or on one's own."""

import math
import os
import sys
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path

import torch
import transformers
import yaml
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from .rollouts.records import read_batch, read_sampling
from .runtime.distributed import agree, together
from .runtime.resume import discard
from .study.probe import probe
from .training.checkpoint import load_checkpoint

BUNDLED_MAX_LENGTH = 24  # the bundled run's longest allowed completion, its loss's divisor

_SMALL = 10_000_000  # parameters: below, a second thread costs more than it gives

_UNSET = ("", "~", "null")  # in YAML

_DTYPES = {"float64": torch.float64, "float32": torch.float32}
_USAGE = """usage: funcprobe probe [--config FILE.yaml] [--option value ...]

What one AdamW step would do to the model's entropy. Without options, on the bundled checkpoint.
`funcprobe probe --help` lists the options; a YAML file holds the same names.

Finished blocks are kept in OUTPUT/blocks until the report is written: the same command goes on
where it was cut short. `torchrun --nproc-per-node N -m funcprobe probe ...` shares the blocks out.
"""


@dataclass
class ProbeArguments:
    """What `funcprobe probe` takes, as flags or as the keys of a YAML file."""

    checkpoint: str | None = field(
        default=None,
        metadata={"help": "Trainer/TRL checkpoint folder; the bundled one if not given."},
    )
    base_model: str | None = field(
        default=None,
        metadata={"help": "Hub id, folder or .gguf file; adapter_config.json's if not given."},
    )
    update: str | None = field(default=None, metadata={"help": "U, a file of JSON lines."})
    evaluation: str | None = field(default=None, metadata={"help": "E, a file of JSON lines."})
    etas: str = field(
        default="0,0.25x,0.5x,1x,2x,4x",
        metadata={
            "help": "Learning rates: 0.5x of the checkpoint's, or absolute, 1e-6; 0:4x:65 is 65 of "
            "them, evenly."
        },
    )
    recipe: str = field(
        default="dr_grpo", metadata={"help": "reinforce, rloo, grpo, dr_grpo or dapo."}
    )
    weights: str = field(
        default="sequence",
        metadata={
            "help": "Importance weights: plain SNIS, or by prefix, position-normalised or raw.",
            "choices": ["sequence", "prefix", "prefix_raw"],
        },
    )
    per: str = field(
        default="token",
        metadata={"help": "Entropy per token or per sequence.", "choices": ["token", "sequence"]},
    )
    off_policy: bool = field(
        default=False,
        metadata={
            "help": "E's lines hold the log-probabilities it was sampled with: weigh by them."
        },
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "dr_grpo's divisor in tokens; U's longest response if not given."},
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "Precision of the model.", "choices": ["float32", "float64"]},
    )
    change: str = field(
        default="increment",
        metadata={
            "help": "Exact increments, or differences of values.",
            "choices": ["increment", "direct"],
        },
    )
    nodes: str | None = field(
        default=None,
        metadata={"help": "auto, or a degree: interpolate from a few evaluations."},
    )
    tol: float = field(
        default=1e-6,
        metadata={"help": "The error that auto allows, over the largest change per eta."},
    )
    matmul: str = field(
        default="full",
        metadata={
            "help": "Precision of the increments' matrix products.",
            "choices": ["full", "tf32", "bfloat16"],
        },
    )
    device: str | None = field(
        default=None, metadata={"help": "cpu, cuda, ...; cuda where there is one if not given."}
    )
    optimizer: str = field(
        default="saved",
        metadata={"help": "The saved state, or a fresh one.", "choices": ["saved", "fresh"]},
    )
    lr: float | None = field(default=None, metadata={"help": "Overrides the saved learning rate."})
    max_grad_norm: float = field(
        default=1.0,
        metadata={"help": "Gradient clipping, which checkpoints do not save; 0 is off."},
    )
    tokens: int | None = field(
        default=None, metadata={"help": "Positions computed at once; bounds memory."}
    )
    output: str = field(default="probe", metadata={"help": "Folder for report.json and the rest."})


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 0 or 2 on bad input."""
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help"):
        print(_USAGE, end="")
        return 0
    first = os.environ.get("RANK", "0") == "0"

    def speaks() -> bool:
        return first

    try:
        if command != "probe":
            raise ValueError(f"unknown command {command!r}; there is 'probe'.")
        parsed = _parse(rest, first)
        device = parsed.device or ("cuda" if torch.cuda.is_available() else "cpu")
        with together(device) as (group, speaks):
            if not first:
                transformers.utils.logging.disable_progress_bar()
            _probe(parsed, device, group)
    except (ValueError, OSError, RuntimeError) as error:
        if speaks():
            # A line of its own, even where a progress bar stands, of the first rank if not here.
            line = f"funcprobe: {' '.join(str(error).split())}"
            tqdm.write(line if first else f"\n{line}", file=sys.stderr)
        return 2
    return 0


def parse_etas(text: str, lr: float) -> list[float]:
    """Learning rates from text: ``1x`` in units of `lr`, plain numbers absolute, evenly as a:b:n.

    >>> parse_etas("0, 0.5x, 1e-6", 2e-5)
    [0.0, 1e-05, 1e-06]
    >>> parse_etas("0:1x:3, 4e-5", 2e-5)
    [0.0, 1e-05, 2e-05, 4e-05]
    """

    def rate(word: str) -> float:
        eta = float(word[:-1]) * lr if word.endswith("x") else float(word)
        if not math.isfinite(eta):
            raise ValueError
        return eta

    etas = []
    for word in (word.strip() for word in str(text).split(",")):
        try:
            start, *rest = word.split(":")
            if rest:
                stop, points = rest
                first, last = rate(start), rate(stop)
                line = torch.linspace(first, last, int(points), dtype=torch.float64)
                if not len(line):
                    raise ValueError
                line[line.abs() < 1e-12 * max(abs(first), abs(last))] = 0.0
                etas += line.tolist()
            else:
                etas.append(rate(start))
        except (ValueError, RuntimeError):
            raise ValueError(
                "etas: finite numbers such as 0.5x (of the learning rate) or 1e-6, or 0:4x:65 for "
                f"65 from 0 to 4x, separated by commas, were expected, found {word!r}."
            ) from None
    return etas


def _parse(words: list[str], aloud: bool = True) -> ProbeArguments:
    parser = HfArgumentParser(ProbeArguments, prog="funcprobe probe")
    parser.add_argument("--config", help="A YAML file of these options; flags override it.")
    config = parser.parse_known_args(words)[0].config
    if config is not None:
        parser.set_defaults(**_read_config(config))
    with ExitStack() as stack:
        if not aloud:
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(silence))
            stack.enter_context(redirect_stderr(silence))
        values = vars(parser.parse_args(words))
    values.pop("config")
    return ProbeArguments(**values)


def _read_config(path: str) -> dict[str, str]:
    # Text, as flags are: YAML itself would read 1:4:50 as a number in base 60.
    try:
        settings = yaml.load(Path(path).read_text(encoding="utf-8"), yaml.BaseLoader) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: a mapping of options was expected.")
    options = {option.name: option.metadata.get("choices") for option in fields(ProbeArguments)}
    unknown = sorted(set(settings) - set(options))
    if unknown:
        raise ValueError(f"{path}: unknown options {unknown}; there are {list(options)}.")
    if isinstance(settings.get("etas"), list):
        settings["etas"] = ",".join(map(str, settings["etas"]))
    settings = {name: value for name, value in settings.items() if value not in _UNSET}
    for name, value in settings.items():
        if not isinstance(value, str):
            raise ValueError(f"{path}: {name} must be one value, not {value}.")
        if options[name] and value not in options[name]:
            raise ValueError(f"{path}: {name} must be one of {options[name]}.")
    return settings


def _probe(arguments: ProbeArguments, device: str, group) -> None:
    path, update, evaluation = _inputs(arguments)
    etas, max_length = arguments.etas, arguments.max_length
    if arguments.checkpoint is None and max_length is None:
        max_length = BUNDLED_MAX_LENGTH
    parse_etas(etas, 1.0)
    nodes = int(arguments.nodes) if str(arguments.nodes).isdecimal() else arguments.nodes
    checkpoint = load_checkpoint(
        path,
        base_model=arguments.base_model,
        dtype=_DTYPES[arguments.dtype],
        device=device,
        max_grad_norm=arguments.max_grad_norm or None,
        optimizer=arguments.optimizer,
        lr=arguments.lr,
    )
    if sum(t.numel() for t in (checkpoint.base | checkpoint.params).values()) < _SMALL:
        torch.set_num_threads(1)
    sampling = read_sampling(evaluation)
    if sampling is not None:
        checkpoint = replace(checkpoint, sampling=sampling)
    finished = Path(arguments.output) / "blocks"
    report = probe(
        checkpoint,
        read_batch(update, checkpoint.tokenizer),
        read_batch(evaluation, checkpoint.tokenizer),
        lambda lr: parse_etas(etas, lr),
        recipe=arguments.recipe,
        weights=arguments.weights,
        per=arguments.per,
        off_policy=arguments.off_policy,
        change=arguments.change,
        nodes=nodes,
        tol=arguments.tol,
        matmul=None if arguments.matmul == "full" else arguments.matmul,
        max_length=max_length,
        tokens=arguments.tokens,
        resume=finished,
        group=group,
        progress=True,
    )
    if report is not None:
        written = report.save(arguments.output)
        print(report)
        print("wrote " + ", ".join(map(str, written)))
    agree("end", "reached", group)
    discard(finished)


def _inputs(arguments: ProbeArguments) -> tuple[Path, Path, Path]:
    given = (arguments.checkpoint, arguments.update, arguments.evaluation)
    if all(value is None for value in given):
        return bundled()
    if None in given:
        raise ValueError(
            "--checkpoint, --update and --evaluation go together; give all three, or none for the "
            "bundled checkpoint."
        )
    return tuple(map(Path, given))


def bundled() -> tuple[Path, Path, Path]:
    """The bundled checkpoint's folder and its U and E, files of JSON lines."""
    data = Path(str(files("funcprobe"))) / "data"
    return next(data.glob("checkpoint-*")), data / "update.jsonl", data / "evaluation.jsonl"
