"Teachers: the pocket ones that ship and their training, folders of one's own, and linear probes."

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from dera import metrics, teachers
from dera.align import teacher_features
from dera.pocket import MOTIONS, render, sample_factors
from dera.runtime.checkpoints import checkpoint_path
from dera.runtime.errors import InputError
from dera.runtime.published_teachers import PUBLISHED_TEACHERS
from dera.streams import TokenizerConfig
from dera.teachers import (
    HIDDEN,
    TEACHERS,
    PocketTeacher,
    Teacher,
    TeacherConfig,
    factor_probes,
    linear_probe,
    load_teacher,
    pooled_tokens,
    train_teacher,
)

POCKET = [name for name in TEACHERS if name.startswith("pocket")]


@pytest.fixture(scope="module")
def clips():
    return render(sample_factors(4, seed=31, level="busy"), 16, 64)


@pytest.fixture(scope="module")
def shipped():
    return load_teacher("pocket64-image"), load_teacher("pocket64-video")


# ---- the interface


def test_tokens_stand_where_their_patches_are():
    "The most changed token after one block is the one whose patch changed."
    for name in POCKET:
        torch.manual_seed(0)
        teacher = load_teacher(name, pretrained=False, layer=1)
        assert isinstance(teacher, Teacher)
        steps, rows, columns = teacher.grid
        frames = 16 if teacher.modality == "video" else 1
        side = 2 * teacher.size  # twice the size it asks for
        box = (frames // steps, side // rows, side // columns)
        clip = torch.rand(1, 3, frames, side, side, generator=torch.Generator().manual_seed(1))
        for place in ((steps - 1, 1, columns - 1), (steps // 2, rows - 1, 2)):
            at = tuple(slice(b * i, b * (i + 1)) for b, i in zip(box, place))
            changed = clip.clone()
            changed[(slice(None), slice(None), *at)] = 1 - clip[(slice(None), slice(None), *at)]
            out = teacher(torch.cat([clip, changed]))
            assert out.shape == (2, math.prod(teacher.grid), teacher.dim)
            moved = (out[1] - out[0]).norm(dim=-1)
            assert moved.argmax() == (place[0] * rows + place[1]) * columns + place[2]


def test_frozen_for_good(clips):
    teacher = load_teacher("pocket-video")
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.train().training
    assert not torch.nn.Sequential(teacher).train()[0].model.training
    x = clips.clone().requires_grad_()
    teacher(x).square().mean().backward()  # the gradient reaches the input and not the weights
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())


def test_unknown_names_and_layers_are_refused():
    with pytest.raises(InputError, match="dinov9.*pocket-image.*folder"):
        load_teacher("dinov9")
    for layer in (0, 5, -1):
        with pytest.raises(InputError, match="1 to 4"):
            load_teacher("pocket-video", layer=layer)
    image = load_teacher("pocket-image")
    with pytest.raises(InputError, match=r"\(3, 16, 64, 64\)"):
        image(torch.rand(3, 16, 64, 64))
    with pytest.raises(InputError, match="uint8"):
        image(torch.zeros(1, 3, 1, 32, 32, dtype=torch.uint8))


def test_other_ways_to_say_a_name(monkeypatch):
    loaded = []

    def stop(name, weights):
        loaded.append(name)
        raise InputError("stop")

    monkeypatch.setattr(teachers, "load_published", stop)
    said = {
        "InternVideo2-B/14": "internvideo2-b14",
        "internvideo2_b14": "internvideo2-b14",
        "videomae": "videomae-base",
        "OpenGVLab/VideoMAEv2-Base": "videomaev2-base",
        "facebook/vjepa2-vitl-fpc64-256": "vjepa2-vitl-fpc64-256",
        "vit_base_patch14_dinov2": "vit_base_patch14_dinov2.lvd142m",
    }
    for name in said:
        with pytest.raises(InputError, match="stop"):
            load_teacher(name)
    assert loaded == list(said.values())
    for vague in ("pocket", "vit", "", "timm"):
        with pytest.raises(InputError, match="unknown teacher"):
            load_teacher(vague)


@pytest.mark.parametrize("name", ["pocket-image", "pocket64-video"])
def test_any_size_and_length(name, clips):
    teacher = load_teacher(name, pretrained=False)
    for shape in ((1, 20, 20), (5, 48, 80), (16, 64, 64), (40, 90, 90)):
        assert teacher(torch.rand(2, 3, *shape)).shape == (
            2,
            math.prod(teacher.grid),
            teacher.dim,
        )
    larger = F.interpolate(clips, scale_factor=(1, 3, 3))  # the same picture
    features = teacher(clips)
    assert (teacher(larger) - features).abs().mean() < 0.1 * features.abs().mean()
    stripes = (torch.arange(8 * teacher.size) % 2).float()  # finer than it can show: grey
    stripes = stripes.expand(1, 3, 16, 8 * teacher.size, -1)
    grey = torch.full_like(stripes, 0.5)
    assert (teacher(stripes) - teacher(grey)).abs().mean() < 0.02


def test_image_teacher_takes_the_first_frame_and_video_teacher_all(clips):
    image = load_teacher("pocket64-image", pretrained=False)
    video = load_teacher("pocket64-video", pretrained=False)
    later = clips.clone()
    later[:, :, 9:] = 0
    assert torch.equal(image(clips), image(clips[:, :, :1]))
    assert torch.equal(image(clips), image(later))
    change = (video(later) - video(clips)).norm(dim=-1).view(4, *video.grid).mean((0, 2, 3))
    assert change[2:].min() > 2 * change[0]


def test_bf16(clips):
    torch.manual_seed(0)
    exact = load_teacher("pocket64-video", pretrained=False)
    torch.manual_seed(0)
    half = load_teacher("pocket64-video", pretrained=False, bf16=True)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half(clips).dtype == torch.float32
    assert 0.99 < F.cosine_similarity(half(clips), exact(clips), dim=-1).mean() < 1


def test_fingerprint_follows_the_weights():
    torch.manual_seed(0)
    teacher = load_teacher("pocket-image", pretrained=False)
    before = teacher.fingerprint
    with torch.no_grad():
        next(teacher.parameters()).add_(1e-3)
    assert len(before) == 8
    assert teacher.fingerprint != before


# ---- the pocket teachers that ship


def test_older_teachers_are_unchanged():
    "The shipped tokenizers were trained with these."
    x = render(sample_factors(5, 3, "busy"), 8, 32)
    image, video = load_teacher("pocket-image"), load_teacher("pocket-video")
    assert (image.fingerprint, video.fingerprint) == ("21dbecd1", "ce908e0f")
    assert (image.grid, video.grid, image.dim) == ((1, 4, 4), (4, 4, 4), 96)
    first = torch.tensor([0.1414, 0.0907, 2.1169])
    assert torch.allclose(image(x).flatten()[:3], first, atol=1e-3)
    first = torch.tensor([1.3909, -0.4035, 1.4738])
    assert torch.allclose(video(x).flatten()[:3], first, atol=1e-3)


def test_shipped_files(shipped):
    for teacher in shipped:
        assert sum(p.numel() for p in teacher.parameters()) <= 3e6
        folder = checkpoint_path(f"{teacher.name}-teacher")
        files = {file.name: file.stat().st_size for file in folder.iterdir()}
        wanted = {"config.json", "training.json", "environment.json", "log.jsonl"}
        assert wanted | {"model.safetensors"} <= set(files)
        assert sum(files.values()) < 5e6
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        config = TeacherConfig(**json.loads((folder / "training.json").read_text()))
        assert log[-1]["step"] == config.steps
        assert config.modality == teacher.modality
        tensors = load_file(folder / "model.safetensors")
        assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_image_teacher_knows_shapes_and_textures_and_no_motion(shipped):
    "On clips of a seed that no training used; motion classes of which the middle frame shows nothing."
    found = factor_probes(shipped[0], "textured", n=480, seed=502)
    assert found["shape"] >= 0.8
    assert found["texture"] >= 0.9
    assert found["hidden_motion"] <= 2 / len(HIDDEN)


def test_video_teacher_knows_motion(shipped):
    found = factor_probes(shipped[1], n=320, seed=503, num_frames=8, size=32)
    assert found["motion"] >= 0.7


def test_pooled_tokens_take_the_frame_that_is_asked_for(shipped):
    image, video = shipped
    factors = sample_factors(4, 5)
    film = render(factors, 3, 64)
    for when in (0, 0.5, 1):
        frame = film[:, :, round(2 * when)][:, :, None]
        pooled = pooled_tokens(image, factors, when=when)
        assert torch.allclose(pooled, image(frame).mean(1), atol=1e-5)
    # of three frames a video teacher sees all
    pooled = pooled_tokens(video, factors, 3, when=1)
    assert torch.allclose(pooled, video(film).mean(1), atol=1e-5)
    for when in (0.3, 2, -1):
        with pytest.raises(InputError, match="when is 0, .5 or 1"):
            pooled_tokens(image, factors, when=when)


def test_hidden_motions_look_alike_in_the_middle():
    "Changing one hidden motion into another leaves the middle frame as it was; no other does."
    factors = sample_factors(40, 5)

    def middle(motion):
        changed = replace(factors, motion=torch.full_like(factors.motion, MOTIONS.index(motion)))
        return render(changed, 3, 32)[:, :, 1]

    still = middle(HIDDEN[0])
    for motion in set(MOTIONS) - {"SpinLeft", "SpinRight"}:
        alike = (middle(motion) - still).abs().amax() < 1e-4
        assert alike == (motion in HIDDEN), motion


def test_they_fit_the_tokenizers(shipped):
    image, video = shipped
    config = TokenizerConfig.preset("pocket")
    x = render(sample_factors(2, 7), config.num_frames, config.size)
    targets = teacher_features(image, video, x, config.grid)
    assert [t.shape for t in targets] == [(2, 64, 192), (2, 256, 192)]
    small = TokenizerConfig.preset("tiny")
    x = render(sample_factors(2, 7), small.num_frames, small.size)
    pair = load_teacher("pocket-image"), load_teacher("pocket-video")
    targets = teacher_features(*pair, x, small.grid)
    assert [t.shape for t in targets] == [(2, 16, 96), (2, 64, 96)]


# ---- training, and teachers of one's own

SMALL = dict(batch_size=6, dim=24, depth=1, heads=2, size=32, log_every=1, save_every=2)


def log_without_clock(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


@pytest.mark.parametrize("modality", ["image", "video"])
@pytest.mark.parametrize("objective", ["factors", "masked"])
def test_stop_and_go_on(tmp_path, modality, objective):
    config = TeacherConfig(modality, 6, objective=objective, **SMALL)
    whole = train_teacher(config, tmp_path / "whole")
    train_teacher(config, tmp_path / "halves", stop_after=3)
    again = train_teacher(config, tmp_path / "halves")
    for key, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key
    log = log_without_clock(tmp_path / "whole")
    assert log == log_without_clock(tmp_path / "halves")
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]

    saved = PocketTeacher.from_pretrained(str(tmp_path / "halves" / "teacher"), strict=True)
    assert not any("head" in key or "redraw" in key for key in saved.state_dict())
    assert saved.modality == modality
    with pytest.raises(InputError, match="another steps 6 then, 7 now; seed 0 then, 1 now"):
        train_teacher(replace(config, steps=7, seed=1), tmp_path / "halves")


def test_training_learns_and_wrong_settings_are_refused(tmp_path):
    config = TeacherConfig(steps=40, **SMALL | dict(batch_size=24, dim=32, log_every=10))
    train_teacher(config, tmp_path)
    log = log_without_clock(tmp_path)
    assert log[-1]["redraw"] < 0.6 * log[0]["redraw"]
    assert log[-1]["numbers"] < 0.6 * log[0]["numbers"]
    for wrong in (dict(modality="sound"), dict(objective="contrastive"), dict(level="hard")):
        with pytest.raises(InputError, match=next(iter(wrong.values()))):
            TeacherConfig(**wrong)


def test_a_token_redraws_its_own_patch():
    "A video teacher that sees half of the patches is compared with the same half."
    torch.manual_seed(0)
    network = PocketTeacher("video", 24, 1, 2, 32)
    config = TeacherConfig("video", **SMALL)
    batch = teachers._draw_batch(config, 0, "cpu")
    objective = teachers._FactorLoss(network, keep=0.5)

    # an identity from a patch to itself through every layer is a perfect redrawing
    width = 3 * network.tubelet * 64
    network.tokens = lambda x: teachers.patchify(x, network.tubelet, 8)
    network.transformer = torch.nn.Identity()
    for name, head in [*objective.named_modules()]:
        if isinstance(head, torch.nn.Linear) and not name.startswith("teacher"):
            head.weight = torch.nn.Parameter(torch.zeros(head.out_features, width))
    objective.redraw.weight = torch.nn.Parameter(torch.eye(width))
    objective.redraw.bias = torch.nn.Parameter(torch.zeros(width))
    _, log = objective(batch.video, batch)
    assert log["redraw"] == 0


def test_a_teacher_of_ones_own(tmp_path, clips):
    "A folder, or the run folder that holds it, is a name; other levels give other teachers."
    for level in ("all", "plain"):
        config = TeacherConfig("video", 2, level=level, **SMALL)
        trained = train_teacher(config, tmp_path / level)
        loaded = [load_teacher(tmp_path / level), load_teacher(str(tmp_path / level / "teacher"))]
        for teacher in loaded:
            assert (teacher.modality, teacher.grid, teacher.dim) == ("video", (4, 4, 4), 24)
            assert (teacher.frames, teacher.size) == (8, 32)
            half = trained.state_dict()["positions"].half().float()
            assert torch.equal(teacher.model.positions, half)
            assert teacher(clips).shape == (4, 64, 24)
        assert loaded[0].name == str(tmp_path / level)
    first, second = (load_teacher(tmp_path / level) for level in ("all", "plain"))
    assert first.fingerprint != second.fingerprint
    assert load_teacher(tmp_path / "all", layer=1)(clips).shape == (4, 64, 24)

    with pytest.raises(InputError, match="layers 1 to 1"):
        load_teacher(tmp_path / "all", layer=2)
    with pytest.raises(InputError, match="holds a teacher of video and not of image"):
        load_teacher("pocket-image", weights=tmp_path / "all" / "teacher")
    with pytest.raises(InputError, match=r"no teacher in .*nowhere"):
        load_teacher(tmp_path / "nowhere")
    file = tmp_path / "all" / "teacher" / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(InputError, match="Git LFS pointer"):
        load_teacher(tmp_path / "all")
    file.write_bytes(b"junk")
    with pytest.raises(InputError, match="does not hold a PocketTeacher") as error:
        load_teacher(tmp_path / "all")
    assert "\n" not in str(error.value)


def test_clips_of_one_level():
    "`plain` has one texture and one background; a third of each level has all of them."
    for level, count in (("plain", 1), ("all", 4)):
        config = TeacherConfig("image", level=level, batch_size=300, size=32)
        factors = teachers._draw_batch(config, 0, "cpu").factors
        assert len(factors.texture) == 300
        assert len(factors.texture.unique()) == count


# ---- linear probes


def test_probe_reads_what_is_linear_and_not_what_is_absent():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (1000,), generator=generator)
    noise = torch.randn(1000, 6, generator=generator)
    told = torch.cat([noise, F.one_hot(labels, 4) * 100.0 + 7], dim=1)
    assert linear_probe(told[:800], labels[:800], told[800:], labels[800:])["test"] == 1
    blind = linear_probe(noise[:800], labels[:800], noise[800:], labels[800:])
    assert abs(blind["test"] - 0.25) < 0.1
    # an exclusive or is in the features, but not linearly
    bits = torch.randint(2, (1000, 2), generator=generator)
    either = bits.sum(1) % 2
    found = linear_probe(bits[:800].float(), either[:800], bits[800:].float(), either[800:])
    assert found["test"] < 0.65
    assert metrics.linear_probe is linear_probe


def test_probe_refuses_what_it_cannot_read():
    x, y = torch.randn(8, 3), torch.arange(8) % 2
    wrong = [
        ((x, y - 1, x, y), "train: label -1 is below 0"),
        ((x, y, x, y - 5), "test: label -5 is below 0"),
        ((x, y.float(), x, y), "integers are needed"),
        ((x[:5], y, x, y), r"train: features \(5, 3\) and labels \(8,\)"),
        ((x, y, x[:, :2], y), "train has 3 features and test 2"),
        ((x / 0, y, x, y), "train: features hold NaN or infinite"),
        ((x[:0], y[:0], x, y), "train"),
    ]
    for arguments, complaint in wrong:
        with pytest.raises(InputError, match=complaint):
            linear_probe(*arguments)


def test_tables_agree():
    assert set(PUBLISHED_TEACHERS) | set(POCKET) == set(TEACHERS)
    for name in POCKET:
        assert load_teacher(name, pretrained=False).grid == TEACHERS[name].grid
