"""The terms of the loss against formulas and libraries in float64, who gets gradients from what, and
two processes against one."""

import copy
import inspect
import json
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dera.losses import (
    LPIPSVGG,
    SMOOTHING,
    ARPrior,
    LeCAM,
    ReconstructionLoss,
    VideoDiscriminator,
    adversarial_term,
    discriminator_loss,
    discriminator_terms,
    discriminator_turn,
    generator_loss,
    load_lpips,
    load_perceptual,
    perceptual_distance,
    scheduled_sampling,
    total_loss,
)
from dera.pocket import render, sample_factors
from dera.query import TokenizerConfig, patchify
from dera.runtime.checkpoints import load_checkpoint, save_checkpoint
from dera.runtime.errors import InputError

bce = F.binary_cross_entropy_with_logits


def count(module):
    return sum(p.numel() for p in module.parameters())


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(scope="module")
def clips():
    return render(sample_factors(4, 5, "textured"), 8, 32)


@pytest.fixture(scope="module")
def teacher():
    return load_perceptual("pocket-video")


# ---- reconstruction


class Patches(nn.Module):
    "A float64 teacher: patches through a fixed matrix."

    def __init__(self, modality):
        super().__init__()
        self.modality, self.matrix = (
            modality,
            normal(3 * 2 * 64 if modality == "video" else 3 * 64, 10),
        )

    def forward(self, video):
        if self.modality == "image":
            assert video.shape[2] == 1, "an image teacher gets one frame at a time"
        return patchify(video, 2 if self.modality == "video" else 1, 8) @ self.matrix


def test_reconstruction_in_float64(clips):
    x, y, video = (
        clips.double(),
        (clips.double() + 0.1 * normal(*clips.shape)).requires_grad_(),
        Patches("video"),
    )
    total, terms = ReconstructionLoss(video, 0.3, 2.0)(y, x)
    assert total.dtype == torch.float64 and list(terms) == ["l1", "l2", "perceptual"]
    cosine = F.cosine_similarity(video(y), video(x), dim=-1).mean()
    for got, wanted in zip(terms.values(), (F.l1_loss(y, x), F.mse_loss(y, x), 2 - 2 * cosine)):
        assert torch.allclose(got, wanted, rtol=1e-10)
    assert torch.allclose(
        total, F.l1_loss(y, x) + 2 * F.mse_loss(y, x) + 0.3 * (2 - 2 * cosine), rtol=1e-10
    )
    (l1,) = torch.autograd.grad(ReconstructionLoss()(y, x)[0], y)
    assert torch.allclose(l1, (y - x).sign() / x.numel())


def test_an_image_teacher_looks_at_every_frame(clips):
    x, y, image = (
        clips.double(),
        (clips.double() + 0.1 * normal(*clips.shape)).requires_grad_(),
        Patches("image"),
    )
    distance = perceptual_distance(image, y, x)
    cosine = torch.stack(
        [
            F.cosine_similarity(image(y[:, :, t : t + 1]), image(x[:, :, t : t + 1]), dim=-1).mean()
            for t in range(8)
        ]
    )
    assert torch.allclose(distance, 2 - 2 * cosine.mean(), rtol=1e-10)
    assert (torch.autograd.grad(distance, y)[0].abs().sum((0, 1, 3, 4)) > 0).all()
    pocket, y = load_perceptual("pocket-image"), (clips + 0.1).requires_grad_()
    assert (
        torch.autograd.grad(perceptual_distance(pocket, y, clips), y)[0].abs().sum((0, 1, 3, 4)) > 0
    ).all()


def test_defaults_are_the_old_numbers_bit_for_bit(clips, teacher):
    "The shipped checkpoints were trained with these expressions."
    y = (clips + 0.1 * normal(*clips.shape, dtype=torch.float32)).requires_grad_()
    old = dict(l1=(y - clips).abs().mean(), l2=(y - clips).pow(2).mean())
    wanted = old["l1"] + 4.0 * old["l2"]
    with torch.no_grad():
        goal = F.normalize(teacher(clips).float(), dim=-1)
    old["perceptual"] = (F.normalize(teacher(y).float(), dim=-1) - goal).pow(2).sum(-1).mean()
    wanted = wanted + 0.05 * old["perceptual"]
    total, terms = ReconstructionLoss(teacher, 0.05, 4.0)(y, clips)
    assert (
        torch.equal(total, wanted)
        and all(torch.equal(terms[k], v) for k, v in old.items())
        and list(terms) == list(old)
    )
    assert torch.equal(torch.autograd.grad(total, y)[0], torch.autograd.grad(wanted, y)[0])
    names = list(inspect.signature(ReconstructionLoss).parameters)
    assert names[:3] == ["teacher", "perceptual_weight", "l2_weight"]


def test_perceptual_gradient_reaches_only_the_reconstruction(clips, teacher):
    x, y = clips.clone().requires_grad_(), (clips + 0.1).requires_grad_()
    perceptual_distance(teacher, y, x).backward()
    assert (
        x.grad is None
        and y.grad.abs().sum() > 0
        and all(p.grad is None for p in teacher.parameters())
    )
    assert (
        not list(ReconstructionLoss(teacher).parameters())
        and not ReconstructionLoss(teacher).state_dict()
    )


# ---- LPIPS: the real loader, untrained convolutions in the place of the download


class Convolutions(nn.Module):
    "torchvision's VGG without the three large layers that LPIPS does not use."

    def __init__(self, features, **_):
        super().__init__()
        self.features = features


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    from torchvision.models import VGG16_Weights, vgg

    folder = tmp_path_factory.mktemp("hub") / "checkpoints"
    folder.mkdir()
    torch.manual_seed(0)
    file = folder / VGG16_Weights.DEFAULT.url.rsplit("/", 1)[-1]
    torch.save(Convolutions(vgg.make_layers(vgg.cfgs["D"])).state_dict(), file)
    return file


@pytest.fixture
def hub(vgg_file, monkeypatch):
    from torchvision.models import vgg

    monkeypatch.setattr(vgg, "VGG", Convolutions)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(vgg_file.parent.parent))
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda *a, **k: pytest.fail("a download was started")
    )


def test_lpips_through_the_real_loader(hub, clips):
    lpips = load_perceptual("lpips-vgg")
    assert isinstance(lpips, LPIPSVGG)
    x, y = clips[:2, :, :2], (clips[:2, :, :2] + 0.2).requires_grad_()
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    metric = LearnedPerceptualImagePatchSimilarity("vgg", normalize=True)
    for a, b in zip(x, y.detach().clamp(0, 1)):
        metric.update(b.transpose(0, 1), a.transpose(0, 1))
    assert (
        torch.allclose(lpips(y.detach().clamp(0, 1), x), metric.compute(), rtol=1e-5)
        and lpips(x, x) == 0
    )
    total, terms = ReconstructionLoss(lpips, 0.5)(y, x)
    assert list(terms) == ["l1", "l2", "lpips_vgg"] and torch.allclose(
        total, terms["l1"] + 0.5 * terms["lpips_vgg"]
    )
    (g,) = torch.autograd.grad(terms["lpips_vgg"], y)
    assert y.max() > 1 and (g[y > 1] != 0).any()  # not clamped
    lpips.train()
    assert not any(p.requires_grad for p in lpips.parameters()) and not any(
        isinstance(m, nn.Dropout) and m.training for m in lpips.modules()
    )
    with pytest.raises(InputError, match="16 x 16"):
        lpips(clips[..., :8], clips[..., :8])


def test_lpips_formula_in_float64(hub, clips):
    lpips = load_lpips().double()
    net = lpips.net
    x, y = clips[:1, :, :2].double(), clips[1:2, :, :2].double()

    def scale(v):
        return (2 * v[0].transpose(0, 1) - 1 - net.scaling_layer.shift) / net.scaling_layer.scale

    def unit(f):
        return f / (f.pow(2).sum(1, keepdim=True) + 1e-8).sqrt()

    wanted = 0
    for a, b, lin in zip(net.net(scale(x)), net.net(scale(y)), net.lins):
        w = lin.model[-1].weight[0]
        assert (w >= 0).all()  # torchmetrics' fitted ones
        wanted = wanted + ((unit(a) - unit(b)).pow(2) * w).sum(1).mean((1, 2))
    assert torch.allclose(lpips(y, x), wanted.mean(), rtol=1e-10)


def one_line(error):
    return len(str(error.value).splitlines()) == 1


def test_lpips_without_weights_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda *a, **k: pytest.fail("a download was started")
    )
    with pytest.raises(InputError, match="vgg16.*DEFAULT") as e:
        load_perceptual("lpips-vgg")
    assert one_line(e) and str(tmp_path) in str(e.value)


def test_lpips_of_a_damaged_file(vgg_file, hub, tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / vgg_file.name).write_bytes(vgg_file.read_bytes()[:5000])
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(InputError, match="does not load") as e:
        load_lpips()
    assert one_line(e)


@pytest.mark.parametrize("name", ["pocket-image", "pocket-video"])
def test_a_stand_in_never_has_the_real_name(name, clips):
    _, terms = ReconstructionLoss(load_perceptual(name))(clips, clips)
    assert not [k for k in terms if "lpips" in k or "vgg" in k] and "perceptual" in terms
    with pytest.raises(InputError):
        load_perceptual("lpips")


# ---- adversarial losses


@pytest.mark.parametrize("s", [0.0, 0.05, SMOOTHING, 0.3])
def test_adversarial_losses_against_torch(s):
    real, fake = (4 * normal(2, 500)).requires_grad_()
    assert torch.allclose(
        discriminator_loss(real, fake, s),
        bce(real, torch.full_like(real, 1 - s)) + bce(fake, torch.full_like(fake, s)),
        rtol=1e-12,
    )
    assert torch.allclose(generator_loss(fake), bce(fake, torch.ones_like(fake)), rtol=1e-12)
    assert torch.autograd.gradcheck(
        lambda a, b: discriminator_loss(a, b, s),
        (real[:5].detach().requires_grad_(), fake[:5].detach().requires_grad_()),
    )
    if s:
        best = torch.full((3,), math.log((1 - s) / s), dtype=torch.float64, requires_grad=True)
        for z, args in ((best, (best, -best.detach())), (best, (best.detach(), -best))):
            assert torch.autograd.grad(discriminator_loss(*args, s), z)[0].abs().max() < 1e-12


def test_gradient_signs():
    real, fake = (4 * normal(2, 50)).requires_grad_()
    assert (
        torch.autograd.grad(generator_loss(fake), fake)[0] < 0
    ).all()  # raise the logits of fakes
    d_real, d_fake = torch.autograd.grad(discriminator_loss(real, fake, 0.0), (real, fake))
    assert (d_real < 0).all() and (d_fake > 0).all()
    losses = [generator_loss(torch.full((3,), z)) for z in (-50.0, -5.0, 0.0, 5.0, 50.0)]
    assert losses == sorted(losses, reverse=True)
    assert all(
        torch.isfinite(f)
        for z in (-1e4, 1e4)
        for f in (
            generator_loss(torch.tensor([z])),
            discriminator_loss(torch.tensor([z]), torch.tensor([-z])),
        )
    )
    assert generator_loss(torch.tensor([2.0]).bfloat16()).dtype == torch.float32


def test_smoothing_is_the_mean_of_larps_random_labels():
    n = normal(400_000)
    target = (0.15 * n.abs()).clamp(max=0.3)
    assert abs(target.mean() - SMOOTHING) < 1e-3
    for bad in (-0.1, 0.5, 1.0):
        with pytest.raises(InputError, match="smoothing"):
            discriminator_loss(n[:2], n[:2], bad)


@pytest.mark.parametrize("start, every", [(0, 5), (3, 1), (10, 4)])
def test_turns(start, every):
    turns = [s for s in range(60) if discriminator_turn(s, start, every)]
    assert turns == list(range(start, 60, every))


# ---- the discriminator


def test_discriminator_size_at_paper_scale():
    with torch.device("meta"):
        n = count(VideoDiscriminator())
    larp = (
        (3 * 4 * 64 * 512 + 512)
        + 512
        + 12 * (3 * 512**2 + 512**2 + 512 + 8 * 512**2 + 5 * 512 + 4 * 512)
        + 1024
        + 513
    )
    assert (
        larp == 38_205_953 and n == larp + 12 * 3 * 512 == 38_224_385
    )  # ours has a bias on q, k, v


@pytest.mark.parametrize("name", ["tiny", "pocket", "paper"])
def test_discriminator_preset_fits_the_tokenizer(name):
    c = TokenizerConfig.preset(name)
    with torch.device("meta"):
        D = VideoDiscriminator.preset(name)
        assert D(torch.empty(2, 3, c.num_frames, *c.frame)).shape == (2,) and D.positions.shape[
            0
        ] == math.prod(c.grid)


def test_discriminator_sees_every_pixel_and_frame_order():
    torch.manual_seed(0)
    D = VideoDiscriminator(4, (16, 24), 2, 8, dim=24, depth=2, heads=2).double()
    x = torch.rand(3, 3, 4, 16, 24, dtype=torch.float64, requires_grad=True)
    assert (torch.autograd.grad(D(x).sum(), x)[0] != 0).all()
    moved = [
        x.flip(2),
        x.roll(2, 2),
        x.roll(8, 3),
        x.roll(8, 4),
    ]  # the last three only change the order of patches
    assert not any(torch.allclose(D(x), D(v)) for v in moved) and torch.allclose(
        D(x)[1], D(x[1:2])[0]
    )


@pytest.mark.parametrize(
    "bad, words",
    [
        (
            lambda: VideoDiscriminator.preset("tiny")(torch.zeros(1, 3, 16, 32, 32)),
            r"\(B, 3, 8, 32, 32\), got \(1, 3, 16, 32, 32\)",
        ),
        (lambda: VideoDiscriminator(num_frames=10), "10 x 128 x 128 do not divide"),
        (lambda: VideoDiscriminator(heads=7), "7 heads"),
        (lambda: VideoDiscriminator.preset("big"), "unknown preset 'big'"),
        (lambda: ARPrior.preset("grid"), "unknown preset 'grid'"),
    ],
)
def test_refusals(bad, words):
    with pytest.raises(InputError, match=words) as e:
        bad()
    assert one_line(e)


def test_each_side_gets_only_its_own_gradients(clips):
    torch.manual_seed(0)
    D, lecam = VideoDiscriminator.preset("tiny"), LeCAM(weight=1.0)
    D.class_token.requires_grad_(False)
    fake = (clips + 0.1).requires_grad_()
    adversarial_term(D, fake).backward()
    assert fake.grad.abs().sum() > 0 and all(p.grad is None for p in D.parameters())
    assert [n for n, p in D.named_parameters() if not p.requires_grad] == [
        "class_token"
    ]  # as it was
    D.class_token.requires_grad_()
    fake.grad = None
    loss, log = discriminator_terms(D, clips, fake, lecam)
    loss.backward()
    assert fake.grad is None and all(
        p.grad is not None and p.grad.abs().sum() > 0 for p in D.parameters()
    )
    wanted = discriminator_loss(D(clips), D(fake)) + LeCAM(weight=1.0)(D(clips), D(fake))
    assert torch.allclose(loss, wanted, rtol=1e-4) and set(log) == {
        "discriminator",
        "logit_real",
        "logit_fake",
        "lecam",
    }
    assert (
        not any(v.requires_grad for v in log.values())
        and abs(log["logit_real"] - D(clips).mean()) < 1e-5
    )
    with pytest.raises(ZeroDivisionError):
        adversarial_term(nn.Sequential(D, Boom()), fake)
    assert all(p.requires_grad for p in D.parameters())  # also after an error


class Boom(nn.Module):
    def forward(self, x):
        return x / (1 // 0)


def test_the_discriminator_learns_and_the_generator_follows(clips):
    torch.manual_seed(0)
    D = VideoDiscriminator.preset("tiny", dim=48, depth=1)
    fake = clips.flip(-1).mean(2, keepdim=True).expand_as(clips)
    adam = torch.optim.Adam(D.parameters(), 1e-3, betas=(0.5, 0.9))
    for _ in range(30):
        loss, log = discriminator_terms(D, clips, fake)
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert log["logit_real"] > log["logit_fake"] + 1
    moved = fake.clone().requires_grad_()
    (g,) = torch.autograd.grad(adversarial_term(D, moved), moved)
    assert D(fake - 0.5 * g / g.norm()).mean() > D(fake).mean()


# ---- LeCAM


def test_lecam_by_hand_in_float64():
    lecam = LeCAM(decay=0.7, weight=0.25).double()
    anchors = torch.zeros(2, dtype=torch.float64)
    for step in range(6):
        real, fake = (2 * normal(2, 9, seed=step) + torch.tensor([[0.5], [-0.5]])).requires_grad_()
        wanted = (
            0.25 * ((real - anchors[1]).relu() ** 2).mean()
            + 0.25 * ((anchors[0] - fake).relu() ** 2).mean()
        )
        loss = lecam(real, fake)
        assert torch.allclose(loss, wanted, rtol=1e-12)
        assert torch.allclose(
            torch.autograd.grad(loss, real)[0], 0.25 * 2 * (real - anchors[1]).relu() / 9
        )
        anchors = 0.7 * anchors + 0.3 * torch.stack([real.mean(), fake.mean()]).detach()
        assert torch.allclose(torch.stack([lecam.real, lecam.fake]), anchors, rtol=1e-12)


def test_lecam_weight_is_applied_once(clips):
    torch.manual_seed(0)
    D = VideoDiscriminator.preset("tiny")
    fake = clips + 0.1
    for w in (0.001, 0.1):  # the total moves by the weight, not by its square
        plain, _ = discriminator_terms(D, clips, fake)
        with_it, log = discriminator_terms(D, clips, fake, LeCAM(weight=w))
        penalty = D(clips).relu().pow(2).mean() + (-D(fake)).relu().pow(2).mean()
        assert torch.allclose(log["lecam"], w * penalty, rtol=1e-4) and torch.allclose(
            with_it - plain, w * penalty, atol=2e-7
        )


def test_lecam_resumes_exactly(tmp_path):
    def steps(lecam, seeds):
        return [lecam(*(normal(2, 8, seed=s, dtype=torch.float32) + 0.3)) for s in seeds]

    lecam = LeCAM()
    steps(lecam, range(50))
    save_checkpoint(tmp_path / "x.safetensors", lecam.state_dict())
    again = LeCAM()
    again.load_state_dict(load_checkpoint(tmp_path / "x.safetensors"))
    assert (
        all(map(torch.equal, steps(lecam, range(50, 60)), steps(again, range(50, 60))))
        and torch.equal(lecam.real, again.real)
        and lecam.real != 0
    )


def test_lecam_anchors_survive_nan_and_evaluation():
    lecam = LeCAM()
    x = torch.ones(4)
    lecam(x, -x)
    before = lecam.real.clone(), lecam.fake.clone()
    assert before[0] > 0 > before[1]
    lecam(x * float("nan"), -x)
    lecam(x, x * float("inf"))
    lecam.eval()(x, -x)
    assert torch.equal(lecam.real, before[0]) and torch.equal(lecam.fake, before[1])


WORKER = """
import json, sys, torch

rank, world, place = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
from dera.losses import LeCAM, discriminator_loss

if world > 1:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{place}/meet", rank=rank, world_size=world
    )
w = torch.tensor([1.0, -0.5], requires_grad=True)
lecam, out = LeCAM(decay=0.5, weight=0.3), []
for step in range(8):
    data = (
        torch.randn(2, 12, 2, generator=torch.Generator().manual_seed(step))
        + torch.tensor([0.5, -0.5])[:, None, None]
    )
    real, fake = data[:, rank::world] @ w
    (g,) = torch.autograd.grad(discriminator_loss(real, fake) + lecam(real, fake), w)
    if world > 1:
        torch.distributed.all_reduce(g)
        g = g / world
    w.data -= 0.3 * g
    out.append([*w.tolist(), lecam.real.item(), lecam.fake.item()])
open(f"{place}/{world}-{rank}.json", "w").write(json.dumps(out))
if world > 1:
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
"""


def test_two_processes_equal_one(tmp_path, root, monkeypatch):
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), "2", str(tmp_path)],
            env=env,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    monkeypatch.setattr(sys, "argv", ["", "0", "1", str(tmp_path)])
    exec(WORKER, {})
    for r in runs:
        assert r.wait(240) == 0, r.stderr.read().decode()[-1000:]
    one, a, b = (
        torch.tensor(json.loads((tmp_path / f"{n}.json").read_text()))
        for n in ("1-0", "2-0", "2-1")
    )
    assert torch.equal(a, b) and torch.allclose(a, one, atol=1e-5) and one[-1, 2] != 0


def test_lecam_moves_once_for_all_parts_of_a_step():
    "Parts of any sizes: the anchors of the whole batch, each part compared with those of before the step."
    for sizes in [12], [6, 6], [1, 4, 7], [3] * 4:
        whole, parts = (LeCAM(decay=0.6, weight=1.0, parts=n).double() for n in (1, len(sizes)))
        for step in range(4):
            real, fake = 3 * normal(2, 12, seed=step) + torch.tensor([[1.0], [-1.0]])
            wanted, found, before = whole(real, fake), 0.0, parts.real.clone()
            for i, (some, others) in enumerate(zip(real.split(sizes), fake.split(sizes))):
                found = found + len(some) / 12 * parts(some, others)
                moved = not torch.equal(parts.real, before)
                assert moved == (i == len(sizes) - 1), (sizes, i)
            assert torch.allclose(found, wanted, rtol=1e-12)
            assert torch.allclose(parts.real, whole.real, rtol=1e-12)
            assert torch.allclose(parts.fake, whole.fake, rtol=1e-12)
        assert list(parts.state_dict()) == ["real", "fake"]


# ---- on a device that is not there


def test_everything_stays_on_the_device():
    "Fake CUDA tensors run through every term: a number made on the CPU would be refused."
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.device("cuda"):
        discriminator, lecam = VideoDiscriminator.preset("tiny"), LeCAM()
        x, y = torch.rand(2, 3, 8, 32, 32), torch.rand(2, 3, 8, 32, 32, requires_grad=True)
        total, terms = ReconstructionLoss(Patches("image").float().cuda(), 0.5, 4.0)(y, x)
        loss, log = discriminator_terms(discriminator, x, y, lecam)
        adversarial = adversarial_term(discriminator, y)
        prior = ARPrior(num_tokens=6, latent_dim=4, dim=8, depth=1, heads=2).eval()
        indices = torch.zeros(2, 6, dtype=torch.long)
        forecast = prior(torch.rand(2, 6, 4), indices, torch.rand(5, 4))
        everything = [total_loss(total, loss, adversarial, forecast), lecam.real, *terms.values()]
        for value in everything + list(log.values()):
            assert value.device.type == "cuda"


def test_lpips_in_parts_is_lpips(hub, clips):
    from dera.runtime.lpips import LPIPSVGG as moved

    whole, y = load_perceptual("lpips-vgg"), (clips[:2, :, :3] + 0.1).requires_grad_()
    assert moved is LPIPSVGG
    wanted = whole(y, clips[:2, :, :3])
    (gradient,) = torch.autograd.grad(wanted, y)
    for frames in 1, 4, 100:
        parts = load_perceptual("lpips-vgg", frames_at_once=frames)
        parts.load_state_dict(whole.state_dict())
        found = parts(y, clips[:2, :, :3])
        assert torch.allclose(found, wanted, rtol=1e-5)
        assert torch.allclose(torch.autograd.grad(found, y)[0], gradient, atol=1e-7)


# ---- the prior


def make_prior(**changes):
    torch.manual_seed(0)
    prior = ARPrior(num_tokens=12, latent_dim=8, dim=24, depth=2, heads=2, **changes).double()
    codes = F.normalize(normal(32, 8), dim=-1)
    indices = torch.randint(32, (3, 12), generator=torch.Generator().manual_seed(1))
    return prior, codes, indices, codes[indices].clone().requires_grad_()


def test_prior_has_larps_size():
    with torch.device("meta"):
        assert count(ARPrior()) == 21_700_240 and ARPrior().temperature == 1.0


def test_prior_is_causal():
    prior, codes, indices, z = make_prior()
    prior.eval()
    out = prior.predict(z)
    assert torch.allclose(out.norm(dim=-1), torch.ones_like(out[..., 0]))
    for i in range(12):
        reach = (
            torch.autograd.grad(out[:, i].square().mul(normal(8)).sum(), z, retain_graph=True)[0]
            .abs()
            .sum((0, 2))
        )
        assert (reach[: i + 1] > 0).all() and (reach[i + 1 :] == 0).all()


def by_hand(prior, z, codes, indices):
    "Cross-entropy of each next code, position by position."
    out, total = prior.predict(z[:, :-1]), 0.0
    for b in range(len(z)):
        for i in range(z.shape[1] - 1):
            logits = codes @ out[b, i] / prior.temperature
            total = total + torch.logsumexp(logits, 0) - logits[indices[b, i + 1]]
    return total / (len(z) * (z.shape[1] - 1))


def test_prior_loss_and_the_limit_without_sampling():
    prior, codes, indices, z = make_prior(temperature=0.5)
    prior.eval()
    assert torch.allclose(prior(z, indices, codes), by_hand(prior, z, codes, indices), rtol=1e-10)
    assert torch.allclose(prior(z, indices, 7 * codes), prior(z, indices, codes), rtol=1e-10)
    assert torch.allclose(
        prior(z, indices, codes, sampling=1e-12), prior(z, indices, codes), rtol=1e-10
    )  # two equal rounds


def test_prior_with_every_latent_sampled():
    prior, codes, indices, z = make_prior(temperature=1e-7)
    prior.eval()
    best = (prior.predict(z[:, :-1]) @ codes.T).argmax(-1)
    read = torch.cat([z[:, :1], codes[best]], 1)
    wanted = (by_hand(prior, z, codes, indices) + by_hand(prior, read, codes, indices)) / 2
    assert torch.allclose(prior(z, indices, codes, sampling=1.0), wanted, rtol=1e-9)


def test_sampling_replaces_the_right_share_and_never_the_first():
    prior, codes, indices, z = make_prior()
    prior.eval()
    seen = []
    predict = prior.predict
    prior.predict = lambda z: (seen.append(z), predict(z))[1]
    torch.manual_seed(0)
    z = z.detach() + 1e-3  # so that a drawn code differs from what it replaces
    for _ in range(60):
        prior(z, indices, codes, sampling=0.3)
    changed = torch.stack([(a != b).any(-1) for a, b in zip(seen[::2], seen[1::2])]).double()
    assert changed[..., 0].sum() == 0 and abs(changed[..., 1:].mean() - 0.3) < 0.03
    drawn = torch.cat([b[(a != b).any(-1)] for a, b in zip(seen[::2], seen[1::2])])
    assert torch.cdist(drawn, codes).min(1).values.max() < 1e-6  # what is read instead is a code


def test_prior_gradients():
    prior, codes, indices, z = make_prior()
    codes = codes.clone().requires_grad_()
    prior(z, indices, codes, sampling=0.5).backward()
    assert (
        codes.grad is None
        and (z.grad[:, :-1].abs().sum(-1) > 0).all()
        and (z.grad[:, -1] == 0).all()
    )
    unused = [n for n, p in prior.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    assert not unused, f"without a gradient, DistributedDataParallel would wait for ever: {unused}"
    z.grad = None
    prior.eval()
    prior(z, indices, codes, sampling=1.0).backward()
    both = z.grad.clone()
    z.grad = None
    prior(z, indices, codes).backward()
    assert torch.allclose(both[:, 1:], z.grad[:, 1:] / 2)  # drawn codes carry no gradient


def test_prior_learns_a_rule_and_its_floor():
    torch.manual_seed(0)
    prior = ARPrior(
        num_tokens=12, latent_dim=8, dim=32, depth=1, heads=2, dropout=0.0, temperature=0.1
    )
    codes = F.normalize(normal(16, 8, dtype=torch.float32), dim=-1)
    adam = torch.optim.Adam(prior.parameters(), 5e-3)
    for _step in range(120):
        indices = (torch.randint(16, (32, 1)) + 3 * torch.arange(12)) % 16
        loss = prior(codes[indices], indices, codes)
        adam.zero_grad()
        loss.backward()
        adam.step()
    floor = ((codes @ codes.T / 0.1).logsumexp(-1) - 10).mean()
    assert loss < floor + 0.5 < math.log(16) - 1
    cold = copy.deepcopy(prior)
    cold.temperature = 1.0
    assert cold(codes[indices], indices, codes) > math.log(16) - 1.5  # cosines: little to win


def test_prior_under_autocast_scores_codes_in_float32():
    prior, codes, indices, z = make_prior(dropout=0.0)
    prior, codes, z = prior.float(), codes.float(), z.detach().float()
    with torch.autocast("cpu", torch.bfloat16):
        low, answers = prior(z, indices, codes), prior.predict(z[:, :-1])
    wanted = F.cross_entropy((answers @ codes.T).flatten(0, 1), indices[:, 1:].flatten())
    rough = (answers.bfloat16() @ codes.T.bfloat16()).float()
    assert (
        low.dtype == torch.float32
        and torch.allclose(low, wanted, rtol=1e-6)
        and abs(low - prior(z, indices, codes)) < 0.05
    )
    assert not torch.allclose(
        low, F.cross_entropy(rough.flatten(0, 1), indices[:, 1:].flatten()), rtol=1e-6
    )


def test_processes_drop_different_activations_and_go_on_alike(monkeypatch):
    "Each rank has a dropout of its own; what is drawn afterwards is the same in all, and in one process."
    prior, codes, indices, z = make_prior()
    found = {}
    for rank, world in (0, 1), (0, 2), (1, 2):
        monkeypatch.setattr("dera.runtime.prior.world_size", lambda world=world: world)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        torch.manual_seed(7)
        losses = [prior(z, indices, codes, sampling=0.5).item() for _ in range(2)]
        assert losses[0] != losses[1]  # parts of a step do not repeat each other
        found[rank, world] = losses, torch.rand(3)
    assert found[0, 1][0] == found[0, 2][0] != found[1, 2][0]
    assert torch.equal(found[0, 1][1], found[1, 2][1])


def test_prior_refuses():
    prior, codes, indices, z = make_prior()
    with pytest.raises(InputError, match="12 quantised tokens") as e:
        prior(z, None, codes)
    with pytest.raises(InputError, match="12 quantised tokens a clip, got 11"):
        prior(z[:, :-1], indices[:, :-1], codes)
    assert one_line(e)


@pytest.mark.parametrize("name", ["tiny", "pocket", "paper"])
def test_prior_preset_fits_the_tokenizer(name):
    c = TokenizerConfig.preset(name)
    with torch.device("meta"):
        prior = ARPrior.preset(name)
    assert len(prior.positions) == c.num_tokens and prior.embed.in_features == c.latent_dim


def test_schedule():
    values = [scheduled_sampling(s, 200) for s in range(200)]
    assert (
        values[0] == 0
        and max(values) == 0.5
        and values == sorted(values)
        and values[60] == 0.5
        and abs(values[30] - 0.25) < 1e-9
    )
    assert [scheduled_sampling(s, 200, peak=0.8, ramp=0.0) for s in (0, 1, 199)] == [
        0.8
    ] * 3  # no ramp: the peak from the first step


# ---- the sum


def test_total_is_the_weighted_sum():
    terms = [torch.tensor(float(v), requires_grad=True) for v in (2, 3, 5, 7)]
    total = total_loss(*terms)
    assert torch.allclose(total, torch.tensor(2 + 0.1 * 3 + 0.3 * 5 + 0.06 * 7))
    weights = torch.autograd.grad(total, terms)
    assert torch.allclose(torch.stack(weights), torch.tensor([1.0, 0.1, 0.3, 0.06]))
    assert torch.allclose(total_loss(terms[0], terms[1]), torch.tensor(2.3)) and torch.allclose(
        total_loss(*terms[:2], None, terms[3], prior_weight=1.0), torch.tensor(9.3)
    )
