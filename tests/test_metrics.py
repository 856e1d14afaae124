"Each metric against a float64 reference, an oracle library or a known answer; and what each must refuse."

import hashlib
import json
import math
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import torch
from torch import nn

from dera.metrics import (
    FactorClassifier,
    FrechetVideoDistance,
    GaussianStats,
    baselines,
    extrapolated_distance,
    factor_accuracy,
    frechet_distance,
    linear_probe,
    load_extractor,
    load_factor_classifier,
    load_i3d,
    load_tokenizer,
    lpips,
    missing_lpips,
    psnr,
    ssim,
    token_swap,
    video_distance,
)
from dera.pocket import CLASSES, MOTIONS, render, sample_factors
from dera.runtime.checkpoints import checkpoint_path
from dera.runtime.errors import InputError
from dera.runtime.extractors import Extractor
from dera.runtime.measuring import computing_in
from dera.runtime.statistics import load_stats, save_stats
from dera.tools.factor_classifier import train_factor_classifier


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def clips(n=4, t=4, size=16, seed=0):
    return torch.rand(n, 3, t, size, size, generator=gen(seed))


def gaussian(d, seed=0, samples=None):
    "Mean and covariance of random, correlated data."
    x = torch.randn(samples or 20 * d, d, generator=gen(seed), dtype=torch.float64)
    x = x @ torch.randn(d, d, generator=gen(seed + 100), dtype=torch.float64)
    x = x + torch.randn(d, generator=gen(seed + 200), dtype=torch.float64)
    return x.mean(0), torch.cov(x.T).reshape(d, d)


def moments(*sets):
    "Mean, covariance, mean, covariance of sets of features."
    return [value for x in sets for value in GaussianStats().update(x).finish()]


# --- PSNR, SSIM, LPIPS


def test_psnr_is_of_the_mean_error():
    from torchmetrics.functional.image import peak_signal_noise_ratio

    a, b = clips(5), clips(5, seed=1)
    b[0] = a[0] + 0.001 * (b[0] - a[0])
    difference = a.double().numpy() - b.double().numpy()
    errors = (difference**2).reshape(5, -1).mean(1)
    assert psnr(a, b) == pytest.approx(-10 * math.log10(errors.mean()), abs=1e-4)
    assert psnr(a, b) == pytest.approx(
        peak_signal_noise_ratio(a, b, data_range=1.0).item(), abs=1e-4
    )
    assert psnr(a, b, per_clip=True).numpy() == pytest.approx(-10 * np.log10(errors), abs=1e-2)
    assert psnr(a, b, per_clip=True).mean() > psnr(a, b) + 5
    assert psnr(a, a) == math.inf


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
    window = np.exp(-(r**2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2

    def blur(v):
        return scipy.ndimage.correlate(v, window, mode="mirror")

    mx, my = blur(x), blur(y)
    vx, vy, covariance = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    top = (2 * mx * my + 1e-4) * (2 * covariance + 9e-4)
    return (top / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))).mean()


def test_ssim_against_float64_reference():
    a = render(sample_factors(3, seed=1), 3, 24)
    b = (a + 0.1 * torch.randn(a.shape, generator=gen())).clamp(0, 1)
    planes = zip(a.double().numpy().reshape(-1, 24, 24), b.double().numpy().reshape(-1, 24, 24))
    assert ssim(a, b) == pytest.approx(np.mean([reference_ssim(x, y) for x, y in planes]), abs=2e-4)
    assert ssim(a, a) == pytest.approx(1, abs=1e-6)


def test_ssim_per_clip_averages_to_the_whole_and_does_not_depend_on_the_batch():
    a, b = clips(19), clips(19, seed=1)
    each = ssim(a, b, per_clip=True)
    assert each.dtype == torch.float64
    assert each.mean().item() == pytest.approx(ssim(a, b), rel=1e-12)
    for row in (1, 17):
        assert each[row].item() == pytest.approx(ssim(a[[row]], b[[row]]), rel=1e-6)
    with pytest.raises(InputError, match="11 x 11"):
        ssim(clips(size=8), clips(size=8))


@pytest.fixture
def hub(tmp_path):
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path))
    yield tmp_path
    torch.hub.set_dir(before)


def test_lpips_never_downloads(hub, monkeypatch):
    def download(*args, **kwargs):
        pytest.fail("tried to download")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for net in ("alex", "vgg", "squeeze"):
        with pytest.raises(InputError, match=f"LPIPS-{net}.*weights.*python -c"):
            lpips(clips(), clips(), net)
        assert str(hub) in missing_lpips(net)
    with pytest.raises(InputError, match="alex, vgg, squeeze"):
        lpips(clips(), clips(), "resnet")


def test_lpips_is_the_named_network(hub):
    "With stand-in weights in the cache: the formula, recomputed in float64 from torchvision's network."
    import torchvision
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    torch.manual_seed(0)
    net = torchvision.models.squeezenet1_1(weights=None)
    (hub / "checkpoints").mkdir()
    url = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url
    torch.save(net.state_dict(), hub / "checkpoints" / url.rsplit("/")[-1])
    a, b = clips(2, 2, 64), clips(2, 2, 64, seed=1)
    heads = LearnedPerceptualImagePatchSimilarity("squeeze").net.state_dict()
    shift = torch.tensor([-0.030, -0.088, -0.188]).reshape(3, 1, 1).double()
    scale = torch.tensor([0.458, 0.448, 0.450]).reshape(3, 1, 1).double()
    x, y = (((2 * v.transpose(1, 2).flatten(0, 1).double() - 1) - shift) / scale for v in (a, b))
    taps = (1, 4, 7, 9, 10, 11, 12)
    total = 0
    with torch.no_grad():
        for i, layer in enumerate(net.features.double().eval()):
            x, y = layer(x), layer(y)
            if i in taps:
                unit = [v / (v.pow(2).sum(1, keepdim=True).sqrt() + 1e-8) for v in (x, y)]
                head = heads[f"lin{taps.index(i)}.model.1.weight"].double()
                total = total + ((unit[0] - unit[1]) ** 2 * head).sum(1).mean((1, 2))
    assert lpips(a, b, "squeeze") == pytest.approx(total.mean().item(), rel=1e-4)
    assert lpips(a, b, "squeeze", per_clip=True).shape == (2,)
    assert lpips(a, a, "squeeze") == 0


def test_pixel_metrics_refuse():
    good = clips()
    bad = dict(
        empty=good[:0],
        fewer=clips(3),
        short=clips(t=3),
        size=clips(size=17),
        dims=good[0],
        bytes=good * 255,
        negative=good - 0.5,
        nan=torch.where(good > 0.99, torch.nan, good),
        inf=torch.where(good > 0.99, torch.inf, good),
    )
    for metric in (psnr, ssim):
        for name, video in bad.items():
            for pair in ((good, video), (video, good)):
                with pytest.raises(InputError) as error:
                    metric(*pair)
                assert "\n" not in str(error.value), name


def test_float32_switches_tf32_off_and_back():
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    with computing_in("float32"):
        assert not any(flag.allow_tf32 for flag in flags)
    with computing_in("tf32"):
        assert all(flag.allow_tf32 for flag in flags)
    with computing_in("bf16"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert [flag.allow_tf32 for flag in flags] == before
    with pytest.raises(InputError, match="float32, tf32, bf16"), computing_in("fp8"):
        pass


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
    a = torch.rand(300, 3, 8, 12, generator=gen(), dtype=torch.float64)
    b = torch.rand(200, 3, 8, 12, generator=gen(1), dtype=torch.float64) ** 2
    fid.update(a, real=True)
    fid.update(b, real=False)
    ours = frechet_distance(*moments(a[:, 0, 0], b[:, 0, 0]))
    assert ours == pytest.approx(fid.compute().item(), rel=1e-6)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("rank", [3, 64])
def test_frechet_of_identical_sets_is_zero(scale, rank):
    m, c = gaussian(64, 3, samples=rank + 1)
    m, c = m * scale, c * scale**2
    assert 0 <= frechet_distance(m, c, m.clone(), c.clone()) <= 1e-8 * c.trace().item()


def test_frechet_of_analytic_gaussians():
    zero, eye = torch.zeros(5).double(), torch.eye(5).double()
    assert frechet_distance(zero, eye, zero + 2, eye) == pytest.approx(20, rel=1e-12)
    s, t = torch.tensor([1.0, 2, 3, 4, 5]).double(), torch.tensor([5.0, 1, 0, 2, 7]).double()
    found = frechet_distance(zero, torch.diag(s**2), zero, torch.diag(t**2))
    assert found == pytest.approx((s - t).pow(2).sum().item(), rel=1e-12)
    a = torch.tensor([[1.0, 0.6], [0.6, 1.0]]).double()
    b = torch.tensor([[2.0, -0.3], [-0.3, 0.5]]).double()
    product = a @ b  # 2 x 2: Tr sqrt(M) = sqrt(Tr M + 2 sqrt(det M))
    root = math.sqrt(product.trace() + 2 * math.sqrt(product.det()))
    found = frechet_distance(zero[:2], a, zero[:2], b)
    assert found == pytest.approx(4.5 - 2 * root, rel=1e-12)


def test_frechet_is_symmetric_and_invariant_to_rotation():
    (m1, c1), (m2, c2) = gaussian(24, 4), gaussian(24, 5)
    d = frechet_distance(m1, c1, m2, c2)
    q = torch.linalg.qr(torch.randn(24, 24, generator=gen(), dtype=torch.float64)).Q
    assert frechet_distance(m2, c2, m1, c1) == pytest.approx(d, rel=1e-12)
    turned = frechet_distance(q @ m1, q @ c1 @ q.T, q @ m2, q @ c2 @ q.T)
    assert turned == pytest.approx(d, rel=1e-10)


def test_frechet_survives_where_ranks_differ():
    "Rank 4 against rank 7 of 200, against the answer in the joint 11-dimensional span."
    g = gen(6)
    basis = torch.linalg.qr(torch.randn(200, 11, generator=g, dtype=torch.float64)).Q
    small = []
    for samples in (5, 8):
        x = torch.randn(samples, 11, generator=g, dtype=torch.float64)
        small.append((x.mean(0), torch.cov(x.T)))
    (m1, c1), (m2, c2) = small
    values = scipy.linalg.eigvals((c1 @ c2).numpy()).real.clip(0)
    shift = (m1 - m2).pow(2).sum().item()
    expected = shift + (c1.trace() + c2.trace()).item() - 2 * np.sqrt(values).sum()
    wide = [(basis @ m, basis @ c @ basis.T) for m, c in small]
    assert frechet_distance(*wide[0], *wide[1]) == pytest.approx(expected, rel=1e-5)
    zero = torch.zeros(200)
    assert frechet_distance(zero, torch.zeros(200, 200), zero, torch.zeros(200, 200)) == 0


def test_frechet_keeps_digits_where_sqrtm_loses_them():
    """Tr sqrt(AB) of thin covariances is the nuclear norm of their factors' product;
    here sqrtm has lost half of its digits, in older SciPy all."""
    d, rank = 200, 4
    x, y = (torch.randn(rank, d, generator=gen(s), dtype=torch.float64) for s in (1, 2))
    a, b, zero = x.T @ x, y.T @ y, torch.zeros(d)
    traces = (a.trace() + b.trace()).item()
    truth = traces - 2 * torch.linalg.svdvals(x @ y.T).sum().item()
    with np.errstate(all="ignore"):
        root = scipy.linalg.sqrtm((a @ b).numpy())
    theirs = abs(traces - 2 * np.trace(root).real - truth) / truth
    assert abs(frechet_distance(zero, a, zero, b) - truth) / truth < 1e-12
    assert not theirs < 1e-9


def test_frechet_refuses():
    m, c = gaussian(4)
    with_nan, lopsided = c.clone(), c.clone()
    with_nan[0, 0] = torch.nan
    lopsided[0, 1] += 1
    negative = c - 2 * torch.linalg.eigvalsh(c)[-1] * torch.eye(4)
    for args in (
        (m, c, m[:3], c),
        (m, c, m, c[:3]),
        (m, c, m[:3], c[:3, :3]),
        (m[:0], c[:0, :0], m[:0], c[:0, :0]),
        (m, with_nan, m, c),
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
    stats = GaussianStats()
    for part in x.split(17):
        stats.update(part)
    mean, cov = stats.finish()
    assert stats.n == 301
    assert mean.numpy() == pytest.approx(x.mean(0).numpy(), rel=1e-13, abs=1e-13)
    assert cov.numpy() == pytest.approx(np.cov((x - offset).numpy().T), rel=1e-9, abs=1e-9)


def test_merging_is_order_free_and_takes_empty_parts():
    x = torch.randn(100, 5, generator=gen(), dtype=torch.float64)
    mean, cov = GaussianStats().update(x).finish()
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 3, 0, 1]):
        parts = [GaussianStats().update(part) for part in (x[:1], x[1:40], x[40:])]
        parts.append(GaussianStats())
        merged = GaussianStats()
        for i in order:
            merged.merge(parts[i])
        assert merged.n == 100
        assert torch.allclose(merged.finish()[0], mean, rtol=1e-12, atol=1e-14)
        assert torch.allclose(merged.finish()[1], cov, rtol=1e-12, atol=1e-14)


def test_stats_of_float32_features_accumulate_in_float64():
    x = torch.randn(1000, 3, generator=gen()) + 1000
    _, cov = GaussianStats().update(x).finish()
    assert cov.dtype == torch.float64
    assert torch.allclose(cov, torch.cov(x.double().T), rtol=1e-9)


def test_stats_refuse():
    stats = GaussianStats().update(torch.ones(1, 3))
    for bad in (
        torch.ones(0, 3),
        torch.ones(3),
        torch.ones(2, 2, 2),
        torch.full((2, 3), torch.nan),
        torch.ones(2, 4),
    ):
        with pytest.raises(InputError):
            stats.update(bad)
    assert stats.n == 1
    for few in (stats, GaussianStats()):
        with pytest.raises(InputError, match="at least 2"):
            few.finish()


def test_kept_statistics_belong_to_their_extractor_and_protocol(tmp_path):
    x = torch.randn(40, 6, generator=gen(), dtype=torch.float64)
    stats = GaussianStats("net@1").update(x)
    file = tmp_path / "a" / "s.npz"
    save_stats(file, stats, "line")
    again = load_stats(file, "net@1", "line")
    assert again.n == 40 and again.source == "net@1"
    assert all(torch.equal(p, q) for p, q in zip(stats.finish(), again.finish()))
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

    arrays = dict(mean=np.zeros(2), scatter=np.zeros((2, 2)), source="", protocol="")
    np.savez(tmp_path / "evil.npz", n=np.array([Evil()], dtype=object), **arrays)
    (tmp_path / "text.npz").write_text("no zip")
    for name in ("evil", "text", "absent"):
        with pytest.raises(InputError, match="holds no statistics"):
            load_stats(tmp_path / f"{name}.npz", "", "")
    assert not (tmp_path / "ran").exists()


# --- between videos


class Tokens(nn.Module):
    "Patch-grid tokens (B, N, D); D = 3 channels x 2 x 2 pixels."

    name = "patches"

    def forward(self, v):
        patches = v.unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8))[..., :2, :, :2]
        return patches.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)


def test_frechet_video_distance_is_the_distance_of_mean_tokens():
    net = Tokens().train()
    real, fake = clips(40, seed=1), clips(30, seed=2) ** 2
    score = FrechetVideoDistance(net)
    for part in real.split(16):
        score.update(real=part)
    for part in fake.split(7):
        score.update(fake=part)
    features = [net(x).mean(1).double() for x in (real, fake)]
    expected = frechet_distance(*(v for x in features for v in (x.mean(0), torch.cov(x.T))))
    assert net(real).shape == (40, 16, 12)
    assert score.compute() == pytest.approx(expected, rel=1e-9)
    assert score.name == "frechet[patches]" and net.training
    pooled = FrechetVideoDistance(lambda v: net(v).mean(1), name="pooled")
    pooled.update(real=real, fake=fake)
    assert pooled.compute() == pytest.approx(expected, rel=1e-9)
    assert pooled.name == "frechet[pooled]"


def test_video_distance_is_the_score_in_batches():
    a, b = clips(130, seed=1), clips(205, seed=2)
    score = FrechetVideoDistance(Tokens())
    score.update(a, b)
    name, value = video_distance(a, b, Tokens())
    assert name == score.name and value == pytest.approx(score.compute(), rel=1e-4) and value > 0
    assert video_distance(a, a, Tokens()).value <= 1e-8 * score.real.finish()[1].trace().item()


def test_frechet_video_distance_merges_across_processes():
    real, fake = clips(40, seed=1), clips(40, seed=2)
    whole, one, two = (FrechetVideoDistance(Tokens()) for _ in range(3))
    whole.update(real, fake)
    one.update(real[:25], fake[:15])
    two.update(real[25:], fake[15:])
    one.real.merge(two.real)
    one.fake.merge(two.fake)
    assert one.compute() == pytest.approx(whole.compute(), rel=1e-10)


def test_too_few_samples_are_refused_unless_asked_for():
    score = FrechetVideoDistance(Tokens())
    score.update(real=clips(40), fake=clips(11, seed=1))
    with pytest.raises(InputError, match="11 samples cannot fill 12"):
        score.compute()
    assert score.compute(allow_few=True) > 0
    assert score.name == "frechet[patches, only 11 samples for 12 dimensions]"
    score.update(fake=clips(1, seed=2))
    assert score.compute() > 0 and score.name == "frechet[patches]"


def test_sets_that_cannot_be_compared_are_refused():
    score = FrechetVideoDistance(Tokens())
    with pytest.raises(InputError):
        score.compute()
    with pytest.raises(InputError, match="fake holds NaN"):
        score.update(fake=clips() * torch.nan)
    with pytest.raises(InputError, match="real has shape"):
        score.update(real=clips()[:0])
    with pytest.raises(InputError, match="real: every pixel"):
        score.update(real=torch.zeros(3, 3, 4, 16, 16))
    score.update(real=clips(20))
    for change in (dict(t=5), dict(size=24)):
        with pytest.raises(InputError, match="fake has clips of shape"):
            score.update(fake=clips(20, **change))
    score.update(fake=clips(1).expand(20, -1, -1, -1, -1))
    with pytest.raises(InputError, match="all fake clips have the same features"):
        score.compute()
    one = clips(4)
    one[0] = 0
    score.update(real=one)  # a black clip among others is no mistake
    with pytest.raises(RuntimeError):
        net = Tokens().train()
        FrechetVideoDistance(net).update(real=clips(size=17))
    assert net.training  # also after an error


def test_features_of_two_extractors_are_never_mixed():
    a, b = FrechetVideoDistance(Tokens(), "one"), FrechetVideoDistance(Tokens(), "two")
    for score in (a, b):
        score.update(clips(20), clips(20, seed=1))
    with pytest.raises(InputError, match="one and of two"):
        a.real.merge(b.real)
    a.fake = b.fake
    with pytest.raises(InputError, match="use one extractor"):
        a.compute()
    a.fake = GaussianStats().update(torch.rand(20, 13, generator=gen()))
    with pytest.raises(InputError, match="12 and 13"):
        a.compute()


def test_an_extractor_that_answers_nan_is_named():
    broken = Extractor(lambda video: video.mean((2, 3, 4)).log(), "logs", "1")
    with pytest.raises(InputError, match="logs@1 answers with NaN or infinite"):
        broken(torch.zeros(2, 3, 4, 8, 8))


def test_extrapolation_removes_the_bias_of_few_samples():
    g = gen(7)
    true = 12 * (0.5**2 + 0.2**2)
    runs = []
    for _ in range(6):
        real = torch.randn(120, 12, generator=g, dtype=torch.float64)
        fake = 1.5 * torch.randn(120, 12, generator=g, dtype=torch.float64) + 0.2
        runs.append((real, fake))
    plain = np.mean([frechet_distance(*moments(*run)) for run in runs])
    fits = [extrapolated_distance(*run) for run in runs]
    value = np.mean([fit["value"] for fit in fits])
    assert plain > 1.08 * true and abs(value - true) < 0.5 * (plain - true)
    for fit in fits:  # the line is the least squares line of its points
        inverse = [1 / n for n, _ in fit["points"]]
        slope, value = np.polyfit(inverse, [d for _, d in fit["points"]], 1)
        assert fit["value"] == pytest.approx(value) and fit["slope"] == pytest.approx(slope)
        assert fit["points"][-1][0] == 120
    real = runs[0][0]
    same = extrapolated_distance(real, real + 1, paired=True)  # pairs: no noise at any size
    assert same["value"] == pytest.approx(12, rel=1e-6)
    assert same["slope"] == pytest.approx(0, abs=1e-3)
    with pytest.raises(InputError, match="too few"):
        extrapolated_distance(real[:20], runs[0][1])
    with pytest.raises(InputError, match="no pairs"):
        extrapolated_distance(real[:100], runs[0][1], paired=True)


# --- extractors


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
    assert torch.allclose(net(x), (2 * x - 1).mean((2, 3, 4)), atol=1e-6)
    assert net.name == f"i3d@{digest[:8]}"
    score = FrechetVideoDistance(net)
    score.update(x, clips(8, t=10, seed=1))
    score.compute()
    with pytest.raises(InputError, match="10 frames or more"):
        net(clips(t=9))
    assert score.name == f"FVD[i3d@{digest[:8]}]"
    assert "FVD" not in FrechetVideoDistance("pocket-video").name
    assert "fvd" not in FrechetVideoDistance(Tokens()).name.lower()


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
    with pytest.raises(InputError, match="fetch https") as error:
        load_extractor("i3d")
    assert "\n" not in str(error.value)


def test_i3d_download_is_checked(i3d_file, monkeypatch, tmp_path):
    def fetch(url, to, prefix):
        assert "i3d_torchscript" in url and prefix == "bec6519f66ea534e"
        shutil.copy(i3d_file, to)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    with pytest.raises(InputError, match="not bec6519f"):
        load_i3d(tmp_path / "x" / "i3d.pt", download=True)

    def broken(*args):
        raise OSError("no network\nmore")

    monkeypatch.setattr(torch.hub, "download_url_to_file", broken)
    with pytest.raises(InputError, match="could not be fetched .no network."):
        load_i3d(tmp_path / "y.pt", download=True)


def test_extractor_of_a_teacher_is_its_mean_token():
    from dera.teachers import load_teacher

    x = render(sample_factors(5, 1), 8, 32)
    extractor, teacher = load_extractor("pocket-video"), load_teacher("pocket-video")
    assert torch.allclose(extractor(x), teacher(x).mean(1), atol=1e-6)
    assert extractor.name == f"pocket-video@{teacher.fingerprint}"
    for bad in ("fvd", "pocket-image"):  # an image teacher sees no motion
        with pytest.raises(InputError, match="choose i3d or"):
            load_extractor(bad)
    with pytest.raises(InputError, match="no weights for videomae-base|safetensors"):
        load_extractor("videomae", path="nowhere")


# --- probe and swap


def test_probe_agrees_with_scikit_learn():
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scales = torch.logspace(-3, 3, 7).double()
    x = torch.randn(600, 7, generator=gen(), dtype=torch.float64) * scales
    weight = torch.randn(7, 4, generator=gen(1)).double()
    noise = 0.5 * torch.randn(600, 4, generator=gen(2)).double()
    y = (x / scales @ weight + noise).argmax(1)
    ours = linear_probe(x[:400], y[:400], x[400:], y[400:], weight_decay=1e-2)
    scaler = StandardScaler().fit(x[:400])
    theirs = LogisticRegression(C=1 / (1e-2 * 400), tol=1e-8, max_iter=2000)
    theirs.fit(scaler.transform(x[:400]), y[:400])
    test = theirs.score(scaler.transform(x[400:]), y[400:])
    train = theirs.score(scaler.transform(x[:400]), y[:400])
    assert ours["test"] == pytest.approx(test, abs=0.006) and ours["test"] > 0.75
    assert ours["train"] == pytest.approx(train, abs=0.004)


def test_probe_survives_constant_features_unseen_classes_and_no_grad():
    x = torch.cat([torch.eye(3).repeat(10, 1), torch.ones(30, 1)], 1)
    y = torch.arange(3).repeat(10)
    with torch.no_grad():
        assert linear_probe(x, y, x, y)["test"] == 1
    assert linear_probe(x, y, x, torch.where(y == 2, 5, y)) == {
        "test": pytest.approx(2 / 3),
        "train": 1.0,
        "chance": pytest.approx(1 / 3),
    }


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
    assert torch.equal(swapped[:, :, :1], a[:, :, :1])
    assert torch.equal(swapped[:, :, 1:], b[:, :, 1:]) and tokenizer.training
    with pytest.raises(InputError):
        token_swap(tokenizer, a, b[:2])


def test_token_swap_counts_several_codes_a_token():
    a, b = ((clips(size=8, seed=s) * 255).round() / 255 for s in (0, 1))
    tokenizer = Pixels()
    tokenizer.config = SimpleNamespace(num_appearance=64, codes_per_token=3)
    tokenizer.eval()
    swapped = token_swap(tokenizer, a, b)
    assert torch.equal(swapped[:, :, :1], a[:, :, :1])
    assert torch.equal(swapped[:, :, 1:], b[:, :, 1:])


@pytest.mark.parametrize("kind", ["DeRATokenizer", "QueryTokenizer", "GridTokenizer"])
def test_load_tokenizer_finds_the_class(kind, tmp_path):
    from dera import query, streams

    cls = getattr(streams, kind, None) or getattr(query, kind)
    config = query.TokenizerConfig.preset("tiny", encoder_depth=1, decoder_depth=1)
    cls(config).save_pretrained(tmp_path)
    assert type(load_tokenizer(tmp_path)).__name__ == kind
    with pytest.raises(InputError, match="no tokenizer in"):
        load_tokenizer(tmp_path / "absent")


# --- recognised factors


class Oracle(nn.Module):
    "Answers with what is written in the first pixel."

    def forward(self, video):
        code = (video[:, 0, 0, 0, 0] * 255).round().long()
        return torch.eye(8)[code // len(MOTIONS)], torch.eye(14)[code % len(MOTIONS)]


def test_factor_accuracy_counts_shape_motion_and_both():
    label = torch.arange(112)
    written = (label / 255.0).reshape(-1, 1, 1, 1, 1).expand(-1, 3, 2, 4, 4)
    assert factor_accuracy(Oracle(), written, label) == {"shape": 1, "motion": 1, "class": 1}
    other_motion = label // 14 * 14 + (label + 1) % 14
    half = torch.where(label < 56, label, other_motion)
    found = factor_accuracy(Oracle(), written, half)
    assert found == {"shape": 1, "motion": 0.5, "class": 0.5}
    stored = torch.from_numpy(label.numpy().astype(np.uint16))
    assert factor_accuracy(Oracle(), written, stored)["class"] == 1
    for bad in (label - 1, label + 1):
        with pytest.raises(InputError, match=r"must lie in \[0, 112\)"):
            factor_accuracy(Oracle(), written, bad)


def test_shipped_classifier_reads_clips_it_never_saw_and_has_its_log():
    classifier = load_factor_classifier()
    factors = sample_factors(300, seed=12345)
    accuracy = factor_accuracy(classifier, render(factors, 8, 32), factors.label)
    assert not classifier.training
    assert sum(parameter.numel() for parameter in classifier.parameters()) <= 5e5
    assert accuracy["shape"] >= 0.95 and accuracy["motion"] >= 0.95 and accuracy["class"] >= 0.9
    folder = checkpoint_path("pocket-classifier")
    log = json.loads((folder / "log.json").read_text())
    assert log["held_out"]["shape"] >= 0.85 and log["held_out"]["motion"] >= 0.85
    assert log["loss"][-1] < log["loss"][0] / 5
    assert (folder / "model.safetensors").stat().st_size < 1e6


def test_training_is_repeatable_kept_and_leaves_the_global_generator_alone(tmp_path):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    small = dict(steps=3, batch=4, held_out=6, num_frames=4, size=16)
    runs = [train_factor_classifier(seed=seed, **small) for seed in (0, 0, 1)]
    assert torch.equal(before, torch.random.get_rng_state())
    weights = [torch.cat([p.flatten() for p in model.parameters()]) for model, _ in runs]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert runs[0][1] == runs[1][1]

    train_factor_classifier(seed=0, **small, out=tmp_path)
    again = load_factor_classifier(tmp_path)
    kept = torch.cat([p.flatten() for p in again.parameters()])
    assert torch.equal(kept, weights[0])
    (tmp_path / "model.safetensors").write_text("no weights")
    with pytest.raises(InputError):
        load_factor_classifier(tmp_path)


def test_classifier_refuses(tmp_path):
    classifier = FactorClassifier(4, 16).eval()
    with pytest.raises(InputError, match="trained on clips"):
        classifier(clips(t=5))
    with pytest.raises(InputError, match="one label a clip"):
        factor_accuracy(classifier, clips(), torch.zeros(3).long())
    with pytest.raises(InputError, match="no FactorClassifier in"):
        load_factor_classifier(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError):
        train_factor_classifier(steps=1, out=tmp_path / "file" / "x")
    with pytest.raises(InputError, match="lower lr"):
        train_factor_classifier(steps=9, batch=4, lr=1e30, num_frames=4, size=16)
    assert len(CLASSES) == 112
