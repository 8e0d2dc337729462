"""Steps against torch.optim, and a step as an affine map: its parts add up."""

import cases
import pytest
import reference
import torch

import funcprobe as fp

NAMES = ("w", "b", "c")
SHAPES = {"w": (5, 3), "b": (4,), "c": (2, 2)}


def tree(seed, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: size * torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in SHAPES.items()
    }


GROUPS = [
    (("w", "c"), dict(lr=0.02, weight_decay=0.1, eps=1e-8, betas=(0.9, 0.99))),
    (("b",), dict(lr=0.005, weight_decay=0.4, eps=1e-3, betas=(0.8, 0.9))),
]


def by_name(key):
    return {name: options[key] for names, options in GROUPS for name in names}


def adam_state(after, amsgrad=False):
    read = {
        key: {name: values[key] for name, values in after.items()}
        for key in ("step", "exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else []))
    }
    return fp.AdamState(
        read["step"], read["exp_avg"], read["exp_avg_sq"], read.get("max_exp_avg_sq")
    )


def torch_run(optimizer, steps, *, groups, gradients=tree, **options):
    """The parameters and optimizer state after `steps` steps."""
    params, state = tree(0), {}
    for i in range(steps):
        params, state = reference.optimizer_step(
            optimizer, params, gradients(100 + i), state, groups=groups, **options
        )
    return params, state


def assert_lands(params, step, grads, after):
    """params + lr * v is where the optimizer went, to a few rounding errors."""
    v = fp.direction(step, grads)
    for name, p in params.items():
        ours = p + step.lr * v[name]
        tolerance = 4e-16 * torch.maximum(p.abs(), after[name].abs()).clamp(min=1.0)
        assert ((ours - after[name]).abs() <= tolerance).all(), name
    assert any((after[n] - params[n]).abs().max() > 1e-4 for n in params)


# AdamW


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("clip", [None, 0.5, 100.0])
@pytest.mark.parametrize("taken", [1, 2, 7])
def test_adamw_is_torchs(taken, clip, amsgrad):
    options = dict(groups=GROUPS, max_grad_norm=clip, amsgrad=amsgrad)
    # Falling gradients, so that AMSGrad's maximum is an old one.
    params, state = torch_run(
        torch.optim.AdamW, taken, gradients=lambda seed: tree(seed, 10.0), **options
    )
    grads = tree(7)
    after, _ = reference.optimizer_step(torch.optim.AdamW, params, grads, state, **options)
    step = fp.adamw(
        grads,
        params,
        adam_state(state, amsgrad),
        lr=by_name("lr"),
        betas=by_name("betas"),
        eps=by_name("eps"),
        weight_decay=by_name("weight_decay"),
        amsgrad=amsgrad,
        max_grad_norm=clip,
    )
    assert step.lr == 0.02 and step.lr.dtype == torch.float64
    assert (step.clip < 1) == (clip == 0.5)
    assert_lands(params, step, grads, after)


def fresh_state(params):
    zero = {name: torch.zeros_like(p) for name, p in params.items()}
    return fp.AdamState({name: torch.zeros(()) for name in params}, zero, zero)


PLAIN = dict(lr=0.02, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)


def test_the_first_step_is_torchs():
    params, grads = tree(0), tree(1)
    step = fp.adamw(grads, params, fresh_state(params), **PLAIN)
    after, _ = reference.optimizer_step(
        torch.optim.AdamW, params, grads, {}, groups=[(NAMES, PLAIN)]
    )
    assert_lands(params, step, grads, after)


@pytest.mark.parametrize("key", ["lr", "eps", "weight_decay", "betas"])
def test_a_dict_of_equal_values_is_the_value(key):
    params, state = torch_run(torch.optim.AdamW, 2, groups=[(NAMES, PLAIN)])
    grads = tree(7)
    one = fp.adamw(grads, params, adam_state(state), **PLAIN)
    many = PLAIN | {key: dict.fromkeys(NAMES, PLAIN[key])}
    two = fp.adamw(grads, params, adam_state(state), **many)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_gradient_of_none_does_not_move():
    params, state = torch_run(torch.optim.AdamW, 2, groups=GROUPS)
    grads = tree(7) | {"c": None}
    after, _ = reference.optimizer_step(
        torch.optim.AdamW, params, grads, state, groups=GROUPS, max_grad_norm=0.5
    )
    step = fp.adamw(
        grads,
        params,
        adam_state(state),
        **{key: by_name(key) for key in PLAIN},
        max_grad_norm=0.5,
    )
    assert_lands(params, step, grads, after)
    assert (fp.direction(step, grads)["c"] == 0).all()


def test_clipping_uses_the_norm_over_all_gradients():
    params, grads = tree(0), tree(1)
    total = torch.cat([g.flatten() for g in grads.values()]).norm()
    torch.testing.assert_close(fp.norm(grads), total, rtol=1e-14, atol=0)
    step = fp.adamw(grads, params, fresh_state(params), **PLAIN, max_grad_norm=0.5)
    torch.testing.assert_close(step.clip, 0.5 / (total + 1e-6), rtol=1e-14, atol=0)


@pytest.mark.parametrize("none", [None, 0, 0.0])
def test_none_or_zero_clips_nothing(none):
    params, grads = tree(0), tree(1)
    for step in (
        fp.adamw(grads, params, fresh_state(params), **PLAIN, max_grad_norm=none),
        fp.sgd(grads, params, lr=0.1, max_grad_norm=none),
    ):
        assert step.clip == 1
        assert all((fp.direction(step, grads)[n] != 0).all() for n in params)


def test_float32_parameters_give_float32_steps():
    params = {n: p.float() for n, p in tree(0).items()}
    grads = {n: g.float() for n, g in tree(1).items()}
    step = fp.adamw(grads, params, fresh_state(params), **PLAIN, max_grad_norm=0.1)
    v = fp.direction(step, grads)
    exact = fp.direction(
        fp.adamw(
            {n: g.double() for n, g in grads.items()},
            {n: p.double() for n, p in params.items()},
            fresh_state(tree(0)),
            **PLAIN,
            max_grad_norm=0.1,
        ),
        grads,
    )
    for name in v:
        assert v[name].dtype == torch.float32
        torch.testing.assert_close(v[name].double(), exact[name], rtol=2e-6, atol=1e-6)


# SGD

SGD_GROUPS = [
    (("w", "c"), dict(lr=0.1, weight_decay=0.2)),
    (("b",), dict(lr=0.03, weight_decay=0.0)),
]


@pytest.mark.parametrize("taken", [0, 1, 3])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize(
    "options",
    [
        dict(momentum=0.0),
        dict(momentum=0.9),
        dict(momentum=0.9, dampening=0.3),
        dict(momentum=0.0, dampening=0.3),
        dict(momentum=0.9, nesterov=True),
    ],
)
def test_sgd_is_torchs(options, clip, taken):
    settings = dict(groups=SGD_GROUPS, max_grad_norm=clip, **options)
    params, state = torch_run(torch.optim.SGD, taken, **settings)
    grads = tree(7)
    after, _ = reference.optimizer_step(torch.optim.SGD, params, grads, state, **settings)
    buffer = None
    if taken and options["momentum"]:
        buffer = {name: state[name]["momentum_buffer"] for name in NAMES}
    step = fp.sgd(
        grads,
        params,
        buffer,
        lr={"w": 0.1, "c": 0.1, "b": 0.03},
        weight_decay={"w": 0.2, "c": 0.2, "b": 0.0},
        max_grad_norm=clip,
        **options,
    )
    assert step.lr == 0.1
    assert_lands(params, step, grads, after)


# The parts of a step, on a model


@pytest.mark.parametrize("clip", [None, 0.01])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_parts_of_a_step_add_up_to_it(optimizer, clip):
    case, loss, batch = cases.loss()
    params = case.params
    rows = fp.row_gradients(loss, params, batch)
    grads = {n: g.sum(0) for n, g in rows.items()}
    if optimizer == "adamw":
        state = fp.AdamState(
            {n: torch.tensor(4.0) for n in params},
            cases.direction(params, seed=1, size=1e-2),
            {n: d.abs() for n, d in cases.direction(params, seed=2, size=1e-3).items()},
        )
        step = fp.adamw(grads, params, state, **PLAIN, max_grad_norm=clip)
    else:
        buffer = cases.direction(params, seed=1)
        step = fp.sgd(
            grads, params, buffer, lr=0.1, momentum=0.9, weight_decay=0.1, max_grad_norm=clip
        )
    v = fp.direction(step, grads)
    momentum, decay, shares = fp.decompose(step, rows)
    for n in params:
        total = momentum[n] + decay[n] + shares[n].sum(0)
        torch.testing.assert_close(total, v[n], rtol=1e-13, atol=1e-13)
        assert all(x[n].abs().max() > 0 for x in (momentum, decay))
    assert max(float(x.abs().max()) for x in shares.values()) > 0
    # The rows without a response or an advantage contribute nothing at all.
    silent = [i for i in range(8) if not batch.response[i].any() or batch.advantage[i] == 0]
    assert silent and all((shares[n][silent] == 0).all() for n in params)


def test_adamws_parts_are_the_formulas():
    params, grads = tree(0), tree(1)
    mu, nu = tree(2), {n: x * x for n, x in tree(3).items()}
    state = fp.AdamState({n: torch.tensor(3.0) for n in params}, mu, nu)
    step = fp.adamw(grads, params, state, **PLAIN)
    for n, g in grads.items():
        denominator = ((0.99 * nu[n] + 0.01 * g**2) / (1 - 0.99**4)).sqrt() + 1e-8
        torch.testing.assert_close(step.momentum[n], -0.9 * mu[n] / ((1 - 0.9**4) * denominator))
        torch.testing.assert_close(step.scale[n], -0.1 / ((1 - 0.9**4) * denominator))
        torch.testing.assert_close(step.decay[n], -0.1 * params[n])


def test_a_step_changes_nothing_it_is_given():
    params, grads, mu = tree(0), tree(1), tree(2)
    state = fp.AdamState(
        {n: torch.tensor(3.0) for n in params}, mu, {n: x * x for n, x in tree(3).items()}
    )
    given = [params, grads, *state[:3]]
    versions = [t._version for one in given for t in one.values()]
    before = [t.clone() for one in given for t in one.values()]
    step = fp.adamw(grads, params, state, **PLAIN, max_grad_norm=0.1)
    fp.direction(step, grads)
    after = [t for one in given for t in one.values()]
    assert [t._version for t in after] == versions
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


# Refusals


def without(values, name):
    return {n: x for n, x in values.items() if n != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(grads=tree(1) | {"x": torch.ones(1)}), r"adamw \(grads\): .*others did: 'x'"),
        (dict(grads=without(tree(1), "b")), r"adamw \(grads\): .*1 of 3 are missing: 'b'"),
        (dict(grads=tree(1) | {"b": torch.ones(3)}), r"'b' is \[3\], expected \[4\]"),
        (dict(grads=tree(1) | {"b": torch.full((4,), torch.nan)}), "must be finite.*'b'"),
        (dict(mu=without(tree(1), "w")), r"adamw \(state.mu\): .*missing: 'w'"),
        (dict(nu=tree(1) | {"w": torch.full((5, 3), torch.inf)}), r"\(state.nu\): .*finite"),
        (dict(count=without(tree(1), "w")), r"\(state.count\): .*missing: 'w'"),
        (
            dict(count={n: torch.tensor(3.0) for n in (*NAMES, "x")}),
            r"\(state.count\): .*others did: 'x'",
        ),
        (
            dict(count={n: torch.tensor(torch.nan) for n in NAMES}),
            r"\(state.count\): .*must be finite",
        ),
        (dict(count=tree(1)), r"\(state.count\): .*'b' is \[4\], expected \[\]"),
        (dict(grads=dict.fromkeys(NAMES)), "adamw: a gradient was .* all 3 are None"),
        (dict(max_grad_norm=-1.0), "adamw: max_grad_norm must be positive, .* not -1.0"),
        (dict(amsgrad=True), "amsgrad needs state.nu_max"),
        (dict(lr=0.0), "adamw: at least one learning rate must be positive"),
        (dict(lr={"w": 0.1, "b": 0.1}), "'c' has none"),
        (dict(betas={"w": (0.9, 0.9), "b": (0.9, 0.9)}), "'c' has none"),
    ],
)
def test_adamw_refuses(change, message):
    params = tree(0)
    state = fresh_state(params)
    state = state._replace(**{k: change[k] for k in ("count", "mu", "nu") if k in change})
    options = PLAIN | {
        k: change[k] for k in ("lr", "amsgrad", "betas", "max_grad_norm") if k in change
    }
    with pytest.raises(ValueError, match=f"(?s){message}"):
        fp.adamw(change.get("grads", tree(1)), params, state, **options)


def test_sgd_refuses():
    with pytest.raises(ValueError, match=r"sgd \(buffer\): .*missing: 'b'"):
        fp.sgd(tree(1), tree(0), without(tree(2), "b"), lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match="sgd: max_grad_norm must be positive"):
        fp.sgd(tree(1), tree(0), lr=0.1, max_grad_norm=-1.0)
    with pytest.raises(ValueError, match="sgd: at least one learning rate"):
        fp.sgd(tree(1), tree(0), lr={"w": 0.0, "b": 0.0, "c": -1.0})


def test_the_direction_is_of_the_steps_own_names():
    params, grads = tree(0), tree(1)
    step = fp.adamw(grads | {"c": None}, params, fresh_state(params), **PLAIN)
    assert fp.direction(step, grads | {"c": None}).keys() == params.keys()
    for wrong, message in (
        (without(grads, "w"), "missing: 'w'"),
        (grads | {"x": torch.ones(1)}, "others did: 'x'"),
        (grads | {"b": torch.ones(1)}, r"'b' is \[1\], expected \[4\]"),
    ):
        with pytest.raises(ValueError, match=f"(?s)direction: .*{message}"):
            fp.direction(step, wrong)


def test_the_inner_product_is_of_the_same_names():
    with pytest.raises(ValueError, match="dot: .*missing: 'b'"):
        fp.dot(tree(0), without(tree(1), "b"))
    with pytest.raises(ValueError, match="dot: .*others did: 'x'"):
        fp.dot(tree(0), tree(1) | {"x": torch.ones(1)})


def test_decompose_refuses_other_names():
    params, grads = tree(0), tree(1)
    step = fp.adamw(grads, params, fresh_state(params), **PLAIN)
    rows = {n: g.expand(3, *g.shape) for n, g in grads.items()}
    with pytest.raises(ValueError, match="decompose: .*missing: 'w'"):
        fp.decompose(step, without(rows, "w"))


# What a REPL shows


def test_a_step_and_a_state_print_their_sizes_and_norms():
    params, grads = tree(0), tree(1)
    late = fresh_state(params)._replace(
        count={"w": torch.tensor(3.0), "b": torch.tensor(7.0), "c": torch.tensor(3.0)}
    )
    assert repr(fresh_state(params)) == (
        "AdamState: 3 tensors, 23 parameters, 0 steps taken\n  norms: mu 0, nu 0"
    )
    shown = repr(late._replace(nu_max=late.nu))
    assert "3 to 7 steps taken" in shown and "nu_max 0" in shown
    step = fp.adamw(grads, params, fresh_state(params), **PLAIN, max_grad_norm=0.5)
    decay = 0.1 * float(fp.norm(params))
    assert repr(step).startswith("Affine: 3 tensors, 23 parameters, lr 0.02, clip ")
    assert f"norms: momentum 0, decay {decay:.4g}, scale " in repr(step)
    assert len(repr(step).splitlines()) == 2


def test_a_step_prints_within_a_transform():
    params, grads, shown = tree(0), tree(1), []

    def scaled(factor):
        state = fresh_state(params)
        step = fp.adamw({n: factor * g for n, g in grads.items()}, params, state, **PLAIN)
        shown.append(repr(step))
        return step.scale["b"]

    torch.func.vmap(scaled)(torch.ones(2).double())
    assert "scale unknown" in shown[0]
