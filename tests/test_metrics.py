"Each metric against a float64 reference, an oracle library or a known answer; and what each must refuse."
import json, math
from types import SimpleNamespace

import numpy as np, pytest, scipy.linalg, scipy.ndimage, torch
from torch import nn
from dera.metrics import *
from dera.pocket import CLASSES, render, sample_factors
from dera.utils import InputError, checkpoint_path


def gen(seed=0): return torch.Generator().manual_seed(seed)

def clips(n=4, t=4, size=16, seed=0): return torch.rand(n, 3, t, size, size, generator=gen(seed))

def gaussian(d, seed=0, samples=None):
    "Mean and covariance of random, correlated data."
    x = torch.randn(samples or 20*d, d, generator=gen(seed), dtype=torch.float64)
    x = x@torch.randn(d, d, generator=gen(seed + 100), dtype=torch.float64) + torch.randn(d, generator=gen(seed + 200), dtype=torch.float64)
    return x.mean(0), torch.cov(x.T).reshape(d, d)


# --- PSNR, SSIM, LPIPS

def test_psnr_is_of_the_mean_error():
    a, b = clips(5), clips(5, seed=1); b[0] = a[0] + .001*(b[0] - a[0])
    x, y = a.double().numpy(), b.double().numpy()
    errors = ((x - y)**2).reshape(5, -1).mean(1)
    assert psnr(a, b) == pytest.approx(-10*math.log10(errors.mean()), abs=1e-4)
    assert psnr(a, b, per_clip=True).numpy() == pytest.approx(-10*np.log10(errors), abs=1e-2)
    assert psnr(a, b, per_clip=True).mean() > psnr(a, b) + 5

def test_psnr_agrees_with_torchmetrics():
    from torchmetrics.functional.image import peak_signal_noise_ratio
    a, b = clips(), clips(seed=1)
    assert psnr(a, b) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1.).item(), abs=1e-4)

def test_psnr_of_equal_videos_is_infinite(): assert psnr(clips(), clips()) == math.inf

def test_psnr_in_half_precision_is_computed_in_double():
    a = torch.full((1, 3, 2, 16, 16), .5, dtype=torch.bfloat16); b = a.clone(); b[..., 0, 0] = .5078125
    assert psnr(a, b) == pytest.approx(-10*math.log10(.0078125**2/256), abs=1e-9)

def test_baselines():
    x = clips(3)
    first = ((x - x[:, :, :1]).double()**2).mean().item(); mean = x.double().var(2, correction=0).mean().item()
    assert baselines(x) == {'first_frame': pytest.approx(-10*math.log10(first), abs=1e-4), 'temporal_mean': pytest.approx(-10*math.log10(mean), abs=1e-4)}

def reference_ssim(x, y):
    "SSIM of one channel (H, W) in float64: Gaussian windows, the frame mirrored at its border."
    r = np.arange(-5, 6); k = np.exp(-r**2/(2*1.5**2)); k = np.outer(k, k)/k.sum()**2
    blur = lambda v: scipy.ndimage.correlate(v, k, mode='mirror')
    mx, my = blur(x), blur(y); vx, vy, c = blur(x*x) - mx**2, blur(y*y) - my**2, blur(x*y) - mx*my
    return (((2*mx*my + 1e-4)*(2*c + 9e-4))/((mx**2 + my**2 + 1e-4)*(vx + vy + 9e-4))).mean()

def test_ssim_against_float64_reference():
    a = render(sample_factors(3, seed=1), 3, 24); b = (a + .1*torch.randn(a.shape, generator=gen())).clamp(0, 1)
    planes = zip(a.double().numpy().reshape(-1, 24, 24), b.double().numpy().reshape(-1, 24, 24))
    assert ssim(a, b) == pytest.approx(np.mean([reference_ssim(x, y) for x, y in planes]), abs=2e-4)
    assert ssim(a, a) == pytest.approx(1, abs=1e-6)

@pytest.fixture
def hub(tmp_path):
    before = torch.hub.get_dir(); torch.hub.set_dir(str(tmp_path)); yield tmp_path; torch.hub.set_dir(before)

@pytest.mark.parametrize('net', ['alex', 'vgg', 'squeeze'])
def test_lpips_never_downloads(hub, net, monkeypatch):
    monkeypatch.setattr(torch.hub, 'download_url_to_file', lambda *a, **k: pytest.fail('tried to download'))
    with pytest.raises(InputError, match=f'LPIPS-{net}.*weights.*python -c'): lpips(clips(), clips(), net)

def test_lpips_is_the_named_network(hub):
    "With stand-in weights in the cache: the formula, recomputed in float64 from torchvision's network."
    import torchvision
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
    torch.manual_seed(0); net = torchvision.models.squeezenet1_1(weights=None)
    (hub/'checkpoints').mkdir()
    torch.save(net.state_dict(), hub/'checkpoints'/torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url.rsplit('/')[-1])
    a, b = clips(2, 2, 64), clips(2, 2, 64, seed=1)
    heads = LearnedPerceptualImagePatchSimilarity('squeeze').net.state_dict()
    shift, scale = torch.tensor([-.030, -.088, -.188]).reshape(3, 1, 1).double(), torch.tensor([.458, .448, .450]).reshape(3, 1, 1).double()
    x, y = (((2*v.transpose(1, 2).flatten(0, 1).double() - 1) - shift)/scale for v in (a, b))
    total, features = 0, net.features.double().eval()
    with torch.no_grad():
        for i, layer in enumerate(features):
            x, y = layer(x), layer(y)
            if i in (1, 4, 7, 9, 10, 11, 12):
                unit = [v/(v.pow(2).sum(1, keepdim=True).sqrt() + 1e-8) for v in (x, y)]
                k = [1, 4, 7, 9, 10, 11, 12].index(i)
                total = total + ((unit[0] - unit[1])**2*heads[f'lin{k}.model.1.weight'].double()).sum(1).mean((1, 2))
    assert lpips(a, b, 'squeeze') == pytest.approx(total.mean().item(), rel=1e-4)
    assert lpips(a, a, 'squeeze') == 0

def test_lpips_unknown_network():
    with pytest.raises(InputError, match='alex, vgg, squeeze'): lpips(clips(), clips(), 'resnet')

@pytest.mark.parametrize('metric', [psnr, ssim])
@pytest.mark.parametrize('bad', [clips()[:0], clips(3), clips(t=3), clips(size=17), clips()[0], clips()*255, clips() - .5,
                                 torch.where(clips() > .99, torch.nan, clips()), torch.where(clips() > .99, torch.inf, clips())],
                         ids='empty fewer short size dims bytes negative nan inf'.split())
def test_pixel_metrics_refuse(metric, bad):
    for pair in (clips(), bad), (bad, clips()):
        with pytest.raises(InputError) as e: metric(*pair)
        assert '\n' not in str(e.value)

def test_ssim_refuses_small_frames():
    with pytest.raises(InputError, match='11 x 11'): ssim(clips(size=8), clips(size=8))


# --- Frechet distance

@pytest.mark.parametrize('d', [1, 2, 16, 96])
def test_frechet_agrees_with_scipy(d):
    (m1, c1), (m2, c2) = gaussian(d, 1), gaussian(d, 2)
    root = scipy.linalg.sqrtm((c1@c2).numpy()).real
    expected = (m1 - m2).pow(2).sum().item() + np.trace(c1.numpy() + c2.numpy() - 2*root)
    assert frechet_distance(m1, c1, m2, c2) == pytest.approx(expected, rel=1e-9)

def test_frechet_agrees_with_torchmetrics_fid():
    from torchmetrics.image.fid import FrechetInceptionDistance
    class Rows(nn.Module):
        num_features = 12
        def forward(self, x): return x[:, 0, 0, :12]
    fid = FrechetInceptionDistance(Rows(), normalize=True, input_img_size=(3, 8, 12)); fid.set_dtype(torch.float64)
    a, b = torch.rand(300, 3, 8, 12, generator=gen(), dtype=torch.float64), torch.rand(200, 3, 8, 12, generator=gen(1), dtype=torch.float64)**2
    fid.update(a, real=True); fid.update(b, real=False)
    ours = frechet_distance(*(v for x in (a, b) for v in GaussianStats().update(x[:, 0, 0]).finish()))
    assert ours == pytest.approx(fid.compute().item(), rel=1e-6)

@pytest.mark.parametrize('scale', [1e-8, 1., 1e8])
@pytest.mark.parametrize('rank', [3, 64])
def test_frechet_of_identical_sets_is_zero(scale, rank):
    m, c = gaussian(64, 3, samples=rank + 1); m, c = m*scale, c*scale**2
    assert 0 <= frechet_distance(m, c, m.clone(), c.clone()) <= 1e-8*c.trace().item()

def test_frechet_of_analytic_gaussians():
    z, i = torch.zeros(5).double(), torch.eye(5).double()
    assert frechet_distance(z, i, z + 2, i) == pytest.approx(20, rel=1e-12)
    s, t = torch.tensor([1., 2, 3, 4, 5]).double(), torch.tensor([5., 1, 0, 2, 7]).double()
    assert frechet_distance(z, torch.diag(s**2), z, torch.diag(t**2)) == pytest.approx((s - t).pow(2).sum().item(), rel=1e-12)
    a = torch.tensor([[1., .6], [.6, 1.]]).double(); b = torch.tensor([[2., -.3], [-.3, .5]]).double()
    product = a@b                                                           # 2 x 2: Tr sqrt(M) = sqrt(Tr M + 2 sqrt(det M))
    root = math.sqrt(product.trace() + 2*math.sqrt(product.det()))
    assert frechet_distance(z[:2], a, z[:2], b) == pytest.approx(4.5 - 2*root, rel=1e-12)

def test_frechet_is_symmetric_and_invariant_to_rotation():
    (m1, c1), (m2, c2) = gaussian(24, 4), gaussian(24, 5)
    d = frechet_distance(m1, c1, m2, c2); q = torch.linalg.qr(torch.randn(24, 24, generator=gen(), dtype=torch.float64)).Q
    assert frechet_distance(m2, c2, m1, c1) == pytest.approx(d, rel=1e-12)
    assert frechet_distance(q@m1, q@c1@q.T, q@m2, q@c2@q.T) == pytest.approx(d, rel=1e-10)

def test_frechet_survives_where_ranks_differ():
    "Rank 4 against rank 7 of 200, against the answer in the joint 11-dimensional span."
    g = gen(6); basis = torch.linalg.qr(torch.randn(200, 11, generator=g, dtype=torch.float64)).Q
    small = []
    for samples in 5, 8:
        x = torch.randn(samples, 11, generator=g, dtype=torch.float64); small.append((x.mean(0), torch.cov(x.T)))
    (m1, c1), (m2, c2) = small
    values = scipy.linalg.eigvals((c1@c2).numpy()).real.clip(0)
    expected = (m1 - m2).pow(2).sum().item() + (c1.trace() + c2.trace()).item() - 2*np.sqrt(values).sum()
    wide = [(basis@m, basis@c@basis.T) for m, c in small]
    assert frechet_distance(*wide[0], *wide[1]) == pytest.approx(expected, rel=1e-5)
    zero = torch.zeros(200)
    assert frechet_distance(zero, torch.zeros(200, 200), zero, torch.zeros(200, 200)) == 0

def test_frechet_refuses():
    m, c = gaussian(4); bad = c.clone(); bad[0, 0] = torch.nan
    lopsided, negative = c.clone(), c - 2*torch.linalg.eigvalsh(c)[-1]*torch.eye(4); lopsided[0, 1] += 1
    for args in (m, c, m[:3], c), (m, c, m, c[:3]), (m, c, m[:3], c[:3, :3]), (m[:0], c[:0, :0], m[:0], c[:0, :0]), (m, bad, m, c), \
                (m*torch.nan, c, m, c), (m, lopsided, m, c), (m, c, m, negative):
        with pytest.raises(InputError): frechet_distance(*args)


# --- streaming statistics

@pytest.mark.parametrize('offset', [0., 1e6])
def test_streaming_equals_one_pass(offset):
    x = torch.randn(301, 9, generator=gen(), dtype=torch.float64) + offset
    s = GaussianStats()
    for part in x.split(17): s.update(part)
    mean, cov = s.finish(); expected = np.cov((x - offset).numpy().T)
    assert s.n == 301 and mean.numpy() == pytest.approx(x.mean(0).numpy(), rel=1e-13, abs=1e-13)
    assert cov.numpy() == pytest.approx(expected, rel=1e-9, abs=1e-9)

def test_merging_is_order_free_and_takes_empty_parts():
    x = torch.randn(100, 5, generator=gen(), dtype=torch.float64); whole = GaussianStats().update(x).finish()
    parts = lambda: [GaussianStats().update(p) for p in (x[:1], x[1:40], x[40:])] + [GaussianStats()]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 3, 0, 1]):
        p = parts(); s = GaussianStats()
        for i in order: s.merge(p[i])
        assert s.n == 100 and all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(s.finish(), whole))

def test_stats_of_float32_features_accumulate_in_float64():
    x = torch.randn(1000, 3, generator=gen()) + 1000
    _, cov = GaussianStats().update(x).finish()
    assert cov.dtype == torch.float64 and torch.allclose(cov, torch.cov(x.double().T), rtol=1e-9)

def test_stats_refuse():
    s = GaussianStats().update(torch.ones(1, 3))
    for bad in torch.ones(0, 3), torch.ones(3), torch.ones(2, 2, 2), torch.full((2, 3), torch.nan), torch.ones(2, 4):
        with pytest.raises(InputError): s.update(bad)
    assert s.n == 1
    for few in s, GaussianStats():
        with pytest.raises(InputError, match='at least 2'): few.finish()


# --- between videos

class Tokens(nn.Module):
    "Patch-grid tokens (B, N, D); D = 3 channels x 2 x 2 pixels."
    name = 'patches'
    def forward(self, v): return v.unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8))[..., :2, :, :2].permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)

def test_frechet_video_distance_is_the_distance_of_mean_tokens():
    net = Tokens().train(); real, fake = clips(40, seed=1), clips(30, seed=2)**2
    score = FrechetVideoDistance(net)
    for part in real.split(16): score.update(real=part)
    for part in fake.split(7): score.update(fake=part)
    expected = frechet_distance(*(v for x in (real, fake) for v in (net(x).mean(1).double().mean(0), torch.cov(net(x).mean(1).double().T))))
    assert net(real).shape == (40, 16, 12) and score.compute() == pytest.approx(expected, rel=1e-9)
    assert score.name == 'frechet[patches]' and net.training
    pooled = FrechetVideoDistance(lambda v: net(v).mean(1), name='pooled'); pooled.update(real=real, fake=fake)
    assert pooled.compute() == pytest.approx(expected, rel=1e-9) and pooled.name == 'frechet[pooled]'

def test_frechet_video_distance_merges_across_processes():
    real, fake = clips(40, seed=1), clips(40, seed=2)
    whole, one, two = (FrechetVideoDistance(Tokens()) for _ in range(3))
    whole.update(real, fake); one.update(real[:25], fake[:15]); two.update(real[25:], fake[15:])
    one.real.merge(two.real); one.fake.merge(two.fake)
    assert one.compute() == pytest.approx(whole.compute(), rel=1e-10)

def test_same_set_scores_zero():
    score = FrechetVideoDistance(Tokens()); score.update(real=clips(40), fake=clips(40))
    assert score.compute() <= 1e-8*score.real.finish()[1].trace().item()

def test_too_few_samples_are_refused_unless_asked_for():
    score = FrechetVideoDistance(Tokens()); score.update(real=clips(40), fake=clips(11, seed=1))
    with pytest.raises(InputError, match='11 samples cannot fill 12'): score.compute()
    assert score.compute(allow_few=True) > 0 and score.name == 'frechet[patches, only 11 samples for 12 dimensions]'
    score.update(fake=clips(1, seed=2)); assert score.compute() > 0 and score.name == 'frechet[patches]'

def test_frechet_video_distance_refuses():
    score = FrechetVideoDistance(Tokens())
    with pytest.raises(InputError): score.compute()
    with pytest.raises(InputError, match='fake'): score.update(fake=clips()*torch.nan)
    with pytest.raises(InputError, match='real'): score.update(real=clips()[:0])
    score.update(real=clips(1))
    with pytest.raises(InputError): score.compute(allow_few=True)

def test_no_score_is_called_fvd():
    assert 'fvd' not in FrechetVideoDistance(Tokens()).name.lower()


# --- probe, swap, judge

def test_probe_agrees_with_scikit_learn():
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler
    x = torch.randn(600, 7, generator=gen(), dtype=torch.float64)*torch.logspace(-3, 3, 7).double(); w = torch.randn(7, 4, generator=gen(1)).double()
    y = (x/torch.logspace(-3, 3, 7).double()@w + .5*torch.randn(600, 4, generator=gen(2)).double()).argmax(1)
    ours = linear_probe(x[:400], y[:400], x[400:], y[400:], weight_decay=1e-2)
    scaler = StandardScaler().fit(x[:400]); theirs = LogisticRegression(C=1/(1e-2*400), tol=1e-8, max_iter=2000).fit(scaler.transform(x[:400]), y[:400])
    assert ours['test'] == pytest.approx(theirs.score(scaler.transform(x[400:]), y[400:]), abs=.006)
    assert ours['train'] == pytest.approx(theirs.score(scaler.transform(x[:400]), y[:400]), abs=.004)
    assert ours['test'] > .75 and ours == linear_probe(x[:400], y[:400], x[400:], y[400:], weight_decay=1e-2)

def test_probe_survives_constant_features_and_unseen_classes():
    x = torch.cat([torch.eye(3).repeat(10, 1), torch.ones(30, 1)], 1); y = torch.arange(3).repeat(10)
    assert linear_probe(x, y, x, y)['test'] == 1
    assert linear_probe(x, y, x, torch.where(y == 2, 5, y)) == {'test': pytest.approx(2/3), 'train': 1., 'chance': pytest.approx(1/3)}

def test_probe_works_without_gradients():
    with torch.no_grad(): assert linear_probe(torch.eye(2), torch.arange(2), torch.eye(2), torch.arange(2))['test'] == 1

def test_probe_refuses():
    x, y = torch.rand(6, 3), torch.arange(6) % 2
    for bad in (x[:0], y[:0], x, y), (x, y[:5], x, y), (x, y.float(), x, y), (x, y, x[:, :2], y), (x*torch.nan, y, x, y), (x[None], y, x, y):
        with pytest.raises(InputError): linear_probe(*bad)

class Pixels(nn.Module):
    "Tokens are pixel values; the first frame is the appearance. Refuses to be used in training mode."
    config = SimpleNamespace(num_appearance=3*8*8)
    def encode(self, v): assert not self.training; return SimpleNamespace(indices=(v*255).round().long().transpose(1, 2).flatten(1))
    def decode(self, i): assert not self.training; return (i.float()/255).unflatten(1, (-1, 3, 8, 8)).transpose(1, 2)

def test_token_swap_takes_appearance_of_a_and_motion_of_b():
    a, b = ((clips(size=8, seed=s)*255).round()/255 for s in (0, 1)); tokenizer = Pixels().train()
    swapped = token_swap(tokenizer, a, b)
    assert torch.equal(swapped[:, :, :1], a[:, :, :1]) and torch.equal(swapped[:, :, 1:], b[:, :, 1:]) and tokenizer.training
    with pytest.raises(InputError): token_swap(tokenizer, a, b[:2])

def test_mode_is_restored_after_an_error():
    net = Tokens().train()
    with pytest.raises(RuntimeError): FrechetVideoDistance(net).update(real=clips(size=17))
    assert net.training

def test_shipped_classifier_reads_clips_it_never_saw():
    judge = load_factor_classifier(); f = sample_factors(300, seed=12345)
    accuracy = factor_accuracy(judge, render(f, 8, 32), f.label)
    assert not judge.training and sum(p.numel() for p in judge.parameters()) <= 5e5
    assert accuracy['shape'] >= .95 and accuracy['motion'] >= .95 and accuracy['class'] >= .9

def test_shipped_classifier_has_its_log():
    folder = checkpoint_path('pocket-classifier')
    log = json.loads((folder/'log.json').read_text())
    assert log['held_out']['shape'] >= .85 and log['held_out']['motion'] >= .85 and log['loss'][-1] < log['loss'][0]/5
    assert (folder/'model.safetensors').stat().st_size < 1e6

def test_training_is_repeatable_and_leaves_the_global_generator_alone(tmp_path):
    torch.manual_seed(1); before = torch.random.get_rng_state()
    runs = [train_factor_classifier(steps=3, batch=4, held_out=6, seed=s, num_frames=4, size=16) for s in (0, 0, 1)]
    assert torch.equal(before, torch.random.get_rng_state())
    same = [all(torch.equal(p, q) for p, q in zip(runs[0][0].parameters(), r[0].parameters())) for r in runs]
    assert same == [True, True, False] and runs[0][1] == runs[1][1]

def test_classifier_refuses(tmp_path):
    judge = FactorClassifier(4, 16).eval()
    with pytest.raises(InputError, match='trained on clips'): judge(clips(t=5))
    with pytest.raises(InputError, match='one label a clip'): factor_accuracy(judge, clips(), torch.zeros(3).long())
    with pytest.raises(InputError, match='no FactorClassifier in'): load_factor_classifier(tmp_path)
    (tmp_path/'file').write_text('')
    with pytest.raises(InputError): train_factor_classifier(steps=1, out=tmp_path/'file'/'x')
    assert len(CLASSES) == 112
