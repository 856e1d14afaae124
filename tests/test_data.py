"Manifests, the data set, its batches, audit and copies: the same clips on every run, one line for bad input."

import gc
import json
import logging
import os
import shutil
import signal
import warnings
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from dera.data import (
    Manifest,
    VideoClips,
    folder_manifest,
    frame_indices,
    kinetics_manifest,
    loader,
    manifest,
    mixed,
    probe,
    read_chunks,
    read_clip,
    ucf101_manifest,
)
from dera.pocket import CLASSES, render, sample_factors, write_dataset, write_video
from dera.runtime import video, writing
from dera.runtime.errors import InputError
from dera.runtime.workers import for_each
from dera.tools.audit import audit, audit_table, prepare

N, FRAMES = 20, 20


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "A folder of pocket clips, their names in order, and the frames they were rendered from."
    root = tmp_path_factory.mktemp("data") / "pocket"
    factors = write_dataset(root, N, seed=8, num_frames=FRAMES)
    names = np.load(root / "factors.npz")["names"].tolist()
    return root, names, render(factors, FRAMES, 64), factors


def one_line(error, *parts):
    message = str(error.value)
    assert "\n" not in message and all(str(p) in message for p in parts), message
    return message


# ---- manifests


def test_pocket_splits(world):
    root, names, _, factors = world
    train, classes = ucf101_manifest(root, "train")
    test, _ = ucf101_manifest(root, "test")
    every, _ = ucf101_manifest(root)
    assert (
        classes == CLASSES
        and len(train) == 16
        and len(test) == 4
        and sorted(train + test) == sorted(every)
    )
    label = dict(zip(names, factors.label.tolist()))
    assert {str(Path(p).relative_to(root)): l for p, l in every} == label
    assert [str(Path(p).relative_to(root)) for p, _ in train] == [
        n for i, n in enumerate(names) if i % 5 != 4
    ]
    second = ucf101_manifest(root, "train", 2)[0]
    assert second and {p for p, _ in second} != {p for p, _ in train}


def ucf(root, folder, file, listed, beside=True):
    "One official-looking clip; lists beside UCF-101 (as the archives unpack) or within the class folders' parent."
    videos = root / "UCF-101" if beside else root
    (videos / folder).mkdir(parents=True)
    (videos / folder / file).write_bytes(b"0")
    (root / "ucfTrainTestlist").mkdir()
    (root / "ucfTrainTestlist/classInd.txt").write_text("1 Archery\r\n2 HandstandPushups\r\n")
    (root / "ucfTrainTestlist/trainlist01.txt").write_text(f"{listed} 2\r\n\r\n")
    (root / "ucfTrainTestlist/testlist01.txt").write_text(f"{listed}\r\n")
    return root


@pytest.mark.parametrize(
    "folder, file, listed",
    [
        (
            "HandstandPushups",
            "v_HandStandPushups_g01_c01.avi",
            "HandstandPushups/v_HandStandPushups_g01_c01.avi",
        ),
        (
            "HandstandPushups",
            "v_HandStandPushups_g01_c01.avi",
            "HandstandPushups/v_HandstandPushups_g01_c01.avi",
        ),
        (
            "HandstandPushups",
            "v_HandStandPushups_g01_c01.avi",
            "HandStandPushups/v_HandStandPushups_g01_c01.avi",
        ),
        (
            "HandStandPushups",
            "v_HandStandPushups_g01_c01.avi",
            "HandstandPushups/v_HandstandPushups_g01_c01.avi",
        ),
    ],
)
@pytest.mark.parametrize("beside", [True, False])
def test_handstand_trap(tmp_path, folder, file, listed, beside):
    root = ucf(tmp_path, folder, file, listed, beside)
    for place in [root, root / "UCF-101"] if beside else [root]:
        for split in ("train", "test", None):
            assert ucf101_manifest(place, split) == (
                [(str((root / "UCF-101" if beside else root) / folder / file), 1)],
                ["Archery", "HandstandPushups"],
            )


def test_exact_spelling_comes_first(tmp_path):
    root = ucf(tmp_path, "HandstandPushups", "v_A.avi", "HandstandPushups/v_a.avi")
    other = root / "UCF-101/HandstandPushups/v_a.avi"
    other.write_bytes(b"1")
    if other.samefile(root / "UCF-101/HandstandPushups/v_A.avi"):
        pytest.skip("this file system ignores case")
    assert ucf101_manifest(root, "train")[0] == [(str(other), 1)]


def test_plain_folders(tmp_path, world):
    root, names, *_ = world
    for place in ("b/x.MP4", "a/y.mp4", "a/x.mp4", "a/.hidden.mp4", "a/notes.txt"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        shutil.copy(root / names[0], tmp_path / place)
    items, classes = folder_manifest(tmp_path)
    assert classes == ["a", "b"] and [
        (str(Path(p).relative_to(tmp_path)), l) for p, l in items
    ] == [("a/x.mp4", 0), ("a/y.mp4", 0), ("b/x.MP4", 1)]
    assert ucf101_manifest(tmp_path) == (items, classes) and len(VideoClips(tmp_path, 8, 32)) == 3
    assert folder_manifest(tmp_path / "a")[1] == ["a"]


def test_bad_folders_and_lists(tmp_path, world):
    root = world[0]

    def refused(*parts, source, **options):
        with pytest.raises(InputError) as e:
            VideoClips(source, 8, 32, **options)
        one_line(e, *parts)

    refused(tmp_path / "nowhere", "no folder", source=tmp_path / "nowhere")
    refused(tmp_path, "no videos", source=tmp_path)
    refused("valid", "train or test", source=root, split="valid")
    refused("trainlist04.txt", "split_id", source=root, split="train", split_id=4)
    refused("sampling", "'every'", source=root, sampling="every")
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    lost = (copy / "ucfTrainTestlist/testlist01.txt").read_text().split()
    for name in lost[1:]:
        (copy / name).unlink()
    refused("testlist01.txt", lost[1], "and 2 more", source=copy, split="test")
    assert len(VideoClips(copy, 8, 32, split="train")) == 16
    (copy / "ucfTrainTestlist/testlist01.txt").write_text("")
    refused("testlist01.txt", "nothing", source=copy, split="test")
    (copy / "Strange").mkdir()
    shutil.copy(copy / lost[0], copy / "Strange/v.mp4")
    refused("Strange", "classInd.txt", source=copy)
    shutil.rmtree(copy / "ucfTrainTestlist")
    refused("ucfTrainTestlist", source=copy, split="train")
    refused("empty", source=[])
    refused("'Archery'", source=[("a.mp4", "Archery")])
    refused("-1", source=[("a.mp4", -1)])
    refused("no split", source=[("a.mp4", 0)], split="train")
    with pytest.raises(InputError) as e:
        VideoClips([(tmp_path / "gone.mp4", 0)], 8, 32)[0]
    one_line(e, "gone.mp4")


def kinetics(root, names, where, place="train"):
    "Copy clips under Kinetics' names; returns the (name without ending) of each."
    out = []
    for i, name in enumerate(names):
        target = root / place / f"{where}{i:09d}_{i:06d}_{i + 10:06d}.mp4"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(name, target)
        out.append(target.stem)
    return out


def test_a_list_finds_files_with_another_ending(tmp_path):
    root = ucf(
        tmp_path,
        "HandstandPushups",
        "v_HandStandPushups_g01_c01.mp4",
        "HandstandPushups/v_HandstandPushups_g01_c01.avi",
    )
    assert [Path(p).suffix for p, _ in ucf101_manifest(root, "train")[0]] == [".mp4"]


def test_kinetics_by_folder(tmp_path, world):
    files = [world[0] / n for n in world[1]]
    kinetics(tmp_path, files[:3], "ab")
    kinetics(tmp_path, files[3:5], "cd", "val")
    (tmp_path / "train/._ab000000000_000000_000010.mp4").write_bytes(b"what a Mac leaves behind")
    items, classes = kinetics_manifest(tmp_path, "train")
    assert (
        classes == []
        and [l for _, l in items] == [-1] * 3
        and len(kinetics_manifest(tmp_path)[0]) == 5
    )
    item = VideoClips(tmp_path, 8, 32, split="val")[0]
    assert item["label"] == -1 and item["video"].shape == (3, 8, 32, 32)
    kinetics(tmp_path, files[:2], "ef", "train/riding a bike")
    kinetics(tmp_path, files[:1], "gh", "val/archery")
    items, classes = kinetics_manifest(tmp_path, "train")  # numbers are the same in every split
    assert classes == ["archery", "riding a bike"] and sorted(l for _, l in items) == [
        -1,
        -1,
        -1,
        1,
        1,
    ]
    assert VideoClips(f"k600={tmp_path}", 8, 32, split="val").labels.count(0) == 1
    for source, split, part in (
        (tmp_path, "test", "train, val"),
        (tmp_path / "train", None, "no train, val or test"),
        (tmp_path / "nowhere", None, "nowhere"),
    ):
        with pytest.raises(InputError) as e:
            kinetics_manifest(source, split)
        one_line(e, part)


def test_kinetics_by_csv(tmp_path, world):
    files = [world[0] / n for n in world[1]]
    train = kinetics(tmp_path, files[:4], "ab")
    val = kinetics(tmp_path, files[4:6], "cd", "validate/some class")
    head, line = (
        "label,youtube_id,time_start,time_end,split",
        lambda name, label, split: (
            f"{label},{name[:11]},{int(name[12:18])}.0,{int(name[19:])},{split}"
        ),
    )
    (tmp_path / "annotations").mkdir()
    lists = tmp_path / "annotations/train.csv", tmp_path / "annotations/validate.csv"
    lists[0].write_text(
        "\ufeff"
        + "\r\n".join(
            [
                head,
                line(train[0], "waving", "train"),
                line(train[1], '"eating, slowly"', "train"),
                line("zz000000000_000001_000011", "gone", "train"),
                line(train[2], "waving", "train"),
            ]
        ),
        encoding="utf-8",
    )
    lists[1].write_text(
        "\n".join([head, line(val[0], "waving", "validate"), line(val[1], "gone", "validate")])
    )
    (tmp_path / "annotations/test.csv").write_text(
        "youtube_id,time_start,time_end,split\nabc,1,2,test"
    )  # no such folder: not asked for
    items, classes = kinetics_manifest(tmp_path, "train")
    assert classes == ["eating, slowly", "gone", "waving"] and [
        (Path(p).stem, l) for p, l in items
    ] == [(train[0], 2), (train[1], 0), (train[2], 2)]
    assert [(Path(p).stem, l) for p, l in kinetics_manifest(tmp_path, "val")[0]] == [
        (val[0], 2),
        (val[1], 1),
    ]
    assert (
        kinetics_manifest(lists[0], "train")
        == (items, classes)
        == manifest(f"k600={lists[0]}", "train")[:2]
        == manifest(lists[0], "train")[:2]
    )
    report = audit(tmp_path, num_frames=16, workers=2)
    assert (
        report["counts"]
        == dict(missing=1, undecodable=0, too_short=0, duplicates=0, in_two_splits=0)
        and not report["ok"]
    )
    assert report["splits"]["not listed"]["files"] == 1 and report["splits"]["train"] == dict(
        files=4, found=3, classes=2, smallest=1, median=1.5, largest=2, empty=["gone"]
    )
    for text, part in (
        (head + "\na,b,soon,11,train", "line 2"),
        (head + "\na,b,1,11,dev", "'dev'"),
        ("a,b\n1,2", "columns"),
        ("", "columns"),
    ):
        lists[0].write_text(text)
        lists[0].rename(tmp_path / "list.csv")
        with pytest.raises(InputError) as e:
            kinetics_manifest(tmp_path / "list.csv")
        one_line(e, "list.csv", part)
        (tmp_path / "list.csv").rename(lists[0])
    lists[0].write_text(head + "\n" + line("zz000000000_000001_000011", "gone", "train"))
    with pytest.raises(InputError) as e:
        kinetics_manifest(tmp_path, "train")
    one_line(e, "none of the 1 videos", "on disk")


def test_csv_with_paths(tmp_path, world):
    for i in range(3):
        shutil.copy(world[0] / world[1][i], tmp_path / f"{i}.mp4")
    file = tmp_path / "list.csv"
    file.write_text(
        f"path,label,split\n0.mp4,b,train\n{tmp_path}/1.mp4,a,train\n2.avi,b,val\ngone.mp4,c,train\n"
    )
    assert manifest(file, "train")[:2] == (
        [(str(tmp_path / "0.mp4"), 1), (str(tmp_path / "1.mp4"), 0)],
        ["a", "b", "c"],
    )
    assert manifest(f"k600={file}", "val").items == [
        (str(tmp_path / "2.mp4"), 1)
    ]  # listed as .avi, there as .mp4
    assert audit(file, num_frames=8)["missing"] == [str(tmp_path / "gone.mp4")]
    file.write_text("path,label\n0.mp4,2\n1.mp4,0\n")
    assert VideoClips(file, 8, 32).labels == [2, 0] and manifest(file).classes == ["0", "1", "2"]
    with pytest.raises(InputError) as e:
        manifest(file, "train")
    one_line(e, "'train'", "no splits")


@pytest.mark.parametrize(
    "spec, part",
    [
        ("imagenet=x", "imagenet"),
        ("ucf101=", "no path"),
        ("k600={}:0", "'0'"),
        ("k600={}:-1", "'-1'"),
        ("k600={}:nan", "nan"),
        ("k600={}:inf", "inf"),
        ("k600={}:lots", "lots"),
        ("folder={}/none", "none"),
        ("k600={}", "no train"),
        ("{}/x.csv", "x.csv"),
        (["ucf101={}:2", "ucf101={}"], "no weight"),
        (["folder={}", "k600={}/x"], "/x"),
    ],
)
def test_descriptions_that_are_refused(world, spec, part):
    spec = [s.format(world[0]) for s in spec] if isinstance(spec, list) else spec.format(world[0])
    with pytest.raises(InputError) as e:
        VideoClips(spec, 8, 32, split="train")
    one_line(e, part)


def test_descriptions_of_one_set(world, tmp_path):
    root = world[0]
    whole, classes = ucf101_manifest(root, "train")
    for spec in f"ucf101={root}", f"ucf101={root}:2.5", str(root), root:
        assert manifest(spec, "train") == Manifest(whole, classes)
    assert (
        manifest(f"folder={root}", "train")[:2]
        == folder_manifest(root)
        == manifest(f"folder={root}")[:2]
    )
    odd = tmp_path / "a=b:3"
    shutil.copytree(root, odd)
    for spec in odd, str(odd), f"ucf101={odd}", f"ucf101={odd}:2":
        assert len(VideoClips(spec, 8, 32, split="train")) == 16
    for source in (whole, classes), Manifest(whole, classes), whole:
        clips = VideoClips(source, 8, 32)
        assert clips.paths == [p for p, _ in whole] and clips.labels == [l for _, l in whole]
    with pytest.raises(InputError) as e:
        VideoClips(Manifest(whole, classes), 8, 32, split="train")
    one_line(e, "train", "no split")


# ---- mixtures


@pytest.fixture(scope="module")
def two(world, tmp_path_factory):
    "The pocket world and a small Kinetics folder without labels, beside each other."
    k600 = tmp_path_factory.mktemp("mix") / "k600"
    kinetics(k600, [world[0] / n for n in world[1][:5]], "ab")
    kinetics(k600, [world[0] / world[1][5]], "cd", "val")
    return f"ucf101={world[0]}", f"k600={k600}"


def test_a_mixture_numbers_classes_one_after_the_other(world, two):
    both = manifest([two[0], f"folder={world[0]}", two[1]], "train")
    n = len(CLASSES)
    a, b = ucf101_manifest(world[0], "train")[0], folder_manifest(world[0])
    assert both.classes == CLASSES + b[1] and both.shares is None and len(both.items) == 16 + N + 5
    assert (
        both.items[:16] == a
        and both.items[16 : 16 + N] == [(p, l + n) for p, l in b[0]]
        and {l for _, l in both.items[-5:]} == {-1}
    )
    clips = VideoClips([*two], 8, 32, split="train")
    assert (
        len(clips) == 21 and [clips[i]["path"] for i in range(21)] == clips.paths
    )  # without weights: every clip, in order
    with pytest.raises(InputError) as e:
        mixed([(manifest([two[0] + ":1", two[1] + ":1"], "train"), 1.0), (two[0], 1.0)], "train")
    one_line(e, "mixture")
    with pytest.raises(InputError) as e:
        mixed([(a, 0.0), (two[1], 1.0)])
    one_line(e, "weight")


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (1, 10), (1e-9, 1)])
def test_weights_are_shares_of_an_epoch(two, weights):
    clips = VideoClips(
        [f"{s}:{w}" for s, w in zip(two, weights)], 8, 32, split="train", seed=4, cache=True
    )
    drawn = []
    for epoch in range(40):
        clips.set_epoch(epoch)
        drawn.append([clips.paths.index(clips[i]["path"]) for i in range(len(clips))])
    share = 21 * weights[0] / sum(weights)
    counts = np.bincount(sum(drawn, []), minlength=21)
    assert len(clips) == 21 and all(abs(sum(p < 16 for p in epoch) - share) < 1 for epoch in drawn)
    for part in counts[:16], counts[16:]:
        assert part.max() - part.min() <= 1  # nobody is forgotten, in the long run
    if weights == (1, 1):
        assert (
            drawn[0] != drawn[1]
            and len({p for p in drawn[0] if p < 16}) == 10
            or sum(p < 16 for p in drawn[0]) == 11
        )
    again = VideoClips(
        [f"{s}:{w}" for s, w in zip(two, weights)], 8, 32, split="train", seed=4, cache=True
    )
    again.set_epoch(39)
    assert [again.paths.index(again[i]["path"]) for i in range(21)] == drawn[
        39
    ]  # no memory of earlier epochs
    other = VideoClips(
        [f"{s}:{w}" for s, w in zip(two, weights)], 8, 32, split="train", seed=5, cache=True
    )
    assert [other.paths.index(other[i]["path"]) for i in range(21)] != drawn[0]


# ---- the data set


def collect(root, workers, epochs=(0, 1), **options):
    "Everything an epoch yields, for several epochs of one loader."
    clips = VideoClips(
        root, 8, 32, split="train", seed=3, flip=True, cache=options.pop("cache", False)
    )
    out = []
    batches = loader(clips, 4, seed=5, num_workers=workers, **options)
    for epoch in epochs:
        clips.set_epoch(epoch)
        out.append(
            [(p, int(l), v) for b in batches for p, l, v in zip(b["path"], b["label"], b["video"])]
        )
    return out


def same(a, b):
    return len(a) == len(b) and all(
        x[:2] == y[:2] and torch.equal(x[2], y[2]) for x, y in zip(a, b)
    )


def test_workers_caches_and_resumes_see_the_same_clips(world):
    root = world[0]
    alone = collect(root, 0)
    assert len(alone[0]) == 16 and len({p for p, *_ in alone[0]}) == 16
    assert [p for p, *_ in alone[0]] != [p for p, *_ in alone[1]]  # another order
    assert any(
        not torch.equal(v, {p: w for p, _, w in alone[1]}[p]) for p, _, v in alone[0]
    )  # other windows
    assert all(map(same, alone, collect(root, 0, cache=True)))
    assert all(
        map(same, alone, collect(root, 2, persistent_workers=True))
    )  # set_epoch reaches running workers
    assert same(alone[1], collect(root, 0, epochs=(1,))[0])  # resumed at epoch 1


def test_starts_depend_on_seed_epoch_and_index(world):
    root, names, truth, _ = world

    def starts(seed, epoch, flip=False):
        clips = VideoClips([(root / names[0], 0)] * 30, 8, 64, seed=seed, flip=flip, cache=True)
        clips.set_epoch(epoch)
        return [clips[i]["video"] for i in range(30)]

    base = starts(0, 0)
    distinct = {v.numpy().tobytes() for v in base}
    assert 6 < len(distinct) <= 13  # one file, 13 possible windows

    def agree(a, b):
        return sum(torch.equal(x, y) for x, y in zip(a, b))

    assert (
        agree(base, starts(0, 0)) == 30
        and agree(base, starts(1, 0)) < 12
        and agree(base, starts(0, 1)) < 12
    )
    flipped = starts(0, 0, flip=True)
    kept, mirrored = agree(base, flipped), agree([v.flip(-1) for v in base], flipped)
    assert kept + mirrored >= 30 and min(kept, mirrored) >= 5


def test_entries(world):
    root, names, truth, factors = world
    clips = VideoClips(root, 8, 64, "uniform")
    assert (
        len(clips) == N
        and clips.labels == [clips[i]["label"] for i in range(N)]
        and torch.equal(clips[-1]["video"], clips[N - 1]["video"])
    )
    with pytest.raises(IndexError):
        clips[N]
    for item in (clips[i] for i in range(N)):
        i = names.index(str(Path(item["path"]).relative_to(root)))
        wanted = truth[i][:, frame_indices(FRAMES, 8, "uniform")[0]]
        assert (item["video"] - wanted).pow(2).mean() < 0.004 and clips.classes[
            item["label"]
        ] == Path(item["path"]).parent.name
    seen = []
    VideoClips(root, 8, 32, cache=True, progress=lambda it, **k: seen.append(k) or it)
    assert len(seen) == 1 and seen[0]["desc"]


def test_loader_refuses_what_it_cannot_fill(world):
    clips = VideoClips(world[0], 8, 32, split="test")
    for size in (5, 0):
        with pytest.raises(InputError) as e:
            loader(clips, size)
        one_line(e, f"batch of {size} ", "4 clips")
    assert [len(b["label"]) for b in loader(clips, 3, shuffle=False)] == [3, 1]
    assert [p for b in loader(clips, 3, shuffle=False) for p in b["path"]] == clips.paths


def test_chunks_are_entries(world, tmp_path):
    for n in (3, 8, 20, 33):
        write_video(tmp_path / f"{n:02d}.mp4", render(sample_factors(1, seed=n), n, 32)[0])
    fresh, cached = (VideoClips(tmp_path, 8, 32, "all", cache=c) for c in (False, True))
    assert len(fresh) == len(cached) == 1 + 1 + 2 + 4
    wanted = torch.cat([read_chunks(p, 8, 32) for p in fresh.paths])
    for clips in fresh, cached:
        assert all(torch.equal(clips[i]["video"], v) for i, v in enumerate(wanted))
        assert [Path(clips[i]["path"]).stem for i in range(8)] == [
            "03",
            "08",
            "20",
            "20",
            "33",
            "33",
            "33",
            "33",
        ]
    alone, helped = (
        [v for b in loader(fresh, 3, num_workers=w) for v in b["video"]] for w in (0, 2)
    )
    assert len(alone) == 6 and all(map(torch.equal, alone, helped))
    steps = []
    VideoClips(tmp_path, 8, 32, "all", progress=lambda it, **k: steps.append(k["desc"]) or it)
    assert steps == ["counting frames"]
    (tmp_path / "20.mp4").write_bytes(b"x")
    (tmp_path / "99.mp4").touch()
    with pytest.raises(InputError):
        VideoClips(tmp_path, 8, 32, "all")
    clips = VideoClips(tmp_path, 8, 32, "all", replace_bad=True)
    assert len(clips) == 6 and [Path(p).stem for p in clips.bad] == ["20", "99"]
    for name in ("03", "08", "33"):
        (tmp_path / f"{name}.mp4").write_bytes(b"x")
    with pytest.raises(InputError) as e:
        VideoClips(tmp_path, 8, 32, "all", replace_bad=True)
    one_line(e, "not one of 5", "dera audit")


# ---- bad clips in training


@pytest.fixture
def spoilt(world, tmp_path):
    "A copy of 20 videos of which one is cut short; and its number in the sorted list."
    root = tmp_path / "spoilt"
    shutil.copytree(world[0], root)
    shutil.rmtree(root / "ucfTrainTestlist")
    clips = VideoClips(root, 8, 32)
    bad = Path(clips.paths[7])
    bad.write_bytes(bad.read_bytes()[:300])
    whole = shutil.copytree(world[0], tmp_path / "whole")
    shutil.rmtree(whole / "ucfTrainTestlist")
    return root, whole, 7


@pytest.fixture
def log(tmp_path):
    "What `dera.data` logs, from every process."
    handler = logging.FileHandler(tmp_path / "log.txt")
    logging.getLogger("dera.data").addHandler(handler)
    yield lambda: (tmp_path / "log.txt").read_text().splitlines()
    logging.getLogger("dera.data").removeHandler(handler)
    handler.close()


def epochs_of(clips, workers, epochs, **options):
    "{(epoch, place): (path, label, video)} through a loader in fixed order."
    batches = loader(clips, 4, shuffle=False, num_workers=workers, **options)
    out = []
    for epoch in epochs:
        clips.set_epoch(epoch)
        out.append(
            [(p, int(l), v) for b in batches for p, l, v in zip(b["path"], b["label"], b["video"])]
        )
    return out


@pytest.mark.parametrize("cache", [False, True])
def test_a_bad_clip_is_replaced_and_the_others_are_not_touched(spoilt, log, cache):
    root, whole, k = spoilt
    with pytest.raises(InputError):
        VideoClips(root, 8, 32, cache=cache)[k]  # only if asked
    clips, sound = (
        VideoClips(root, 8, 32, flip=True, cache=cache, replace_bad=True),
        VideoClips(whole, 8, 32, flip=True),
    )
    assert clips.bad == ([clips.paths[k]] if cache else [])
    a, b = epochs_of(clips, 0, range(4)), epochs_of(sound, 0, range(4))
    for x, y in zip(a, b):
        assert (
            all(torch.equal(x[i][2], y[i][2]) for i in range(N) if i != k)
            and x[k][0] != clips.paths[k]
        )
        assert x[k][1] == clips.labels[clips.paths.index(x[k][0])]
    assert len({x[k][0] for x in a}) > 1  # not always the same one
    assert clips.bad == [clips.paths[k]] and len(log()) == 1 and clips.paths[k] in log()[0]
    assert all(
        map(same, a, epochs_of(VideoClips(root, 8, 32, flip=True, replace_bad=True), 0, range(4)))
    )
    with pytest.raises(InputError):
        read_clip(clips.paths[k], 8, 32)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_share_the_epoch_and_the_marks(spoilt, log, method):
    root, _, k = spoilt

    def make():
        return VideoClips(root, 8, 32, flip=True, seed=2, replace_bad=True)

    alone, clips, workers = epochs_of(make(), 0, (0, 5, 2)), make(), 2 if method == "fork" else 1
    assert all(
        map(same, alone, epochs_of(clips, workers, (0, 5, 2), multiprocessing_context=method))
    )  # set_epoch reaches running workers
    assert clips.bad == [clips.paths[k]]  # and the main process knows
    if method == "fork":
        assert len(log()) == 2  # once alone, once with two workers


def test_too_many_bad_clips_stop_the_next_epoch(spoilt, log):
    root, _, k = spoilt
    clips = VideoClips(root, 8, 32, replace_bad=True)
    epochs_of(clips, 0, (0, 1))  # 1 of 20 is 5 %, not more
    Path(clips.paths[3]).unlink()  # removed after the list was made
    clips.set_epoch(2)
    seen = [clips[i]["path"] for i in range(N)]
    assert (
        clips.paths[3] not in seen
        and sorted(clips.bad) == sorted([clips.paths[3], clips.paths[k]])
        and len(log()) == 2
    )
    with pytest.raises(InputError) as e:
        clips.set_epoch(3)
    one_line(e, "2 of 20", "10.0%", f"dera audit {root}")
    cached = VideoClips(
        root, 8, 32, replace_bad=True, cache=True
    )  # knows before the first epoch: 1 of 19
    with pytest.raises(InputError) as e:
        cached.set_epoch(0)
    one_line(e, "1 of 19", "5.3%")
    VideoClips(root, 8, 32).set_epoch(3)  # not asked to look
    for source in [(clips.paths[k], 0)] * 3, [(clips.paths[k], 0), (clips.paths[3], 0)]:
        empty = VideoClips(source, 8, 32, replace_bad=True)
        with pytest.raises(InputError) as e:
            empty[0]
        one_line(e, "dera audit")
    with pytest.raises(InputError) as e:
        empty.set_epoch(1)
    one_line(e, "dera audit")


def test_a_file_named_twice_is_one_file(spoilt, log):
    root, _, k = spoilt
    paths = VideoClips(root, 8, 32).paths
    clips = VideoClips([(paths[k], 0)] * 5 + [(paths[0], 0)] * 20, 8, 32, replace_bad=True)
    assert (
        {clips[i]["path"] for i in range(25)} == {paths[0]}
        and clips.bad == [paths[k]]
        and len(log()) == 1
    )


def test_a_mixture_replaces_from_the_same_source(spoilt, two, log):
    root, _, k = spoilt
    clips = VideoClips(
        [f"folder={root}:1", f"{two[1]}:1"], 8, 32, split="train", replace_bad=True, cache=True
    )
    parts = []
    for epoch in range(40):
        clips.set_epoch(epoch)
        parts.append([str(root) in clips[i]["path"] for i in range(len(clips))])
    assert clips.bad and all(sum(p) in (12, 13) for p in parts) and len(set(map(tuple, parts))) == 1


# ---- workers


class Threads(torch.utils.data.Dataset):
    "How many threads the process runs that has just read a clip."

    def __init__(self, clips):
        self.clips = clips

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, i):
        self.clips[i]
        return len(os.listdir("/proc/self/task")), torch.get_num_threads()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_worker_decodes_in_one_thread(world):
    counts = list(
        torch.utils.data.DataLoader(
            Threads(VideoClips(world[0], 16, 32)), 4, num_workers=2, multiprocessing_context="fork"
        )
    )
    assert max(int(t.max()) for t, _ in counts) <= 4 and all(
        (n == 1).all() for _, n in counts
    )  # a queue's thread or two, none for decoding


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device to pin memory for")
def test_pinning_is_silent_without_a_device(world):
    clips = VideoClips(world[0], 8, 32, cache=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in {}, dict(pin_memory=True), dict(pin_memory=False):
            assert len(list(loader(clips, 5, **options))) == 4


def rss():
    return (
        int(
            next(
                l
                for l in Path("/proc/self/status").read_text().splitlines()
                if l.startswith("VmRSS")
            ).split()[1]
        )
        / 1024
    )  # MB


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_the_main_process_does_not_grow(world):
    clips = VideoClips(world[0], 16, 64, cache=True)
    batches = loader(clips, 4, num_workers=2, multiprocessing_context="fork")

    def go(first, last):
        for epoch in range(first, last):
            clips.set_epoch(epoch)
            for b in batches:
                assert b["video"].shape == (4, 3, 16, 64, 64)
        gc.collect()
        return rss(), len(os.listdir("/proc/self/fd"))

    memory, files = go(0, 5)
    more, still = go(5, 25)  # 20 epochs are 315 MB of clips
    assert more - memory < 20 and still <= files + 4, (memory, more, files, still)
    assert batches._iterator is not None  # the same workers all along


# ---- audit


def test_children_that_die_do_not_stop_the_rest():
    def work(n):
        if n % 5 == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return n * n

    for workers in 1, 3:
        assert dict(for_each(work, range(12), workers)) == {
            n: None if n % 5 == 2 else n * n for n in range(12)
        }
    assert list(for_each(work, [], 2)) == []
    left = for_each(work, range(1000), 2)
    next(left)
    left.close()  # leaving early leaves no process
    assert not __import__("multiprocessing").active_children()


def break_it(root):
    "One thing of each kind wrong in a pocket world; returns the paths."
    lists = {k: root / f"ucfTrainTestlist/{k}list01.txt" for k in ("train", "test")}
    train, test = ([l.split()[0] for l in f.read_text().splitlines()] for f in lists.values())

    def at(n):
        return str(root / n)

    Path(at(train[0])).unlink()
    content = Path(at(train[1])).read_bytes()
    Path(at(train[1])).write_bytes(content[: len(content) // 2])
    write_video(Path(at(train[2])), render(sample_factors(1, seed=5), 4, 64)[0])
    shutil.copy(at(train[3]), at(test[0]))
    lists["test"].write_text("\n".join([*test, train[4]]) + "\n")
    (root / train[5]).parent.joinpath("unlisted.mp4").write_bytes(
        (root / train[6]).read_bytes() + b"0"
    )
    return [at(n) for n in train], [at(n) for n in test]


def test_a_sound_set_passes(world):
    for source in world[0], str(world[0]), [f"ucf101={world[0]}"]:
        report = audit(source, workers=2)
        assert report["ok"] and not any(report["counts"].values()) and report["files"] == N
    assert (
        "nothing is wrong" in audit_table(report)
        and report["splits"]["test"]["found"] == 4
        and report["splits"]["train"]["files"] == 16
    )
    assert (
        len(report["splits"]["train"]["empty"])
        == len(CLASSES) - report["splits"]["train"]["classes"]
    )
    labels = [l for _, l in ucf101_manifest(world[0], "train")[0]]
    n = [labels.count(l) for l in set(labels)]
    assert [report["splits"]["train"][k] for k in ("smallest", "median", "largest")] == [
        min(n),
        np.median(n),
        max(n),
    ]


def test_audit_finds_each_kind_of_trouble(world, tmp_path):
    root = tmp_path / "b"
    shutil.copytree(world[0], root)
    train, test = break_it(root)
    steps = []
    report = audit(root, workers=2, progress=lambda it, **k: steps.append(k) or it)
    assert (
        not report["ok"]
        and report["missing"] == [train[0]]
        and [d["path"] for d in report["undecodable"]] == [train[1]]
    )
    assert report["too_short"] == [dict(path=train[2], frames=4)] and report["duplicates"] == [
        sorted([train[3], test[0]])
    ]
    assert report["in_two_splits"] == [
        dict(same="file", splits=dict(train=[train[4]], test=[train[4]])),
        dict(same="content", splits=dict(train=[train[3]], test=[test[0]])),
    ]
    assert report["splits"]["not listed"]["files"] == 1 and report["counts"]["in_two_splits"] == 2
    assert audit(root, num_frames=4, workers=1)["too_short"] == [] and report["num_frames"] == 16
    assert (
        report == json.loads(json.dumps(report)) == audit(root, workers=1)
        and [k["total"] for k in steps][0] == N
    )
    table = audit_table(report)
    assert str(tmp_path) not in table and "something is wrong" in table
    for text in (
        "missing              1",
        Path(train[1]).name,
        "4 frames",
        "same file",
        "same content",
        "damaged",
    ):
        assert text in table
    many = audit_table(report | dict(missing=[f"{root}/{i}" for i in range(9)]))
    assert "and 4 more" in many


def test_a_set_of_short_files_is_not_wrong(tmp_path):
    for n, frames in enumerate((8, 8, 8, 3, 30)):
        write_video(tmp_path / f"{n}.mp4", render(sample_factors(1, seed=n), frames, 32)[0])
    for num_frames, short in (None, [3]), (16, [8, 8, 8, 3]), (3, []):
        report = audit(tmp_path, num_frames=num_frames, workers=1)
        assert (
            [d["frames"] for d in report["too_short"]] == short
            and report["ok"] == (not short)
            and report["num_frames"] == (num_frames or 8)
        )
    for n in range(2):
        (tmp_path / f"empty{n}.mp4").touch()
    report = audit(tmp_path, num_frames=3, workers=1)
    assert (
        len(report["undecodable"]) == 2 and report["duplicates"] == []
    )  # nothing twice is nothing


def test_audit_knows_videos_by_their_names(world, tmp_path):
    files = [world[0] / n for n in world[1]]
    names = kinetics(tmp_path / "k", files[:3], "ab")
    kinetics(tmp_path / "k", files[3:5], "cd", "val")
    assert audit(tmp_path / "k", workers=2)["ok"]
    shutil.copy(
        files[6], tmp_path / "k/val" / (names[1][:11] + "_000777_000787.mp4")
    )  # another window of a training video
    [leak] = audit(f"k600={tmp_path}/k", workers=2)["in_two_splits"]
    assert leak["same"] == "video" and set(leak["splits"]) == {"train", "val"}
    ucf = tmp_path / "u"
    (ucf / "ucfTrainTestlist").mkdir(parents=True)
    clips = [
        ("Run", 1, 1, "train"),
        ("Run", 1, 2, "test"),
        ("Run", 2, 1, "train"),
        ("Jump", 2, 1, "test"),
        ("HandstandPushups", 9, 1, "train"),
        ("HandstandPushups", 9, 2, "test"),
    ]
    lines = dict(train=[], test=[])
    for file, (c, g, n, split) in zip(files, clips):
        name = f"{c}/v_{c.replace('ds', 'dS')}_g{g:02d}_c{n:02d}.avi"
        (ucf / c).mkdir(exist_ok=True)
        shutil.copy(file, ucf / name)
        lines[split].append(name if split == "train" else name.replace("dS", "ds"))
    (ucf / "ucfTrainTestlist/classInd.txt").write_text("1 Run\n2 Jump\n3 HandstandPushups\n")
    for split in lines:
        (ucf / f"ucfTrainTestlist/{split}list01.txt").write_text("\n".join(lines[split]))
    report = audit(ucf, workers=2)
    assert [d["same"] for d in report["in_two_splits"]] == ["video", "video"] and report["counts"][
        "missing"
    ] == 0
    assert all(
        len({Path(p).parent.name for group in d["splits"].values() for p in group}) == 1
        for d in report["in_two_splits"]
    )


def test_audit_survives_a_decoder_that_crashes(world, monkeypatch):
    victim, load = str(world[0] / world[1][4]), video.load_frames

    def crash(path, *rest):
        if str(path) == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return load(path, *rest)

    monkeypatch.setattr(video, "load_frames", crash)
    report = audit(world[0], workers=2)  # children inherit the crash
    assert (
        [d["path"] for d in report["undecodable"]] == [victim]
        and "crash" in report["undecodable"][0]["cause"]
        and report["counts"]["too_short"] == 0
    )


def test_a_full_audit_reads_every_frame(tmp_path, monkeypatch, world):
    read, load = tmp_path / "read.txt", video.load_frames

    def spy(path, size, indices, *rest):
        def noted(n):
            k = indices(n)
            with open(read, "a") as f:
                f.write(f"{len(k)} {k[-1]}\n")
            return k

        return load(path, size, noted, *rest)

    monkeypatch.setattr(video, "load_frames", spy)
    for full, last in (False, 8), (True, FRAMES):
        read.unlink(missing_ok=True)
        audit(world[0], num_frames=8, full=full, workers=1)
        assert read.read_text().splitlines() == [f"{last} {last - 1}"] * N


# ---- prepared copies


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    "Four videos of 160 x 120 as old avi files with sound or without, two lists, and one that is damaged."
    root = tmp_path_factory.mktemp("prepare") / "large"
    folder = root / "UCF-101/Turn Left"
    folder.mkdir(parents=True)
    (root / "ucfTrainTestlist").mkdir()
    for i, v in enumerate(render(sample_factors(4, seed=3), 24, 160)[:, :, :, 20:140]):
        with av.open(str(folder / f"v_Turn_g0{i}_c01.avi"), "w") as file:
            stream = file.add_stream("mpeg4", rate=Fraction(30000, 1001), options=dict(qscale="2"))
            stream.height, stream.width, stream.pix_fmt = 120, 161 if i == 1 else 160, "yuv420p"
            sound = file.add_stream("pcm_s16le", rate=8000) if i == 2 else None
            for frame in (v * 255).byte().permute(1, 2, 3, 0).numpy():
                if i == 1:
                    frame = np.concatenate([frame, frame[:, -1:]], 1)
                file.mux(
                    stream.encode(
                        av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                    )
                )
            if sound:
                noise = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), layout="mono")
                noise.rate = 8000
                file.mux(sound.encode(noise))
            file.mux(stream.encode())
    (folder / "v_Turn_g09_c01.avi").write_bytes((folder / "v_Turn_g00_c01.avi").read_bytes()[:2000])
    (root / "ucfTrainTestlist/classInd.txt").write_text("1 Turn Left\n")
    for split, rows in ("train", (0, 1, 2)), ("test", (3,)):
        (root / f"ucfTrainTestlist/{split}list01.txt").write_text(
            "".join(f"Turn Left/v_Turn_g0{i}_c01.avi\n" for i in rows)
        )
    return root


def psnr(a, b):
    return float(-10 * torch.log10((a - b).pow(2).mean()))


@pytest.mark.parametrize("lossless", [False, True])
def test_a_copy_reads_like_the_original(large, tmp_path, lossless):
    report = prepare(f"ucf101={large}", tmp_path / "small", size=64, lossless=lossless, workers=2)
    assert (report["files"], report["written"], report["kept"]) == (5, 4, 0) and report[
        "bytes_copy"
    ] > 0
    assert (
        [Path(b["path"]).name for b in report["bad"]] == ["v_Turn_g09_c01.avi"]
        and "damaged" in report["bad"][0]["cause"]
        and report == json.loads((tmp_path / "small/prepared.json").read_text())
    )
    for split in "train", "test":
        a, b = (VideoClips(r, 24, 64, split=split) for r in (large, tmp_path / "small"))
        assert [p.replace(".avi", "") for p in a.paths] == [
            p.replace("small", "large")
            .replace(str(tmp_path), str(large.parent))
            .replace(".mp4", "")
            for p in b.paths
        ] and a.labels == b.labels
        for i in range(len(a)):
            x, y, info, small = a[i]["video"], b[i]["video"], probe(a.paths[i]), probe(b.paths[i])
            assert (
                small.num_frames == 24
                and abs(small.fps - 30000 / 1001) < 1e-3
                and small.height == 64
                and small.width == 84 + 2 * (info.width == 161)
            )
            assert torch.equal(x, y) if lossless else psnr(x, y) > 33
            assert (
                read_clip(b.paths[i], 24, 64, backend="decord")
                - read_clip(b.paths[i], 24, 64, backend="pyav")
            ).abs().max() <= 2 / 255 + 1e-6
            with av.open(b.paths[i]) as file:
                assert len(file.streams.audio) == 0
    assert (tmp_path / "small/ucfTrainTestlist/testlist01.txt").read_bytes() == (
        large / "ucfTrainTestlist/testlist01.txt"
    ).read_bytes()
    assert audit(tmp_path / "small", workers=1)["ok"] and not [
        p for p in (tmp_path / "small").rglob("*") if "part" in p.name
    ]


def test_preparing_goes_on_where_it_was(large, tmp_path):
    out = tmp_path / "small"

    def stop(it, **_):
        for i, x in enumerate(it):
            if i == 2:
                raise KeyboardInterrupt
            yield x

    with pytest.raises(KeyboardInterrupt):
        prepare(large, out, size=32, workers=1, progress=stop)
    half = {p: p.stat().st_mtime_ns for p in out.rglob("[!.]*.mp4")}
    assert 2 <= len(half) < 4
    next(iter(half)).with_name(".v_Turn_g03_c01.mp4.part.mp4").write_bytes(b"left by a power cut")
    report = prepare(large, out, size=32, workers=1)
    assert (
        report["kept"] == len(half)
        and report["written"] == 4 - len(half)
        and len(report["bad"]) == 1
    )
    assert (
        all(p.stat().st_mtime_ns == t for p, t in half.items())
        and len(VideoClips(out, 8, 32, split="train")) == 3
    )
    for settings in dict(size=64), dict(size=32, crf=20), dict(size=32, lossless=True):
        with pytest.raises(InputError) as e:
            prepare(large, out, **settings)
        one_line(e, out, "another folder")
    (out / "prepared.json").write_text("{}")
    with pytest.raises(InputError) as e:
        prepare(large, out, size=32)
    one_line(e, "prepared.json")


def test_what_prepare_refuses(large, tmp_path, world):
    for out in large / "small", large, large.parent:
        with pytest.raises(InputError) as e:
            prepare(large, out)
        one_line(e, "elsewhere")
    for wrong in dict(size=1), dict(crf=0), dict(crf=60):
        with pytest.raises(InputError):
            prepare(large, tmp_path / "x", **wrong)
    shutil.copy(world[0] / world[1][0], (tmp_path / "a.mp4"))
    shutil.copy(world[0] / world[1][0], tmp_path / "a.avi")
    with pytest.raises(InputError) as e:
        prepare(tmp_path, tmp_path.parent / "clash")
    one_line(e, "a.avi", "same name")
    (tmp_path / "file").touch()
    (tmp_path / "a.avi").unlink()
    with pytest.raises(InputError) as e:
        prepare(large, tmp_path / "file/out")
    one_line(e, "cannot write")


def test_prepare_keeps_kinetics_layout_and_small_files(tmp_path, world, monkeypatch):
    k600 = tmp_path / "k600"
    names = kinetics(k600, [world[0] / n for n in world[1][:3]], "ab", "train/some class")
    kinetics(k600, [world[0] / world[1][3]], "cd", "val")
    (k600 / "annotations").mkdir()
    (k600 / "annotations/train.csv").write_text(
        "label,youtube_id,time_start,time_end,split\n"
        + "".join(f"x,{n[:11]},{i},{i + 10},train\n" for i, n in enumerate(names))
    )
    report = prepare(k600, tmp_path / "out", workers=2)
    assert report["written"] == 4 and not report["bad"]
    assert [p.relative_to(tmp_path / "out") for p in sorted((tmp_path / "out").rglob("*.mp4"))] == [
        p.relative_to(k600) for p in sorted(k600.rglob("*.mp4"))
    ]
    a, b = (kinetics_manifest(r, "train") for r in (k600, tmp_path / "out"))
    assert a[1] == b[1] and [l for _, l in a[0]] == [l for _, l in b[0]]
    assert (probe(b[0][0][0]).height, probe(b[0][0][0]).width) == (64, 64)  # never enlarged
    victim, encode = str(tmp_path / "two"), writing.encode_frames
    monkeypatch.setattr(
        writing,
        "encode_frames",
        lambda path, *rest, **more: (
            os.kill(os.getpid(), signal.SIGKILL)
            if names[1] in str(path)
            else encode(path, *rest, **more)
        ),
    )
    report = prepare(k600, victim, workers=2)
    assert (
        report["written"] == 3
        and "crash" in report["bad"][0]["cause"]
        and names[1] in report["bad"][0]["path"]
    )

    def full(path, *rest, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "encode_frames", full)
    with pytest.raises(InputError) as e:
        prepare(k600, victim + "x", workers=2)
    one_line(e, "No space", "same command")


def test_shipped_checksums_are_those_of_the_readme():
    folder = Path(__file__).resolve().parent.parent / "data"
    text = (folder / "README.md").read_text()
    lines = [l.split("  ") for l in (folder / "manifests/ucf101.sha256").read_text().splitlines()]
    assert len(lines) == 2 and all(
        len(digest) == 64 and digest in text and name in text for digest, name in lines
    )
