"Alignment: the loss, grids, projectors, layers, teachers alone or together, stages, devices."

import math

import pytest
import torch
from safetensors import safe_open
from torch._subclasses.fake_tensor import FakeTensorMode

from dera.align import (
    Alignment,
    Projector,
    alignment_loss,
    match_grid,
    stage_weights,
    teacher_features,
)
from dera.pocket import render, sample_factors, write_dataset
from dera.query import Encoded, QueryTokenizer
from dera.runtime.checkpoints import load_model
from dera.runtime.errors import InputError
from dera.runtime.run_folder import RunFolder
from dera.streams import DeRATokenizer, TokenizerConfig
from dera.teachers import load_teacher
from dera.train_tokenizer import TIMES, TokenizerTraining, train_tokenizer

TINY = TokenizerConfig.preset("tiny")


@pytest.fixture(scope="module")
def clips():
    return render(sample_factors(6, seed=41), 8, 32)


@pytest.fixture(scope="module")
def teachers():
    return load_teacher("pocket-image"), load_teacher("pocket-video")


@pytest.fixture(scope="module")
def encoded(clips):
    torch.manual_seed(0)
    return DeRATokenizer(TINY).encode(clips, quantize=False)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the loss


def test_perfect_opposite_and_orthogonal():
    x = random(3, 7, 16)
    orthogonal = torch.empty_like(x)
    orthogonal[..., ::2] = -x[..., 1::2]
    orthogonal[..., 1::2] = x[..., ::2]
    assert alignment_loss(x, x).item() == pytest.approx(-1, abs=1e-6)
    assert alignment_loss(x, -x).item() == pytest.approx(1, abs=1e-6)
    assert alignment_loss(x, orthogonal).item() == pytest.approx(0, abs=1e-6)


def test_it_is_equation_4():
    "A double loop in float64; positions of very different lengths all count the same."
    x = random(3, 7, 16, seed=1) * torch.logspace(-3, 3, 7)[:, None]
    y = random(3, 7, 16, seed=2)
    total = 0.0
    for b in range(3):
        for n in range(7):
            lengths = math.sqrt(float(x[b, n] @ x[b, n])) * math.sqrt(float(y[b, n] @ y[b, n]))
            total -= float(x[b, n] @ y[b, n]) / lengths / 7
    assert alignment_loss(x, y).item() == pytest.approx(total / 3, abs=1e-6)


def test_teacher_scale_is_ignored_in_value_and_gradient():
    x, y = random(2, 5, 8).requires_grad_(), random(2, 5, 8, seed=3)
    loss = alignment_loss(x, y)
    (gradient,) = torch.autograd.grad(loss, x)
    for scale in (1e-4, 1e-2, 7.0, 1e4, 1e8):
        scaled = alignment_loss(x, scale * y)
        (other,) = torch.autograd.grad(scaled, x)
        assert torch.allclose(gradient, other, rtol=1e-4, atol=1e-7)
        assert scaled.item() == pytest.approx(loss.item(), abs=1e-6)


def test_float32_whatever_comes_in():
    x, y = random(4, 64, 96), random(4, 64, 96, seed=1)
    exact = alignment_loss(x.bfloat16().double(), y.bfloat16().double())
    with torch.autocast("cpu", torch.bfloat16):
        loss = alignment_loss(x.bfloat16(), y.bfloat16())
    assert loss.dtype == torch.float32
    assert abs(loss - exact) < 1e-6


def test_no_gradient_reaches_the_teacher(clips):
    x, y = random(2, 5, 8).requires_grad_(), random(2, 5, 8, seed=1).requires_grad_()
    alignment_loss(x, y).backward()
    assert y.grad is None
    assert x.grad.abs().sum() > 0

    # even one that somebody unfroze
    awake = [load_teacher(name).requires_grad_(True) for name in ("pocket-image", "pocket-video")]
    targets = teacher_features(*awake, clips, TINY.grid)
    torch.manual_seed(0)
    encoded = DeRATokenizer(TINY).encode(clips, quantize=False)
    sum(Alignment(128, 96, 96, 32)(encoded, *targets)).backward()
    for teacher in awake:
        assert all(p.grad is None for p in teacher.parameters())


def test_shapes_must_agree():
    with pytest.raises(InputError, match=r"\(2, 5, 8\).*\(2, 6, 8\)"):
        alignment_loss(torch.zeros(2, 5, 8), torch.zeros(2, 6, 8))
    with pytest.raises(InputError, match="match the grids"):
        alignment_loss(torch.zeros(2, 5, 8), torch.zeros(1, 5, 8))  # no broadcasting


# ---- grids


def test_averaging_over_time():
    cases = [
        ((8, 3, 2), (4, 3, 2)),
        ((8, 3, 2), (1, 3, 2)),
        ((6, 2, 2), (3, 2, 2)),
        ((4, 2, 3), (4, 2, 3)),
    ]
    for grid, wanted in cases:
        x, ratio = random(2, *grid, 5), grid[0] // wanted[0]
        out = match_grid(x.flatten(1, 3), grid, wanted).unflatten(1, wanted)
        for t in range(wanted[0]):
            mean = x[:, t * ratio : (t + 1) * ratio].mean(1)
            assert torch.allclose(out[:, t], mean, atol=1e-12), (grid, wanted)


def test_a_wrong_grid_names_both():
    cases = [
        ((8, 2, 2), (3, 2, 2)),
        ((4, 2, 2), (8, 2, 2)),
        ((4, 2, 2), (4, 4, 4)),
        ((1, 14, 14), (1, 16, 16)),
        ((4, 4, 2), (4, 2, 4)),
    ]
    for grid, wanted in cases:
        features = torch.zeros(1, math.prod(grid), 3)
        with pytest.raises(InputError) as error:
            match_grid(features, grid, wanted)
        assert all(part in str(error.value) for part in (str(grid), str(wanted), "interpolation"))
        stretched = match_grid(features, grid, wanted, interpolate=True)
        assert stretched.shape == (1, math.prod(wanted), 3)
    with pytest.raises(InputError, match=r"17 teacher features.*\(1, 4, 4\)"):
        match_grid(torch.zeros(1, 17, 3), (1, 4, 4), (1, 4, 4))  # a class token was left in


def test_interpolation_keeps_what_is_linear():
    def places(*grid):
        axes = [(torch.arange(n) + 0.5) / n for n in grid]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)[None]

    out = match_grid(places(4, 6, 6), (4, 6, 6), (2, 3, 3), interpolate=True)
    assert torch.allclose(out, places(2, 3, 3), atol=1e-6)


def test_targets_stand_where_the_patches_are(clips, teachers):
    "A changed corner of the first frame, or changed later frames: those targets move, others do not."
    before = teacher_features(*teachers, clips, TINY.grid)
    corner = clips.clone()
    corner[:, :, 0, 24:, :8] = 1 - corner[:, :, 0, 24:, :8]
    after = teacher_features(teachers[0], None, corner, TINY.grid)
    assert after[1] is None
    assert (after[0] - before[0]).norm(dim=-1).mean(0).argmax() == 12  # last row, first column
    late = clips.clone()
    late[:, :, 1:] = torch.rand(late[:, :, 1:].shape, generator=torch.Generator().manual_seed(0))
    after = teacher_features(*teachers, late, TINY.grid)
    assert torch.equal(after[0], before[0])  # the image teacher sees the first frame only
    assert not torch.allclose(after[1], before[1], atol=0.1)


def test_the_wrong_kind_of_teacher_is_refused(clips, teachers):
    "A video teacher's answer for one frame, averaged over time, would fit without a word."
    image, video = teachers
    with pytest.raises(InputError, match="pocket-video is a teacher of video"):
        teacher_features(video, None, clips, TINY.grid)
    with pytest.raises(InputError, match="pocket-image is a teacher of image"):
        teacher_features(None, image, clips, TINY.grid)


# ---- projectors and streams


def test_projector_is_a_two_layer_mlp():
    h = Projector(12, 7, 20).double()
    x = random(2, 3, 12)
    w1, b1, w2, b2 = h.parameters()
    hidden = x @ w1.T + b1
    assert torch.allclose(h(x), (hidden * torch.sigmoid(hidden)) @ w2.T + b2)
    assert w1.shape == (20, 12)
    assert w2.shape == (7, 20)


@pytest.mark.parametrize("use", [(True, True), (True, False), (False, True), (False, False)])
def test_each_teacher_alone_both_none(clips, teachers, use):
    "An absent teacher gives exactly zero, and its stream's own parameters get nothing."
    torch.manual_seed(0)
    model = DeRATokenizer(TINY)
    encoded = model.encode(clips, quantize=False)
    used = [teacher if wanted else None for teacher, wanted in zip(teachers, use)]
    align = Alignment(128, *[teacher and teacher.dim for teacher in used], hidden=32)
    targets = teacher_features(*used, clips, TINY.grid)
    losses = align(encoded, *targets)
    for i, stream in enumerate(("appearance", "motion")):
        projector = getattr(align, stream)
        if use[i]:
            assert losses[i] == alignment_loss(projector(getattr(encoded, stream)), targets[i])
        else:
            assert losses[i] == 0
            assert projector is None
            assert targets[i] is None
    if any(use):
        (1.0 * losses[0] + 0.5 * losses[1]).backward()
        embeddings = model.embed_appearance.weight, model.embed_motion.weight
        assert [e.grad is not None for e in embeddings] == list(use)


def test_zeros_and_losses_stay_on_the_device_of_the_features():
    "With one teacher, the other or none, both losses can be stacked there."
    with FakeTensorMode():
        features = torch.empty(2, 16, 128, device="cuda")
        encoded = Encoded(None, torch.empty(2, 64, 16, device="cuda"), features, features, None)
        for widths in ((96, 96), (96, None), (None, 96), (None, None)):
            align = Alignment(128, *widths, hidden=32)
            for part in align.modules():
                for key, parameter in part._parameters.items():
                    part._parameters[key] = torch.nn.Parameter(parameter.to("cuda"))
            targets = [w and torch.empty(2, 16, w, device="cuda") for w in widths]
            with torch.autocast("cpu", torch.bfloat16):
                losses = torch.stack(align(encoded, *targets))
            assert losses.device.type == "cuda"
            assert losses.dtype == torch.float32


def test_shared_or_separate(clips, teachers, encoded):
    targets = teacher_features(*teachers, clips, TINY.grid)
    shared, separate = Alignment(128, 96, 96, 32, shared=True), Alignment(128, 96, 96, 32)
    sizes = [sum(p.numel() for p in module.parameters()) for module in (shared, separate)]
    assert 2 * sizes[0] == sizes[1]
    with pytest.raises(InputError, match="96 and 64"):
        Alignment(128, 96, 64, shared=True)
    for loss in shared(encoded, *targets):
        gradients = torch.autograd.grad(loss, list(shared.parameters()), retain_graph=True)
        assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_a_tokenizer_without_appearance_stream(clips, teachers):
    "LARP's tokenizer has one stream: the video teacher alone fits it, the image teacher is refused."
    torch.manual_seed(0)
    encoded = QueryTokenizer(TINY).encode(clips, quantize=False)
    image, video = teacher_features(*teachers, clips, TINY.grid)
    assert -1 < Alignment(128, None, 96, 32)(encoded, None, video)[1] < 1
    with pytest.raises(InputError, match="no appearance stream"):
        Alignment(128, 96, 96, 32)(encoded, image, video)
    with pytest.raises(InputError, match="no projector"):
        Alignment(128, None, 96, 32)(encoded, image, video)


@pytest.mark.parametrize("layer", [1, 3, 4])
def test_any_encoder_layer(clips, teachers, layer):
    "The outputs of that block at the patch places; gradients in the blocks up to it, no further."
    torch.manual_seed(0)
    model = DeRATokenizer(TINY)
    targets = teacher_features(*teachers, clips, TINY.grid)
    seen = []

    def keep(module, inputs, output):
        seen.append(output)

    hook = model.encoder.blocks[layer - 1].register_forward_hook(keep)
    encoded = model.encode(clips, quantize=False, tap=layer)
    hook.remove()
    appearance, motion = (model.encoder.norm(x) if layer == 4 else x for x in seen)
    assert torch.allclose(encoded.appearance, appearance[:, 16:], atol=1e-6)
    assert torch.allclose(encoded.motion, motion[:, 48:], atol=1e-6)
    sum(Alignment(128, 96, 96, 32)(encoded, *targets)).backward()
    reached = [block.qkv.weight.grad is not None for block in model.encoder.blocks]
    assert reached == [i < layer for i in range(4)]


# ---- schedule and inference


def test_two_stages_of_20_and_55_epochs():
    for per_epoch in (1, 37):
        steps = 75 * per_epoch
        on = [stage_weights(s, steps, (1.0, 0.5), 20 / 75) == (1.0, 0.5) for s in range(steps)]
        assert on == [True] * 20 * per_epoch + [False] * 55 * per_epoch
        later = stage_weights(20 * per_epoch, steps, share=20 / 75, second=(0.2, 0.1))
        assert later == (0.2, 0.1)
    assert {stage_weights(s, 50) for s in (0, 25, 49)} == {(1.0, 0.5)}  # one stage by default
    with pytest.raises(InputError, match="20"):
        stage_weights(0, 75, share=20)  # epochs instead of a share


def test_inference_checkpoint_is_that_of_an_unaligned_tokenizer(tmp_path, clips, teachers):
    torch.manual_seed(0)
    model = DeRATokenizer(TINY)
    align = Alignment(128, 96, 96, 32)
    targets = teacher_features(*teachers, clips, TINY.grid)
    adam = torch.optim.Adam([*model.parameters(), *align.parameters()])
    sum(align(model.encode(clips, quantize=False), *targets)).backward()
    adam.step()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    fresh = DeRATokenizer(TINY).state_dict()
    assert {k: v.shape for k, v in saved.items()} == {k: v.shape for k, v in fresh.items()}

    # no tensor of a teacher or a projector is in it
    foreign = {}
    for module in (align, *teachers):
        for tensor in module.state_dict().values():
            foreign.setdefault(tensor.shape, []).append(tensor.float())
    for key, tensor in saved.items():
        if tensor.float().std() > 0:
            others = foreign.get(tensor.shape, [])
            assert not any(torch.equal(tensor.float(), other) for other in others), key
    again = load_model(DeRATokenizer, tmp_path).encode(clips).indices
    assert torch.equal(again, model.eval().encode(clips).indices)


# ---- in the training loop


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("pocket")
    write_dataset(root, 40, seed=1)
    return str(root)


def train(data, out, stop_after=None, **changes):
    "A few steps; the log without what depends on the clock."
    settings = dict(
        steps=6,
        batch_size=4,
        quantizer_start=3,
        warmup=2,
        log_every=1,
        save_every=1,
        projector_hidden=32,
    )
    config = TokenizerTraining(data=data, **settings | changes)
    train_tokenizer(config, out, stop_after=stop_after)
    log = RunFolder(out).history()
    return [{key: value for key, value in line.items() if key not in TIMES} for line in log]


def test_stages_and_teachers_in_training(tmp_path, data):
    two = train(data, tmp_path / "two", align_share=0.5, align_layer=2)
    assert all(line["align_a"] != 0 for line in two[:3])
    for line in two[3:]:
        assert line["align_a"] == 0 == line["align_m"]
        assert "cosine" not in line

    both = train(data, tmp_path / "both")
    for line in both:
        assert -1 < line["cosine"] < 1
        assert line["norm_a"] > 0
        assert line["conflict"] == (line["cosine"] < 0)
    assert len(both[0]["cosine_by_block"]) == 4

    alone = train(data, tmp_path / "image", video_teacher="")
    assert all(line["align_m"] == 0 and "conflict" not in line for line in alone)
    assert alone[-1]["align_a"] < alone[0]["align_a"]
    with pytest.raises(InputError, match="align_layer 9"):
        train(data, tmp_path / "deep", align_layer=9)


def test_every_kind_of_surgery_trains(tmp_path, data):
    kinds = [
        dict(surgery="soft", soft_weight=0.5),
        dict(surgery_level="encoder"),
        dict(projector_shared=True, eps_relative=True),
    ]
    for i, changes in enumerate(kinds):
        log = train(data, tmp_path / str(i), **changes)
        assert log[-1]["align_a"] < log[0]["align_a"], changes
        assert all(abs(line["loss"]) < 100 for line in log), changes


def test_held_coefficients_are_resumed(tmp_path, data):
    "Stopped between two decisions, a run with every=4 goes on as if it had not been."
    settings = dict(surgery_every=4)
    whole = train(data, tmp_path / "whole", **settings)
    train(data, tmp_path / "half", stop_after=3, **settings)
    assert train(data, tmp_path / "half", **settings) == whole
    assert ["cosine" in line for line in whole] == [True, False, False, False, True, False]
