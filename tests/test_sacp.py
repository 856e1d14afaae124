"""SACP against an independent implementation, its geometry, what the losses' backward passes give,
precision and compilation, micro-batches, several processes, memory."""

import gc
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from browser import Browser, find_browser
from torch.utils.checkpoint import checkpoint

from dera.runtime.errors import InputError
from dera.runtime.two_arrows import project_by_formulas, two_arrows
from dera.sacp import SACP, GradientSACP, SoftConflict, project, sacp


def generator(seed):
    return torch.Generator().manual_seed(seed)


def flat(grads):
    return torch.cat([g.flatten() for g in grads])


# ---- the oracle: PCGrad of TorchJD on the stacked weighted gradients


def zoo():
    "1,000 random pairs with random weights and sizes, and the awkward ones."
    g = generator(0)
    for i in range(1000):
        scales = (
            10 ** (24 * torch.rand(2, 1, generator=g, dtype=torch.float64) - 12)
            if i % 2
            else torch.ones(2, 1, dtype=torch.float64)
        )
        yield (
            scales * torch.randn(2, 2 + i % 40, generator=g, dtype=torch.float64),
            (1.0, 0.5) if i % 3 else tuple((0.01 + 3 * torch.rand(2, generator=g)).tolist()),
        )
    v, w = torch.randn(2, 30, generator=g, dtype=torch.float64)
    o = torch.zeros_like(v)
    for a, b in itertools.product(10.0 ** torch.arange(-12, 13, 4), repeat=2):
        for p, q in (v, v), (v, -v), (v, w), (v, -w), (v, -v + 1e-6 * w), (v, o), (o, v), (o, o):
            yield torch.stack([a * p, b * q]), (1.0, 0.5)


def test_zero_eps_is_pcgrad():
    from torchjd.aggregation import PCGrad  # here, so that worker processes do not wait for it

    aggregate, conflicts = PCGrad(), 0
    for pair, (w_a, w_m) in zoo():
        g_a, g_m = project(*pair, eps=0)
        stacked = torch.stack([w_a * pair[0], w_m * pair[1]])
        ours, theirs = w_a * g_a + w_m * g_m, aggregate(stacked)
        assert torch.isfinite(ours).all() and (ours - theirs).norm() <= 1e-10 * stacked.norm(), (
            pair.norm(dim=1),
            w_a,
            w_m,
        )
        conflicts += (pair[0] @ pair[1] < 0).item()
    assert conflicts > 400  # the zoo is not all peace


def test_weights_before_or_after():
    for pair, (w_a, w_m) in itertools.islice(zoo(), 300):
        before, after = (
            sum(project(w_a * pair[0], w_m * pair[1], eps=0)),
            [w * g for w, g in zip((w_a, w_m), project(*pair, eps=0))],
        )
        assert (before - sum(after)).norm() <= 1e-10 * pair.norm() * max(w_a, w_m)


def test_each_is_orthogonal_to_the_others_original():
    for pair, _ in zoo():
        g_a, g_m = pair
        p_a, p_m = project(g_a, g_m, eps=0)
        if g_a @ g_m < 0:
            assert (
                abs(p_a @ g_m) <= 1e-12 * g_a.norm() * g_m.norm()
                and abs(p_m @ g_a) <= 1e-12 * g_a.norm() * g_m.norm()
            )
            assert (
                p_a @ g_a >= -1e-12 * g_a.norm() ** 2
                and p_m @ g_m >= -1e-12 * g_m.norm() ** 2
                and p_a.norm() <= g_a.norm() * (1 + 1e-12)
            )
        else:
            assert p_a is g_a and p_m is g_m


# ---- eps


@pytest.mark.parametrize(
    "norm, left", [(1e-2, 0.0), (1e-3, 0.01), (1e-4, 0.5), (1e-5, 0.99), (1e-6, 1.0)]
)
def test_the_papers_eps_is_not_free_of_scale(norm, left):
    "Of a component against the other gradient, eps/(norm^2 + eps) stays; at norm 1e-4 it is half."
    v = torch.randn(50, generator=generator(0), dtype=torch.float64)
    v = v / v.norm() * norm
    p_a, p_m = project(v, -v)
    assert (
        p_a.norm() / norm == pytest.approx(left, abs=0.01)
        and torch.allclose(p_a, v * 1e-8 / (norm**2 + 1e-8))
        and torch.allclose(p_m, -p_a)
    )


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e6, 1e12])
def test_relative_eps_is_free_of_scale(scale):
    g_a, g_m = torch.randn(2, 50, generator=generator(1), dtype=torch.float64)
    g_m = g_m - 2 * g_a
    once, scaled = (
        project(g_a, g_m, eps=1e-3, relative=True),
        project(scale * g_a, scale * g_m, eps=1e-3, relative=True),
    )
    assert all(torch.allclose(scale * x, y, rtol=1e-12, atol=0) for x, y in zip(once, scaled))
    assert once[0] @ g_m < 0 and abs(once[0] @ g_m) <= 1.01e-3 * abs(
        g_a @ g_m
    )  # a thousandth of the conflict stays


# ---- a small network: shared encoder, two heads, two inputs


class Mix(nn.Module):
    """Attention and a nonlinearity in whatever precision it is given; `dera.query.Transformer` computes
    attention in float32 on a CPU."""

    def __init__(self, dim):
        super().__init__()
        self.qkv, self.mlp = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + (q @ k.mT).softmax(-1).to(v.dtype) @ v
        return x + self.mlp(x.tanh())


class Encoder(nn.Module):
    def __init__(self, dim, depth):
        super().__init__()
        self.blocks, self.norm = nn.ModuleList(Mix(dim) for _ in range(depth)), nn.Linear(dim, dim)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Net(nn.Module):
    "Both losses pass a shared encoder; `sign` makes them agree or fight. `reach`: blocks of the encoder that L_a sees."

    def __init__(self, seed=0, dtype=torch.float64, dim=12, depth=2):
        super().__init__()
        torch.manual_seed(seed)
        self.encoder, self.h_a, self.h_m, self.embed = (
            Encoder(dim, depth),
            nn.Linear(dim, 5),
            nn.Linear(dim, 5),
            nn.Linear(4, dim),
        )
        self.h_m.load_state_dict(self.h_a.state_dict())
        self.to(dtype)

    def forward(self, x, sign=-1, encoder=None):
        encoder = self.encoder if encoder is None else encoder
        e_a, e_m = encoder(self.embed(x[:, :3])), encoder(self.embed(x))
        wish = torch.linspace(-1, 1, 5, dtype=x.dtype)
        return (
            (self.h_a(e_a) - wish).pow(2).mean(),
            (self.h_m(e_m) - sign * wish).pow(2).mean(),
            e_m.mean(),
        )


def batch(n=6, seed=5, dtype=torch.float64):
    return torch.randn(n, 7, 4, generator=generator(seed), dtype=dtype)


def grads_of(loss, params):
    return [
        torch.zeros_like(p) if g is None else g
        for p, g in zip(
            params, torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
        )
    ]


def expected(net, L_a, L_m, weights, eps=1e-8):
    "Projected encoder gradient by the formula, from plain gradients."
    params = list(net.encoder.parameters())
    p_a, p_m = project(flat(grads_of(L_a, params)), flat(grads_of(L_m, params)), eps)
    return weights[0] * p_a + weights[1] * p_m


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.5), (0.2, 3.0)])
@pytest.mark.parametrize("level", ["loss", "encoder"])
def test_backward_gives_the_projected_gradient(level, weights):
    net = Net()
    params = list(net.encoder.parameters())
    L_a, L_m, _ = net(batch())
    r = sacp(L_a, L_m, params, weights, level=level)
    want = expected(net, L_a, L_m, weights)
    assert r.conflict and r.cosine < -0.05 and r.coef_a < 0 and r.coef_m < 0
    assert not any(t.requires_grad for t in r[2:]) and all(p.grad is None for p in net.parameters())
    got = flat(grads_of(r.loss_a + r.loss_m, params))
    assert (got - want).norm() <= 1e-12 * want.norm()
    one = flat(grads_of(r.loss_a, params)) / weights[0]
    g_m = flat(grads_of(L_m, params))  # each loss by itself
    assert abs(one @ g_m) <= 1e-6 * one.norm() * g_m.norm()


def test_coefficients_are_algorithm_1():
    net = Net()
    params = list(net.encoder.parameters())
    L_a, L_m, _ = net(batch())
    g_a, g_m = flat(grads_of(L_a, params)), flat(grads_of(L_m, params))
    for eps in 1e-8, 0.1:
        r, s = sacp(L_a, L_m, params, (1.0, 0.5), eps), g_a @ g_m
        assert (
            torch.allclose(r.coef_a, s / (g_m @ g_m + eps))
            and torch.allclose(r.coef_m, s / (g_a @ g_a + eps))
            and torch.allclose(r.cosine, s / g_a.norm() / g_m.norm())
        )
        assert torch.allclose(r.loss_a, L_a - r.coef_a * L_m) and torch.allclose(
            r.loss_m, 0.5 * (L_m - r.coef_m * L_a)
        )
    r = sacp(L_a, L_m, params, eps=0.1, relative=True)
    assert torch.allclose(r.coef_a, s / (1.1 * g_m @ g_m))


@pytest.mark.parametrize("level", ["loss", "encoder"])
@pytest.mark.parametrize("weights", [(1.0, 0.5), (0.3, 0.7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_conflict_leaves_gradients_bit_identical(level, weights, dtype):
    net = Net(dtype=dtype)
    L_a, L_m, rest = net(batch(dtype=dtype), sign=1)
    everything = list(net.parameters())
    r = sacp(L_a, L_m, net.encoder.parameters(), weights, level=level)
    assert not r.conflict and r.coef_a == 0 == r.coef_m and r.cosine > 0
    for ours, plain in zip(
        grads_of(r.loss_a + r.loss_m + rest, everything),
        grads_of(weights[0] * L_a + weights[1] * L_m + rest, everything),
    ):
        assert torch.equal(ours, plain)
    assert r.loss_a == weights[0] * L_a and r.loss_m == weights[1] * L_m


def test_projector_gradients_as_stated():
    """Loss level: the projectors' gradients grow by lambda_a - lambda_m c_m and lambda_m - lambda_a c_a.
    Encoder level: they do not."""
    net, (w_a, w_m) = Net(), (1.0, 0.5)
    L_a, L_m, _ = net(batch())
    heads = [*net.h_a.parameters(), *net.h_m.parameters()]
    own_a, own_m = grads_of(L_a, heads)[:2], grads_of(L_m, heads)[2:]
    r = sacp(L_a, L_m, net.encoder.parameters(), (w_a, w_m))
    got = grads_of(r.loss_a + r.loss_m, heads)
    grow_a, grow_m = w_a - w_m * r.coef_m, w_m - w_a * r.coef_a
    assert grow_a > w_a and grow_m > w_m
    for g, o in zip(got, [grow_a * o for o in own_a] + [grow_m * o for o in own_m]):
        assert torch.allclose(g, o, rtol=1e-12)
    r = sacp(L_a, L_m, net.encoder.parameters(), (w_a, w_m), level="encoder")
    got = grads_of(r.loss_a + r.loss_m, heads + list(net.embed.parameters()))
    plain = grads_of(w_a * L_a + w_m * L_m, heads + list(net.embed.parameters()))
    assert all(torch.equal(g, p) for g, p in zip(got, plain))


def test_parameters_that_one_loss_does_not_reach():
    "They count as zero in the inner product, keep the other loss's gradient, and frozen ones are left out."
    net = Net(depth=3)
    params = list(net.encoder.parameters())
    x = batch()
    wish = torch.linspace(-1, 1, 5, dtype=x.dtype)
    early = net.encoder.blocks[0](net.embed(x))
    out = net.encoder(net.embed(x))  # L_a taps the first block
    L_a, L_m = (net.h_a(early) - wish).pow(2).mean(), (net.h_m(out) + wish).pow(2).mean()
    if flat(grads_of(L_a, params)) @ flat(grads_of(L_m, params)) > 0:
        L_m = -L_m
    for level in "loss", "encoder":
        r = sacp(L_a, L_m, params, (1.0, 0.5), level=level)
        got = grads_of(r.loss_a + r.loss_m, params)
        assert r.conflict
        assert torch.allclose(flat(got), expected(net, L_a, L_m, (1.0, 0.5)), rtol=1e-10)
        late, g_m = (
            net.encoder.blocks[2].qkv.weight,
            torch.autograd.grad(L_m, net.encoder.blocks[2].qkv.weight, retain_graph=True)[0],
        )
        assert torch.allclose(
            got[[p is late for p in params].index(True)], (0.5 - r.coef_a) * g_m
        )  # g_a is 0 there, -c_a g_m is not
    net.encoder.blocks[0].requires_grad_(False)
    L_a, L_m, _ = net(x)
    some = [p for p in params if p.requires_grad]
    r = sacp(L_a, L_m, params)
    g_a, g_m = flat(grads_of(L_a, some)), flat(grads_of(L_m, some))
    assert torch.allclose(r.cosine, g_a @ g_m / g_a.norm() / g_m.norm())


def test_losses_without_graph_or_weight_have_no_say():
    net = Net()
    params = list(net.encoder.parameters())
    L_a, L_m, _ = net(batch())
    for r, plain in (
        (sacp(L_a, torch.zeros((), dtype=L_a.dtype), params), L_a),
        (sacp(L_a, L_m, params, (1.0, 0.0)), L_a),
        (sacp(L_a, L_m, params, (0.0, 0.5)), 0.5 * L_m),
    ):
        assert not r.conflict and all(
            torch.equal(a, b)
            for a, b in zip(grads_of(r.loss_a + r.loss_m, params), grads_of(plain, params))
        )
    with pytest.raises(InputError, match="unfreeze"):
        sacp(L_a, L_m, list(net.encoder.requires_grad_(False).parameters()))
    with pytest.raises(InputError, match="loss or encoder"):
        sacp(L_a, L_m, params, level="gradient")


def test_an_overflow_decides_nothing():
    net = Net(dtype=torch.float32)
    params = list(net.encoder.parameters())
    L_a, L_m, _ = net(batch(dtype=torch.float32))
    for level in "loss", "encoder":
        r = sacp(float("inf") * L_a, L_m, params, level=level)
        assert not r.conflict and r.coef_a == 0 == r.coef_m


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_squares_that_leave_the_range_of_the_dtype(dtype):
    "Opposite gradients cancel, of any size that the dtype can hold; the result has the dtype of the input."
    v = torch.randn(3000, generator=generator(3), dtype=torch.float64).clamp(-3, 3)
    largest, smallest = torch.finfo(dtype).max / 4, torch.finfo(dtype).smallest_normal * 100
    for size_a, size_m in (largest, largest), (smallest, smallest), (smallest, largest), (1.0, 3.0):
        g_a, g_m = (size_a * v).to(dtype), (-size_m * v).to(dtype)
        p_a, p_m = project(g_a, g_m, relative=True)
        assert p_a.dtype == dtype == p_m.dtype
        assert p_a.double().norm() <= 0.02 * g_a.double().norm(), (size_a, size_m)
        assert p_m.double().norm() <= 0.02 * g_m.double().norm(), (size_a, size_m)
        same = project(g_a, -g_m, relative=True)
        assert same[0] is g_a  # no conflict
    half, wide = project(torch.ones(4, dtype=torch.float16), -torch.ones(4))
    assert half.dtype == torch.float16 and wide.dtype == torch.float32


def test_huge_gradients_of_parameters_are_decided_too():
    net = Net(dtype=torch.float32)
    params = list(net.encoder.parameters())
    L_a, L_m, _ = net(batch(dtype=torch.float32))
    plain, huge = (
        sacp(L_a, L_m, params, eps=0.0),
        sacp(2.0**90 * L_a, 2.0**90 * L_m, params, eps=0.0),
    )
    assert plain.conflict and huge.conflict and huge.coef_a == plain.coef_a  # to the last bit
    tiny = sacp(2.0**-80 * L_a, 2.0**-80 * L_m, params, relative=True)
    assert tiny.conflict and torch.allclose(tiny.coef_a, plain.coef_a, rtol=1e-5)


def test_a_parameter_listed_twice_counts_once():
    "Every function that takes parameters: same decision, same gradients, whatever the list repeats."
    weights = (1.0, 0.5)

    def ways(repeat):
        net = Net()
        enc, heads = (
            list(net.encoder.parameters()),
            [*net.h_a.parameters(), *net.embed.parameters()],
        )
        L_a, L_m, _ = net(batch())
        enc_listed = enc + enc[1:3] + enc[:1] if repeat else enc
        for level in "loss", "encoder":
            r = sacp(L_a, L_m, enc_listed, weights, level=level)
            yield torch.stack([r.cosine, r.coef_a, r.coef_m])
            yield flat(grads_of(r.loss_a + r.loss_m, enc))
        yield SACP()(L_a, L_m, enc_listed, weights).cosine
        yield flat(grads_of(SoftConflict()(L_a, L_m, enc_listed), enc))
        gather = GradientSACP(enc_listed, heads + heads[:1] + enc[:2] if repeat else heads)
        gather.collect(L_a, L_m)
        yield gather.apply(weights).cosine
        yield flat([p.grad for p in enc + heads])

    for once, twice in zip(ways(False), ways(True)):
        assert torch.equal(once, twice)


def test_empty_hands_are_refused():
    net = Net()
    L_a, L_m, _ = net(batch())
    with pytest.raises(InputError, match="nothing collected"):
        GradientSACP(net.encoder.parameters()).apply()
    frozen = Net().encoder.requires_grad_(False)
    for refused in (
        lambda: GradientSACP(frozen.parameters()),
        lambda: SoftConflict()(L_a, L_m, frozen.parameters()),
        lambda: SACP()(L_a, L_m, frozen.parameters()),
    ):
        with pytest.raises(InputError, match="unfreeze"):
            refused()


def test_soft_conflict_in_float16_needs_the_scale():
    "Gradients that float16 cannot hold are found by their scale, as in `sacp`."
    net, x = Net(dtype=torch.float32, depth=1), batch(2, dtype=torch.float32)
    enc = list(net.encoder.parameters())
    want = SoftConflict()(*net(x)[:2], enc)
    with torch.autocast("cpu", torch.float16):
        L_a, L_m, _ = net(x)
        got = SoftConflict()(L_a, L_m, enc, loss_scale=2.0**10)
    assert got.dtype == torch.float32 and torch.allclose(got, want, rtol=0.1) and want > 0


# ---- the same under every way of running it


def close(a, b, tolerance):
    return (a - b).norm() <= tolerance * b.norm()


def test_bf16_autocast():
    "The backward pass gives what projecting the same bfloat16 gradients gives, and coefficients near those of float32."
    net = Net(dtype=torch.float32)
    params, x = list(net.encoder.parameters()), batch(dtype=torch.float32)
    exact = sacp(*net(x)[:2], params, (1.0, 0.5))
    with torch.autocast("cpu", torch.bfloat16):
        L_a, L_m, _ = net(x)
        r = sacp(L_a, L_m, params, (1.0, 0.5))
    assert r.conflict and all(t.dtype == torch.float32 for t in r[3:])
    error = flat(grads_of(r.loss_a + r.loss_m, params)) - expected(net, L_a, L_m, (1.0, 0.5))
    assert error.norm() < 0.02 * flat(grads_of(L_a, params)).norm()
    assert torch.allclose(r.coef_a, exact.coef_a, rtol=0.05) and torch.allclose(
        r.coef_m, exact.coef_m, rtol=0.05
    )


@pytest.mark.parametrize("level", ["loss", "encoder"])
def test_grad_scaler(level):
    "float16 with a scaler: same coefficients as float32, also where unscaled gradients would have vanished in float16."

    def params_of(net):
        return list(net.encoder.parameters())

    for tiny in 1.0, 1e-5:
        net, x = Net(dtype=torch.float32), batch(dtype=torch.float32)
        L_a, L_m, rest = net(x)
        exact = sacp(tiny * L_a, tiny * L_m, params_of(net), (1.0, 0.5), relative=True)
        want = flat(grads_of(exact.loss_a + exact.loss_m + tiny * rest, params_of(net)))
        scaler, optimizer = (
            torch.amp.GradScaler("cpu", init_scale=2.0**14),
            torch.optim.SGD(net.parameters(), lr=0.0),
        )
        with torch.autocast("cpu", torch.float16):
            L_a, L_m, rest = net(x)
            r = sacp(
                tiny * L_a,
                tiny * L_m,
                params_of(net),
                (1.0, 0.5),
                relative=True,
                level=level,
                loss_scale=scaler.get_scale(),
            )
        scaler.scale(r.loss_a + r.loss_m + tiny * rest).backward()
        scaler.unscale_(optimizer)
        assert r.conflict and close(flat([p.grad for p in params_of(net)]), want, 0.03), tiny
        assert torch.allclose(r.coef_a, exact.coef_a, rtol=0.05) and torch.allclose(
            r.loss_a, tiny * (L_a - r.coef_a * L_m) if level == "loss" else tiny * L_a, rtol=1e-3
        )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_torch_compile(backend):
    "Two passes of different length through one compiled encoder, three backward passes: no complaint, same gradients."
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("inductor needs a C++ compiler")
    net = Net(dtype=torch.float32, depth=1)
    params, x = list(net.encoder.parameters()), batch(dtype=torch.float32)
    torch._dynamo.reset()
    L_a, L_m, _ = net(x)
    eager = sacp(L_a, L_m, params, (1.0, 0.5))
    want = flat(grads_of(eager.loss_a + eager.loss_m, params))
    L_a, L_m, _ = net(x, encoder=torch.compile(net.encoder, backend=backend))
    r = sacp(L_a, L_m, params, (1.0, 0.5))
    (r.loss_a + r.loss_m).backward()
    torch._dynamo.reset()
    assert (
        r.conflict
        and close(flat([p.grad for p in params]), want, 1e-5)
        and torch.allclose(r.coef_a, eager.coef_a, rtol=1e-4)
    )


def test_activation_checkpointing():
    net = Net()
    params, x = list(net.encoder.parameters()), batch()
    L_a, L_m, _ = net(x)
    plain = sacp(L_a, L_m, params, (1.0, 0.5))
    want = grads_of(plain.loss_a + plain.loss_m, params)
    L_a, L_m, _ = net(x, encoder=lambda t: checkpoint(net.encoder, t, use_reentrant=False))
    r = sacp(L_a, L_m, params, (1.0, 0.5))
    (r.loss_a + r.loss_m).backward()
    assert torch.allclose(r.coef_a, plain.coef_a, rtol=1e-12) and close(
        flat([p.grad for p in params]), flat(want), 1e-12
    )


@pytest.mark.parametrize("level", ["loss", "encoder"])
@pytest.mark.parametrize("sizes", [[6], [3, 3], [1, 2, 3], [1] * 6])
def test_micro_batches_decide_together(level, sizes):
    "Accumulated over micro-batches of any sizes: coefficients and every gradient of the joined batch."
    net, x, w = Net(), batch(), (1.0, 0.5)
    everything, enc = list(net.parameters()), list(net.encoder.parameters())
    others = [p for p in everything if not any(p is q for q in enc)]
    L_a, L_m, rest = net(x)
    whole = sacp(L_a, L_m, enc, w, level=level)
    want = grads_of(whole.loss_a + whole.loss_m + rest, everything)
    gather = GradientSACP(enc, others, level=level)
    for part in x.split(sizes):
        share = len(part) / len(x)
        L_a, L_m, rest = net(part)
        gather.collect(L_a, L_m, share)
        (share * rest).backward()
    r = gather.apply(w)
    assert (
        all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(r, whole))
        and r.conflict
        and not r.loss_a.requires_grad
    )
    assert close(flat([p.grad for p in everything]), flat(want), 1e-10) and gather.collected is None


def test_micro_batches_that_decide_alone_are_wrong():
    """What accumulation must not mean: the mean of micro-batches' own projections differs from the
    projection of the mean."""
    net, x, w = Net(), batch(), (1.0, 0.5)
    enc = list(net.encoder.parameters())
    L_a, L_m, _ = net(x)
    want = expected(net, L_a, L_m, w)
    alone = 0
    for part in x.split(2):
        r = sacp(*net(part)[:2], enc, w)
        alone = alone + flat(grads_of(r.loss_a + r.loss_m, enc)) / 3
    assert (alone - want).norm() > 0.01 * want.norm()


# ---- through a run


def test_every_k_decides_rarely_and_holds():
    net, surgery = Net(), SACP(every=3)
    enc = list(net.encoder.parameters())
    held = []
    for step in range(7):
        L_a, L_m, _ = net(batch(seed=step))
        fresh = sacp(L_a, L_m, enc, (1.0, 0.5))
        r = surgery(L_a, L_m, enc, (1.0, 0.5))
        if step % 3 == 0:
            held = fresh.coef_a, fresh.coef_m
        assert (
            (r.coef_a, r.coef_m) == held
            and torch.allclose(r.loss_a, L_a - held[0] * L_m)
            and torch.allclose(r.loss_m, 0.5 * (L_m - held[1] * L_a))
        )
        assert step % 3 == 0 or r.coef_a != fresh.coef_a
    assert surgery.decisions == 3
    for wrong in dict(every=0), dict(every=2, level="encoder"):
        with pytest.raises(InputError, match="every"):
            SACP(**wrong)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SACP(level="both"),
        lambda: SACP(every=2, level="both"),
        lambda: GradientSACP([], level="both"),
        lambda: sacp(torch.ones(()), torch.ones(()), [], level="both"),
    ],
    ids=["SACP", "SACP, every=2", "GradientSACP", "sacp"],
)
def test_an_unknown_level_is_refused_at_once(make):
    with pytest.raises(InputError, match="unknown level 'both'; choose loss or encoder"):
        make()


def test_no_statistics_before_a_decision():
    net, surgery = Net(), SACP()
    enc = list(net.encoder.parameters())
    names = [n for n, _ in net.encoder.named_parameters()]
    with pytest.raises(InputError, match="no decision yet"):
        surgery.statistics(names)
    surgery(*net(batch())[:2], enc, (1.0, 0.0))  # without weight nothing is decided
    with pytest.raises(InputError, match="no decision yet"):
        surgery.statistics(names)
    surgery(*net(batch())[:2], enc)
    assert math.isfinite(surgery.statistics(names)["cosine"])


def test_state_is_resumed_exactly():
    net, whole, enc = Net(), SACP(every=4), None
    enc = list(net.encoder.parameters())
    names = [n for n, _ in net.encoder.named_parameters()]
    first = [whole(*net(batch(seed=s))[:2], enc) for s in range(6)]
    half = SACP(every=4)
    for s in range(3):
        half(*net(batch(seed=s))[:2], enc)
    resumed = SACP(every=4)
    resumed.load_state_dict(half.state_dict())
    for s in range(3, 6):
        assert resumed(*net(batch(seed=s))[:2], enc).coef_a == first[s].coef_a
    assert resumed.statistics(names) == whole.statistics(names)


def test_statistics_are_those_of_the_gradients():
    net, surgery = Net(), SACP()
    enc = list(net.encoder.parameters())
    names = [n for n, _ in net.encoder.named_parameters()]
    for sign in 1, 1, -1, -1, -1:
        L_a, L_m, _ = net(batch(), sign)
        surgery(L_a, L_m, enc)
    s, g_a, g_m = surgery.statistics(names), grads_of(L_a, enc), grads_of(L_m, enc)

    def cosine(a, b):
        return (a @ b / a.norm() / b.norm()).item()

    assert (
        s["conflict"] == pytest.approx(0.6)
        and s["norm_a"] == pytest.approx(flat(g_a).norm().item())
        and s["norm_m"] == pytest.approx(flat(g_m).norm().item())
    )
    rows = [[i for i, n in enumerate(names) if n.startswith(f"blocks.{b}.")] for b in range(2)]
    assert s["cosine"] == pytest.approx(cosine(flat(g_a), flat(g_m))) and s[
        "cosine_by_block"
    ] == pytest.approx([cosine(flat([g_a[i] for i in r]), flat([g_m[i] for i in r])) for r in rows])
    surgery(*net(batch(), 1)[:2], enc)
    assert surgery.statistics(names)["conflict"] == 0  # the rate starts afresh


class Live:
    "Counts what autograd has saved and not yet let go."

    def __init__(self):
        self.kept = weakref.WeakSet()

    def pack(self, t):
        box = type("Box", (), {})()
        box.t = t.detach()
        self.kept.add(box)
        return box


@pytest.mark.parametrize("way", ["loss", "encoder", "every", "gradient", "soft"])
def test_memory_is_constant_over_200_steps(way):
    """Two gradients with retain_graph each step: after the step nothing that autograd saved is alive, and
    no tensor more than before."""
    net, live = Net(dim=4, depth=1), Live()
    enc = list(net.encoder.parameters())
    others = [p for n, p in net.named_parameters() if not n.startswith("encoder")]
    surgery, gather, counts = (
        SACP(every=3 if way == "every" else 1, level="encoder" if way == "encoder" else "loss"),
        GradientSACP(enc, others),
        [],
    )

    def step(x):
        L_a, L_m, rest = net(x)
        if way == "gradient":
            gather.collect(L_a, L_m)
            rest.backward()
            gather.apply((1.0, 0.5))
        elif way == "soft":
            (L_a + L_m + rest + SoftConflict()(L_a, L_m, enc)).backward()
        else:
            r = surgery(L_a, L_m, enc, (1.0, 0.5))
            (r.loss_a + r.loss_m + rest).backward()
        net.zero_grad()

    gc.collect()
    gc.disable()  # nothing may wait for the collector of cycles either
    try:
        with torch.autograd.graph.saved_tensors_hooks(live.pack, lambda box: box.t):
            for i in range(200):
                step(batch(2, seed=i))
                if i in (10, 199):
                    counts.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
                assert len(live.kept) == 0, f"{len(live.kept)} saved tensors outlive step {i}"
    finally:
        gc.enable()
    assert counts[0] == counts[1]


def test_soft_conflict_is_the_penalty_of_table_5():
    "Value w max(0, -s) and, by finite differences, its gradient; on the real encoder too."
    net, x = Net(depth=1), batch(2)

    def penalty(w=0.5):
        L_a, L_m, _ = net(x)
        return SoftConflict(w)(L_a, L_m, net.encoder.parameters()), L_a, L_m

    enc = list(net.encoder.parameters())
    p, L_a, L_m = penalty()
    s = flat(grads_of(L_a, enc)) @ flat(grads_of(L_m, enc))
    assert (
        s < 0
        and torch.allclose(p, -0.5 * s)
        and torch.allclose(penalty(1.0)[0], -s)
        and SoftConflict(1.0)(L_a, L_a, enc) == 0
    )
    p.backward()
    weight, d = net.encoder.blocks[0].mlp.weight, 1e-5
    got, direction = (
        weight.grad,
        torch.randn(weight.shape, generator=generator(3), dtype=weight.dtype),
    )
    with torch.no_grad():
        weight += d * direction
    high = penalty()[0].item()
    with torch.no_grad():
        weight -= 2 * d * direction
    assert (got * direction).sum().item() == pytest.approx(
        (high - penalty()[0].item()) / (2 * d), rel=1e-5
    )


def test_the_real_encoder():
    "Two streams of the tiny tokenizer against the pocket teachers: all forms agree, soft conflict included."
    from dera.align import Alignment, teacher_features
    from dera.pocket import render, sample_factors
    from dera.streams import DeRATokenizer, TokenizerConfig
    from dera.teachers import load_teacher

    torch.manual_seed(0)
    config = TokenizerConfig.preset("tiny")
    model, align = DeRATokenizer(config), Alignment(128, 96, 96, 32)
    x = render(sample_factors(3, seed=8), 8, 32)
    targets = teacher_features(
        load_teacher("pocket-image"), load_teacher("pocket-video"), x, config.grid
    )
    enc = list(model.encoder.parameters())
    others = [
        p
        for n, p in (*model.named_parameters(), *align.named_parameters())
        if p.requires_grad and not any(p is q for q in enc)
    ]
    L_a, L_m = align(model.encode(x, False), *targets)
    L_m = -L_m if grads_of(L_a, enc)[0].flatten() @ grads_of(L_m, enc)[0].flatten() > 0 else L_m
    if flat(grads_of(L_a, enc)) @ flat(grads_of(L_m, enc)) > 0:
        L_m = -L_m
    want = expected(Wrap(model.encoder), L_a, L_m, (1.0, 0.5))
    gather = GradientSACP(enc, others)
    gather.collect(L_a, L_m)
    r = gather.apply((1.0, 0.5))
    assert r.conflict and close(flat([p.grad for p in enc]), want, 1e-5)
    for level in "loss", "encoder":
        r = sacp(L_a, L_m, enc, (1.0, 0.5), level=level)
        assert close(flat(grads_of(r.loss_a + r.loss_m, enc)), want, 1e-5)
    with SoftConflict.attention():
        L_a, L_m = align(model.encode(x, False), *targets)
    assert (
        torch.autograd.grad(SoftConflict()(L_a, -L_m, enc) + SoftConflict()(L_a, L_m, enc), enc[0])[
            0
        ]
        .abs()
        .sum()
        > 0
    )


class Wrap:
    def __init__(self, encoder):
        self.encoder = encoder


# ---- several processes

WORKER = """
import json, sys, torch, torch.distributed as dist, torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
import test_sacp as t
from dera.sacp import GradientSACP, SoftConflict, batch_share, sacp


def data(world, equal):  # ranks see different clips, and unless `equal` different numbers of them
    sizes = [3] * world if equal else [1 + (3 * r) % 5 for r in range(world)]
    return (torch.cat([t.batch(n, seed=20 + r) + r for r, n in enumerate(sizes)]) / world).split(
        sizes
    )


def step(net, x, way, share, model=None):
    enc = list(net.encoder.parameters())
    others = [p for n, p in net.named_parameters() if not n.startswith("encoder")]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    L_a, L_m, rest = (model or net)(x)
    L_a, L_m, rest = share * L_a, share * L_m, share * rest
    if way == "gradient":
        gather = GradientSACP(enc, others)
        gather.collect(L_a, L_m)
        rest.backward()
        r = gather.apply((1.0, 0.5))
    elif way == "soft":
        r = None
        (L_a + 0.5 * L_m + rest + SoftConflict()(L_a, L_m, enc)).backward()
    else:
        r = sacp(L_a, L_m, enc, (1.0, 0.5), level=way)
        (r.loss_a + r.loss_m + rest).backward()
    optimizer.step()
    found = [float(v) for v in r[2:]] if r else []
    return dict(
        found=found,
        encoder=t.flat([p.detach() for p in enc]).tolist(),
        others=t.flat([p.detach() for p in others]).tolist(),
    )


def rank(r, world, folder, port):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet{world}", rank=r, world_size=world
    )
    out = {}
    for equal in (True, False) if world == 2 else (False,):
        x = data(world, equal)[r]
        share = batch_share(len(x))
        assert share == len(x) * world / sum(map(len, data(world, equal)))
        for way in "loss", "encoder", "soft", "gradient":
            net = t.Net()
            model = None
            if way != "gradient":
                model = DistributedDataParallel(net, find_unused_parameters=False)
            else:
                [
                    p.register_hook(lambda g: (dist.all_reduce(g), g / world)[1])
                    for p in net.parameters()
                ]  # averages what `rest` gives
            out[f"{way} {equal}"] = step(net, x, way, share, model)
    json.dump(out, open(f"{folder}/{world}-{r}.json", "w"))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    folder = sys.argv[2]
    for world in 2, 4:
        mp.start_processes(rank, args=(world, folder, 0), nprocs=world, start_method="fork")
    alone = {
        f"{world} {way} {equal}": step(t.Net(), torch.cat(data(world, equal)), way, batch_share(1))
        for world, equal in ((2, True), (2, False), (4, False))
        for way in ("loss", "encoder", "soft", "gradient")
    }
    json.dump(alone, open(f"{folder}/alone.json", "w"))
"""


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    "What 2 and 4 gloo processes and one process found, decided and updated."
    folder = tmp_path_factory.mktemp("gloo")
    (folder / "worker.py").write_text(WORKER)
    done = subprocess.run(
        [sys.executable, folder / "worker.py", Path(__file__).parent, folder],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {p.stem: json.loads(p.read_text()) for p in folder.glob("*.json")}


@pytest.mark.parametrize("way", ["loss", "encoder", "gradient", "soft"])
@pytest.mark.parametrize(
    "world, equal", [(2, True), (2, False), (4, False)], ids=["2-equal", "2-unequal", "4-unequal"]
)
def test_processes_are_one_process_on_the_joined_batch(processes, world, way, equal):
    "Decision, cosine, coefficients and the updated parameters, on every rank, to 1e-6."
    want = processes["alone"][f"{world} {way} {equal}"]
    for rank in range(world):
        got = processes[f"{world}-{rank}"][f"{way} {equal}"]
        for key in want:
            assert torch.allclose(
                torch.tensor(got[key]).double(), torch.tensor(want[key]).double(), rtol=0, atol=1e-6
            ), (key, rank)
    assert way == "soft" or want["found"][0] == 1  # there was a conflict to decide


# ---- the picture that one can drag


def test_the_formulas_of_the_picture_are_the_rule():
    for pair in torch.randn(200, 2, 2, generator=generator(0), dtype=torch.float64):
        found = project_by_formulas(*pair.tolist())
        for name, wanted in zip(("new_a", "new_m"), project(*pair, eps=0)):
            assert torch.allclose(torch.tensor(found[name], dtype=torch.float64), wanted, atol=1e-9)


@pytest.mark.skipif(not find_browser(), reason="needs Chromium")
def test_arrows_can_be_dragged(tmp_path):
    """Drag a tip in a real browser: the numbers under the picture are those of `project`, and nothing is
    asked of the network."""
    html = two_arrows()
    (tmp_path / "page.html").write_text(f'<meta charset="utf-8"><body>{html}')

    def expected_text(a, m):
        a, m = torch.tensor(a, dtype=torch.float64), torch.tensor(m, dtype=torch.float64)
        s, new = a @ m, sum(project(a, m, eps=0))
        clash = min(s, torch.zeros(()))
        return [s, clash / (m @ m), clash / (a @ a), -a @ (a + m), -m @ (a + m), -a @ new, -m @ new]

    with Browser() as browser:
        browser.open((tmp_path / "page.html").as_uri(), 800, 500)
        browser.listen(0.2)
        left, top, width, height = browser.evaluate(
            """(() => { const r = document.querySelector('svg').getBoundingClientRect(); return [r.left, r.top,
            r.width, r.height]; })()"""
        )
        x0, y0, w, h = map(
            float, browser.evaluate("document.querySelector('svg').getAttribute('viewBox')").split()
        )

        def mouse(kind, x, y):
            browser.call(
                "Input.dispatchMouseEvent",
                type=kind,
                x=left + (x - x0) / w * width,
                y=top + (-y - y0) / h * height,
                button="left",
                buttons=int(kind != "mouseReleased"),
                clickCount=1,
            )

        def shown():
            return [
                float(n)
                for n in re.findall(
                    r"[+-]\d+\.\d+", browser.evaluate("document.querySelector('pre').textContent")
                )
            ]

        tips = json.loads(re.search(r"tips = (\[\[.*?\]\]);", html)[1])
        for held, to in [
            (None, None),
            (1, (-1.5, 0.2)),
            (0, (0.8, 1.0)),
            (1, (1.0, -0.4)),
            (0, (-0.7, -1.2)),
        ]:
            if held is not None:
                mouse("mousePressed", *tips[held])
                mouse("mouseMoved", *to)
                mouse("mouseReleased", *to)
                mouse("mouseMoved", 3, 1)
                tips[held] = to
            want = expected_text(*tips)
            assert len(shown()) == 7 and all(abs(a - b) < 0.06 for a, b in zip(shown(), want)), (
                tips,
                shown(),
                want,
            )
        assert not [e for e in browser.events if e.get("method") == "Runtime.exceptionThrown"]
        assert all(
            e["params"]["request"]["url"].startswith("file:")
            for e in browser.events
            if e.get("method") == "Network.requestWillBeSent"
        )
