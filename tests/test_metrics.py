"Each metric against a float64 reference, an oracle library or a known answer; and what each must refuse."

import base64
import hashlib
import json
import math
import re
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import torch
import torch.nn.functional as F
from torch import nn

from dera import metrics
from dera.metrics import *
from dera.pocket import CLASSES, Factors, render, sample_factors
from dera.runtime.checkpoints import checkpoint_path
from dera.runtime.errors import InputError


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def clips(n=4, t=4, size=16, seed=0):
    return torch.rand(n, 3, t, size, size, generator=gen(seed))


def gaussian(d, seed=0, samples=None):
    "Mean and covariance of random, correlated data."
    x = torch.randn(samples or 20 * d, d, generator=gen(seed), dtype=torch.float64)
    x = x @ torch.randn(d, d, generator=gen(seed + 100), dtype=torch.float64) + torch.randn(
        d, generator=gen(seed + 200), dtype=torch.float64
    )
    return x.mean(0), torch.cov(x.T).reshape(d, d)


# --- PSNR, SSIM, LPIPS


def test_psnr_is_of_the_mean_error():
    a, b = clips(5), clips(5, seed=1)
    b[0] = a[0] + 0.001 * (b[0] - a[0])
    x, y = a.double().numpy(), b.double().numpy()
    errors = ((x - y) ** 2).reshape(5, -1).mean(1)
    assert psnr(a, b) == pytest.approx(-10 * math.log10(errors.mean()), abs=1e-4)
    assert psnr(a, b, per_clip=True).numpy() == pytest.approx(-10 * np.log10(errors), abs=1e-2)
    assert psnr(a, b, per_clip=True).mean() > psnr(a, b) + 5


def test_psnr_agrees_with_torchmetrics():
    from torchmetrics.functional.image import peak_signal_noise_ratio

    a, b = clips(), clips(seed=1)
    assert psnr(a, b) == pytest.approx(
        peak_signal_noise_ratio(a, b, data_range=1.0).item(), abs=1e-4
    )


def test_psnr_of_equal_videos_is_infinite():
    assert psnr(clips(), clips()) == math.inf


def test_psnr_in_half_precision_is_computed_in_double():
    a = torch.full((1, 3, 2, 16, 16), 0.5, dtype=torch.bfloat16)
    b = a.clone()
    b[..., 0, 0] = 0.5078125
    assert psnr(a, b) == pytest.approx(-10 * math.log10(0.0078125**2 / 256), abs=1e-9)


def test_baselines():
    x = clips(3)
    first = ((x - x[:, :, :1]).double() ** 2).mean().item()
    mean = x.double().var(2, correction=0).mean().item()
    assert baselines(x) == {
        "first_frame": pytest.approx(-10 * math.log10(first), abs=1e-4),
        "temporal_mean": pytest.approx(-10 * math.log10(mean), abs=1e-4),
    }


def reference_ssim(x, y):
    "SSIM of one channel (H, W) in float64: Gaussian windows, the frame mirrored at its border."
    r = np.arange(-5, 6)
    k = np.exp(-(r**2) / (2 * 1.5**2))
    k = np.outer(k, k) / k.sum() ** 2
    blur = lambda v: scipy.ndimage.correlate(v, k, mode="mirror")
    mx, my = blur(x), blur(y)
    vx, vy, c = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    return (
        ((2 * mx * my + 1e-4) * (2 * c + 9e-4)) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    ).mean()


def test_ssim_against_float64_reference():
    a = render(sample_factors(3, seed=1), 3, 24)
    b = (a + 0.1 * torch.randn(a.shape, generator=gen())).clamp(0, 1)
    planes = zip(a.double().numpy().reshape(-1, 24, 24), b.double().numpy().reshape(-1, 24, 24))
    assert ssim(a, b) == pytest.approx(np.mean([reference_ssim(x, y) for x, y in planes]), abs=2e-4)
    assert ssim(a, a) == pytest.approx(1, abs=1e-6)


@pytest.fixture
def hub(tmp_path):
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path))
    yield tmp_path
    torch.hub.set_dir(before)


@pytest.mark.parametrize("net", ["alex", "vgg", "squeeze"])
def test_lpips_never_downloads(hub, net, monkeypatch):
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda *a, **k: pytest.fail("tried to download")
    )
    with pytest.raises(InputError, match=f"LPIPS-{net}.*weights.*python -c"):
        lpips(clips(), clips(), net)


def test_lpips_is_the_named_network(hub):
    "With stand-in weights in the cache: the formula, recomputed in float64 from torchvision's network."
    import torchvision
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    torch.manual_seed(0)
    net = torchvision.models.squeezenet1_1(weights=None)
    (hub / "checkpoints").mkdir()
    torch.save(
        net.state_dict(),
        hub / "checkpoints" / torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url.rsplit("/")[-1],
    )
    a, b = clips(2, 2, 64), clips(2, 2, 64, seed=1)
    heads = LearnedPerceptualImagePatchSimilarity("squeeze").net.state_dict()
    shift, scale = (
        torch.tensor([-0.030, -0.088, -0.188]).reshape(3, 1, 1).double(),
        torch.tensor([0.458, 0.448, 0.450]).reshape(3, 1, 1).double(),
    )
    x, y = (((2 * v.transpose(1, 2).flatten(0, 1).double() - 1) - shift) / scale for v in (a, b))
    total, features = 0, net.features.double().eval()
    with torch.no_grad():
        for i, layer in enumerate(features):
            x, y = layer(x), layer(y)
            if i in (1, 4, 7, 9, 10, 11, 12):
                unit = [v / (v.pow(2).sum(1, keepdim=True).sqrt() + 1e-8) for v in (x, y)]
                k = [1, 4, 7, 9, 10, 11, 12].index(i)
                total = total + (
                    (unit[0] - unit[1]) ** 2 * heads[f"lin{k}.model.1.weight"].double()
                ).sum(1).mean((1, 2))
    assert lpips(a, b, "squeeze") == pytest.approx(total.mean().item(), rel=1e-4)
    assert lpips(a, a, "squeeze") == 0


def test_lpips_unknown_network():
    with pytest.raises(InputError, match="alex, vgg, squeeze"):
        lpips(clips(), clips(), "resnet")


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize(
    "bad",
    [
        clips()[:0],
        clips(3),
        clips(t=3),
        clips(size=17),
        clips()[0],
        clips() * 255,
        clips() - 0.5,
        torch.where(clips() > 0.99, torch.nan, clips()),
        torch.where(clips() > 0.99, torch.inf, clips()),
    ],
    ids=["empty", "fewer", "short", "size", "dims", "bytes", "negative", "nan", "inf"],
)
def test_pixel_metrics_refuse(metric, bad):
    for pair in (clips(), bad), (bad, clips()):
        with pytest.raises(InputError) as e:
            metric(*pair)
        assert "\n" not in str(e.value)


def test_ssim_refuses_small_frames():
    with pytest.raises(InputError, match="11 x 11"):
        ssim(clips(size=8), clips(size=8))


# --- Frechet distance


@pytest.mark.parametrize("d", [1, 2, 16, 96])
def test_frechet_agrees_with_scipy(d):
    (m1, c1), (m2, c2) = gaussian(d, 1), gaussian(d, 2)
    root = scipy.linalg.sqrtm((c1 @ c2).numpy()).real
    expected = (m1 - m2).pow(2).sum().item() + np.trace(c1.numpy() + c2.numpy() - 2 * root)
    assert frechet_distance(m1, c1, m2, c2) == pytest.approx(expected, rel=1e-9)


def test_frechet_agrees_with_torchmetrics_fid():
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Rows(nn.Module):
        num_features = 12

        def forward(self, x):
            return x[:, 0, 0, :12]

    fid = FrechetInceptionDistance(Rows(), normalize=True, input_img_size=(3, 8, 12))
    fid.set_dtype(torch.float64)
    a, b = (
        torch.rand(300, 3, 8, 12, generator=gen(), dtype=torch.float64),
        torch.rand(200, 3, 8, 12, generator=gen(1), dtype=torch.float64) ** 2,
    )
    fid.update(a, real=True)
    fid.update(b, real=False)
    ours = frechet_distance(
        *(v for x in (a, b) for v in GaussianStats().update(x[:, 0, 0]).finish())
    )
    assert ours == pytest.approx(fid.compute().item(), rel=1e-6)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("rank", [3, 64])
def test_frechet_of_identical_sets_is_zero(scale, rank):
    m, c = gaussian(64, 3, samples=rank + 1)
    m, c = m * scale, c * scale**2
    assert 0 <= frechet_distance(m, c, m.clone(), c.clone()) <= 1e-8 * c.trace().item()


def test_frechet_of_analytic_gaussians():
    z, i = torch.zeros(5).double(), torch.eye(5).double()
    assert frechet_distance(z, i, z + 2, i) == pytest.approx(20, rel=1e-12)
    s, t = torch.tensor([1.0, 2, 3, 4, 5]).double(), torch.tensor([5.0, 1, 0, 2, 7]).double()
    assert frechet_distance(z, torch.diag(s**2), z, torch.diag(t**2)) == pytest.approx(
        (s - t).pow(2).sum().item(), rel=1e-12
    )
    a = torch.tensor([[1.0, 0.6], [0.6, 1.0]]).double()
    b = torch.tensor([[2.0, -0.3], [-0.3, 0.5]]).double()
    product = a @ b  # 2 x 2: Tr sqrt(M) = sqrt(Tr M + 2 sqrt(det M))
    root = math.sqrt(product.trace() + 2 * math.sqrt(product.det()))
    assert frechet_distance(z[:2], a, z[:2], b) == pytest.approx(4.5 - 2 * root, rel=1e-12)


def test_frechet_is_symmetric_and_invariant_to_rotation():
    (m1, c1), (m2, c2) = gaussian(24, 4), gaussian(24, 5)
    d = frechet_distance(m1, c1, m2, c2)
    q = torch.linalg.qr(torch.randn(24, 24, generator=gen(), dtype=torch.float64)).Q
    assert frechet_distance(m2, c2, m1, c1) == pytest.approx(d, rel=1e-12)
    assert frechet_distance(q @ m1, q @ c1 @ q.T, q @ m2, q @ c2 @ q.T) == pytest.approx(
        d, rel=1e-10
    )


def test_frechet_survives_where_ranks_differ():
    "Rank 4 against rank 7 of 200, against the answer in the joint 11-dimensional span."
    g = gen(6)
    basis = torch.linalg.qr(torch.randn(200, 11, generator=g, dtype=torch.float64)).Q
    small = []
    for samples in 5, 8:
        x = torch.randn(samples, 11, generator=g, dtype=torch.float64)
        small.append((x.mean(0), torch.cov(x.T)))
    (m1, c1), (m2, c2) = small
    values = scipy.linalg.eigvals((c1 @ c2).numpy()).real.clip(0)
    expected = (
        (m1 - m2).pow(2).sum().item() + (c1.trace() + c2.trace()).item() - 2 * np.sqrt(values).sum()
    )
    wide = [(basis @ m, basis @ c @ basis.T) for m, c in small]
    assert frechet_distance(*wide[0], *wide[1]) == pytest.approx(expected, rel=1e-5)
    zero = torch.zeros(200)
    assert frechet_distance(zero, torch.zeros(200, 200), zero, torch.zeros(200, 200)) == 0


def test_frechet_refuses():
    m, c = gaussian(4)
    bad = c.clone()
    bad[0, 0] = torch.nan
    lopsided, negative = c.clone(), c - 2 * torch.linalg.eigvalsh(c)[-1] * torch.eye(4)
    lopsided[0, 1] += 1
    for args in (
        (m, c, m[:3], c),
        (m, c, m, c[:3]),
        (m, c, m[:3], c[:3, :3]),
        (m[:0], c[:0, :0], m[:0], c[:0, :0]),
        (m, bad, m, c),
        (m * torch.nan, c, m, c),
        (m, lopsided, m, c),
        (m, c, m, negative),
    ):
        with pytest.raises(InputError):
            frechet_distance(*args)


# --- streaming statistics


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_streaming_equals_one_pass(offset):
    x = torch.randn(301, 9, generator=gen(), dtype=torch.float64) + offset
    s = GaussianStats()
    for part in x.split(17):
        s.update(part)
    mean, cov = s.finish()
    expected = np.cov((x - offset).numpy().T)
    assert s.n == 301 and mean.numpy() == pytest.approx(x.mean(0).numpy(), rel=1e-13, abs=1e-13)
    assert cov.numpy() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_merging_is_order_free_and_takes_empty_parts():
    x = torch.randn(100, 5, generator=gen(), dtype=torch.float64)
    whole = GaussianStats().update(x).finish()
    parts = lambda: (
        [GaussianStats().update(p) for p in (x[:1], x[1:40], x[40:])] + [GaussianStats()]
    )
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 3, 0, 1]):
        p = parts()
        s = GaussianStats()
        for i in order:
            s.merge(p[i])
        assert s.n == 100 and all(
            torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(s.finish(), whole)
        )


def test_stats_of_float32_features_accumulate_in_float64():
    x = torch.randn(1000, 3, generator=gen()) + 1000
    _, cov = GaussianStats().update(x).finish()
    assert cov.dtype == torch.float64 and torch.allclose(cov, torch.cov(x.double().T), rtol=1e-9)


def test_stats_refuse():
    s = GaussianStats().update(torch.ones(1, 3))
    for bad in (
        torch.ones(0, 3),
        torch.ones(3),
        torch.ones(2, 2, 2),
        torch.full((2, 3), torch.nan),
        torch.ones(2, 4),
    ):
        with pytest.raises(InputError):
            s.update(bad)
    assert s.n == 1
    for few in s, GaussianStats():
        with pytest.raises(InputError, match="at least 2"):
            few.finish()


# --- between videos


class Tokens(nn.Module):
    "Patch-grid tokens (B, N, D); D = 3 channels x 2 x 2 pixels."

    name = "patches"

    def forward(self, v):
        return (
            v.unflatten(-1, (-1, 8))
            .unflatten(-3, (-1, 8))[..., :2, :, :2]
            .permute(0, 2, 3, 5, 1, 4, 6)
            .flatten(4)
            .flatten(1, 3)
        )


def test_frechet_video_distance_is_the_distance_of_mean_tokens():
    net = Tokens().train()
    real, fake = clips(40, seed=1), clips(30, seed=2) ** 2
    score = FrechetVideoDistance(net)
    for part in real.split(16):
        score.update(real=part)
    for part in fake.split(7):
        score.update(fake=part)
    expected = frechet_distance(
        *(
            v
            for x in (real, fake)
            for v in (net(x).mean(1).double().mean(0), torch.cov(net(x).mean(1).double().T))
        )
    )
    assert net(real).shape == (40, 16, 12) and score.compute() == pytest.approx(expected, rel=1e-9)
    assert score.name == "frechet[patches]" and net.training
    pooled = FrechetVideoDistance(lambda v: net(v).mean(1), name="pooled")
    pooled.update(real=real, fake=fake)
    assert (
        pooled.compute() == pytest.approx(expected, rel=1e-9) and pooled.name == "frechet[pooled]"
    )


def test_video_distance_is_the_score_in_batches():
    a, b = clips(130, seed=1), clips(205, seed=2)
    extractor = Tokens()
    score = FrechetVideoDistance(extractor)
    score.update(a, b)
    name, value = metrics.video_distance(a, b, extractor)
    assert name == score.name and value == pytest.approx(score.compute(), rel=1e-4) and value > 0


def test_frechet_video_distance_merges_across_processes():
    real, fake = clips(40, seed=1), clips(40, seed=2)
    whole, one, two = (FrechetVideoDistance(Tokens()) for _ in range(3))
    whole.update(real, fake)
    one.update(real[:25], fake[:15])
    two.update(real[25:], fake[15:])
    one.real.merge(two.real)
    one.fake.merge(two.fake)
    assert one.compute() == pytest.approx(whole.compute(), rel=1e-10)


def test_same_set_scores_zero():
    score = FrechetVideoDistance(Tokens())
    score.update(real=clips(40), fake=clips(40))
    assert score.compute() <= 1e-8 * score.real.finish()[1].trace().item()


def test_too_few_samples_are_refused_unless_asked_for():
    score = FrechetVideoDistance(Tokens())
    score.update(real=clips(40), fake=clips(11, seed=1))
    with pytest.raises(InputError, match="11 samples cannot fill 12"):
        score.compute()
    assert (
        score.compute(allow_few=True) > 0
        and score.name == "frechet[patches, only 11 samples for 12 dimensions]"
    )
    score.update(fake=clips(1, seed=2))
    assert score.compute() > 0 and score.name == "frechet[patches]"


def test_frechet_video_distance_refuses():
    score = FrechetVideoDistance(Tokens())
    with pytest.raises(InputError):
        score.compute()
    with pytest.raises(InputError, match="fake"):
        score.update(fake=clips() * torch.nan)
    with pytest.raises(InputError, match="real"):
        score.update(real=clips()[:0])
    score.update(real=clips(1))
    with pytest.raises(InputError):
        score.compute(allow_few=True)


def test_no_score_is_called_fvd():
    assert "fvd" not in FrechetVideoDistance(Tokens()).name.lower()


# --- probe, swap, judge


def test_probe_agrees_with_scikit_learn():
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    x = (
        torch.randn(600, 7, generator=gen(), dtype=torch.float64)
        * torch.logspace(-3, 3, 7).double()
    )
    w = torch.randn(7, 4, generator=gen(1)).double()
    y = (
        x / torch.logspace(-3, 3, 7).double() @ w
        + 0.5 * torch.randn(600, 4, generator=gen(2)).double()
    ).argmax(1)
    ours = linear_probe(x[:400], y[:400], x[400:], y[400:], weight_decay=1e-2)
    scaler = StandardScaler().fit(x[:400])
    theirs = LogisticRegression(C=1 / (1e-2 * 400), tol=1e-8, max_iter=2000).fit(
        scaler.transform(x[:400]), y[:400]
    )
    assert ours["test"] == pytest.approx(
        theirs.score(scaler.transform(x[400:]), y[400:]), abs=0.006
    )
    assert ours["train"] == pytest.approx(
        theirs.score(scaler.transform(x[:400]), y[:400]), abs=0.004
    )
    assert ours["test"] > 0.75 and ours == linear_probe(
        x[:400], y[:400], x[400:], y[400:], weight_decay=1e-2
    )


def test_probe_survives_constant_features_and_unseen_classes():
    x = torch.cat([torch.eye(3).repeat(10, 1), torch.ones(30, 1)], 1)
    y = torch.arange(3).repeat(10)
    assert linear_probe(x, y, x, y)["test"] == 1
    assert linear_probe(x, y, x, torch.where(y == 2, 5, y)) == {
        "test": pytest.approx(2 / 3),
        "train": 1.0,
        "chance": pytest.approx(1 / 3),
    }


def test_probe_works_without_gradients():
    with torch.no_grad():
        assert (
            linear_probe(torch.eye(2), torch.arange(2), torch.eye(2), torch.arange(2))["test"] == 1
        )


def test_probe_refuses():
    x, y = torch.rand(6, 3), torch.arange(6) % 2
    for bad in (
        (x[:0], y[:0], x, y),
        (x, y[:5], x, y),
        (x, y.float(), x, y),
        (x, y, x[:, :2], y),
        (x * torch.nan, y, x, y),
        (x[None], y, x, y),
    ):
        with pytest.raises(InputError):
            linear_probe(*bad)


class Pixels(nn.Module):
    "Tokens are pixel values; the first frame is the appearance. Refuses to be used in training mode."

    config = SimpleNamespace(num_appearance=3 * 8 * 8)

    def encode(self, v):
        assert not self.training
        return SimpleNamespace(indices=(v * 255).round().long().transpose(1, 2).flatten(1))

    def decode(self, i):
        assert not self.training
        return (i.float() / 255).unflatten(1, (-1, 3, 8, 8)).transpose(1, 2)


def test_token_swap_takes_appearance_of_a_and_motion_of_b():
    a, b = ((clips(size=8, seed=s) * 255).round() / 255 for s in (0, 1))
    tokenizer = Pixels().train()
    swapped = token_swap(tokenizer, a, b)
    assert (
        torch.equal(swapped[:, :, :1], a[:, :, :1])
        and torch.equal(swapped[:, :, 1:], b[:, :, 1:])
        and tokenizer.training
    )
    with pytest.raises(InputError):
        token_swap(tokenizer, a, b[:2])


def test_mode_is_restored_after_an_error():
    net = Tokens().train()
    with pytest.raises(RuntimeError):
        FrechetVideoDistance(net).update(real=clips(size=17))
    assert net.training


def test_shipped_classifier_reads_clips_it_never_saw():
    judge = load_factor_classifier()
    f = sample_factors(300, seed=12345)
    accuracy = factor_accuracy(judge, render(f, 8, 32), f.label)
    assert not judge.training and sum(p.numel() for p in judge.parameters()) <= 5e5
    assert accuracy["shape"] >= 0.95 and accuracy["motion"] >= 0.95 and accuracy["class"] >= 0.9


def test_shipped_classifier_has_its_log():
    folder = checkpoint_path("pocket-classifier")
    log = json.loads((folder / "log.json").read_text())
    assert (
        log["held_out"]["shape"] >= 0.85
        and log["held_out"]["motion"] >= 0.85
        and log["loss"][-1] < log["loss"][0] / 5
    )
    assert (folder / "model.safetensors").stat().st_size < 1e6


def test_training_is_repeatable_and_leaves_the_global_generator_alone(tmp_path):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    runs = [
        train_factor_classifier(steps=3, batch=4, held_out=6, seed=s, num_frames=4, size=16)
        for s in (0, 0, 1)
    ]
    assert torch.equal(before, torch.random.get_rng_state())
    same = [
        all(torch.equal(p, q) for p, q in zip(runs[0][0].parameters(), r[0].parameters()))
        for r in runs
    ]
    assert same == [True, True, False] and runs[0][1] == runs[1][1]


def test_classifier_refuses(tmp_path):
    judge = FactorClassifier(4, 16).eval()
    with pytest.raises(InputError, match="trained on clips"):
        judge(clips(t=5))
    with pytest.raises(InputError, match="one label a clip"):
        factor_accuracy(judge, clips(), torch.zeros(3).long())
    with pytest.raises(InputError, match="no FactorClassifier in"):
        load_factor_classifier(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError):
        train_factor_classifier(steps=1, out=tmp_path / "file" / "x")
    assert len(CLASSES) == 112


# --- extractors, protocols, kept statistics


def test_ssim_and_lpips_per_clip_average_to_the_whole():
    a, b = clips(3), clips(3, seed=1)
    each = ssim(a, b, per_clip=True)
    assert each.dtype == torch.float64 and each.mean().item() == pytest.approx(
        ssim(a, b), rel=1e-12
    )
    assert each[1].item() == pytest.approx(ssim(a[1:2], b[1:2]), rel=1e-9)


def test_frechet_keeps_digits_where_sqrtm_loses_them():
    "Tr sqrt(AB) of thin covariances is the nuclear norm of their factors' product; here sqrtm has lost half of its digits, in older SciPy all."
    d, rank = 200, 4
    x, y = (torch.randn(rank, d, generator=gen(s), dtype=torch.float64) for s in (1, 2))
    a, b, zero = x.T @ x, y.T @ y, torch.zeros(d)
    truth = (a.trace() + b.trace() - 2 * torch.linalg.svdvals(x @ y.T).sum()).item()
    with np.errstate(all="ignore"):
        root = scipy.linalg.sqrtm((a @ b).numpy())
    theirs = abs((a.trace() + b.trace()).item() - 2 * np.trace(root).real - truth) / truth
    assert abs(frechet_distance(zero, a, zero, b) - truth) / truth < 1e-12 and not theirs < 1e-9


class Stand(nn.Module):
    def forward(self, x, rescale: bool, resize: bool, return_features: bool):
        if rescale or not resize or not return_features:
            raise ValueError("not as the protocol calls it")
        return x.mean((2, 3, 4))


@pytest.fixture(scope="module")
def i3d_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("i3d") / "i3d.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Stand()).save(str(path))
    return path


def test_i3d_gets_minus_one_to_one_and_only_i3d_is_called_fvd(i3d_file):
    digest = hashlib.sha256(i3d_file.read_bytes()).hexdigest()
    net = load_i3d(i3d_file, sha256=digest)
    x = clips(8, t=10)
    assert (
        torch.allclose(net(x), (2 * x - 1).mean((2, 3, 4)), atol=1e-6)
        and net.name == f"i3d@{digest[:8]}"
    )
    score = FrechetVideoDistance(net)
    score.update(x, clips(8, t=10, seed=1))
    score.compute()
    with pytest.raises(InputError, match="10 frames or more"):
        net(clips(t=9))
    assert score.name == f"FVD[i3d@{digest[:8]}]"
    assert "FVD" not in FrechetVideoDistance(load_extractor("pocket-video")).name


def test_i3d_of_another_hash_is_never_opened(i3d_file, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.jit, "load", lambda *a, **k: pytest.fail("opened"))
    with pytest.raises(InputError, match="code and is not opened"):
        load_i3d(i3d_file)
    monkeypatch.setenv("DERA_I3D", str(i3d_file))
    with pytest.raises(InputError, match="SHA-256"):
        load_extractor("i3d")
    monkeypatch.setenv("DERA_I3D", str(tmp_path / "absent.pt"))
    monkeypatch.setattr(
        torch.hub,
        "download_url_to_file",
        lambda *a, **k: pytest.fail("downloaded without being asked"),
    )
    with pytest.raises(InputError, match="fetch https") as e:
        load_extractor("i3d")
    assert "\n" not in str(e.value)


def test_i3d_download_is_checked(i3d_file, monkeypatch, tmp_path):
    def fetch(url, to, prefix):
        assert "i3d_torchscript" in url and prefix == "bec6519f66ea534e"
        shutil.copy(i3d_file, to)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    with pytest.raises(InputError, match="not bec6519f"):
        load_i3d(tmp_path / "x" / "i3d.pt", download=True)

    def broken(*a):
        raise OSError("no network\nmore")

    monkeypatch.setattr(torch.hub, "download_url_to_file", broken)
    with pytest.raises(InputError, match="could not be fetched .no network."):
        load_i3d(tmp_path / "y.pt", download=True)


def test_extractor_of_a_teacher_is_its_mean_token():
    from dera.teachers import load_teacher

    x = render(sample_factors(5, 1), 8, 32)
    e, t = load_extractor("pocket-video"), load_teacher("pocket-video")
    assert (
        torch.allclose(e(x), t(x).mean(1), atol=1e-6) and e.name == f"pocket-video@{t.fingerprint}"
    )
    for bad in "fvd", "pocket-image":  # an image teacher sees no motion
        with pytest.raises(InputError, match="choose i3d or"):
            load_extractor(bad)
    with pytest.raises(InputError, match="no weights for videomae-base|safetensors"):
        load_extractor("videomae", path="nowhere")


@pytest.mark.parametrize("change", [dict(t=5), dict(size=24)], ids=str)
def test_sets_of_other_clips_are_refused(change):
    score = FrechetVideoDistance(Tokens())
    score.update(real=clips(20))
    with pytest.raises(InputError, match="fake has clips of shape"):
        score.update(fake=clips(20, **change))


def test_constant_clips_are_refused():
    score = FrechetVideoDistance(Tokens())
    with pytest.raises(InputError, match="real: every pixel"):
        score.update(real=torch.zeros(3, 3, 4, 16, 16))
    score.update(real=clips(20), fake=clips(1).expand(20, -1, -1, -1, -1))
    with pytest.raises(InputError, match="all fake clips have the same features"):
        score.compute()
    one = clips(4)
    one[0] = 0
    score.update(real=one)  # a black clip among others is no mistake


def test_features_of_two_extractors_are_never_mixed():
    a, b = FrechetVideoDistance(Tokens(), "one"), FrechetVideoDistance(Tokens(), "two")
    for s in a, b:
        s.update(clips(20), clips(20, seed=1))
    with pytest.raises(InputError, match="one and of two"):
        a.real.merge(b.real)
    a.fake = b.fake
    with pytest.raises(InputError, match="use one extractor"):
        a.compute()
    wide = GaussianStats().update(torch.rand(20, 13, generator=gen()))
    a.fake = wide
    with pytest.raises(InputError, match="12 and 13"):
        a.compute()


def test_protocols_are_those_of_the_papers():
    r, g, h, k = (PROTOCOLS[n] for n in ("larp-rfvd", "larp-gfvd", "heldout", "k600-fp"))
    assert (r.split, r.sampling, r.samples, r.num_frames, r.size) == (
        "train",
        "native",
        9537,
        16,
        128,
    )
    assert (g.split, g.sampling, g.samples) == ("train", "all", 10000) and h.split == "test"
    assert (k.score_size, k.samples, k.given, k.num_frames) == (64, 50000, 5, 16)


def test_a_changed_protocol_says_so_and_a_line_has_everything():
    p = protocol("larp-rfvd", size=64, seed=5)
    e = load_extractor("pocket-video")
    assert (
        p.name == "larp-rfvd changed in size"
        and p.change(num_frames=8).name == "larp-rfvd changed in num_frames, size"
    )
    assert (
        p.change(size=128, seed=0) == PROTOCOLS["larp-rfvd"]
        and p.change(num_frames=8).change(size=128).name == "larp-rfvd changed in num_frames"
    )  # set back
    own = metrics.Protocol("own", None, "all")
    assert (
        own.change(size=64).change(given=2, size=128).name == "own changed in given, size"
    )  # no value to go back to
    assert p.change(size=64) == p and PROTOCOLS["larp-rfvd"].name == "larp-rfvd"
    line = p.describe(e, 100, 90)
    for part in (
        e.name,
        "64",
        "antialias",
        "16 frames",
        "stride 1",
        "native",
        "split train",
        "100 real",
        "90 fake",
        "seed 5",
        "32 x 32",
    ):
        assert part in line, part
    lines = {
        p.change(**c).describe(e, 100, 90)
        for c in (
            {},
            dict(size=65),
            dict(num_frames=8),
            dict(split="test"),
            dict(sampling="uniform"),
            dict(seed=6),
            dict(given=2),
            dict(score_size=32),
        )
    }
    assert (
        len(lines) == 8
        and p.describe(None, 100, 90) not in lines
        and p.describe(e, 100, 91) not in lines
    )
    with pytest.raises(InputError, match="larp-gfvd"):
        protocol("fvd")
    with pytest.raises(InputError, match="num_frames"):
        p.change(frames=8)


def test_rows_of_a_protocol_are_a_seeded_choice():
    p = protocol("heldout", samples=30)
    rows = protocol_rows(p, 100)
    assert (
        rows.unique().numel() == 30 and torch.equal(rows, protocol_rows(p, 100)) and rows.max() > 60
    )  # not the first ones
    assert (
        not torch.equal(rows, protocol_rows(p.change(seed=1), 100))
        and len(protocol_rows(PROTOCOLS["heldout"], 7)) == 7
    )
    assert (
        protocol_rows(p, 20).sort().values.tolist() == list(range(20))
        and protocol_rows(p, 20, repeat=True).bincount(minlength=20).tolist().count(2) == 10
    )
    with pytest.raises(InputError, match="no clips"):
        protocol_rows(p, 0)


def test_kept_statistics_belong_to_their_extractor_and_protocol(tmp_path):
    x = torch.randn(40, 6, generator=gen(), dtype=torch.float64)
    s = GaussianStats("net@1").update(x)
    file = tmp_path / "a" / "s.npz"
    save_stats(file, s, "line")
    again = load_stats(file, "net@1", "line")
    assert (
        again.n == 40
        and again.source == "net@1"
        and all(torch.equal(p, q) for p, q in zip(s.finish(), again.finish()))
    )
    again.update(x)
    assert torch.allclose(again.finish()[0], x.mean(0)) and again.n == 80
    with pytest.raises(InputError, match="another extractor: net@1"):
        load_stats(file, "net@2", "line")
    with pytest.raises(InputError, match="another protocol"):
        load_stats(file, "net@1", "other")
    with pytest.raises(InputError, match="no samples"):
        save_stats(file, GaussianStats("net@1"), "line")
    assert load_stats(file, "net@1", "line").n == 40  # what was there stays


def test_kept_statistics_are_never_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    np.savez(
        tmp_path / "evil.npz",
        n=np.array([Evil()], dtype=object),
        mean=np.zeros(2),
        scatter=np.zeros((2, 2)),
        source="",
        protocol="",
    )
    (tmp_path / "text.npz").write_text("no zip")
    for name in "evil", "text", "absent":
        with pytest.raises(InputError, match="holds no statistics"):
            load_stats(tmp_path / f"{name}.npz", "", "")
    assert not (tmp_path / "ran").exists()


def test_extrapolation_removes_the_bias_of_few_samples():
    g = gen(7)
    true = 12 * (0.5**2 + 0.2**2)
    runs = [
        [
            torch.randn(120, 12, generator=g, dtype=torch.float64),
            1.5 * torch.randn(120, 12, generator=g, dtype=torch.float64) + 0.2,
        ]
        for _ in range(6)
    ]
    plain = np.mean(
        [
            frechet_distance(*(v for x in r for v in GaussianStats().update(x).finish()))
            for r in runs
        ]
    )
    fits = [extrapolated_distance(*r) for r in runs]
    value = np.mean([f["value"] for f in fits])
    assert plain > 1.08 * true and abs(value - true) < 0.5 * (plain - true)
    for f in fits:  # the line is the least squares line of its points
        slope, value = np.polyfit([1 / n for n, _ in f["points"]], [d for _, d in f["points"]], 1)
        assert (
            f["value"] == pytest.approx(value)
            and f["slope"] == pytest.approx(slope)
            and f["points"][-1][0] == 120
        )
    same = extrapolated_distance(
        runs[0][0], runs[0][0] + 1, paired=True
    )  # pairs: no noise at any size
    assert same["value"] == pytest.approx(12, rel=1e-6) and same["slope"] == pytest.approx(
        0, abs=1e-3
    )
    with pytest.raises(InputError, match="too few"):
        extrapolated_distance(runs[0][0][:20], runs[0][1])
    with pytest.raises(InputError, match="no pairs"):
        extrapolated_distance(runs[0][0][:100], runs[0][1], paired=True)


# --- decoupling


def test_factor_classes_are_equal_bins_of_what_varies():
    f = sample_factors(4000, 3)
    c = factor_classes(f)
    assert "texture" not in c and set(factor_classes(sample_factors(99, 3, "textured"))) - set(
        c
    ) == {"texture"}
    assert c["hue"].tolist() == (6 * f.hue).long().tolist() and torch.equal(c["motion"], f.motion)
    assert all(
        v.dtype == torch.int64 and v.bincount().min() > 0.8 * 4000 / len(v.unique())
        for v in c.values()
    )


def test_probes_of_many_factors_agree_with_one_at_a_time():
    x = torch.randn(900, 9, generator=gen())
    classes = dict(a=(x[:, 0] + 0.5 * x[:, 1] > 0).long(), b=x[:, 2:6].argmax(1))
    cut = {k: y[:600] for k, y in classes.items()}
    test = {k: y[600:] for k, y in classes.items()}
    found = probe_accuracy(fit_probes(x[:600], cut), x[600:], test)
    for k in classes:
        assert found[k] == pytest.approx(
            linear_probe(x[:600], cut[k], x[600:], test[k], weight_decay=1e-2)["test"], abs=0.02
        )
    twice = [probe_accuracy(fit_probes(x[:600], cut, 8, seed=s), x[600:], test) for s in (3, 3)]
    assert twice[0] == twice[1]
    for bad in (x * torch.nan, cut), (x[:600], classes), (x[:600], {}), (x[:0], {}):
        with pytest.raises(InputError):
            fit_probes(*bad)


def test_probes_leave_the_global_generator_alone_and_work_without_gradients():
    torch.manual_seed(4)
    before = torch.random.get_rng_state()
    x = torch.randn(50, 3, generator=gen())
    with torch.no_grad():
        fit_probes(x, dict(a=(x[:, 0] > 0).long()), 4)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.fixture(scope="module")
def verdict():
    return Verdict(n=400)


class Known(nn.Module):
    "A tokenizer that knows its clips: token 0 names the appearance and token 1 the motion; or, entangled, token 1 names both."

    def __init__(self, factors, entangled=False):
        super().__init__()
        self.factors, self.entangled = factors, entangled
        self.bank = render(factors, 8, 32).flatten(1)
        self.config = SimpleNamespace(
            num_appearance=1, num_tokens=2, num_codes=2, codebook_size=len(factors)
        )

    def encode(self, video):
        i = torch.cdist(video.flatten(1), self.bank).argmin(1)
        return SimpleNamespace(
            indices=torch.stack([i, i], 1),
            latents=F.one_hot(torch.stack([i, i], 1), len(self.bank)).float(),
        )

    def decode(self, indices):
        a, m = indices.unbind(1)
        return render(
            self.factors[m if self.entangled else a].swap(motion_of=self.factors[m]), 8, 32
        )


def _join(*parts):
    return Factors(**{k: torch.cat([getattr(p, k) for p in parts]) for k in vars(parts[0])})


def test_swap_study_tells_decoupled_from_entangled(verdict):
    a, b = sample_factors(40, 1), sample_factors(40, 2)
    both = _join(a, b, a.swap(motion_of=b))
    good, bad = (
        swap_study(Known(both, entangled), a, b, verdict, few=40) for entangled in (False, True)
    )
    assert (
        good["swapped"]["psnr"] > 80
        and bad["swapped"]["psnr"] < 25
        and good["truth"]["psnr"] is None
    )
    for k in good["truth"].keys() - {
        "psnr"
    }:  # perfect tokens read as the truth does, entangled ones as B
        assert good["swapped"][k] == good["truth"][k] and bad["swapped"][k] == pytest.approx(
            bad["B"][k], abs=1e-6
        )
    assert good["swapped"]["shape"][0] > 0.9 and bad["swapped"]["shape"] == (
        pytest.approx(0, abs=0.1),
        pytest.approx(1, abs=0.1),
    )
    assert good["A"]["motion"][0] < 0.1 < 0.9 < good["B"]["motion"][0]
    assert max(good["random_codes"][k][0] for k in ("shape", "motion")) < 0.4


def test_share_study_blames_the_right_stream(verdict):
    f = sample_factors(30, 5)
    found = share_study(Known(f), f, verdict, shares=(0, 1.0))
    look, move = found["appearance"], found["motion"]
    assert look[0] == move[0] and look[0]["shape"] > 0.9 and look[0]["motion"] > 0.9
    assert (
        look[1]["shape"] < 0.4
        and look[1]["motion"] > 0.9
        and move[1]["shape"] > 0.8
        and move[1]["motion"] < 0.4
    )


def test_token_groups_and_probe_study():
    tokenizer, f = Known(sample_factors(20, 6)), sample_factors(200, 8)
    look, move = (F.one_hot(v).float() for v in (f.shape, f.motion))
    noise = torch.randn(200, 4, generator=gen())
    found = probe_study(
        dict(appearance=torch.cat([look, noise], 1), motion=torch.cat([move, noise], 1)),
        f,
        hidden=16,
    )
    own = found["factors"]
    assert (
        own["appearance"]["shape"]["linear"] > 0.95 > 0.4 > own["appearance"]["motion"]["linear"]
        and own["motion"]["motion"]["linear"] > 0.9
    )
    assert (
        found["pairs"]["appearance"]["held_out"]["shape"] > 0.95 and found["chance"]["shape"] < 0.35
    )
    groups, error = metrics._token_groups(tokenizer, render(tokenizer.factors, 8, 32))
    assert (
        error.max() < 1e-10
        and torch.equal(groups["appearance"].argmax(1), torch.arange(20))
        and groups["motion"].shape == (20, 20)
    )


@pytest.mark.parametrize("kind", ["DeRATokenizer", "QueryTokenizer", "GridTokenizer"])
def test_load_tokenizer_finds_the_class(kind, tmp_path):
    from dera import query, streams

    made = (getattr(streams, kind, None) or getattr(query, kind))(
        query.TokenizerConfig.preset("tiny", encoder_depth=1, decoder_depth=1)
    )
    made.save_pretrained(tmp_path)
    assert type(load_tokenizer(tmp_path)).__name__ == kind
    with pytest.raises(InputError, match="no tokenizer in"):
        load_tokenizer(tmp_path / "absent")


def test_decoupling_study_goes_on_where_it_was(tmp_path, monkeypatch):
    calls = []
    shipped = checkpoint_path("pocket-tokenizer-tiny")
    out = tmp_path / "d.json"
    monkeypatch.setattr(metrics, "Verdict", lambda **k: "verdict")

    def once(tokenizer, verdict, seed, **sizes):
        calls.append((seed, sizes))
        return dict(seed=seed) if len(calls) != 3 else (_ for _ in ()).throw(KeyboardInterrupt)

    monkeypatch.setattr(metrics, "study_once", once)
    with pytest.raises(KeyboardInterrupt):
        decoupling_study(dict(a=shipped), out, pairs=5)
    found = decoupling_study(dict(a=shipped), out, pairs=5)
    assert [c[0] for c in calls] == [0, 1, 2, 2] and found["rows"]["a"]["seeds"] == {
        str(s): dict(seed=s) for s in range(3)
    }
    decoupling_study(dict(b=shipped), out, pairs=5)
    assert len(calls) == 7 and set(json.loads(out.read_text())["rows"]) == {"a", "b"}
    decoupling_study(dict(a=shipped, b=shipped), out, pairs=5)
    assert len(calls) == 7
    decoupling_study(dict(a=shipped), out, seeds=(0,), pairs=6)
    assert len(calls) == 8  # other sizes: measured again
    assert "6 swapped pairs" in json.loads(out.read_text())["protocol"]
    with pytest.raises(InputError, match="no tokenizers"):
        decoupling_study({}, out)


def test_study_refuses_other_clips():
    from dera.streams import DeRATokenizer, TokenizerConfig

    with pytest.raises(InputError, match="8 x 32 x 32"):
        study_once(DeRATokenizer(TokenizerConfig.preset("tiny", num_frames=4)), None, 0)


# --- real video


def test_h264_is_repeatable_and_pays_for_quality():
    x = render(sample_factors(1, 4), 8, 32)[0]
    low, high = h264(x), h264(x, 15)
    again = h264(x)
    assert low[1] == again[1] and torch.equal(low[0], again[0]) and low[0].shape == x.shape
    assert (
        high[1] > 2 * low[1] > 1000
        and psnr(high[0][None], x[None]) > psnr(low[0][None], x[None]) + 4
    )


def test_reconstruct_beside_h264():
    from dera.runtime.checkpoints import load_model
    from dera.streams import DeRATokenizer

    tokenizer = load_model(DeRATokenizer, checkpoint_path("pocket-tokenizer-tiny"))
    x = render(sample_factors(2, 4), 8, 32)
    r = reconstruct(tokenizer, x)
    assert r["bits"] == [576, 576] and r["psnr"] == pytest.approx(
        psnr(tokenizer(x).video.detach().clamp(0, 1), x, per_clip=True).tolist(), abs=1e-3
    )
    assert r["psnr_h264"][1] == pytest.approx(psnr(r["h264"][1:], x[1:])) and r["bits_h264"] == [
        h264(v)[1] for v in x
    ]
    with pytest.raises(InputError, match="video"):
        reconstruct(tokenizer, x * torch.nan)


# --- evaluation


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    from dera.pocket import write_dataset

    root = tmp_path_factory.mktemp("world") / "data"
    write_dataset(root, 80, seed=3)
    return root


@pytest.fixture(scope="module")
def shipped():
    from dera.runtime.checkpoints import load_model
    from dera.streams import DeRATokenizer

    return load_model(DeRATokenizer, checkpoint_path("pocket-tokenizer-tiny"))


def _uniform(name, **changes):
    return protocol(name, sampling="uniform", **changes)


def test_evaluate_tokenizer_against_the_metrics_themselves(world, shipped, tmp_path):
    from dera.data import VideoClips
    from dera.quantize import codebook_stats

    result = evaluate_tokenizer(shipped, world, tmp_path, _uniform("larp-rfvd"))
    e = load_extractor()
    data = VideoClips(world, 8, 32, "uniform", split="train", seed=0)
    x = torch.stack([d["video"] for d in data])
    with torch.no_grad():
        out = shipped(x)
    y = out.video.clamp(0, 1)
    v = result["values"]
    (frechet,) = (k for k in v if k.startswith("frechet"))
    assert v["psnr"] == pytest.approx(psnr(y, x), abs=1e-4) and v["ssim"] == pytest.approx(
        ssim(y, x), abs=1e-5
    )
    assert v["psnr_mean_of_clips"] == pytest.approx(
        psnr(y, x, per_clip=True).mean().item(), abs=1e-4
    )
    score = FrechetVideoDistance(e)
    score.update(x, y)
    assert v[frechet] == pytest.approx(score.compute(allow_few=True), rel=1e-3)
    assert frechet == score.name == f"frechet[{e.name}, only 64 samples for 96 dimensions]"
    assert v["code_usage"] == pytest.approx(
        codebook_stats(out.encoded.indices, 512)["usage"], abs=0.005
    )
    assert (
        len(result["clips"]) == 64
        and "split train" in result["protocol"]
        and e.name in result["protocol"]
    )
    held = result["held_out"]
    assert (
        "split test" in held["protocol"]
        and held["values"]["psnr"] != v["psnr"]
        and len(held["clips"]) == 16
    )
    text = evaluation_table(result)
    assert "split test" in text and f"{v['psnr']:.4f}" in text and "held-out" in text

    def no(x):
        raise AssertionError(f"{x} is not JSON")

    stored = json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=no)
    assert stored["values"]["psnr"] == v["psnr"]
    page = (tmp_path / "report.html").read_text()
    worst = min(result["clips"], key=lambda c: c["psnr"])
    assert (
        "Worst" in page
        and "Best" in page
        and worst["file"].replace("_", " ") in page.replace("<wbr>", "")
        and page.count("data:image/png") == 2
        and "http://" not in page
        and "https://" not in page
    )
    assert b"acTL" in base64.b64decode(re.search(r'base64,([^"]+)', page)[1])  # they move


def test_evaluation_goes_on_and_any_number_of_processes_agrees(
    world, shipped, tmp_path, monkeypatch
):
    p = _uniform("heldout", split="train")
    calls = []
    real = metrics._tokenizer_part

    def stopping(rows, **k):
        calls.append(rows)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(rows, **k)

    monkeypatch.setattr(metrics, "_tokenizer_part", stopping)
    with pytest.raises(KeyboardInterrupt):
        evaluate_tokenizer(shipped, world, tmp_path / "a", p)
    found = evaluate_tokenizer(shipped, world, tmp_path / "a", p)
    train_calls = [c for c in calls if len(c) in (50, 14)]
    monkeypatch.undo()
    whole = evaluate_tokenizer(shipped, world, tmp_path / "b", p)
    two = evaluate_tokenizer(shipped, world, tmp_path / "c", p, workers=2)
    assert [len(c) for c in train_calls] == [50, 14, 14]  # the first part was kept
    for other in found, two:
        assert other["values"] == {
            k: pytest.approx(v, rel=1e-5) for k, v in whole["values"].items()
        }


def test_a_folder_of_another_evaluation_is_refused(world, shipped, tmp_path):
    evaluate_tokenizer(shipped, world, tmp_path, _uniform("heldout", samples=4))
    for p in _uniform("heldout", samples=5), _uniform("heldout", samples=4, seed=1):
        with pytest.raises(InputError, match="another evaluation"):
            evaluate_tokenizer(shipped, world, tmp_path, p)
    (part,) = (tmp_path / "parts").glob("part-*")
    part.write_text("broken")
    with pytest.raises(InputError, match="damaged"):
        evaluate_tokenizer(shipped, world, tmp_path, _uniform("heldout", samples=4))


def test_evaluation_of_bad_input(world, shipped, tmp_path):
    import copy

    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no videos"):
        evaluate_tokenizer(
            shipped, tmp_path / "empty", tmp_path / "a", _uniform("heldout", split=None)
        )
    with pytest.raises(InputError, match="1 samples have no covariance"):
        evaluate_tokenizer(shipped, world, tmp_path / "b", _uniform("heldout", samples=1))
    broken = copy.deepcopy(shipped)
    broken.out.bias.data[:] = torch.nan
    with pytest.raises(InputError, match="NaN") as e:
        evaluate_tokenizer(broken, world, tmp_path / "c", _uniform("heldout", samples=4), workers=2)
    assert "\n" not in str(e.value)
    alone = tmp_path / "plain"
    alone.mkdir()
    [shutil.copy(f, alone) for f in sorted(world.rglob("*.mp4"))[:4]]
    with pytest.raises(InputError, match="split"):
        evaluate_tokenizer(shipped, alone, tmp_path / "d", _uniform("heldout"))
    assert (
        len(
            evaluate_tokenizer(shipped, alone, tmp_path / "e", _uniform("heldout", split=None))[
                "clips"
            ]
        )
        == 4
    )


def test_evaluate_generator(world, shipped, tmp_path, monkeypatch):
    from dera.ar import Generator
    from dera.runtime.checkpoints import load_model

    generator = load_model(Generator, checkpoint_path("pocket-generator-tiny"))
    p = protocol("larp-gfvd", samples=6)  # chunks
    result = evaluate_generator(generator, shipped, world, tmp_path / "a", p, guidance=1.5)
    (name,) = (k for k in result["values"] if k.startswith("frechet"))
    with torch.no_grad():
        video = shipped.decode(
            generator.generate(labels=torch.arange(6), guidance=1.5, seed=list(range(6)))
        ).clamp(0, 1)
    from dera.data import VideoClips

    data = VideoClips(world, 8, 32, "all", split="train", seed=0)
    rows = protocol_rows(p, len(data))
    assert len(data) == 128
    e = load_extractor()
    real = torch.stack([data[i]["video"] for i in rows.tolist()])
    score = FrechetVideoDistance(e)
    score.update(real, video)
    assert (
        result["values"][name] == pytest.approx(score.compute(allow_few=True), rel=1e-3)
        and "guidance 1.5" in result["protocol"]
        and "6 real and 6 fake" in result["protocol"]
    )
    assert (
        "split test" in result["held_out"]["protocol"]
        and len(list((tmp_path / "a").glob("reference-*.npz"))) == 2
        and len(result["clips"]) == 6
    )
    monkeypatch.setattr(
        metrics, "_real_part", lambda *a, **k: pytest.fail("the reference was computed again")
    )
    assert (
        evaluate_generator(generator, shipped, world, tmp_path / "a", p, guidance=1.5)["values"]
        == result["values"]
    )
    for name, codes in ("another", 512), ("", 500):  # one that names none must fit in size
        generator.config.tokenizer, generator.config.vocab_size = name, codes
        with pytest.raises(InputError, match="another tokenizer"):
            evaluate_generator(generator, shipped, world, tmp_path / "b", p)


def test_evaluate_prediction_scores_the_predicted_frames_only(world, shipped, tmp_path):
    from dera.ar import Generator, GeneratorConfig

    torch.manual_seed(0)
    generator = Generator(
        GeneratorConfig.preset(
            "tiny", vocab_size=512, num_tokens=64, num_classes=1, prefix_tokens=64, depth=1
        )
    ).eval()
    p = _uniform("k600-fp", split="test", samples=20, score_size=0)
    result = evaluate_prediction(generator, shipped, world, tmp_path / "a", p)
    from dera.data import VideoClips

    data = VideoClips(world, 8, 32, "uniform", split="test", seed=0)
    rows = protocol_rows(p, 16, repeat=True).tolist()
    assert len(rows) == 20
    x = torch.stack([data[i]["video"] for i in rows])
    known = x[:, :, [0, 1, 2, 3, 4, 4, 4, 4]]
    with torch.no_grad():
        y = shipped.decode(
            generator.generate(prefix=shipped.encode(known).indices, seed=list(range(20)))
        ).clamp(0, 1)
    assert (
        result["values"]["psnr"] == pytest.approx(psnr(y[:, :, 5:], x[:, :, 5:]), abs=1e-3)
        and "5 of them given" in result["protocol"]
    )
    y[:, :, :5] = x[:, :, :5]
    score = FrechetVideoDistance(load_extractor())
    score.update(x, y)
    assert [v for k, v in result["values"].items() if "frechet" in k] == [
        pytest.approx(score.compute(allow_few=True), rel=1e-3)
    ]
    small = evaluate_prediction(generator, shipped, world, tmp_path / "b", p.change(score_size=16))
    assert (
        "scored at 16 x 16" in small["protocol"]
        and small["values"]["psnr"] > result["values"]["psnr"]
    )
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(InputError, match="no frames to continue"):
        evaluate_prediction(generator, shipped, world, tmp_path / "a", p.change(given=0))
