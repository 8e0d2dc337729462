"""The laws of the layout, and that importing the package changes nothing outside it."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import funcprobe

ROOT = Path(funcprobe.__file__).parent
TESTS = Path(__file__).parent
FILES = {str(path.relative_to(ROOT)): path for path in sorted(ROOT.rglob("*.py"))}
INSIDE = sorted(name for name in FILES if "/" in name)  # files of a trunk or of an edge package

TRUNKS = {"calculus", "language", "statistics"}
MAY_IMPORT = {trunk: {trunk} for trunk in TRUNKS} | {
    "runtime": TRUNKS | {"runtime"},
    "training": TRUNKS | {"runtime", "training"},
    "rollouts": TRUNKS | {"runtime", "rollouts"},
    "study": TRUNKS | {"runtime", "training", "rollouts", "study"},
}


def imports(path):
    """The absolute names of all that a file of the package imports, wherever in it."""
    package = ["funcprobe", *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            where = [*start, *(node.module.split(".") if node.module else [])]
            yield from (".".join([*where, alias.name]) for alias in node.names)


def imported(path):
    """The packages and top-level files of funcprobe that a file imports."""
    names = (name.split(".") for name in imports(path))
    return {parts[1] if parts[1:] else "" for parts in names if parts[0] == "funcprobe"}


def test_the_parser_sees_what_it_should():
    names = set(imports(FILES["calculus/step.py"]))
    assert {"torch.Tensor", "funcprobe.calculus.tree.Params"} <= names
    assert imported(FILES["calculus/step.py"]) == {"calculus"}
    assert {"study", "training"} <= imported(FILES["cli.py"])
    assert len(INSIDE) > 40


def test_every_package_has_its_law():
    assert {name.split("/")[0] for name in INSIDE} == set(MAY_IMPORT)


@pytest.mark.parametrize("name", INSIDE)
def test_a_file_imports_only_the_packages_below_it(name):
    strangers = imported(FILES[name]) - MAY_IMPORT[name.split("/")[0]] - {"__version__"}
    assert not strangers, f"{name} imports {sorted(strangers)}"


def test_only_main_imports_the_command_line():
    users = {name for name, path in FILES.items() if "cli" in imported(path)}
    assert users == {"__main__.py"}


def test_only_the_tree_knows_optree():
    users = {
        name
        for name, path in FILES.items()
        if "optree" in {imported.split(".")[0] for imported in imports(path)}
    }
    assert users == {"calculus/tree.py"}


@pytest.mark.parametrize("name", [n for n in INSIDE if n.startswith(("calculus", "statistics"))])
def test_only_language_and_the_edge_know_transformers_and_peft(name):
    tops = {imported.split(".")[0] for imported in imports(FILES[name])}
    assert not tops & {"transformers", "peft", "tokenizers", "datasets"}


def test_no_test_file_imports_another():
    tests = {path.stem for path in TESTS.glob("test_*.py")}
    for path in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not tests & set(names), f"{path.name} imports {tests & set(names)}"


# The shape of the text


def functions(tree):
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def lines_of_body(function):
    """Lines from a function's first statement to its last, the docstring not counted."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("name", FILES)
def test_functions_and_files_are_short(name):
    text = FILES[name].read_text()
    assert len(text.splitlines()) <= 400
    for function in functions(ast.parse(text)):
        assert lines_of_body(function) <= 60, f"{name}: {function.name}"


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: path.name)
def test_test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 500


# Each had three meanings or more: a mode, a type, a registry; a block, arguments, scores.
SAY_NOTHING = {"some", "own", "there", "found", "each", "kind"}


def bound_names(tree):
    """The names that a file gives to functions, classes, arguments, variables and fields."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name
            case ast.ClassDef(name=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)):
                yield name
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield name
            case ast.alias(name=name, asname=asname):
                yield asname or name


@pytest.mark.parametrize("name", FILES)
def test_names_are_nouns_of_the_field(name):
    assert not SAY_NOTHING & set(bound_names(ast.parse(FILES[name].read_text())))


OF_LANGUAGE = r"\b(tokens?|nucle(us|i)|logits?|scorers?|Batch|top-p|vocabular(y|ies))\b"


@pytest.mark.parametrize("name", [n for n in INSIDE if n.startswith("calculus/")])
def test_the_calculus_does_not_speak_of_language(name):
    """In no docstring and no message."""
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            word = re.search(OF_LANGUAGE, node.value)
            assert word is None, f"{name}:{node.lineno}: {word[0]}"


@pytest.mark.parametrize("path", sorted(TESTS.glob("benchmarks/*.py")), ids=lambda p: p.name)
def test_everything_that_a_benchmark_uses_exists(path):
    """Benchmarks run by hand, so a renamed function would go unnoticed."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] == "funcprobe":
                exec(ast.unparse(node), {})
            case ast.Attribute(value=ast.Name(id="fp"), attr=name):
                assert hasattr(funcprobe, name), f"fp.{name}"


SNAPSHOT = """
import json, os, random, sys, warnings
import numpy, peft, torch, transformers
import torch.utils._pytree as pytree
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
import logging, signal, locale
from torch.backends import cuda, cudnn, mkldnn

def snapshot():
    return dict(
        dtype=str(torch.get_default_dtype()),
        device=str(torch.get_default_device()),
        grad=[torch.is_grad_enabled(), torch.is_inference_mode_enabled()],
        precision=torch.get_float32_matmul_precision(),
        products=[cuda.matmul.fp32_precision, mkldnn.matmul.fp32_precision, cudnn.allow_tf32],
        reductions=cuda.matmul.allow_bf16_reduced_precision_reduction,
        sdp=[cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()],
        autocast=[torch.is_autocast_enabled(d) for d in ("cpu", "cuda")],
        deterministic=torch.are_deterministic_algorithms_enabled(),
        threads=[torch.get_num_threads(), torch.get_num_interop_threads()],
        seeds=[int(torch.initial_seed()), hash(random.getstate()), str(numpy.random.get_state()),
               torch.get_rng_state().tolist()],
        nodes=sorted(str(t) for t in pytree.SUPPORTED_NODES),
        attention=sorted(ALL_ATTENTION_FUNCTIONS.keys()),
        masks=sorted(ALL_MASK_ATTENTION_FUNCTIONS.keys()),
        warnings=[str(f) for f in warnings.filters],
        environment=dict(os.environ),
        logging=[logging.root.level, len(logging.root.handlers),
                 transformers.logging.get_verbosity()],
        hooks=[str(sys.excepthook), str(sys.displayhook)],
        signals=[str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)],
        methods=[torch.Tensor.to is torch._C.TensorBase.to, str(torch.Tensor.float),
                 str(torch.nn.functional.softmax)],
        path=list(sys.path),
    )

before = snapshot()
import funcprobe
for name in funcprobe.__all__:
    getattr(funcprobe, name)
after = snapshot()
changed = {key: [before[key], after[key]] for key in before if before[key] != after[key]}
drawing = [name for name in ("matplotlib", "IPython", "datasets") if name in sys.modules]
print(json.dumps([changed, drawing]))
"""


def run(code):
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT.parent,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_changes_no_global_and_is_silent():
    changed, drawing = json.loads(run(SNAPSHOT))  # and nothing else was printed
    assert changed == {}
    assert drawing == []


def test_every_public_function_has_a_docstring():
    names = [n for n in funcprobe.__all__ if n[0].islower()]
    public = [n for n in names if callable(getattr(funcprobe, n))]
    assert {"split", "sweep", "taylor", "adamw", "entropy_change"} <= set(public)
    assert "merge" not in public  # `join` is for sweeps; blocks of anything else are the package's
    for name in public:
        assert (getattr(funcprobe, name).__doc__ or "").strip(), name
