"""The head in reverse mode: against full logits in every nesting, and flat in memory."""

import importlib
import weakref
from types import SimpleNamespace

import cases
import pytest
import torch
from torch import nn
from torch.func import grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import funcprobe as fp
import funcprobe.language.score as score_module
from funcprobe.language.head.rematerialise import rematerialise
from funcprobe.language.packing import by_row

TIGHT = dict(rtol=1e-10, atol=1e-12)
MODELS = ("llama", "gemma2", "lora on the head", "tied and trainable")


def build(name):
    if name in cases.FAMILIES:
        return fp.split(cases.live(name), dtype=torch.float64)
    if name == "lora on the head":
        module = cases.live("llama", target_modules=["q_proj", "lm_head"])
    else:
        module = cases.live("llama_tied")
        module.get_input_embeddings().weight.requires_grad_()
    return fp.split(module, dtype=torch.float64)


@pytest.fixture(scope="module", params=MODELS)
def setting(request):
    """Model, parameters, directions, and the rows with a response."""
    model, params, base = build(request.param)
    if request.param == "lora on the head":
        assert any("lm_head.lora_B" in name for name in params)
    if request.param == "tied and trainable":
        assert set(model.head_names) <= set(params)
    v, u = (cases.direction(params, seed=seed, size=0.3) for seed in (1, 2))
    return SimpleNamespace(
        model=model, params=params, base=base, v=v, u=u, batch=cases.batch(rows=[0, 2, 5, 7])
    )


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setattr(score_module, "WIDTH", 23)  # three slices, the last a shorter one


def from_logits(s, temperature=1.0):
    """(logp, entropy) from all logits at once."""

    def fn(params, batch):
        lp = (fp.logits(s.model, params, s.base, batch) / temperature).log_softmax(-1)
        target = batch.tokens.gather(1, (batch.position + 1).clamp(max=batch.tokens.shape[1] - 1))
        logp = lp.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        entropy = -(lp.exp() * lp).sum(-1)
        return tuple(torch.where(batch.response, x, 0.0) for x in (logp, entropy))

    return fn


def weighed(fn, batch):
    """A number that weighs every score differently, and not linearly."""
    w = torch.linspace(0.5, 1.5, batch.response.numel(), dtype=torch.float64)
    w = w.view(batch.response.shape)

    def total(params):
        logp, entropy = fn(params, batch)
        return (w * logp + w.flip(0) * entropy + 0.1 * w * logp * entropy).sum()

    return total


def along(s, total):
    return lambda p: sum((g * s.v[n]).sum() for n, g in grad(total)(p).items())


NESTINGS = {
    "grad": lambda s, f: grad(f)(s.params),
    "jvp": lambda s, f: jvp(f, (s.params,), (s.v,)),
    "jvp(jvp)": lambda s, f: jvp(lambda p: jvp(f, (p,), (s.v,))[1], (s.params,), (s.u,)),
    "jvp(grad)": lambda s, f: jvp(grad(f), (s.params,), (s.u,)),
    "grad(jvp)": lambda s, f: grad(lambda p: jvp(f, (p,), (s.v,))[1])(s.params),
    "grad(grad)": lambda s, f: grad(along(s, f))(s.params),
    "vmap(grad)": lambda s, f: vmap(grad(f))(fp.stack([s.params, fp.shift(s.params, s.v, 0.1)])),
    "grad(vmap)": lambda s, f: grad(lambda p: vmap(f)(p).pow(2).sum())(
        fp.stack([s.params, fp.shift(s.params, s.v, 0.1)])
    ),
    "vmap(grad(grad))": lambda s, f: vmap(grad(along(s, f)))(
        fp.stack([s.params, fp.shift(s.params, s.v, 0.1)])
    ),
}


def assert_same(ours, want):
    ours, want = tree_leaves(ours), tree_leaves(want)
    assert max(float(x.abs().max()) for x in want) > 1e-3
    for x, y in zip(ours, want, strict=True):
        scale = max(float(y.abs().max()), 1.0)
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12 * scale)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", NESTINGS)
def test_every_nesting_is_that_of_full_logits(setting, narrow, name, temperature):
    s = setting
    score = fp.scorer(s.model, s.base, chunk=5, sampling=fp.Sampling(temperature=temperature))
    ours = NESTINGS[name](s, weighed(score, s.batch))
    assert_same(ours, NESTINGS[name](s, weighed(from_logits(s, temperature), s.batch)))


@pytest.mark.parametrize("nesting", ["grad(vmap)", "grad(grad(vmap))"])
def test_vmapped_rows_share_the_parameters(setting, narrow, nesting):
    s = setting

    def outcome(fn):
        def total(params):
            def of_row(row):
                return weighed(fn, fp.Batch(*(x.unsqueeze(0) for x in row)))(params)

            return vmap(of_row)(s.batch).sin().sum()

        return grad(total if nesting == "grad(vmap)" else along(s, total))(s.params)

    assert_same(outcome(fp.scorer(s.model, s.base, chunk=5)), outcome(from_logits(s)))


def test_row_gradients_and_backward_are_those_of_full_logits(setting, narrow):
    s = setting
    score, full = fp.scorer(s.model, s.base, chunk=5), from_logits(s)
    ours = fp.row_gradients(score, s.params, s.batch)
    for i in range(len(s.batch.tokens)):
        total = lambda p, i=i: sum(x[i].sum() for x in full(p, s.batch))  # noqa: E731
        torch.testing.assert_close(
            {n: g[i] for n, g in ours.items()}, grad(total)(s.params), **TIGHT
        )
    outcomes = []
    for fn in (score, full):  # torch.autograd's own, twice
        p = {n: x.clone().requires_grad_() for n, x in s.params.items()}
        first = torch.autograd.grad(weighed(fn, s.batch)(p), list(p.values()), create_graph=True)
        slope = sum((g * s.v[n]).sum() for n, g in zip(p, first, strict=True))
        second = torch.autograd.grad(slope, list(p.values()))
        outcomes.append([x.detach() for x in (*first, *second)])
    assert_same(*outcomes)


def test_increments_of_slices_are_those_of_full_logits(setting, narrow):
    s = setting
    score = fp.scorer(s.model, s.base, chunk=5)
    swept = fp.sweep(score, s.params, s.v, [0.0, 0.3], s.batch, change="increment")
    full = from_logits(s)
    moved, here = full(fp.shift(s.params, s.v, 0.3), s.batch), full(s.params, s.batch)
    assert swept.fallbacks == ()
    assert_same([x[1] for x in swept.change], [a - b for a, b in zip(moved, here, strict=True)])
    assert all((x[0] == 0).all() for x in swept.change)


@pytest.mark.parametrize("readout", [None, fp.readouts.expected_kl, fp.readouts.margin])
def test_reverse_mode_is_right_through_top_p_and_readouts(narrow, readout):
    case, batch = cases.case("gemma2"), cases.batch(rows=[0, 2, 5])
    params, v = case.params, cases.direction(case.params, size=0.1)
    away = fp.shift(params, v, 1.0)
    options = dict(sampling=fp.Sampling(1.3, 0.9999), support=params, readout=readout)
    if readout is fp.readouts.expected_kl:
        options["reference"] = away
    chunked = fp.scorer(case.model, case.base, chunk=4, **options)
    pieces = dict(zip(("logp", "value"), range(2), strict=True))
    for index in pieces.values():

        def total(p, index=index):
            return chunked(p, batch)[index].sin().sum()

        g = grad(total)(params)
        _, slope = jvp(total, (params,), (v,))  # plain operations
        torch.testing.assert_close(fp.dot(g, v), slope, rtol=1e-10, atol=1e-12)
        h = grad(lambda p, total=total: fp.dot(grad(total)(p), v))(params)
        _, curved = jvp(grad(total), (params,), (v,))
        for n in h:
            torch.testing.assert_close(h[n], curved[n], **TIGHT)


def test_impossible_tokens_have_finite_gradients(narrow):
    """A head that gives -inf: finite gradients, of both orders, as of the possible tokens alone."""
    hidden = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double()
    weight = torch.randn(9, 4, generator=torch.Generator().manual_seed(1)).double()
    target = torch.tensor([0, 1, 5, 8, 1, 0])
    out = torch.zeros(9, dtype=torch.bool).index_fill(0, torch.tensor([2, 3, 4, 6]), True)
    bias = torch.zeros(9).double().masked_fill(out, -torch.inf)
    kept = (~out).nonzero().flatten()

    def ours(h, w):
        logp, entropy = score_module.head_scores(
            lambda h, w, b: h @ w.T + b, h, target, (w, bias), vocabulary=9, width=4
        )
        return (logp.sin() + entropy**2).sum()

    def want(h, w):
        lp = (h @ w[kept].T).log_softmax(-1)
        index = torch.searchsorted(kept, target).unsqueeze(-1)
        return (lp.gather(-1, index).squeeze(-1).sin() + (lp.exp() * lp).sum(-1) ** 2).sum()

    def second(f):
        return grad(lambda h, w: sum(x.pow(2).sum() for x in grad(f, (0, 1))(h, w)), (0, 1))

    assert_same(grad(ours, (0, 1))(hidden, weight), grad(want, (0, 1))(hidden, weight))
    assert_same(second(ours)(hidden, weight), second(want)(hidden, weight))


@pytest.mark.parametrize("holds", ["readout", "temperature"])
def test_the_gradient_in_what_a_scorer_holds_is_not_lost(holds):
    """Beside that in the parameters, which alone makes reverse mode recompute."""
    case, batch = cases.case(), cases.batch(rows=[0, 2])

    def total(x, params):
        if holds == "readout":
            score = fp.scorer(case.model, case.base, readout=lambda z, _: (z * x).sin().sum(-1))
        else:
            score = fp.scorer(case.model, case.base, sampling=fp.Sampling(temperature=x))
        return sum(y.sum() for y in score(params, batch))

    x, params = torch.tensor(1.3).double(), case.params
    want = (total(x + 1e-6, params) - total(x - 1e-6, params)) / 2e-6
    got = [grad(total, (0, 1))(x, params)[0], grad(lambda x: total(x, params))(x)]
    if holds == "readout":  # a temperature is checked, which vmap cannot
        got.append(vmap(grad(total, (0, 1)), (0, None))(torch.stack([x, 2 * x]), params)[0][0])
        within = vmap(grad(total, 1), (0, None))(torch.stack([x, 2 * x]), params)
        for i in range(2):
            assert_same({n: g[i] for n, g in within.items()}, grad(total, 1)((i + 1) * x, params))
    leaves = [x.clone().requires_grad_(), *(p.clone().requires_grad_() for p in params.values())]
    loss = total(leaves[0], dict(zip(params, leaves[1:], strict=True)))
    got.append(torch.autograd.grad(loss, leaves)[0])
    for g in got:
        torch.testing.assert_close(g, want, rtol=1e-6, atol=0)


def test_a_function_of_several_inputs_may_be_vmapped_over_one():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 4, 3, generator=generator).double()
    w = torch.randn(3, 2, generator=generator).double()

    def both(x, w):
        z = (x @ w).tanh()
        return z.logsumexp(-1), (z * z).sum(-1)

    def plain(x, w):
        return sum(y.pow(2).sum() for y in both(x, w))

    def ours(x, w):
        return sum(y.pow(2).sum() for y in rematerialise(both, x, w))

    for dims in ((0, None), (1, None), (2, 1)):
        lanes = x.movedim(0, dims[0])
        weights = w if dims[1] is None else torch.stack([w + i for i in range(5)], 1)
        outcomes = []
        for f in (ours, plain):
            by_lane = vmap(grad(f, (0, 1)), dims)(lanes, weights)
            total = lambda x, w, f=f, dims=dims: vmap(f, dims)(x, w).pow(2).sum()  # noqa: E731
            first = grad(total, (0, 1))
            square = lambda x, w, g=first: sum(y.pow(2).sum() for y in g(x, w))  # noqa: E731
            outcomes.append((by_lane, first(lanes, weights), grad(square, (0, 1))(lanes, weights)))
        assert_same(*outcomes)


# Memory


class Alive(TorchDispatchMode):
    """Counts the bytes of tensors that live at once, of those made within it."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if is_real(x)}
        for x in tree_leaves(out):
            if is_real(x) and x.untyped_storage() not in self.seen:
                storage = x.untyped_storage()
                if storage.data_ptr() in known:
                    continue
                self.seen[storage] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.gone, storage.nbytes())
        return out

    def gone(self, size):
        self.now -= size


def is_real(x):
    return isinstance(x, torch.Tensor) and x.device.type == "cpu" and not x._is_zerotensor()


class Head:
    """A stand-in for a model: hidden states from a table that moves, a frozen head."""

    head_names = ("weight",)
    sliced = True
    false_derivative = ""

    def __init__(self, vocabulary):
        self.vocabulary = vocabulary

    def layout(self, batch):
        return by_row(batch)

    def states(self, params, base, layout):
        return params["table"][layout.read % layout.tokens.shape[1]]

    def head(self, params, base, hidden):
        return nn.functional.linear(hidden, (base | params)["weight"])


def peak(transform, vocabulary, n, r, monkeypatch, k=2):
    monkeypatch.setattr(score_module, "WIDTH", 64)
    monkeypatch.setattr(score_module, "_CHUNK_BYTES", 64 * 64 * 4)
    generator = torch.Generator().manual_seed(0)
    params = {"table": torch.randn(r + 1, 2, generator=generator)}
    base = {"weight": torch.randn(vocabulary, 2, generator=generator)}
    batch = fp.collate([[1]] * n, [[2] * r] * n)
    score = fp.scorer(Head(vocabulary), base)
    run = TRANSFORMS[transform]
    monkeypatch.setattr(
        importlib.import_module("funcprobe.calculus.changes"), "keep_pages", lambda: None
    )
    monkeypatch.setattr(
        importlib.import_module("funcprobe.calculus.taylor"), "keep_pages", lambda: None
    )
    run(score, params, batch, k)
    with Alive() as alive:
        out = run(score, params, batch, k)
    del out
    return alive.peak


def summed(score, batch):
    return lambda p: sum((x * x).sum() for x in score(p, batch))


TRANSFORMS = {
    "forward": lambda score, p, b, k: score(p, b),
    "increment": lambda score, p, b, k: fp.sweep(
        score, p, p, [0.1] * k, b, change="increment", rows=len(b.tokens), lanes=1
    ),
    "sweep": lambda score, p, b, k: fp.sweep(
        score, p, p, [0.1] * k, b, rows=len(b.tokens), lanes=2
    ),
    "jvp": lambda score, p, b, k: fp.taylor(score, p, p, b, rows=len(b.tokens)),
    "jvp(jvp)": lambda score, p, b, k: fp.taylor(score, p, p, b, order=2, rows=len(b.tokens)),
    "gradient": lambda score, p, b, k: fp.gradient(score, p, b, rows=len(b.tokens)),
    "grad": lambda score, p, b, k: grad(summed(score, b))(p),
    "backward": lambda score, p, b, k: torch.autograd.grad(
        summed(score, b)({"table": p["table"].requires_grad_()}), p["table"]
    ),
    "vmap(grad)": lambda score, p, b, k: fp.row_gradients(score, p, b, rows=2),
    "grad(grad)": lambda score, p, b, k: grad(
        lambda q: grad(summed(score, b))(q)["table"].pow(2).sum()
    )(p),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_memory_is_flat_in_the_vocabulary(transform, monkeypatch):
    few, many = (peak(transform, v, 4, 32, monkeypatch) for v in (256, 4096))
    assert many <= few + 512  # bytes; the logits have 2 MiB


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_memory_is_flat_in_tokens_but_for_some_numbers_of_each(transform, monkeypatch):
    few, many = (peak(transform, 1024, n, r, monkeypatch) for n, r in ((4, 16), (32, 32)))
    assert (many - few) / (32 * 32 - 4 * 16) < 4 * 32  # bytes; a token's logits have 4,096


@pytest.mark.parametrize("transform", ["increment", "sweep"])
def test_memory_is_flat_in_learning_rates_but_for_the_outputs(transform, monkeypatch):
    few, many = (peak(transform, 1024, 4, 32, monkeypatch, k=k) for k in (2, 8))
    outputs = 4 * 2 * 4 * 32
    assert many - few <= 6 * outputs + 512
