"The pocket world: one seed, one world; gradients; swaps; splits; files that survive interruptions; bad input."

import itertools
import math
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from scipy.stats import chi2
from torch.nn.functional import avg_pool2d
from torch.overrides import TorchFunctionMode

from dera.pocket import (
    BACKGROUNDS,
    CLASSES,
    LEVELS,
    MOTIONS,
    RANGES,
    SHAPES,
    TEXTURES,
    Factors,
    held_out,
    render,
    sample_factors,
    write_dataset,
    write_video,
)
from dera.runtime.errors import InputError

FIELDS = list(Factors.__dataclass_fields__)
MOTION = ["motion", "x", "y", "angle", "speed", "phase"]
CATEGORIES = dict(shape=SHAPES, texture=TEXTURES, background=BACKGROUNDS, motion=MOTIONS)


def same(a, b):
    return all(torch.equal(getattr(a, k), getattr(b, k)) for k in FIELDS)


def double(f):
    return replace(f, **{k: getattr(f, k).double() for k in RANGES})


def every(n, seed, level="busy"):
    "n clips that go through all motions, shapes, textures and backgrounds."
    i = torch.arange(n)
    kinds = dict(motion=i % 14, shape=i % 8, texture=i % 4, background=(i // 4 + i) % 4)
    return replace(sample_factors(n, seed, level), **kinds)


# ---- one seed, one world


def test_the_numbers_drawn_never_change():
    f = sample_factors(3, 7, "busy")
    assert (
        f.shape.tolist() == [2, 0, 6]
        and f.motion.tolist() == [5, 7, 7]
        and f.texture.tolist() == [2, 3, 1]
        and f.background.tolist() == [1, 0, 1]
    )
    for name, numbers in dict(
        hue=[0.32528, 0.0013, 0.62049],
        tilt=[6.22466, 2.30958, 0.24886],
        speed=[0.88788, 1.01651, 0.84162],
        phase=[0.7993, 0.19914, 0.77389],
    ).items():
        assert getattr(f, name).tolist() == pytest.approx(numbers, abs=1e-5)


GOLDEN = dict(
    plain=[
        -11.84,
        -8.481,
        6.219,
        -13.351,
        2.568,
        -6.626,
        -3.097,
        -14.032,
        2.405,
        5.164,
        -1.384,
        19.609,
        14.076,
        -3.759,
    ],
    textured=[
        1.263,
        -22.551,
        6.219,
        -13.273,
        -8.354,
        -1.837,
        12.84,
        3.75,
        -3.843,
        13.45,
        6.581,
        11.731,
        -3.621,
        -16.239,
    ],
    busy=[
        3.466,
        -22.182,
        5.534,
        -13.273,
        -8.279,
        -7.076,
        7.185,
        8.214,
        -3.843,
        5.892,
        6.581,
        9.963,
        -5.44,
        -20.546,
    ],
)


@pytest.mark.parametrize("level", LEVELS)
def test_the_pictures_are_those_that_the_shipped_models_saw(level):
    video = (
        render(replace(sample_factors(28, 2, level), motion=torch.arange(28) % 14), 4, 32)
        .double()
        .flatten(1)
    )
    sums = video @ torch.cos(torch.arange(video.shape[1]).double())  # one number a motion class
    assert sums.view(2, 14).sum(0).tolist() == pytest.approx(GOLDEN[level], abs=3e-3)


@pytest.mark.parametrize("seed", [0, 5, -3, 2**40])
def test_a_sample_does_not_depend_on_n(seed):
    large = sample_factors(2000, seed, "textured")
    for n in 1, 2, 17, 999:
        assert same(sample_factors(n, seed, "textured"), large[:n])
    assert same(sample_factors(20, seed, "textured")[13], large[13]) and same(
        large[torch.tensor([4, 4, 1])][1:], large[[4, 1]]
    )
    assert not torch.equal(sample_factors(20, seed + 1).hue, large.hue[:20])


def test_levels_change_only_textures_and_backgrounds():
    f = {level: sample_factors(4000, 1, level) for level in LEVELS}
    for level, (textures, backgrounds) in LEVELS.items():
        assert f[level].texture.unique().tolist() == list(range(textures)) and f[
            level
        ].background.unique().tolist() == list(range(backgrounds))
        assert same(
            f["plain"],
            replace(f[level], texture=f["plain"].texture, background=f["plain"].background),
        )
    for name, (low, high) in RANGES.items():
        v = getattr(f["busy"], name)
        assert (
            low <= v.min() < low + 0.01 * (high - low)
            and high - 0.01 * (high - low) < v.max() <= high
        )


def test_all_pairs_of_factors_are_independent():
    n, bins = 10_000, 6
    columns, counts = [], []
    f = sample_factors(n, 123, "busy")
    for k in FIELDS:
        low, high = RANGES.get(k, (0, len(CATEGORIES.get(k, []))))
        counts.append(bins if k in RANGES else high)
        columns.append(
            ((getattr(f, k).double().numpy() - low) / (high - low) * counts[-1])
            .astype(int)
            .clip(0, counts[-1] - 1)
        )

    def p(i, j):
        table = np.zeros((counts[i], counts[j]))
        np.add.at(table, (columns[i], columns[j]), 1)
        expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / n
        return chi2.sf(
            ((table - expected) ** 2 / expected).sum(), (counts[i] - 1) * (counts[j] - 1)
        )

    values = [p(i, j) for i, j in itertools.combinations(range(15), 2)]
    assert len(values) == 105 and min(values) * 105 > 0.01
    columns[2][::20] = columns[6][::20]
    assert p(2, 6) * 105 < 1e-6  # and a weak tie is found


def test_sampling_and_rendering_leave_random_generators_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    render(sample_factors(2, 0, "busy"), 2, 16)
    assert (
        torch.equal(before[0], torch.get_rng_state())
        and (before[1] == np.random.get_state()[1]).all()
    )


# ---- the renderer


def test_a_clip_does_not_depend_on_its_batch():
    f = every(70, 3)
    whole = render(f, 4, 64)  # parts of 32: the last one is not full
    assert torch.equal(whole, render(f, 4, 64))
    order = torch.arange(70).roll(11).flip(0)
    assert torch.allclose(render(f[order], 4, 64), whole[order], atol=1e-6)
    for i in 0, 31, 32, 69:
        assert torch.allclose(render(f[i], 4, 64)[0], whole[i], atol=1e-6)
    assert render(f[:0], 4, 64).shape == (0, 3, 4, 64, 64)


def test_threads_do_not_matter():
    f, threads = every(14, 3), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = render(f, 4, 32)
        torch.set_num_threads(2)
        assert torch.allclose(one, render(f, 4, 32), atol=1e-6)
    finally:
        torch.set_num_threads(threads)


class Rounded(TorchFunctionMode):
    "Another processor: elementary functions differ in the last place."

    def __init__(self, units):
        super().__init__()
        self.units, self.generator, self.calls = units, torch.Generator().manual_seed(0), 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if getattr(function, "__name__", "") in ("sin", "cos", "exp", "sqrt", "atan2", "linspace"):
            self.calls += 1
            noise = torch.randint(-self.units, self.units + 1, out.shape, generator=self.generator)
            out = out * (1 + noise * torch.finfo(out.dtype).eps)
        return out


@pytest.mark.parametrize("level", LEVELS)
def test_another_processors_rounding_does_not_show(level):
    f = sample_factors(64, 5, level)
    clips = render(f, 4, 64)
    with Rounded(2) as processor:
        other = render(f, 4, 64)
    assert processor.calls > 20 and 0 < (clips - other).abs().max() < 1e-4
    assert (render(double(f), 4, 64) - clips).abs().max() < 1e-4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("level", LEVELS)
def test_cpu_and_gpu_draw_the_same(level):
    f = sample_factors(300, 5, level)
    on_gpu = render(f.to("cuda"), 16, 64)
    assert on_gpu.is_cuda and (on_gpu.cpu() - render(f, 16, 64)).abs().max() < 1e-4
    assert same(f.to("cuda").to("cpu"), f)


def test_one_field_of_another_precision():
    f = every(28, 1)
    for name in RANGES:
        mixed = render(replace(f, **{name: getattr(f, name).double()}), 2, 16)
        assert mixed.dtype == torch.float64 and (mixed - render(f, 2, 16)).abs().max() < 1e-4
    assert render(f, 2, 16).dtype == torch.float32


def test_frames_sample_one_continuous_motion():
    f = every(14, 2)
    nine, five = render(f, 9, 32), render(f, 5, 32)
    assert torch.equal(nine[:, :, ::2], five) and torch.equal(render(f, 1, 32), five[:, :, :1])
    near = render(f, 401, 8)
    assert (
        near.diff(dim=2).abs().max() < 0.5 and (near.diff(dim=2).abs().amax((1, 2, 3, 4)) > 0).all()
    )


def test_a_small_picture_is_a_large_one_averaged():
    for level in LEVELS:
        f = sample_factors(16, 4, level)
        small, large = render(f, 2, 64), render(f, 2, 256)
        truth = avg_pool2d(large.flatten(0, 2), 4).view_as(small)
        error = (small - truth).pow(2).mean()
        assert error < 1e-4 and error < 0.2 * (large[..., 2::4, 2::4] - truth).pow(2).mean()


def test_every_class_moves_and_looks_different():
    f = sample_factors(1, 9)[torch.zeros(112, dtype=torch.long)]
    i = torch.arange(112)
    clips = render(
        replace(f, shape=i // 14, motion=i % 14, bg_value=torch.full((112,), 0.3)), 6, 24
    ).flatten(1)
    gap = torch.cdist(clips, clips) / clips.shape[1] ** 0.5 + torch.eye(112)
    assert gap.min() > 0.01
    assert (clips.view(112, 3, 6, -1) - clips.view(112, 3, 6, -1)[:, :, :1]).abs().amax(
        (1, 2, 3)
    ).min() > 0.2


@pytest.mark.parametrize("name", RANGES)
def test_gradients_against_finite_differences(name):
    f, e = double(every(56, 6)), 1e-7
    value = getattr(f, name)
    weight = torch.cos(torch.arange(3 * 3 * 24 * 24).double() * 0.37).view(3, 3, 24, 24)

    def loss(v):
        return (render(replace(f, **{name: v}), 3, 24) * weight).mean((1, 2, 3, 4))

    (slope,) = torch.autograd.grad(loss(x := value.clone().requires_grad_()).sum(), x)
    numeric = (loss(value + e) - loss(value - e)) / (2 * e)
    assert (slope - numeric).norm() < 1e-3 * numeric.norm() and (
        numeric.abs() > 1e-8
    ).float().mean() > 0.25


def test_gradients_are_finite_where_a_pixel_is_the_centre():
    f = every(14, 2)
    f = replace(
        f,
        x=torch.zeros(14),
        y=torch.zeros(14),
        tilt=torch.zeros(14),
        motion=torch.full((14,), MOTIONS.index("Grow")),
    )
    leaves = {k: getattr(f, k).clone().requires_grad_() for k in RANGES}
    render(replace(f, **leaves), 3, 33).sum().backward()  # 33: the middle pixel is at 0, 0
    assert (
        all(v.grad.isfinite().all() for k, v in leaves.items() if v.grad is not None)
        and leaves["x"].grad is not None
    )


# ---- swaps


def test_swap_takes_motion_and_nothing_else():
    a, b = sample_factors(30, 1, "busy"), sample_factors(30, 2, "busy")
    keep = {k: getattr(a, k).clone() for k in FIELDS}
    swapped = a.swap(motion_of=b)
    for k in FIELDS:
        assert torch.equal(
            getattr(swapped, k), getattr(b if k in MOTION else a, k)
        ) and torch.equal(getattr(a, k), keep[k])
    assert torch.equal(swapped.label, a.shape * 14 + b.motion) and [
        CLASSES[i] for i in swapped.label
    ] == [SHAPES[s] + MOTIONS[m] for s, m in zip(a.shape, b.motion)]
    assert same(swapped.swap(motion_of=a), a) and same(a.swap(motion_of=a), a)


def test_a_swapped_clip_moves_like_the_other_and_looks_like_the_first():
    a, b = sample_factors(40, 1), sample_factors(40, 2)
    ghost = dict(
        background=torch.zeros(40).long(), bg_value=torch.zeros(40), texture=torch.zeros(40).long()
    )

    def place(f):
        return (render(replace(f, **ghost), 6, 48).amax(1) > 0.3).float()  # where the object is

    def centre(m):
        return torch.stack(
            [
                (m * torch.linspace(-1, 1, 48).view(s)).sum((2, 3)) / m.sum((2, 3))
                for s in ((1, 48), (48, 1))
            ],
            -1,
        )

    inside = (b.motion < 6) & (b.motion != 4)

    def disc(f):
        return replace(f, shape=torch.zeros(40).long())

    a, b = disc(a), disc(b)
    swapped = a.swap(motion_of=b)
    path = centre(place(swapped))
    seen = inside[:, None] & (path.abs().amax(-1) < 0.35)
    assert seen.sum() > 30 and (path - centre(place(b)))[seen].abs().max() < 0.08

    def brightest(f):
        return render(replace(f, **ghost), 1, 48).amax((2, 3, 4))

    rest = dict(
        motion=torch.full((40,), MOTIONS.index("Grow")), x=torch.zeros(40), y=torch.zeros(40)
    )
    assert torch.allclose(
        brightest(replace(swapped, **rest)), brightest(replace(a, **rest)), atol=1e-5
    )


# ---- splits


@pytest.mark.parametrize("level", ["textured", "busy"])
def test_splits(level):
    f = sample_factors(6000, 3, level)
    one, pair, texture = (held_out(f, s) for s in (1, 2, 3))
    assert one.sum() == 1200 and one.dtype == torch.bool
    train, test = set(f.label[~pair].tolist()), set(f.label[pair].tolist())
    assert not train & test and len(train | test) == 112 and len(test) == 16
    assert {l // 14 for l in train} == set(range(8)) and {l % 14 for l in train} == set(
        range(14)
    ) == {l % 14 for l in test}
    assert (
        set(f.texture[~texture].tolist()) & set(f.texture[texture].tolist()) == set()
        and texture.sum() > 1000
    )
    assert torch.equal(held_out(f[:100], 2), pair[:100])


@pytest.mark.parametrize("split", [0, 4, "train", None])
def test_unknown_split(split):
    with pytest.raises(InputError, match="1, 2 or 3"):
        held_out(sample_factors(5, 0), split)


def test_a_plain_world_has_no_texture_to_hold_out(tmp_path):
    with pytest.raises(InputError, match="textured or busy"):
        held_out(sample_factors(500, 0), 3)
    write_dataset(tmp_path, 6, num_frames=1, size=16)
    lists = tmp_path / "ucfTrainTestlist"
    assert (
        len((lists / "trainlist03.txt").read_text().splitlines()) == 6
        and (lists / "testlist03.txt").read_text() == ""
    )


# ---- files

SMALL = dict(num_frames=2, size=16)


def decode(path):
    with av.open(str(path)) as file:
        return (
            torch.from_numpy(
                np.stack([x.to_ndarray(format="rgb24") for x in file.decode(video=0)])
            ).permute(3, 0, 1, 2)
            / 255
        )


def contents(root):
    return {
        p.relative_to(root): p.read_bytes()
        for p in sorted(root.rglob("*"))
        if p.is_file() and p.name != "factors.npz"
    }


@pytest.mark.parametrize("ending", [".mp4", ".mkv", ".avi", ".mov"])
def test_video_files_round_trip(tmp_path, ending):
    flat = (
        torch.rand(3, 7, 4, 6, generator=torch.Generator().manual_seed(0))
        .repeat_interleave(8, 2)
        .repeat_interleave(8, 3)
        * 2
        - 0.5
    )  # out of range, too
    path = tmp_path / f"ein Vidéo{ending}"
    write_video(path, flat, fps=5, crf=1)
    back = decode(path)
    assert back.shape == (3, 7, 32, 48) and (back - flat.clamp(0, 1)).abs().mean() < 0.02
    with av.open(str(path)) as file:
        assert (
            file.streams.video[0].average_rate == 5
            and file.streams.video[0].codec_context.name == "h264"
        )
    write_video(path, flat[:, :1])
    assert decode(path).shape[1] == 1  # overwritten
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_dataset_layout(tmp_path):
    f = write_dataset(tmp_path / "new" / "world", 130, seed=4, level="busy", num_frames=3, size=32)
    root = tmp_path / "new" / "world"
    assert same(f, sample_factors(130, 4, "busy"))
    saved = np.load(root / "factors.npz")
    names = saved["names"].tolist()
    assert (
        all((saved[k] == getattr(f, k).numpy()).all() for k in FIELDS)
        and int(saved["seed"]) == 4
        and str(saved["level"]) == "busy"
    )
    assert len(set(names)) == 130 and {
        p.relative_to(root).as_posix() for p in root.glob("*/*.mp4")
    } == set(names)
    assert [n.split("/")[0] for n in names] == [CLASSES[l] for l in f.label] and all(
        n.split("/")[1].startswith(f"v_{n.split('/')[0]}_g") for n in names
    )
    assert (root / "ucfTrainTestlist/classInd.txt").read_text().split() == [
        w for i, c in enumerate(CLASSES) for w in (str(i + 1), c)
    ]
    for split in 1, 2, 3:
        train = [
            l.split()
            for l in (root / f"ucfTrainTestlist/trainlist0{split}.txt").read_text().splitlines()
        ]
        test = (root / f"ucfTrainTestlist/testlist0{split}.txt").read_text().splitlines()
        held = held_out(f, split).tolist()
        assert test == [n for n, h in zip(names, held) if h] and [t[0] for t in train] == [
            n for n, h in zip(names, held) if not h
        ]
        assert all(int(number) == CLASSES.index(name.split("/")[0]) + 1 for name, number in train)
    for i in 0, 77, 129:
        assert (decode(root / names[i]) - render(f[i], 3, 32)[0]).pow(2).mean() < 4e-3


def test_an_interrupted_dataset_goes_on(tmp_path):
    class PowerCut(Exception):
        pass

    def cut(batches, **_):
        yield next(iter(batches))
        raise PowerCut

    write_dataset(tmp_path / "whole", 70, seed=1, **SMALL)
    with pytest.raises(PowerCut):
        write_dataset(tmp_path / "cut", 70, seed=1, **SMALL, progress=cut)
    videos = list((tmp_path / "cut").glob("*/*.mp4"))
    assert len(videos) == 32
    videos[0].with_name(f".{videos[0].name}.part.mp4").write_bytes(b"half a file")
    videos[0].unlink()  # killed while writing
    with pytest.raises(InputError, match="seed 1, not 2"):
        write_dataset(tmp_path / "cut", 70, seed=2, **SMALL)
    write_dataset(tmp_path / "cut", 70, seed=1, **SMALL)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_longer_dataset_continues_a_shorter_one(tmp_path):
    write_dataset(tmp_path / "a", 40, seed=1, **SMALL)
    write_dataset(tmp_path / "a", 60, seed=1, **SMALL)
    write_dataset(tmp_path / "b", 60, seed=1, **SMALL)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(seed=1), "seed 0, not 1"),
        (dict(level="busy"), "level plain, not busy"),
        (dict(size=32), "pixels 16, not 32"),
        (dict(num_frames=3), "num_frames 2, not 3"),
        (dict(n=9), "10 clips, not 9"),
    ],
)
def test_another_dataset_is_not_mixed_in(tmp_path, change, said):
    write_dataset(tmp_path, 10, **SMALL)
    before = contents(tmp_path)
    with pytest.raises(InputError, match=said) as e:
        write_dataset(tmp_path, **{**SMALL, "n": 10, **change})
    assert (
        str(tmp_path) in str(e.value) and "\n" not in str(e.value) and contents(tmp_path) == before
    )


def test_foreign_folders_are_refused(tmp_path):
    (tmp_path / "Archery").mkdir()
    (tmp_path / "Archery/v_Archery_g01_c01.mp4").write_bytes(b"x")
    with pytest.raises(InputError, match="no factors.npz"):
        write_dataset(tmp_path, 3, **SMALL)
    (tmp_path / "factors.npz").write_bytes(b"not a zip")
    with pytest.raises(InputError, match="cannot be read"):
        write_dataset(tmp_path, 3, **SMALL)
    assert len(list(tmp_path.rglob("*.mp4"))) == 1


@pytest.mark.parametrize("place", ["file", "file/world", "closed/world"])
def test_unwritable_folders(tmp_path, place):
    (tmp_path / "file").write_text("x")
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed").chmod(0o500)
    try:
        (tmp_path / "closed/x").mkdir()
        (tmp_path / "closed/x").rmdir()
        allowed = "closed" in place
    except OSError:
        allowed = False
    if allowed:
        pytest.skip("this user may write anywhere")
    with pytest.raises(InputError, match="cannot write to") as e:
        write_dataset(tmp_path / place, 3, **SMALL)
    assert "\n" not in str(e.value)


# ---- bad input


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: sample_factors(0, 0), "n is 0"),
        (lambda: sample_factors(-1, 0), "n is -1"),
        (lambda: sample_factors(2.5, 0), "n is 2.5"),
        (lambda: sample_factors("3", 0), "n is 3"),
        (lambda: sample_factors(3, 0, "hard"), "plain, textured, busy"),
        (lambda: render(sample_factors(2, 0), 0), "num_frames is 0"),
        (lambda: render(sample_factors(2, 0), 4, 0), "size is 0"),
        (lambda: render(sample_factors(2, 0), 4, math.nan), "size is nan"),
    ],
)
def test_bad_arguments(call, said):
    with pytest.raises(InputError, match=said) as e:
        call()
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(n=0), "n is 0"),
        (dict(level="x"), "unknown level"),
        (dict(size=31), "even"),
        (dict(num_frames=0), "num_frames is 0"),
        (dict(size=-2), "size is -2"),
    ],
)
def test_bad_datasets_leave_nothing_behind(tmp_path, change, said):
    with pytest.raises(InputError, match=said):
        write_dataset(tmp_path / "world", **{**SMALL, "n": 3, **change})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "video, said",
    [
        (torch.rand(3, 2, 15, 16), "15 x 16"),
        (torch.rand(3, 2, 16, 17), "16 x 17"),
        (torch.rand(2, 3, 2, 16, 16), r"\(2, 3, 2, 16, 16\)"),
        (torch.rand(2, 3, 16, 16), r"\(2, 3, 16, 16\)"),
        (torch.rand(3, 0, 16, 16), r"\(3, 0"),
        (torch.zeros(3, 2, 16, 16, dtype=torch.uint8), "uint8"),
        (torch.full((3, 2, 16, 16), math.nan), "NaN"),
        (torch.full((3, 2, 16, 16), math.inf), "NaN"),
    ],
)
def test_bad_videos(tmp_path, video, said):
    with pytest.raises(InputError, match=said):
        write_video(tmp_path / "x.mp4", video)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["no/such/folder/x.mp4", "x.nonsense", "x"])
def test_videos_that_cannot_be_written(tmp_path, name):
    with pytest.raises(InputError, match="cannot write") as e:
        write_video(tmp_path / name, torch.rand(3, 2, 16, 16))
    assert name in str(e.value) and "\n" not in str(e.value) and not list(tmp_path.iterdir())


def test_a_failed_video_leaves_no_part_of_a_file(tmp_path):
    (tmp_path / "x.mp4").mkdir()
    with pytest.raises(InputError, match="cannot write"):
        write_video(tmp_path / "x.mp4", torch.rand(3, 2, 16, 16))
    assert [p.name for p in tmp_path.iterdir()] == ["x.mp4"]
