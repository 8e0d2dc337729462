"""The command line: ``funcprobe probe``, on the bundled checkpoint or on one's own.

Reading flags and printing help needs the standard library alone; torch and transformers are
imported when there is something to compute.
"""

import math
import os
import sys
from argparse import ArgumentParser, ArgumentTypeError
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args, get_origin

from . import __version__
from .language.recipes import RECIPES
from .wording import doubts_in_flags, in_flags, negatives_joined

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .training.checkpoint import Checkpoint

# The longest completion that the bundled run allowed, in tokens. Its loss was divided by it.
BUNDLED_MAX_LENGTH = 24

_INTERRUPTED = "interrupted. The same command goes on from the finished blocks in OUTPUT/blocks."

# Below this many parameters a second thread costs more than it gains.
_SMALL = 10_000_000

_UNSET = ("", "~", "null")  # how a YAML file says that an option is not set

_USAGE = """usage: funcprobe probe [--config FILE.yaml] [--option value ...]
       funcprobe --version

Says what one AdamW step would do to a model's entropy; without options, to the bundled one's.
`funcprobe probe --help` lists the options; a YAML file holds the same names.

Finished blocks are kept in OUTPUT/blocks until the report is written: the same command goes on
where it was cut short. `torchrun --nproc-per-node N -m funcprobe probe ...` divides the blocks
among N processes.
"""


def _option(default: Any, help: str, choices: tuple[str, ...] = ()) -> Any:
    """A field of `ProbeArguments`, with the text of its flag's help."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class ProbeArguments:
    """What `funcprobe probe` takes, as flags or as the keys of a YAML file."""

    checkpoint: str | None = _option(
        None, "Trainer/TRL checkpoint folder; the bundled one if not given."
    )
    base_model: str | None = _option(
        None, "Hub id, folder or .gguf file; adapter_config.json's if not given."
    )
    update: str | None = _option(None, "U, a file of JSON lines.")
    evaluation: str | None = _option(None, "E, a file of JSON lines.")
    etas: str = _option(
        "0,0.25x,0.5x,1x,2x,4x",
        "Learning rates, separated by commas: 0.5x is half the checkpoint's, 1e-6 is absolute, and "
        "0:4x:65 are 65 from 0 to 4x, evenly spaced.",
    )
    recipe: str = _option("dr_grpo", "The objective of the update.", tuple(RECIPES))
    weights: Literal["sequence", "prefix", "prefix_raw"] = _option(
        "sequence",
        "Importance weights of whole sequences, or of prefixes, normalised by position or raw.",
    )
    per: Literal["token", "sequence"] = _option("token", "Entropy per token or per sequence.")
    off_policy: bool = _option(
        False, "E's lines hold the log-probabilities it was sampled with: weight by them."
    )
    max_length: int | None = _option(
        None, "dr_grpo's divisor in tokens; U's longest response if not given."
    )
    dtype: Literal["float32", "float64"] = _option("float32", "Precision of the model.")
    change: Literal["increment", "direct"] = _option(
        "increment", "Exact increments, or differences of values."
    )
    nodes: str | None = _option(None, "auto, or a degree: interpolate from a few evaluations.")
    tol: float = _option(1e-6, "The error that auto allows, over the largest change per eta.")
    matmul: Literal["full", "tf32", "bfloat16"] = _option(
        "full", "Precision of the increments' matrix products."
    )
    device: str | None = _option(None, "cpu, cuda, ...; cuda where there is one if not given.")
    optimizer: Literal["saved", "fresh"] = _option("saved", "The saved state, or a fresh one.")
    lr: float | None = _option(None, "Overrides the saved learning rate.")
    max_grad_norm: float = _option(
        1.0, "Gradient clipping, which checkpoints do not save; 0 is off."
    )
    tokens: int | None = _option(None, "Positions computed at once; bounds memory.")
    output: str = _option("probe", "Folder for report.json and the rest.")
    format: str = _option("png", "Formats of the figure: png, pdf, svg, separated by commas.")
    save_direction: bool = _option(False, "Keep v in report.safetensors, under keys v.NAME.")
    quiet: bool = _option(False, "Print neither bars nor the table: write files, report errors.")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, or 2 if it was refused or failed."""
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help"):
        print(_USAGE, end="")
        return 0
    if command == "--version":
        print(f"funcprobe {__version__}")
        return 0
    first = os.environ.get("RANK", "0") == "0"

    def speaks() -> bool:
        return first

    try:
        if command != "probe":
            raise ValueError(f"unknown command {command!r}; there is 'probe'.")
        options = _parse(negatives_joined(rest), first)
        import torch

        from .runtime.distributed import together

        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(
                f"--device {device}: this torch sees no CUDA device. Use --device cpu."
            )
        with together(device) as (group, speaks):
            _probe(options, device, group, first)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if speaks():
            _complain(in_flags(str(error), _choices()), first)
        return 2
    except KeyboardInterrupt:
        if speaks():
            _complain(_INTERRUPTED, first)
        return 130
    return 0


def _complain(message: str, first: bool) -> None:
    """Prints an error as one line on standard error, even where a progress bar stands."""
    from tqdm.auto import tqdm

    line = f"funcprobe: {' '.join(message.split())}"
    tqdm.write(line if first else f"\n{line}", file=sys.stderr)


def parse_etas(text: str, lr: float) -> list[float]:
    """Learning rates from text, separated by commas.

    ``1x`` is in units of `lr`, a plain number is absolute, and ``a:b:n`` are n from a to b, evenly.

    Raises:
        ValueError: the text is something else, or a rate is not finite.

    >>> parse_etas("0, 0.5x, 1e-6", 2e-5)
    [0.0, 1e-05, 1e-06]
    >>> parse_etas("0:1x:3, 4e-5", 2e-5)
    [0.0, 1e-05, 2e-05, 4e-05]
    """
    etas: list[float] = []
    for word in (word.strip() for word in str(text).split(",")):
        try:
            etas += _etas_of(word, lr)
        except (ValueError, RuntimeError):
            raise ValueError(
                "--etas: finite numbers such as 0.5x (of the learning rate) or 1e-6, or 0:4x:65 "
                f"for 65 from 0 to 4x, separated by commas, were expected, found {word!r}."
            ) from None
    return etas


def _etas_of(word: str, lr: float) -> list[float]:
    """One learning rate, or those of a range ``a:b:n``."""
    import torch

    start, *rest = word.split(":")
    if not rest:
        return [_eta(start, lr)]
    stop, points = rest
    first, last = _eta(start, lr), _eta(stop, lr)
    rates = torch.linspace(first, last, int(points), dtype=torch.float64)
    if not len(rates):
        raise ValueError("a range without points")
    rates[rates.abs() < 1e-12 * max(abs(first), abs(last))] = 0.0
    return list(rates.tolist())


def _eta(word: str, lr: float) -> float:
    eta = float(word[:-1]) * lr if word.endswith("x") else float(word)
    if not math.isfinite(eta):
        raise ValueError("a learning rate that is not finite")
    return eta


class _Parser(ArgumentParser):
    """A parser whose errors are exceptions, so that `main` prints them as any other."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. See funcprobe probe --help.")


def _boolean(text: str) -> bool:
    word = text.lower()
    if word in ("yes", "true", "t", "y", "1"):
        return True
    if word in ("no", "false", "f", "n", "0"):
        return False
    raise ArgumentTypeError(f"true or false was expected, not {text!r}")


_READERS: dict[Any, Any] = {
    str: str,
    str | None: str,
    int | None: int,
    float: float,
    float | None: float,
    bool: _boolean,
}


def _choices() -> dict[str, tuple[str, ...]]:
    """The values that each option may take; none are listed where any of its type will do."""
    return {
        option.name: get_args(option.type)
        if get_origin(option.type) is Literal
        else option.metadata["choices"]
        for option in fields(ProbeArguments)
    }


def _parser() -> _Parser:
    """A flag for each field of `ProbeArguments`, spelt with underscores or with hyphens."""
    parser = _Parser(prog="funcprobe probe")
    choices = _choices()
    for option in fields(ProbeArguments):
        default = "" if option.default in (None, False) else " (default: %(default)s)"
        keywords: dict[str, Any] = {
            "type": _READERS.get(option.type, str),
            "default": option.default,
            "help": option.metadata["help"] + default,
            "choices": choices[option.name] or None,
        }
        if option.type is bool:
            keywords |= {"nargs": "?", "const": True}
        spellings = dict.fromkeys([f"--{option.name}", f"--{option.name.replace('_', '-')}"])
        parser.add_argument(*spellings, **keywords)
    parser.add_argument("--config", help="A YAML file of these options; flags override it.")
    return parser


def _parse(words: list[str], aloud: bool = True) -> ProbeArguments:
    """The options that flags and a config file give; only one rank prints help `aloud`."""
    parser = _parser()
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
    """A config file's settings as text, as flags are: YAML would read 1:4:50 in base 60."""
    import yaml

    try:
        settings = yaml.load(Path(path).read_text(encoding="utf-8"), yaml.BaseLoader) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: a mapping of options was expected.")
    choices = _choices()
    if unknown := sorted(set(settings) - set(choices)):
        raise ValueError(f"{path}: unknown options {unknown}; there are {list(choices)}.")
    for name in ("etas", "format"):
        if isinstance(settings.get(name), list):
            settings[name] = ",".join(map(str, settings[name]))
    settings = {name: value for name, value in settings.items() if value not in _UNSET}
    for name, value in settings.items():
        _check_setting(path, name, value, choices[name])
    return settings


def _check_setting(path: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{path}: {name} must be one value, not {value}.")
    if choices and value not in choices:
        raise ValueError(f"{path}: {name} must be one of {', '.join(choices)}, not {value}.")


def _probe(options: ProbeArguments, device: str, group: "ProcessGroup | None", first: bool) -> None:
    """Probes. The first rank writes and prints the report; then finished blocks are removed."""
    from .rollouts.lines import read_rows
    from .runtime.distributed import agree
    from .runtime.resume import blocks_in, discard
    from .study.probe import probe

    path, update, evaluation = _inputs(options)
    formats = _formats(options.format)
    # What is bad is refused before anything is loaded.
    parse_etas(options.etas, 1.0)
    read_rows("read_batch", update)
    read_rows("read_batch", evaluation)
    max_length, nodes = options.max_length, options.nodes
    if options.checkpoint is None and max_length is None:
        max_length = BUNDLED_MAX_LENGTH
    finished = blocks_in(options.output)
    report = probe(
        _load(path, options, device, bars=first and not options.quiet),
        update,
        evaluation,
        lambda lr: parse_etas(options.etas, lr),
        recipe=options.recipe,
        weights=options.weights,
        per=options.per,
        off_policy=options.off_policy,
        change=options.change,
        nodes=int(nodes) if nodes is not None and nodes.isdecimal() else nodes,
        tol=options.tol,
        matmul=None if options.matmul == "full" else options.matmul,
        max_length=max_length,
        tokens=options.tokens,
        resume=finished,
        group=group,
        progress=not options.quiet,
    )
    if report is not None:
        written = report.save(options.output, formats=formats, direction=options.save_direction)
        if not options.quiet:
            print(doubts_in_flags(str(report), _choices()))
            print("wrote " + ", ".join(map(str, written)))
    agree("end", "reached", group)  # no rank removes blocks that another may still need
    discard(finished)


def _formats(text: str) -> tuple[str, ...]:
    """The formats of the figure, separated by commas; with none there is no figure."""
    from .study.plots import FORMATS

    formats = tuple(word.strip() for word in text.split(",") if word.strip())
    if not set(formats) <= set(FORMATS):
        raise ValueError(
            f"--format: any of {', '.join(FORMATS)}, separated by commas, was expected, not "
            f"{text!r}."
        )
    return formats


def _load(path: Path, options: ProbeArguments, device: str, *, bars: bool) -> "Checkpoint":
    """The checkpoint, as the options say; a small model computes on one thread from here on."""
    import torch
    from transformers.utils import logging

    from .training.checkpoint import load_checkpoint

    if not bars:
        logging.disable_progress_bar()
    checkpoint = load_checkpoint(
        path,
        base_model=options.base_model,
        dtype=getattr(torch, options.dtype),
        device=device,
        max_grad_norm=options.max_grad_norm or None,
        optimizer=options.optimizer,
        lr=options.lr,
    )
    if sum(t.numel() for t in (checkpoint.base | checkpoint.params).values()) < _SMALL:
        torch.set_num_threads(1)
    return checkpoint


def _inputs(options: ProbeArguments) -> tuple[Path, Path, Path]:
    """The paths of the checkpoint, U and E: those given, or the bundled ones."""
    given = {name: getattr(options, name) for name in ("checkpoint", "update", "evaluation")}
    missing = [f"--{name}" for name in given if given[name] is None]
    if len(missing) == 3:
        return bundled()
    if missing:
        raise ValueError(
            f"--checkpoint, --update and --evaluation go together, {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing. Give all three, or none for the "
            "bundled ones."
        )
    return Path(given["checkpoint"]), Path(given["update"]), Path(given["evaluation"])


def bundled() -> tuple[Path, Path, Path]:
    """The bundled checkpoint's folder and its U and E, files of JSON lines."""
    data = Path(str(files("funcprobe"))) / "data"
    return next(data.glob("checkpoint-*")), data / "update.jsonl", data / "evaluation.jsonl"
