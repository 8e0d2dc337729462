"""What goes wrong on a user's side: it is refused with its reason, or flagged with its remedy."""

import ast
import dataclasses
import importlib
import json
import math
import re
import shutil
from pathlib import Path

import cases
import pytest
import torch

import funcprobe as fp
from funcprobe import cli
from funcprobe.calculus.tree import merge
from funcprobe.cli import bundled
from funcprobe.language.model.positions import positions
from funcprobe.language.objectives import clipped
from funcprobe.study.rows import prompts_of
from funcprobe.wording import ALIASES, in_flags

ROOT = Path(fp.__file__).parent
OPTIONS = {field.name for field in dataclasses.fields(cli.ProbeArguments)}


@pytest.fixture(scope="module")
def few(update, evaluation):
    """Four groups of U and of E, whose prompts differ."""
    return update.rows(update.group < 4), evaluation.rows(evaluation.group < 4)


def flags(checkpoint, update, evaluation, etas=(1e-4,), **options):
    report = fp.probe(checkpoint, update, evaluation, etas, **{"max_length": 24} | options)
    return report.flags


def longer(batch, times):
    """The batch with the first row's prompt repeated."""
    prompts, responses = [], []
    for i, steps in enumerate(batch.response.sum(1).tolist()):
        row = batch.tokens[i, batch.attention[i]].tolist()
        prompts.append(row[: len(row) - steps] * (times if i == 0 else 1))
        responses.append(row[len(row) - steps :])
    return fp.collate(prompts, responses, group=batch.group, reward=batch.reward)


def altered(batch, fn):
    """The batch with other response tokens, and so without their log-probabilities."""
    prompts = [list(prompt) for prompt in prompts_of(batch)]
    rows = zip(batch.tokens, batch.attention, prompts, strict=True)
    responses = [fn(tokens[mask].tolist()[len(prompt) :]) for tokens, mask, prompt in rows]
    return fp.collate(prompts, responses, group=batch.group, reward=batch.reward)


DOUBTFUL = {
    "equal rewards": (
        lambda u, e: (u._replace(reward=torch.full_like(u.reward, 0.1)), e, {}),
        ["U causes no gradient: all advantages are 0, since no group", "momentum and weight decay"],
    ),
    "groups of one": (
        lambda u, e: (u.rows(slice(0, None, 8)), e, {"recipe": "grpo"}),
        ["U causes no gradient", "complete groups"],
    ),
    "one row": (lambda u, e: (u.rows(slice(0, 1)), e, {}), ["U causes no gradient"]),
    "no rewards at all": (
        lambda u, e: (u._replace(reward=0 * u.reward), e, {"recipe": "reinforce"}),
        ["U causes no gradient: all advantages are 0."],
    ),
    "one group for all prompts": (
        lambda u, e: (u._replace(group=0 * u.group), e, {}),
        ["1 groups of U hold different prompts", "Give every prompt a group of its own"],
    ),
    "an incomplete group": (
        lambda u, e: (u.rows(slice(0, -3)), e, {}),
        ["1 of U's 4 groups do not have the usual 8 rows; group 3 has 5", "Give U whole"],
    ),
    "merged groups": (
        lambda u, e: (u._replace(group=u.group.clamp(min=1)), e, {}),
        ["group 1 has 16", "hold different prompts"],
    ),
    "U of another policy": (
        lambda u, e: (u._replace(old_logp=u.old_logp - 1), e, {}),
        [
            "U's recorded log-probabilities differ from the checkpoint's by 1 nats a token",
            "clipped",
        ],
    ),
    "U is E": (lambda u, e: (u, u, {}), ["32 of E's 32 rows stand in U too", "Sample E anew"]),
    "E holds rows of U": (
        lambda u, e: (u, merge([u.rows(u.group < 2), e]), {}),
        ["rows stand in U too"],
    ),
    "a row beyond the model's positions": (
        lambda u, e: (u, longer(e, 12), {}),
        ["1 rows of E are longer than the 64 positions", "row 0 has", "Use shorter rows"],
    ),
    "padding kept after EOS": (
        lambda u, e: (u, altered(e, lambda row: [*row, 2, 2]), {}),
        ["32 rows of E go on after an end-of-sequence token (id 2), the first is row 0"],
    ),
    "U without EOS": (
        lambda u, e: (altered(u, lambda row: row[:-1] if row[-1] == 2 else row), e, {}),
        ["no response of U ends with an end-of-sequence token", "completion_ids"],
    ),
    "copies in E": (
        lambda u, e: (u, merge([e, *[e.rows(slice(0, 1))] * 9]), {}),
        ["At least 9 rows of E are copies of others", "Leave the copies out"],
    ),
    "a group for each row of E": (
        lambda u, e: (u, e._replace(group=torch.arange(e.n)), {}),
        ["E has 32 groups but 4 different prompts", "Give equal prompts one group"],
    ),
    "equal advantages": (
        lambda u, e: (u._replace(reward=u.reward * math.nan, advantage=0 * u.reward + 1), e, {}),
        ["all advantages of U are 1: no response is compared"],
    ),
    "a row of U beyond them": (
        lambda u, e: (longer(u, 12), e, {}),
        ["1 rows of U are longer than the 64 positions"],
    ),
}


@pytest.mark.parametrize("spoil, words", DOUBTFUL.values(), ids=DOUBTFUL)
def test_what_is_doubtful_is_flagged_with_its_remedy(checkpoint, few, spoil, words):
    *batches, options = spoil(*few)
    found = " ".join(flags(checkpoint, *batches, **options))
    for word in words:
        assert word in found, found


def test_an_optimizer_of_another_checkpoint_is_flagged(checkpoint, few):
    for step, flagged in ((20, 0), (21, 0), (None, 0), (999, 1), (7, 1)):
        said = flags(dataclasses.replace(checkpoint, step=step), *few)
        assert len(said) == flagged and all("has taken 20 steps, but trai" in x for x in said)


def test_what_is_right_is_not_flagged(checkpoint, few):
    """Nor are two samples of the same prompts, groups of equal rewards, or a few missing groups."""
    update, evaluation = few
    assert flags(checkpoint, update, evaluation) == ()
    prompts = ["3+4=", "8+8+1=", "5+2="]
    pair = [fp.rollout(checkpoint, prompts, samples=8, max_new_tokens=24, seed=s) for s in (0, 1)]
    shared = torch.isin(pair[1].row_hashes(), pair[0].row_hashes())
    assert shared.any()
    reward = torch.arange(24.0, dtype=torch.float64).where(pair[0].group > 0, 1.0)
    assert flags(checkpoint, pair[0]._replace(reward=reward), pair[1]) == ()


def with_lr(checkpoint, **settings):
    return dataclasses.replace(checkpoint, adamw=checkpoint.adamw | settings)


IMPOSSIBLE = {
    "max_length 0": (lambda c, u, e: (c, u, e, {"max_length": 0}), "max_length must be at least 1"),
    "max_length -5": (lambda c, u, e: (c, u, e, {"max_length": -5}), "at least 1, not -5"),
    "max_length 1e20": (
        lambda c, u, e: (c, u, e, {"max_length": 10**20}),
        "max_length must be at most 2147483647",
    ),
    "max_length nan": (
        lambda c, u, e: (c, u, e, {"max_length": math.nan}),
        "max_length must be a whole number",
    ),
    "tokens -5": (lambda c, u, e: (c, u, e, {"tokens": -5}), "tokens must be at least 1"),
    "lanes 0": (lambda c, u, e: (c, u, e, {"lanes": 0}), "lanes must be at least 1"),
    "tol": (lambda c, u, e: (c, u, e, {"tol": math.nan}), "tol must be finite"),
    "nodes 800": (lambda c, u, e: (c, u, e, {"nodes": 800}), "a degree of at most 256, not 800"),
    "lr 0": (lambda c, u, e: (with_lr(c, lr=0.0), u, e, {}), "positive and finite learning rate"),
    "lr inf": (lambda c, u, e: (with_lr(c, lr=math.inf), u, e, {}), "positive and finite"),
    "max_grad_norm": (
        lambda c, u, e: (with_lr(c, max_grad_norm=-1.0), u, e, {}),
        "max_grad_norm must be positive and finite, or 0",
    ),
    "old_logp of U": (
        lambda c, u, e: (c, u._replace(old_logp=0 * u.old_logp + 5), e, {}),
        "none above 0, but row 0 of U holds 5",
    ),
    "old_logp of E": (
        lambda c, u, e: (c, u, e._replace(old_logp=-e.old_logp), {}),
        "old_logp must be log-probabilities in nats.*of E",
    ),
    "placeholders for old_logp": (
        lambda c, u, e: (c, u._replace(old_logp=0 * u.old_logp), e, {}),
        "all [0-9]+ of U are 0, as if every token had been certain.*placeholders",
    ),
    "ref_logp": (
        lambda c, u, e: (c, u._replace(ref_logp=0 * u.old_logp + 1), e, {}),
        "ref_logp must be log-probabilities",
    ),
    "infinite reward": (
        lambda c, u, e: (c, u._replace(reward=u.reward.where(u.group > 0, math.inf)), e, {}),
        "reward must be finite, but 8 rows of U",
    ),
    "off_policy without old_logp": (
        lambda c, u, e: (c, u, e._replace(old_logp=e.old_logp * math.nan), {"off_policy": True}),
        "old_logp is unknown in 32 rows of E",
    ),
    "an unknown recipe": (lambda c, u, e: (c, u, e, {"recipe": "ppo2"}), "unknown recipe"),
}


@pytest.mark.parametrize("spoil, complaint", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_what_is_impossible_is_refused_before_anything_is_computed(
    checkpoint, few, spoil, complaint, monkeypatch
):
    def prepared(*_):
        raise AssertionError("something was computed")

    monkeypatch.setattr(importlib.import_module("funcprobe.study.probe"), "prepared", prepared)
    spoilt, update, evaluation, options = spoil(checkpoint, *few)
    with pytest.raises(ValueError, match=complaint):
        fp.probe(spoilt, update, evaluation, [1e-4], **options)


def test_swapped_arguments_are_named(checkpoint, few):
    update, evaluation = few
    for swapped in ((update, checkpoint, evaluation), (update, update, evaluation)):
        with pytest.raises(TypeError, match="checkpoint must be a Checkpoint or the path of one"):
            fp.probe(*swapped)
    with pytest.raises(
        TypeError, match="evaluation must be a Batch or the path of one, not a Chec"
    ):
        fp.probe(checkpoint, update, checkpoint)
    with pytest.raises(TypeError, match="etas must be numbers or a function .*not '1x'"):
        fp.probe(checkpoint, update, evaluation, "1x")
    with pytest.raises(OSError, match="Is a directory"):
        fp.probe(bundled()[1], bundled()[0], evaluation)
    with pytest.raises(FileNotFoundError, match="found a file"):
        fp.probe(bundled()[1], update, evaluation)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_rows_beyond_a_table_of_positions_are_refused_and_others_are_flagged(family):
    checks = importlib.import_module("funcprobe.study.checks")
    model = cases.case(family).model
    limit = positions(model.skeleton)
    batch = fp.collate([[5] * limit, [5]], [[6], [7]])
    assert checks.rows_beyond(batch, model).tolist() == [0]
    assert checks.rows_beyond(batch.rows(slice(1, 2)), model).tolist() == []
    if family == "llama":
        checks._check_positions("E", batch, model)
    else:
        with pytest.raises(ValueError, match=f"row 0 of E has {limit + 1}.*holds no more"):
            checks._check_positions("E", batch, model)


def test_rates_that_underflow_or_overflow_are_named():
    params = {"a": torch.ones(4)}
    v = {"a": torch.full((4,), 0.5)}
    square = lambda p, x: x * p["a"].sum() ** 2  # noqa: E731
    x = torch.ones(2)
    try:
        fp.sweep(square, params, v, [0.0, 1e-300], x)
    except ValueError as error:
        message = str(error)
    else:
        message = ""
    assert "eta = 1e-300 moves" in message and "eta of at least 2.4e-38" in message
    fp.sweep(square, params, v, [0.0, 3e-38, -1.0], x, change="increment")
    fp.sweep(square, params, {"a": torch.zeros(4)}, [1e-300], x)  # nothing that could underflow
    with pytest.raises(ValueError, match=r"nan at eta = 1e\+30 .*step may be so long"):
        fp.sweep(lambda p, x: square(p, x) - square(p, x), params, v, [1.0, 1e30], x)


def test_clipped_tokens_are_those_without_a_gradient(checkpoint, few):
    update = few[0]._replace(old_logp=few[0].old_logp - 0.5 * torch.rand(few[0].old_logp.shape))
    score = fp.scorer(checkpoint.model, checkpoint.base)
    for recipe in ("dr_grpo", "dapo", "reinforce"):
        ready = fp.prepare(update, recipe, max_length=24)
        logp = fp.evaluate(score, checkpoint.params, ready).logp.requires_grad_()

        def at(params, batch, logp=logp):
            return fp.Scores(logp, logp)

        loss = fp.objective(at, recipe)({}, ready).sum()
        (slope,) = torch.autograd.grad(loss, logp)
        moves = ready.response & (ready.advantage != 0)[:, None]
        assert torch.equal(clipped(logp, ready, recipe) & moves, (slope == 0) & moves)


# The command line


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The bundled checkpoint and some lines of U and E, for a command."""
    folder = tmp_path_factory.mktemp("files")
    checkpoint, *batches = bundled()
    paths = []
    for path in batches:
        paths.append(folder / path.name)
        paths[-1].write_text("".join(path.read_text().splitlines(keepends=True)[:16]))
    names = ("checkpoint", "update", "evaluation")
    return dict(zip(names, (checkpoint, *paths), strict=True)) | {"etas": "1x", "format": ""}


def command(capsys, settings, tmp_path):
    """What the command says: its status, its one line of error, and its output."""
    settings = {"output": tmp_path / "out"} | settings
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    status = cli.main(["probe", *words])
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("funcprobe: ")]
    return status, *(lines or [""]), out


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "1-1", "completion": "2"}, "row 0: .*cannot encode the prompt '1-1': .*'-'"),
        (
            {"prompt_ids": [1], "completion": "1-"},
            "the completion '1-': it lacks the character '-'",
        ),
        ({"prompt": [{"role": "user"}], "completion": "2"}, "row 0: the tokenizer's chat template"),
        (
            {"prompt_ids": [1], "completion_ids": [2], "reward": 10**400},
            "row 0: reward must be a fi",
        ),
        ({"prompt_ids": [1], "completion_ids": [2], "reward": math.inf}, "reward .*not Infinity"),
        ({"prompt_ids": [1], "completion_ids": [2], "reward": "1"}, 'row 0: reward .*not "1"'),
        ({"prompt_ids": [1], "completion_ids": [10**30]}, "completion_ids must be an integer"),
        ({"prompt_ids": [1], "completion": 5}, "row 0: completion must be a text, not 5"),
        ({"prompt": 5, "completion": "1"}, "row 0: prompt must be a text, a list of"),
        ({"prompt_ids": [1], "completion_ids": [2], "old_logp": [-math.inf]}, "row 0: old_logp mu"),
        ({"prompt_ids": [1], "completion_ids": [2], "old_logp": 3}, "row 0: old_logp must be a l"),
        (
            {"prompt_ids": [1], "completion_ids": [2], "old_logp": [-1, -2]},
            "row 0 has 2 values for 1 response",
        ),
        ({"prompt_ids": [1], "completion_ids": []}, "jsonl: at least one response token"),
    ],
)
def test_a_bad_line_is_named_with_its_row(tmp_path, checkpoint, record, words):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=words) as caught:
        fp.read_batch(path, checkpoint.tokenizer)
    assert str(caught.value).count("read_batch") == 1 and "bad.jsonl" in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "deep.jsonl").write_text("[" * 10**5)
    with pytest.raises(ValueError, match=r"deep.jsonl, line 1 is not JSON"):
        fp.read_batch(tmp_path / "deep.jsonl")
    with pytest.raises(FileNotFoundError, match="expected at .*none.jsonl, but there is"):
        fp.read_batch(tmp_path / "none.jsonl")
    with pytest.raises(OSError, match="cannot be read: Is a directory"):
        fp.read_batch(tmp_path)


def broken(folder, name, content):
    """A copy of the bundled checkpoint, a file of which holds something else."""
    checkpoint = bundled()[0]
    shutil.copytree(checkpoint.parent / "base", folder / "base")
    target = shutil.copytree(checkpoint, folder / checkpoint.name)
    if isinstance(content, dict):
        content = json.dumps(json.loads((target / name).read_text()) | content)
    (target / name).write_text(content)
    return target


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("adapter_config.json", "[]", "adapter_config.json, found a list"),
        ("adapter_config.json", "{oops", "adapter_config.json, found JSONDecodeError"),
        ("trainer_state.json", "[]", "trainer_state.json, found a list"),
        ("trainer_state.json", "{oops", "trainer_state.json, found JSONDecodeError"),
        ("tokenizer.json", "{oops", "a tokenizer was expected at .*damaged"),
        ("adapter_config.json", {"lora_alpha": 0}, "a finite scaling other than 0.*lora_alpha"),
        ("adapter_config.json", {"lora_alpha": math.nan}, "a finite scaling other than 0"),
        ("adapter_config.json", {"r": 2}, r"size mismatch for .*\[4, 64\].*\[2, 64\]"),
    ],
)
def test_a_damaged_checkpoint_is_refused_with_the_file(tmp_path, name, content, words):
    with pytest.raises(ValueError, match=words):
        fp.load_checkpoint(broken(tmp_path, name, content))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s["param_groups"][0].update(lr="fast"), "optimizer.pt, found lr = fast"),
        (lambda s: s["param_groups"][0].update(lr=math.nan), "found lr = nan"),
        (lambda s: s["param_groups"][0].update(betas=(0.9,)), r"found betas = \(0.9,\)"),
        (lambda s: s["param_groups"][0].update(betas=(0.9, 1.0)), r"found betas = \(0.9, 1.0\)"),
        (lambda s: s["param_groups"].clear(), "one name for each of the optimizer's 0 entries"),
        (lambda s: s["state"].clear(), "found no moments"),
        (
            lambda s: [entry["exp_avg_sq"].neg_() for entry in s["state"].values()],
            "second ones not negative.*exp_avg_sq of base_model",
        ),
        (
            lambda s: [entry["step"].zero_() for entry in s["state"].values()],
            "all 0 at step 0.*found others in 42: step 0 of base_model",
        ),
        (lambda s: s["state"][0]["exp_avg"].fill_(math.inf), "finite moments.*found others in 1"),
    ],
)
def test_an_optimizer_that_makes_no_step_is_refused(tmp_path, change, words):
    path = broken(tmp_path, "trainer_state.json", {})
    state = torch.load(path / "optimizer.pt", weights_only=True)
    change(state)
    torch.save(state, path / "optimizer.pt")
    with pytest.raises(ValueError, match=words):
        fp.load_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_length": 10**20}, "--max_length must be at most 2147483647"),
        ({"tokens": -5}, "--tokens must be at least 1, not -5"),
        ({"tol": "nan"}, "--tol must be finite"),
        ({"nodes": 2}, "--nodes must be None"),
        ({"lr": 0}, "Pass --lr, the rate you ask about"),
        ({"max_grad_norm": -1}, "Pass --max_grad_norm 0 for no clipping"),
        ({"optimizer": "fresh"}, "--optimizer saved, or 'fresh' with --lr, was expected"),
        ({"output": __file__}, "it cannot be made: File exists"),
        ({"update": "nowhere.jsonl"}, "was expected at nowhere.jsonl, but there is none"),
        ({"matmul": "tf32", "change": "direct"}, "--matmul is the precision of increments"),
    ],
)
def test_the_command_names_flags(capsys, files, tmp_path, change, words):
    status, line, _ = command(capsys, files | change, tmp_path)
    assert status == 2 and words in line
    assert not re.search(r"\b(lr|tokens|optimizer|matmul|tol|max_length)=", line)


def test_a_negative_rate_is_no_flag(capsys, files, tmp_path):
    status, error, out = command(capsys, files | {"etas": "-1x,0,1x"}, tmp_path)
    assert (status, error) == (0, "") and "-1  -0.00133" in out


def test_the_commands_report_names_flags(capsys, files, tmp_path):
    status, error, out = command(capsys, files, tmp_path)
    assert (status, error) == (0, "") and "pass --max_length, its longest" in out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert any("pass max_length=, its longest" in flag for flag in report["flags"])


def test_ctrl_c_says_how_to_go_on(capsys, files, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("funcprobe.study.probe"), "probe", interrupted)
    status, line, _ = command(capsys, files, tmp_path)
    assert status == 130
    assert line == f"funcprobe: {cli._INTERRUPTED}" and "goes on from the finished blocks" in line


# Files whose messages the command can print, and keywords in them that are not ours.
SPOKEN = ["study", "training", "rollouts/records.py", "rollouts/lines.py", "statistics/inputs.py"]
SPOKEN += ["language/objectives.py", "calculus/changes.py", "calculus/line.py", "calculus/step.py"]
FOREIGN = {"optim", "maximize", "amsgrad", "ref_logp", "old_logp", "beta", "baseline", "direction"}


def messages(path):
    """The texts in a file that are not docstrings, as sentences; f-strings lose their values."""
    tree = ast.parse(path.read_text())
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docs = {
        id(n.body[0].value)
        for n in ast.walk(tree)
        if isinstance(n, owners) and n.body and isinstance(n.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield from re.split(r"(?<=\.) ", node.value)


@pytest.mark.parametrize("name", SPOKEN)
def test_every_keyword_that_a_message_advises_has_a_flag(name):
    paths = sorted((ROOT / name).rglob("*.py")) if (ROOT / name).is_dir() else [ROOT / name]
    for path in paths:
        for sentence in messages(path):
            names = set(re.findall(r"\b([a-z_]+)=(?!=)", sentence)) - FOREIGN
            if "n Python" not in sentence:
                assert names <= OPTIONS | set(ALIASES) | {"dtype"}, f"{path.name}: {sentence}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Pass lr=, or optimizer='fresh'.", "Pass --lr, or --optimizer fresh."),
        ("weigh it with off_policy=True.", "weigh it with --off_policy."),
        ("pass them as behaviour=.", "pass them as --off_policy."),
        ("use dtype=torch.float64, or tol=1e-6.", "use --dtype float64, or --tol 1e-6."),
        ("probe: tokens must be at least 1.", "probe: --tokens must be at least 1."),
        ("lr = 0.1, tokens and weights of U", "lr = 0.1, tokens and weights of U"),
        ("in /a/max_length/u.jsonl max_length is", "in /a/max_length/u.jsonl --max_length is"),
    ],
)
def test_keywords_become_flags(text, said):
    assert in_flags(text, OPTIONS) == said
