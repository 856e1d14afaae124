"The quantisers against oracles: another library, formulas in float64, finite differences, the plain softmax."

import copy
import json
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chi2
from vector_quantize_pytorch import FSQ as OracleFSQ
from vector_quantize_pytorch import VectorQuantize

from dera.quantize import (
    FSQ,
    StochasticVectorQuantizer,
    VectorQuantizer,
    codebook_stats,
)
from dera.runtime.errors import InputError
from dera.runtime.search import search_codes

BOTH = pytest.mark.parametrize("cls", [VectorQuantizer, StochasticVectorQuantizer])


def make(cls, size=32, dim=8, seed=0, **options):
    torch.manual_seed(seed)
    return cls(size, dim, **{"restart": False} | options)


def latents(*shape, seed=1, **options):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=options.get("dtype")
    )


def away(z, q, margin=1e-2):
    "Latents whose nearest code wins clearly, so that a small step changes no choice."
    top = (
        (F.normalize(z, dim=-1) @ F.normalize(q.codebook.detach(), dim=-1).T.to(z))
        .topk(2, -1)
        .values
    )
    return z[top[..., 0] - top[..., 1] > margin][None]


# ---- which code


@BOTH
@pytest.mark.parametrize("cosine", [True, False], ids=["cosine", "euclidean"])
@pytest.mark.parametrize(
    "size, dim, shape", [(512, 16, (4, 256)), (8192, 16, (2, 64)), (7, 3, (1, 5)), (1, 2, (3, 4))]
)
def test_evaluation_agrees_with_another_library(cls, cosine, size, dim, shape):
    ours = make(cls, size, dim, normalize=cosine).eval()
    ours.codebook.data *= 0.5 + torch.rand(size, 1)  # lengths must matter, or not
    theirs = VectorQuantize(dim, size, use_cosine_sim=cosine, freeze_codebook=True).eval()
    theirs._codebook.embed.data.copy_(
        (F.normalize(ours.codebook, dim=-1) if cosine else ours.codebook).data[None]
    )
    z = 2 * latents(*shape, dim)
    out, (quantized, indices, _) = ours(z), theirs(z)
    assert torch.equal(out.indices, indices) and torch.allclose(out.z, quantized, atol=1e-6)
    if cosine:
        assert torch.equal(ours(5 * z).indices, out.indices)


def test_on_the_sphere_euclidean_and_cosine_agree():
    a, b = make(VectorQuantizer).eval(), make(VectorQuantizer, normalize=False).eval()
    z = F.normalize(latents(4, 50, 8), dim=-1)
    assert torch.equal(a(z).indices, b(z).indices)


@BOTH
def test_batch_order_never_matters_in_evaluation(cls):
    q, z = make(cls, 512, 16).eval(), latents(6, 64, 16)
    whole = q(z)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    tokens = torch.arange(63, -1, -1)
    assert torch.equal(q(z[order]).indices, whole.indices[order]) and torch.equal(
        q(z[:, tokens]).z, whole.z[:, tokens]
    )
    assert all(torch.equal(q(z[i : i + 1]).indices[0], whole.indices[i]) for i in range(6))
    assert torch.equal(whole.z, q.decode(whole.indices)) and whole.indices.dtype == torch.int64


def test_ties():
    "The lower index in evaluation; in training both halves of a tie are drawn equally often."
    q = make(StochasticVectorQuantizer, 6, 4)
    q.codebook.data[4] = q.codebook.data[2]
    z = q.codebook.data[2].expand(1, 4000, 4)
    assert set(q.eval()(z).indices.unique().tolist()) == {2} and q(
        torch.zeros(1, 3, 4)
    ).indices.tolist() == [[0] * 3]
    count = torch.bincount(q.train()(z).indices.flatten(), minlength=6)
    assert abs(count[2] - count[4]) < 5 * math.sqrt(4000) and count[2] > 1500


# ---- what is no latent, and no token


QUANTIZERS = dict(
    nearest=lambda c: make(VectorQuantizer, 12, 4 * c, codes_per_token=c),
    restarting=lambda c: make(VectorQuantizer, 12, 4 * c, codes_per_token=c, restart=True),
    stochastic=lambda c: make(StochasticVectorQuantizer, 12, 4 * c, codes_per_token=c),
    euclidean=lambda c: make(VectorQuantizer, 12, 4 * c, codes_per_token=c, normalize=False),
    fsq=lambda c: FSQ([8, 5, 3, 2], codes_per_token=c),
)
anyone = pytest.mark.parametrize("name", QUANTIZERS)


@anyone
def test_latents_that_are_not_finite_are_refused(name):
    "In training and in evaluation, with the place of the first one; and nothing else is changed."
    quantizer = QUANTIZERS[name](1)
    before = copy.deepcopy(quantizer.state_dict())
    for value in math.nan, math.inf, -math.inf:
        z = latents(2, 40, 4)
        z[1, 7, 2] = value
        for training in True, False:
            with pytest.raises(InputError, match=rf"got {value} at \[1, 7, 2\]") as caught:
                quantizer.train(training)(z)
            assert "\n" not in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in quantizer.state_dict().items())


@anyone
def test_overflow_under_a_gradient_scaler_is_left_to_it(name):
    "In float16 a step may overflow: the answer is not finite, and the codebook is left alone."
    quantizer, z = QUANTIZERS[name](1).train(), latents(2, 40, 4)
    z[1, 7, 2] = math.inf
    before = copy.deepcopy(quantizer.state_dict())
    with torch.autocast("cpu", torch.float16):
        out = quantizer(z)
    assert not (out.loss.isfinite() and out.z.isfinite().all()) or name == "fsq"
    assert out.indices.min() >= 0 and out.indices.max() < 240
    assert all(torch.equal(v, before[k]) for k, v in quantizer.state_dict().items())


@anyone
@pytest.mark.parametrize("codes", [1, 2])
def test_an_empty_batch_comes_back_empty(name, codes):
    quantizer, z = QUANTIZERS[name](codes), torch.zeros(0, 3, 4 * codes, requires_grad=True)
    for training in True, False:
        out = quantizer.train(training)(z)
        assert out.z.shape == (0, 3, 4 * codes) and out.indices.shape == (0, 3 * codes)
        assert out.loss == 0 and quantizer.decode(out.indices).shape == out.z.shape
    (out.z.sum() + out.loss).backward()
    assert quantizer.continuous(z).shape == z.shape


@anyone
def test_stored_tokens_of_any_integer_type(name):
    quantizer, z = QUANTIZERS[name](2).eval(), latents(2, 9, 8)
    out = quantizer(z)
    for dtype in torch.uint8, torch.uint16, torch.int16, torch.int32, torch.uint32, torch.int64:
        stored = out.indices.to(dtype)
        assert torch.equal(quantizer.decode(stored), out.z), dtype
        assert codebook_stats(stored, 240) == codebook_stats(out.indices, 240)
    memory = out.indices.numpy().astype("uint16")
    assert codebook_stats([memory[:1], memory[1:]], 240) == codebook_stats(out.indices, 240)


@anyone
def test_latents_of_another_width_are_named(name):
    for width in 4, 12:
        with pytest.raises(InputError, match=f"{width} numbers, this quantiser takes 8"):
            QUANTIZERS[name](2)(latents(2, 30, width))


@anyone
def test_groups_are_quantised_each_by_itself(name):
    "Two codes a token are the codes of its halves, side by side."
    double, z = QUANTIZERS[name](2).eval(), latents(2, 9, 8)
    single = QUANTIZERS[name](1).eval()
    single.load_state_dict(double.state_dict())
    out, halves = double(z), single(z.view(2, 18, 4))
    assert torch.equal(out.indices, halves.indices)
    assert torch.equal(out.z, halves.z.view(2, 9, 8))
    assert torch.equal(double.continuous(z), single.continuous(z.view(2, 18, 4)).view(2, 9, 8))


def test_init_from_nothing_is_refused():
    q = make(VectorQuantizer)
    with pytest.raises(InputError, match="init_from got no latents"):
        q.init_from(torch.zeros(0, 5, 8))
    with pytest.raises(InputError, match="codebook starts from"):
        q.init_from(torch.full((1, 5, 8), math.nan))


# ---- which distribution


def pvalue(drawn, p):
    "Chi-square test of drawn indices against probabilities; cells that expect fewer than 5 are pooled."
    expected = p.double() * len(drawn)
    rare = expected < 5
    count = torch.bincount(drawn, minlength=len(p)).double()
    count, expected = (
        torch.cat([x[~rare], x[rare].sum()[None]]) if rare.any() else x for x in (count, expected)
    )
    keep = expected > 0
    assert not count[~keep].any()
    return chi2.sf(((count - expected) ** 2 / expected)[keep].sum().item(), int(keep.sum()) - 1)


@pytest.mark.parametrize(
    "size, temperature", [(5, 1.0), (64, 0.3), (64, 0.03), (512, 0.1), (8192, 0.1)]
)
def test_draws_follow_the_plain_softmax(size, temperature):
    q, z = make(StochasticVectorQuantizer, size, 16, temperature=temperature), latents(1, 1, 16)
    n = 50_000
    p = (
        (F.normalize(z.double(), dim=-1) @ F.normalize(q.codebook.double(), dim=-1).T / temperature)
        .softmax(-1)
        .flatten()
        .detach()
    )
    torch.manual_seed(7)
    drawn = torch.cat([q(z.expand(1, n // 5, 16)).indices.flatten() for _ in range(5)])
    assert pvalue(drawn, p) > 1e-4
    assert (
        pvalue(torch.multinomial(p, n, True, generator=torch.Generator().manual_seed(0)), p) > 1e-4
    )
    wrong = (p.log() / 1.2).softmax(-1)  # the test has the power to see 20% of temperature
    assert (
        pvalue(torch.multinomial(wrong, n, True, generator=torch.Generator().manual_seed(0)), p)
        < 1e-6
    )


def test_draws_are_independent_between_tokens():
    q = make(StochasticVectorQuantizer, 4, 3, temperature=1.0)
    k = q(latents(1, 1, 3).expand(1, 40_001, 3)).indices.flatten()
    p = torch.bincount(k, minlength=4) / len(k)
    pairs = 4 * k[:-1] + k[1:]
    assert pvalue(pairs, torch.outer(p, p).flatten()) > 1e-4


def test_the_random_number_decides_and_nothing_else():
    "u picks the code whose interval of the running sum holds it; how many rows fit changes nothing."
    z, e = F.normalize(latents(900, 16), dim=-1), F.normalize(latents(300, 16, seed=2), dim=-1)
    u = 1 - torch.rand(900, generator=torch.Generator().manual_seed(3))
    total = (z.double() @ e.double().T / 0.03).softmax(-1).cumsum(-1)
    clear = (total - u[:, None]).abs().min(-1).values > 1e-5
    assert clear.sum() > 800
    k = search_codes(z, e, u, 0.03)
    assert torch.equal(k[clear], (total >= u[:, None]).int().argmax(-1)[clear])
    for scores in 1, 301, 10_000, 10**9:
        assert torch.equal(search_codes(z, e, u, 0.03, scores), k)
    assert (
        torch.equal(
            search_codes(z[:1], e, torch.ones(1), 0.03),
            search_codes(z[:1], e, torch.ones(1), 0.03),
        )
        and int(k.max()) < 300
    )
    extreme = search_codes(
        torch.tensor([[1.0, 0]]), torch.tensor([[-1.0, 0], [1, 0], [-1, 0]]), torch.ones(1), 0.001
    )
    assert extreme.item() == 1  # u = 1 never lands on a code of probability 0


def test_seeds_and_resuming():
    "Same generator state, same draws; weights, `used` and the generator are all that a resumed run needs."

    def steps(q, adam, n):
        for _ in range(n):
            out = q(latents(2, 40, 8, seed=100 + int(q.steps)))
            q.steps += 1
            adam.zero_grad()
            out.loss.backward()
            adam.step()

    q = make(StochasticVectorQuantizer, 64, restart=True, patience=3)
    q.steps = 0
    adam = torch.optim.Adam(q.parameters(), lr=0.01)
    steps(q, adam, 5)
    saved = copy.deepcopy((q.state_dict(), adam.state_dict())), torch.get_rng_state()
    steps(q, adam, 6)
    again = make(StochasticVectorQuantizer, 64, seed=9, restart=True, patience=3)
    again.steps = 5
    adam2 = torch.optim.Adam(again.parameters(), lr=0.01)
    again.load_state_dict(saved[0][0])
    adam2.load_state_dict(saved[0][1])
    torch.set_rng_state(saved[1])
    steps(again, adam2, 6)
    assert set(q.state_dict()) == {"codebook", "used"} and all(
        torch.equal(v, again.state_dict()[k]) for k, v in q.state_dict().items()
    )


# ---- gradients and losses


@BOTH
@pytest.mark.parametrize("cosine", [True, False], ids=["cosine", "euclidean"])
@pytest.mark.parametrize("commitment", [0.25, 0.0, 2.0])
def test_losses_equal_their_formulas(cls, cosine, commitment):
    q, z = make(cls, commitment=commitment, normalize=cosine), latents(3, 20, 8).requires_grad_()
    out = q(z)

    def scale(x):
        x = x.detach().double()
        return x / x.norm(dim=-1, keepdim=True) if cosine else x

    e, u = scale(q.codebook)[out.indices], scale(z)
    value = (u - e).pow(2).sum() / u.numel()
    assert (
        out.loss.dtype == torch.float32
        and abs(out.loss.item() - (1 + commitment) * value.item()) < 1e-5 * value
    )


def numerical(f, x, eps=1e-6):
    "Central finite differences of a scalar function of one float64 tensor."
    steps = eps * torch.eye(x.numel(), dtype=torch.float64).view(-1, *x.shape)
    return torch.stack([(f(x + s) - f(x - s)) / (2 * eps) for s in steps]).view_as(x)


@pytest.mark.parametrize("cosine", [True, False], ids=["cosine", "euclidean"])
def test_loss_gradients_equal_finite_differences(cosine):
    "With the choice held fixed: latents feel only the commitment term, codes only the codebook term."
    q = make(VectorQuantizer, 9, 3, normalize=cosine).double()
    z = latents(1, 6, 3, dtype=torch.float64).requires_grad_()
    out = q(z)

    def scale(x):
        return x / x.norm(dim=-1, keepdim=True) if cosine else x

    def distance(z, e):
        return (scale(z) - scale(e)[out.indices]).pow(2).mean()

    Z, E = z.detach(), q.codebook.detach().clone()
    g_z, g_e = torch.autograd.grad(out.loss, (z, q.codebook))
    assert out.z.dtype == torch.float64  # float64 in, float64 through
    assert torch.allclose(g_z, 0.25 * numerical(lambda x: distance(x, E), Z), atol=1e-8)
    assert torch.allclose(g_e, numerical(lambda x: distance(Z, x), E), atol=1e-8)
    unused = [k for k in range(9) if k not in out.indices]
    assert unused and not g_e[unused].any()


@BOTH
def test_straight_through_equals_a_checked_reference(cls):
    "The surrogate z/|z| + constant passes a finite-difference check, and our gradient is its gradient."
    q = make(cls)
    z, w = latents(2, 6, 8).requires_grad_(), latents(2, 6, 8, seed=5)
    out = q(z)

    def head(y):
        return (w.to(y) * y.sin() + y**3).sum()

    (ours,) = torch.autograd.grad(head(out.z), z)
    Z = z.detach().double().requires_grad_()
    constant = out.z.detach().double() - F.normalize(Z.detach(), dim=-1)

    def surrogate(x):
        return head(F.normalize(x, dim=-1) + constant)

    assert torch.autograd.gradcheck(surrogate, Z)
    assert torch.allclose(ours, torch.autograd.grad(surrogate(Z), Z)[0].float(), atol=1e-5)
    assert torch.equal(
        out.z, q.decode(out.indices)
    )  # the code itself, to the last bit, in training too


def test_no_gradient_without_the_trick():
    "The choice itself is flat: a small step of a latent changes neither index nor code."
    q = make(VectorQuantizer).eval()
    z = away(latents(1, 200, 8), q)
    assert z.shape[1] > 50
    assert (
        torch.equal(q(z + 1e-4 * latents(*z.shape, seed=4)).z, q(z).z)
        and q(z.requires_grad_()).z.sub(z).grad_fn is not None
    )


@BOTH
def test_two_threads_give_the_same_codebook_gradient_every_time(cls):
    "Many rows on few codes: indexing would add them up in the order in which threads arrive."
    threads = torch.get_num_threads()
    q, z = make(cls, 8, 16), latents(64, 256, 16)
    try:
        torch.set_num_threads(4)
        seen = []
        for _ in range(8):
            torch.manual_seed(0)
            out = q.train()(z)
            seen.append(torch.autograd.grad(out.loss + out.z.pow(2).mean(), q.codebook)[0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(seen[0], g) for g in seen)


@BOTH
def test_gradients_reach_encoder_and_codebook(cls):
    q, layer = make(cls, 8, 4), torch.nn.Linear(6, 4)
    out = q(layer(latents(3, 10, 6)))
    (out.z.pow(2)[..., 0].mean() + out.loss).backward()
    hit = torch.zeros(8, dtype=torch.bool)
    hit[out.indices.unique()] = True
    assert torch.equal(q.codebook.grad.abs().sum(-1) > 0, hit) and layer.weight.grad.abs().sum() > 0
    assert torch.allclose(
        (q.codebook.grad * q.codebook).sum(-1), torch.zeros(8), atol=1e-6
    )  # along the sphere, never outwards


# ---- precision


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_inside_autocast(cls, dtype):
    "Autocast changes nothing; and it would change a lot, were the cosine taken in it."
    q, z = make(cls, 8192, 16), latents(2, 256, 16).to(dtype)
    torch.manual_seed(1)
    plain = q(z.float())
    with torch.autocast("cpu", dtype):
        torch.manual_seed(1)
        cast = q(z)
        decoded = q.decode(cast.indices)
        coarse = (F.normalize(z, dim=-1) @ F.normalize(q.codebook, dim=-1).T).argmax(-1)
    assert cast.z.dtype == cast.loss.dtype == torch.float32 and torch.equal(
        cast.indices, plain.indices
    )
    assert (
        torch.equal(cast.z, plain.z)
        and torch.equal(cast.loss, plain.loss)
        and torch.equal(decoded, cast.z)
    )
    assert dtype == torch.float16 or (coarse != q.eval()(z).indices).float().mean() > 0.02


def test_gradients_flow_through_autocast():
    q, layer = make(VectorQuantizer), torch.nn.Linear(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = q(layer(latents(2, 10, 8)))
        ((out.z[..., 0]).mean() + out.loss).backward()
    assert (
        layer.weight.grad.isfinite().all()
        and layer.weight.grad.abs().sum() > 0
        and q.codebook.grad.abs().sum() > 0
    )


def test_a_module_in_half_precision_computes_in_float32():
    q = make(VectorQuantizer).bfloat16().eval()
    z = latents(2, 30, 8).bfloat16()
    full = copy.deepcopy(q).float()
    assert (
        q(z).z.dtype == torch.float32
        and torch.equal(q(z).indices, full(z.float()).indices)
        and torch.equal(q.decode(q(z).indices), q(z).z)
    )


# ---- FSQ


@pytest.mark.parametrize(
    "levels", [[8, 5, 5, 5], [4] * 6, [3], [7, 6, 5, 4, 3], [8, 8, 8]], ids=str
)
def test_fsq_agrees_with_another_library(levels):
    z = 3 * latents(2, 700, len(levels))
    ours, theirs = FSQ(levels).eval(), OracleFSQ(levels).eval()
    out, (quantized, indices) = ours(z), theirs(z)
    every = torch.arange(math.prod(levels))[None]
    assert (
        torch.equal(out.indices, indices.long())
        and torch.equal(out.z, quantized)
        and out.indices.dtype == torch.int64
    )
    assert torch.allclose(
        ours.decode(every), theirs.indices_to_codes(every.int()), atol=1e-7
    ) and torch.equal(ours.decode(out.indices), out.z)
    assert (
        len(ours.decode(every)[0].unique(dim=0)) == math.prod(levels)
        and ours.decode(every).abs().max() <= 1
        and out.loss == 0
    )
    zt, zo = z.clone().requires_grad_(), z.clone().requires_grad_()
    w = latents(*z.shape, seed=9)
    a, b = ours.train()(zt), theirs.train()(zo)[0]
    (w * a.z).sum().backward()
    (w * b).sum().backward()
    assert (
        torch.allclose(zt.grad, zo.grad, atol=1e-6)
        and zt.grad.abs().sum() > 0
        and torch.equal(a.z, out.z)
    )


@pytest.mark.parametrize("levels", [[2, 2], [2, 5], [16] * 7], ids=str)
def test_fsq_round_trip(levels):
    "Two levels, which the other library refuses, and more cells than float32 can count."
    q, z = FSQ(levels).eval(), 3 * latents(3, 400, len(levels))
    out = q(z)
    digits = out.indices[..., None] // q.basis % q.levels
    assert torch.equal(q.decode(out.indices), out.z) and all(
        len(digits[..., i].unique()) == l for i, l in enumerate(levels)
    )
    assert out.indices.min() >= 0 and out.indices.max() < math.prod(levels) and not q.state_dict()


def test_fsq_in_autocast_is_float32():
    q, z = FSQ([8, 5, 5]).eval(), latents(2, 300, 3).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = q(z)
    assert out.z.dtype == torch.float32 and torch.equal(out.indices, q(z.float()).indices)


# ---- the codebook's health


@pytest.mark.parametrize("patience", [2, 7, 50])
def test_restart_happens_exactly_when_patience_ends(patience):
    q = make(VectorQuantizer, 4, 2, restart=True, patience=patience)
    q.codebook.data = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    right = torch.tensor([[[1.0, 0.1], [1.0, -0.1], [1.0, 0.05]]])
    q(torch.tensor([[[1.0, 0], [0, 1]]]))
    assert (q.used[:2] == 1).all()  # code 1 was chosen once, a step later than 2 and 3
    for step in range(2, patience + 2):
        before = q.codebook.detach().clone()
        q(right)
        moved = (q.codebook != before).any(-1).tolist()
        assert moved == [False, step == patience + 1, step == patience, step == patience]
    for k in 1, 2, 3:
        assert torch.isclose(F.normalize(right, dim=-1)[0], q.codebook[k]).all(-1).any()
    assert torch.equal(q.codebook[0], torch.tensor([1.0, 0]))  # a code in use stays


def test_restart_counts_the_nearest_and_not_the_draws():
    "All codes are drawn at a high temperature; those that evaluation never uses restart all the same."
    q = make(StochasticVectorQuantizer, 4, 2, temperature=5.0, restart=True, patience=4)
    q.codebook.data = F.normalize(
        torch.tensor([[1.0, 0.1], [1.0, -0.1], [-1, 0.1], [-1, 0]]), dim=-1
    )
    right = F.normalize(torch.tensor([1.0, 0]) + 0.3 * latents(1, 400, 2), dim=-1)
    start = q.codebook.detach().clone()
    for step in range(1, 5):
        k = q(right).indices
        assert len(k.unique()) == 4 and (q.codebook != start).any(-1).tolist() == [
            False,
            False,
            step == 4,
            step == 4,
        ]
    assert torch.isclose(right[0], q.codebook[2]).all(-1).any()


def test_restart_is_off_in_evaluation_and_when_not_wanted():
    for q in (
        make(VectorQuantizer, restart=True, patience=1).eval(),
        make(VectorQuantizer, restart=False),
    ):
        before = copy.deepcopy(q.state_dict())
        q(latents(1, 4, 8))
        assert all(torch.equal(v, before[k]) for k, v in q.state_dict().items())


@pytest.mark.parametrize("n", [16, 64, 500])
def test_init_from_spreads_the_codes_over_the_latents(n):
    q, z = make(VectorQuantizer, 64), F.normalize(latents(1, n, 8), dim=-1)
    q.used.zero_()
    q.init_from(z)
    distance, row = torch.cdist(q.codebook.detach(), z[0]).min(-1)
    assert (
        distance.max() < 0.2
        and len(row.unique()) >= 0.9 * min(n, 64)
        and torch.allclose(q.codebook.norm(dim=-1), torch.ones(64))
        and (q.used == 1).all()
    )


@BOTH
def test_restarts_raise_usage(cls):
    "Clustered data and codes that all start in one place."
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(40, 8, generator=g)
    usage = {}
    for restart in True, False:
        q = make(cls, 32, 8, restart=restart, patience=10)
        q.codebook.data = F.normalize(
            torch.ones(8) + 0.05 * torch.randn(32, 8, generator=g), dim=-1
        )
        adam = torch.optim.Adam(q.parameters(), lr=0.01)
        for _ in range(60):
            z = centres[torch.randint(40, (1, 200), generator=g)] + 0.1 * torch.randn(
                1, 200, 8, generator=g
            )
            loss = q(z).loss
            adam.zero_grad()
            loss.backward()
            adam.step()
        usage[restart] = codebook_stats(q.eval()(z).indices, 32)["usage"]
    assert usage[True] > usage[False] + 0.1


# ---- codebook_stats


def test_stats_equal_the_definition():
    g = torch.Generator().manual_seed(0)
    p = torch.rand(100, generator=g) ** 3
    p[::7] = 0
    k = torch.multinomial(p, 5000, True, generator=g)
    s, share = (
        codebook_stats(k.view(50, 10, 10), 100),
        [(k == i).double().mean().item() for i in range(100)],
    )
    H = -sum(x * math.log(x) for x in share if x)
    assert (
        abs(s["entropy"] - H) < 1e-12
        and abs(s["perplexity"] - math.exp(H)) < 1e-9
        and s["dead"] == sum(x == 0 for x in share) >= 15
    )
    assert s["usage"] == 1 - s["dead"] / 100 and 1 <= s["perplexity"] <= 100 * s["usage"]
    assert codebook_stats(k[torch.randperm(5000, generator=g)], 100) == s
    assert codebook_stats(torch.zeros(3, dtype=torch.long), 5) == dict(
        usage=0.2, perplexity=1.0, entropy=0.0, dead=4
    )


def test_stats_over_a_set_are_those_of_all_tokens():
    "Batch after batch, of any shape and integer type, equals all at once; and differs from the mean over clips."
    k = torch.randint(0, 300, (40, 64), generator=torch.Generator().manual_seed(1))
    whole = codebook_stats(k, 512)
    for parts in (
        list(k),
        (x for x in k.split(7)),
        k.split(40),
        [k[:3].int(), k[3:].view(-1, 2, 32)],
        k.tolist(),
    ):
        assert codebook_stats(parts, 512) == whole
    assert sum(codebook_stats(x, 512)["usage"] for x in k) / 40 < whole["usage"] / 2


@pytest.mark.parametrize(
    "wrong, says",
    [
        ([], "no indices"),
        (torch.zeros(0, 3, dtype=torch.long), "no indices"),
        (torch.tensor([3, 512]), r"\[0, 512\).*3 to 512"),
        (torch.tensor([-1]), "-1"),
        ([torch.tensor([1]), torch.tensor([600])], "600"),
        (torch.tensor([1.0]), "integers"),
    ],
)
def test_stats_refuse_what_is_no_token(wrong, says):
    with pytest.raises(InputError, match=says):
        codebook_stats(wrong, 512)


def test_wrong_input_is_named():
    for q in make(VectorQuantizer, 512), FSQ([8, 8, 8]):
        for wrong in torch.tensor([[512]]), torch.tensor([[-1]]), torch.tensor([[0.5]]):
            with pytest.raises(InputError, match="indices"):
                q.decode(wrong)
    for build in (
        lambda: VectorQuantizer(0, 4),
        lambda: VectorQuantizer(4, 4, patience=0),
        lambda: StochasticVectorQuantizer(4, 4, temperature=0.0),
        lambda: FSQ([]),
        lambda: FSQ([8, 1]),
        lambda: FSQ([8, 8], codes_per_token=0),
        lambda: VectorQuantizer(8, 6, codes_per_token=4),
    ):
        with pytest.raises(InputError):
            build()


# ---- compiled and exported


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    torch._dynamo.reset()


def test_compiled_without_a_graph_break():
    "Three training steps as eager ones: choices, losses, gradients, restarts; and the same codes after."
    z, runs = latents(2, 30, 8), []
    for wrap in (lambda f: f), (lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")):
        q = make(VectorQuantizer, 64, restart=True, patience=3)
        start, step, found = q.codebook.detach().clone(), wrap(q), []
        for _ in range(3):
            x = z.clone().requires_grad_()
            q.zero_grad()
            out = step(x)
            (out.z[..., 0].pow(2).sum() + out.loss).backward()
            found += [out.indices, out.loss, x.grad, q.codebook.grad.clone(), q.used.clone()]
        runs.append(found + [(q.codebook != start).any(-1)])
    assert runs[0][-1].any() and all(
        torch.allclose(a.float(), b.float(), atol=1e-5) for a, b in zip(*runs)
    )
    with torch.no_grad():
        k = torch.compile(q.eval(), fullgraph=True, backend="eager")(z).indices
        assert torch.equal(k, q(z).indices)
        assert torch.allclose(
            torch.compile(q.decode, fullgraph=True, backend="eager")(k), q.decode(k), atol=1e-6
        )


def test_compiled_draws_follow_the_softmax():
    q, z = make(StochasticVectorQuantizer, 64, 16, temperature=0.1), latents(1, 1, 16)
    p = (
        (F.normalize(z.double(), dim=-1) @ F.normalize(q.codebook.double(), dim=-1).T / 0.1)
        .softmax(-1)
        .flatten()
        .detach()
    )
    assert (
        pvalue(torch.compile(q, fullgraph=True)(z.expand(1, 30_000, 16)).indices.flatten(), p)
        > 1e-4
    )


@pytest.mark.parametrize(
    "make_q",
    [
        lambda: make(StochasticVectorQuantizer, 512, 4),
        lambda: make(VectorQuantizer, 512, 4, normalize=False),
        lambda: FSQ([8, 5, 4, 2]),
    ],
    ids=["stochastic", "euclidean", "fsq"],
)
def test_exported_encode_and_decode(make_q, tmp_path):
    "For any batch size, saved, loaded and run; only plain operations inside."

    class Program(torch.nn.Module):
        def __init__(self, q, run):
            super().__init__()
            self.q, self.run = q, run

        def forward(self, x):
            return self.run(self.q, x)

    q, z = make_q().eval(), latents(3, 20, 4)
    batch = torch.export.Dim("batch", min=1, max=64)
    k = q(z).indices
    for i, (run, x, other) in enumerate(
        [
            (lambda q, x: tuple(q(x)), z, latents(7, 20, 4, seed=8)),
            (lambda q, k: (q.decode(k),), k, k[:2]),
        ]
    ):
        module = Program(q, run)
        torch.export.save(
            torch.export.export(module, (x,), dynamic_shapes=({0: batch},)), tmp_path / f"{i}.pt2"
        )
        program = torch.export.load(tmp_path / f"{i}.pt2")
        assert "dera" not in str(program.graph)
        for given in x, other:
            assert all(torch.equal(a, b) for a, b in zip(program.module()(given), module(given)))


# ---- memory

PROBE = """
import json, sys, torch, dera.quantize as q
def plain(z, e, t, *_): return torch.multinomial((z @ e.T/t).softmax(-1), 1).squeeze(1)
def status(key): return next(int(l.split()[1])/1024 for l in open('/proc/self/status') if l.startswith(key))
way, clips = sys.argv[1], int(sys.argv[2])
if way == 'plain': q.choose_codes = plain
quantizer = q.StochasticVectorQuantizer(8192, 16, restart=way != 'plain')
def step(*shape):
    z = torch.randn(*shape, 16, requires_grad=True); out = quantizer(z)
    (out.z.pow(2).mean() + out.loss).backward(); assert quantizer.codebook.grad.abs().sum() > 0
step(1, 8); open('/proc/self/clear_refs', 'w').write('5'); before = status('VmRSS:'); step(clips, 1024)
print(json.dumps(status('VmHWM:') - before))
"""


def extra_megabytes(*arguments):
    return json.loads(
        subprocess.run(
            [sys.executable, "-c", PROBE, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )


linux = pytest.mark.skipif(
    sys.platform != "linux", reason="reads Linux's high-water mark of memory"
)


@linux
def test_memory_at_paper_scale():
    "Batch 32 x 1024 tokens x 8192 codes, forward and backward, in a fresh process."
    assert extra_megabytes("ours", 32) < 150


@linux
def test_the_meter_sees_the_plain_way():
    assert (
        extra_megabytes("plain", 2) > 2 * 67 * 0.9
    )  # two tables of 2 x 1024 x 8192 scores at once


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_at_paper_scale_on_a_gpu():
    q = make(StochasticVectorQuantizer, 8192, 16, restart=True).cuda()
    z = torch.randn(32, 1024, 16, device="cuda", requires_grad=True)
    q(z[:1, :8]).loss.backward()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = q(z)
    (out.z.pow(2).mean() + out.loss).backward()
    assert torch.cuda.max_memory_allocated() - before < 150e6
