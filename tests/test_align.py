"Alignment: the loss, grids, projectors, layers, teachers alone or together, stages, and what a checkpoint holds."

import pytest
import torch
from safetensors import safe_open

from dera.align import (
    Alignment,
    Projector,
    alignment_loss,
    match_grid,
    stage_weights,
    teacher_features,
)
from dera.pocket import render, sample_factors, write_dataset
from dera.query import QueryTokenizer
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


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- the loss


def test_perfect_opposite_and_orthogonal():
    x = random(3, 7, 16)
    y = x.roll(1, -1).clone()
    y[..., ::2], y[..., 1::2] = -x[..., 1::2], x[..., ::2]  # y is orthogonal to x
    assert alignment_loss(x, x).item() == pytest.approx(-1, abs=1e-6)
    assert alignment_loss(x, -x).item() == pytest.approx(1, abs=1e-6)
    assert alignment_loss(x, y).item() == pytest.approx(0, abs=1e-6)


def test_it_is_equation_4():
    "A double loop in float64, with positions of very different lengths: every position counts the same."
    x, y = random(3, 7, 16, seed=1) * torch.logspace(-3, 3, 7)[:, None], random(3, 7, 16, seed=2)
    total = 0.0
    for b in range(3):
        one = 0.0
        for n in range(7):
            one += float(x[b, n] @ y[b, n]) / float(
                (x[b, n] @ x[b, n]).sqrt() * (y[b, n] @ y[b, n]).sqrt()
            )
        total -= one / 7
    assert alignment_loss(x, y).item() == pytest.approx(total / 3, abs=1e-6)


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 7.0, 1e4, 1e8])
def test_teacher_scale_is_ignored_in_value_and_gradient(scale):
    x, y = random(2, 5, 8).requires_grad_(), random(2, 5, 8, seed=3)
    (one,) = torch.autograd.grad(alignment_loss(x, y), x)
    (other,) = torch.autograd.grad(alignment_loss(x, scale * y), x)
    assert torch.allclose(one, other, rtol=1e-4, atol=1e-7)
    assert alignment_loss(x, y).item() == pytest.approx(
        alignment_loss(x, scale * y).item(), abs=1e-6
    )


def test_float32_whatever_comes_in():
    x, y = random(4, 64, 96), random(4, 64, 96, seed=1)
    exact = alignment_loss(x.bfloat16().double(), y.bfloat16().double())
    with torch.autocast("cpu", torch.bfloat16):
        loss = alignment_loss(x.bfloat16(), y.bfloat16())
    assert loss.dtype == torch.float32 and abs(loss - exact) < 1e-6


def test_no_gradient_reaches_the_teacher(clips, teachers):
    x, y = random(2, 5, 8).requires_grad_(), random(2, 5, 8, seed=1).requires_grad_()
    alignment_loss(x, y).backward()
    assert y.grad is None and x.grad.abs().sum() > 0
    awake = [
        load_teacher(t.name).requires_grad_(True) for t in teachers
    ]  # even one that somebody unfroze
    targets = teacher_features(*awake, clips, TINY.grid)
    torch.manual_seed(0)
    loss = sum(Alignment(128, 96, 96, 32)(DeRATokenizer(TINY).encode(clips, False), *targets))
    loss.backward()
    assert not [n for t in awake for n, p in t.named_parameters() if p.grad is not None]


def test_shapes_must_agree():
    with pytest.raises(InputError, match=r"\(2, 5, 8\).*\(2, 6, 8\)"):
        alignment_loss(torch.zeros(2, 5, 8), torch.zeros(2, 6, 8))
    with pytest.raises(InputError, match="match the grids"):
        alignment_loss(torch.zeros(2, 5, 8), torch.zeros(1, 5, 8))  # no broadcasting


# ---- grids


@pytest.mark.parametrize(
    "grid, wanted",
    [
        ((8, 3, 2), (4, 3, 2)),
        ((8, 3, 2), (2, 3, 2)),
        ((8, 3, 2), (1, 3, 2)),
        ((6, 2, 2), (3, 2, 2)),
        ((4, 2, 3), (4, 2, 3)),
    ],
)
def test_averaging_over_time(grid, wanted):
    x, step = random(2, *grid, 5), grid[0] // wanted[0]
    out = match_grid(x.flatten(1, 3), grid, wanted).unflatten(1, wanted)
    for t in range(wanted[0]):
        assert torch.allclose(out[:, t], x[:, t * step : (t + 1) * step].mean(1), atol=1e-12)


@pytest.mark.parametrize(
    "grid, wanted",
    [
        ((8, 2, 2), (3, 2, 2)),
        ((4, 2, 2), (8, 2, 2)),
        ((4, 2, 2), (4, 4, 4)),
        ((1, 14, 14), (1, 16, 16)),
        ((4, 4, 2), (4, 2, 4)),
    ],
)
def test_a_wrong_grid_names_both(grid, wanted):
    n = grid[0] * grid[1] * grid[2]
    with pytest.raises(InputError) as e:
        match_grid(torch.zeros(1, n, 3), grid, wanted)
    assert (
        str(grid) in str(e.value)
        and str(wanted) in str(e.value)
        and "interpolation" in str(e.value)
    )
    assert match_grid(torch.zeros(1, n, 3), grid, wanted, interpolate=True).shape == (
        1,
        wanted[0] * wanted[1] * wanted[2],
        3,
    )


def test_special_tokens_left_in_are_noticed():
    with pytest.raises(InputError, match=r"17 teacher features.*\(1, 4, 4\)"):
        match_grid(torch.zeros(1, 17, 3), (1, 4, 4), (1, 4, 4))


def test_interpolation_keeps_what_is_linear():
    x = torch.stack(
        torch.meshgrid(*[(torch.arange(n) + 0.5) / n for n in (4, 6, 6)], indexing="ij"), -1
    ).flatten(0, 2)[None]
    out = match_grid(x, (4, 6, 6), (2, 3, 3), interpolate=True).unflatten(1, (2, 3, 3))[0]
    want = torch.stack(
        torch.meshgrid(*[(torch.arange(n) + 0.5) / n for n in (2, 3, 3)], indexing="ij"), -1
    )
    assert torch.allclose(out, want, atol=1e-6)


def test_targets_stand_where_the_patches_are(clips, teachers):
    "Change one corner of the first frame, or one corner of the last frames: the targets of those patches move most."
    before = teacher_features(*teachers, clips, TINY.grid)
    changed = clips.clone()
    changed[:, :, 0, 24:, :8] = 1 - changed[:, :, 0, 24:, :8]
    moved = (
        (teacher_features(teachers[0], None, changed, TINY.grid)[0] - before[0])
        .norm(dim=-1)
        .mean(0)
    )
    assert moved.argmax() == 12  # last row, first column of 4 x 4
    late = clips.clone()
    late[:, :, 1:] = torch.rand(late[:, :, 1:].shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        teacher_features(*teachers, late, TINY.grid)[0], before[0]
    )  # the image teacher sees the first frame only
    assert not torch.allclose(teacher_features(*teachers, late, TINY.grid)[1], before[1], atol=0.1)


# ---- projectors and streams


def test_projector_is_a_two_layer_mlp():
    h = Projector(12, 7, 20).double()
    x = random(2, 3, 12)
    (w1, b1, w2, b2) = h.parameters()
    y = x @ w1.T + b1
    assert (
        torch.allclose(h(x), (y * torch.sigmoid(y)) @ w2.T + b2)
        and w1.shape == (20, 12)
        and w2.shape == (7, 20)
    )


@pytest.mark.parametrize("use", [(1, 1), (1, 0), (0, 1), (0, 0)])
def test_each_teacher_alone_both_none(clips, teachers, use):
    "An absent teacher gives exactly zero, and its stream's own parameters and projector get nothing."
    torch.manual_seed(0)
    model = DeRATokenizer(TINY)
    encoded = model.encode(clips, quantize=False)
    align = Alignment(128, *[t.dim if u else None for t, u in zip(teachers, use)], hidden=32)
    targets = teacher_features(*[t if u else None for t, u in zip(teachers, use)], clips, TINY.grid)
    losses = align(encoded, *targets)
    for loss, u, h, features, target in zip(
        losses, use, (align.appearance, align.motion), (encoded.appearance, encoded.motion), targets
    ):
        if u:
            assert loss == alignment_loss(h(features), target)
        else:
            assert loss == 0 and h is None and target is None
    if any(use):
        (1.0 * losses[0] + 0.5 * losses[1]).backward()
        assert (model.embed_appearance.weight.grad is not None) == bool(use[0]) and (
            model.embed_motion.weight.grad is not None
        ) == bool(use[1])


def test_shared_or_separate(clips, teachers):
    torch.manual_seed(0)
    encoded = DeRATokenizer(TINY).encode(clips, quantize=False)
    targets = teacher_features(*teachers, clips, TINY.grid)
    shared, separate = Alignment(128, 96, 96, 32, shared=True), Alignment(128, 96, 96, 32)
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert 2 * count(shared) == count(separate)
    with pytest.raises(InputError, match="96 and 64"):
        Alignment(128, 96, 64, shared=True)
    L_a, L_m = shared(encoded, *targets)
    h = list(shared.parameters())
    for loss in L_a, L_m:
        assert all(g.abs().sum() > 0 for g in torch.autograd.grad(loss, h, retain_graph=True))


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


@pytest.mark.parametrize("layer", [1, 2, 3, 4])
def test_any_encoder_layer(clips, teachers, layer):
    "The outputs of that block at the patch places, and gradients in the blocks up to it and no further."
    torch.manual_seed(0)
    model = DeRATokenizer(TINY)
    targets = teacher_features(*teachers, clips, TINY.grid)
    seen = []
    hook = model.encoder.blocks[layer - 1].register_forward_hook(
        lambda module, args, out: seen.append(out)
    )
    encoded = model.encode(clips, quantize=False, tap=layer)
    hook.remove()
    out = [model.encoder.norm(s) if layer == 4 else s for s in seen]
    assert torch.allclose(encoded.appearance, out[0][:, 16:], atol=1e-6) and torch.allclose(
        encoded.motion, out[1][:, 48:], atol=1e-6
    )
    sum(Alignment(128, 96, 96, 32)(encoded, *targets)).backward()
    assert [b.qkv.weight.grad is not None for b in model.encoder.blocks] == [
        i < layer for i in range(4)
    ]


# ---- schedule and inference


@pytest.mark.parametrize("epochs, per_epoch", [(75, 1), (75, 37), (75, 1000)])
def test_two_stages_of_20_and_55_epochs(epochs, per_epoch):
    on = [
        stage_weights(s, epochs * per_epoch, (1.0, 0.5), 20 / 75) == (1.0, 0.5)
        for s in range(epochs * per_epoch)
    ]
    assert on == [True] * 20 * per_epoch + [False] * 55 * per_epoch
    assert stage_weights(20 * per_epoch, epochs * per_epoch, share=20 / 75) == (0.0, 0.0)
    assert stage_weights(20 * per_epoch, epochs * per_epoch, share=20 / 75, second=(0.2, 0.1)) == (
        0.2,
        0.1,
    )


def test_one_stage_is_the_default():
    assert {stage_weights(s, 50) for s in (0, 25, 49)} == {(1.0, 0.5)}
    with pytest.raises(InputError, match="20"):
        stage_weights(0, 75, share=20)


def test_inference_checkpoint_is_that_of_an_unaligned_tokenizer(tmp_path, clips, teachers):
    torch.manual_seed(0)
    model = DeRATokenizer(TINY)
    align = Alignment(128, 96, 96, 32)
    targets = teacher_features(*teachers, clips, TINY.grid)
    adam = torch.optim.Adam([*model.parameters(), *align.parameters()])
    sum(align(model.encode(clips, quantize=False), *targets)).backward()
    adam.step()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as f:
        saved = {k: f.get_tensor(k) for k in f.keys()}
    assert {k: v.shape for k, v in saved.items()} == {
        k: v.shape for k, v in DeRATokenizer(TINY).state_dict().items()
    }
    foreign = [p for m in (align, *teachers) for p in m.state_dict().values() if p.numel() > 1]
    assert not [
        k
        for k, v in saved.items()
        for p in foreign
        if v.shape == p.shape and torch.equal(v.float(), p.float()) and v.float().std() > 0
    ]
    assert torch.equal(
        load_model(DeRATokenizer, tmp_path).encode(clips).indices,
        model.eval().encode(clips).indices,
    )


# ---- in the training loop


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("pocket")
    write_dataset(root, 40, seed=1)
    return str(root)


def train(data, out, stop_after=None, **changes):
    "Six steps; the log without what depends on the clock."
    config = TokenizerTraining(
        **dict(
            data=data,
            steps=6,
            batch_size=4,
            quantizer_start=3,
            warmup=2,
            log_every=1,
            save_every=1,
            projector_hidden=32,
        )
        | changes
    )
    train_tokenizer(config, out, stop_after=stop_after)
    return [{k: v for k, v in h.items() if k not in TIMES} for h in RunFolder(out).history()]


def test_stages_and_teachers_in_training(tmp_path, data):
    two = train(data, tmp_path / "two", align_share=0.5, align_layer=2)
    both = train(data, tmp_path / "both")
    assert all(h["align_a"] < 0 for h in two[1:3]) and all(
        h["align_a"] == 0 == h["align_m"] and "cosine" not in h for h in two[3:]
    )
    for absent, zero, other in (
        ("image_teacher", "align_a", "align_m"),
        ("video_teacher", "align_m", "align_a"),
    ):
        log = train(data, tmp_path / absent, **{absent: ""})
        assert (
            all(h[zero] == 0 and "conflict" not in h for h in log)
            and log[-1][other] < log[0][other]
        )
    assert len(both[0]["cosine_by_block"]) == 4 and all(
        -1 < h["cosine"] < 1 and h["norm_a"] > 0 and h["conflict"] == (h["cosine"] < 0)
        for h in both
    )
    with pytest.raises(InputError, match="align_layer 9"):
        train(data, tmp_path / "deep", align_layer=9)


@pytest.mark.parametrize(
    "changes",
    [
        dict(surgery="soft", soft_weight=0.5),
        dict(surgery_level="encoder"),
        dict(projector_shared=True, eps_relative=True),
    ],
)
def test_every_kind_of_surgery_trains(tmp_path, data, changes):
    log = train(data, tmp_path, **changes)
    assert log[-1]["align_a"] < log[0]["align_a"] and all(abs(h["loss"]) < 100 for h in log)


def test_held_coefficients_are_resumed(tmp_path, data):
    "Stopped between two decisions, a run with every=4 goes on as if it had not been."
    whole = train(data, tmp_path / "whole", surgery_every=4)
    train(data, tmp_path / "half", stop_after=3, surgery_every=4)
    assert train(data, tmp_path / "half", surgery_every=4) == whole and [
        "cosine" in h for h in whole
    ] == [True, False, False, False, True, False]
