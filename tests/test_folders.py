"Lists and folders as people leave them: any encoding, any name, links in circles, two labels, deep folders."

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from video_files import one_line

from dera.data import VideoClips, as_float, loader, manifest, open_clips
from dera.pocket import PocketClips, render, sample_factors, write_video
from dera.runtime.errors import InputError
from dera.runtime.folders import read_lines, read_text, video_files
from dera.runtime.names import cause_of, legible, printable
from dera.tools.audit import audit, audit_table, prepare

LATIN = os.fsdecode(b"J\xfcrgen l\xe4uft")  # bytes that are not UTF-8


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    "Four small videos, all different."
    root = tmp_path_factory.mktemp("videos")
    clips = render(sample_factors(4, seed=6), 10, 32)
    for number, clip in enumerate(clips):
        write_video(root / f"{number}.mp4", clip)
    return sorted(root.iterdir())


@pytest.fixture
def said(caplog):
    "What `dera` has logged so far, as text."
    caplog.set_level(logging.WARNING, "dera.data")
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


def place(video, *targets):
    for target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(video, target)


# ---- names


def test_any_name_can_be_shown():
    for name in LATIN, "\ud83d lone", "two\nlines", "tab\t", Path("/x") / LATIN:
        printable(name).encode()
        assert "\n" not in printable(name) and printable(name).isprintable()
        str(InputError(f"cannot read {name}: x")).encode()
    assert printable("映像 é.mp4") == "映像 é.mp4" and legible(LATIN) == "Jürgen läuft"
    assert cause_of(OSError(28, "No space left")) == "No space left"


def test_names_that_are_not_utf8_work_everywhere(tmp_path, videos, said):
    root = tmp_path / os.fsdecode(b"set \xff")
    for number, video in enumerate(videos):
        place(video, root / f"class {number % 2}" / f"{number} {LATIN}.mp4")
    place(videos[0], root / LATIN / "more.mp4")
    for workers in 0, 2:
        batches = list(loader(VideoClips(root, 8, 32), 5, num_workers=workers))
        assert batches[0]["video"].shape == (5, 3, 8, 32, 32)
        assert set(batches[0]["path"]) == set(VideoClips(root, 8, 32).paths)
    (name,) = [c for c in VideoClips(root, 8, 32).classes if c.startswith("J")]
    name.encode()

    (root / "class 0" / f"broken {LATIN}.mp4").write_bytes(b"x")
    report = audit(root, workers=2)
    assert [Path(d["path"]).stem for d in report["undecodable"]] == [f"broken {LATIN}"]
    audit_table(report).encode()
    json.dumps(report).encode()
    report = prepare(root, tmp_path / os.fsdecode(b"copy \xfe"), size=16, workers=2)
    assert report["written"] == 5 and len(report["bad"]) == 1
    assert len(VideoClips(tmp_path / os.fsdecode(b"copy \xfe"), 8, 16)) == 5
    clips = VideoClips(root, 8, 32, replace_bad=True)
    [clips[i] for i in range(len(clips))]
    said().encode()
    with pytest.raises(InputError) as e:
        clips.set_epoch(1)
    one_line(e, "1 of 6").encode()


# ---- lists in any encoding


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_a_list_in_any_encoding(tmp_path, encoding, videos):
    place(videos[0], tmp_path / "UCF-101/Läufer/v_Läufer_g01_c01.avi")
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_bytes("1 Sprung\r\n2 Läufer\r\n".encode(encoding))
    (lists / "trainlist01.txt").write_bytes("Läufer/v_Läufer_g01_c01.avi 2\r\n".encode(encoding))
    (lists / "._trainlist01.txt").write_bytes(b"\0\5\26\7")
    [(_, label)], classes = manifest(tmp_path, "train")[:2]
    assert (label, classes) == (1, ["Sprung", "Läufer"])

    table = tmp_path / "list.csv"
    path = "UCF-101/Läufer/v_Läufer_g01_c01.avi"
    table.write_bytes(f"path,label\n{path},Läufer\n".encode(encoding))
    assert manifest(table).classes == ["Läufer"] and len(manifest(table).items) == 1


def test_latin_1_lists_find_latin_1_files_and_junk_is_no_list(tmp_path, videos):
    folder = tmp_path / os.fsdecode("Läufer".encode("latin-1"))
    place(videos[0], folder / os.fsdecode("v_Läufer_g01_c01.mp4".encode("latin-1")))
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_bytes("1 Läufer\n".encode("latin-1"))
    (lists / "trainlist01.txt").write_bytes("Läufer/v_Läufer_g01_c01.avi 1\n".encode("latin-1"))
    assert len(manifest(tmp_path, "train").items) == 1
    (lists / "trainlist01.txt").write_bytes(b"\x00\x05\x16\x07\x00\x02Mac OS X" + bytes(40))
    with pytest.raises(InputError) as e:
        manifest(tmp_path, "train")
    one_line(e, "trainlist01.txt", "no text")
    (tmp_path / "empty.txt").write_text("\ufeff\n \n")
    with pytest.raises(InputError) as e:
        read_lines(tmp_path / "empty.txt")
    one_line(e, "lists nothing")
    with pytest.raises(InputError) as e:
        read_text(tmp_path / "none.txt")
    one_line(e, "none.txt")


# ---- folders


def test_what_a_mac_leaves_behind(tmp_path, videos):
    place(videos[0], tmp_path / "train/abcdefghijk_000001_000011.mp4")
    place(videos[1], tmp_path / "val/bcdefghijkl_000001_000011.mp4")
    head = "label,youtube_id,time_start,time_end,split\n"
    (tmp_path / "annotations").mkdir()
    for folder in tmp_path, tmp_path / "annotations":
        (folder / "._all.csv").write_bytes(b"\0\5\26\7\0\2\0\0youtube_id Mac OS X \260\xff")
    (tmp_path / "annotations/all.csv").write_text(head + "jump,abcdefghijk,1,11,train\n")
    (tmp_path / "old.csv").mkdir()
    (tmp_path / "old.csv/youtube_id").touch()
    assert manifest(f"k600={tmp_path}", "train")[:2] == (
        [(str(tmp_path / "train/abcdefghijk_000001_000011.mp4"), 0)],
        ["jump"],
    )
    assert audit(f"k600={tmp_path}", workers=1)["splits"]["not listed"]["files"] == 1


def test_a_folder_may_be_called_like_a_list(tmp_path, videos):
    root = tmp_path / "set.csv"
    place(videos[0], root / "a/x.mp4")
    for source in root, f"folder={root}", f"ucf101={root}":
        assert len(VideoClips(source, 8, 32)) == 1
    place(videos[0], tmp_path / "k.csv/train/abcdefghijk_000001_000011.mp4")
    assert (
        len(manifest(tmp_path / "k.csv").items)
        == 1
        == len(manifest(f"k600={tmp_path}/k.csv").items)
    )


@pytest.mark.parametrize("seconds", ["inf", "-inf", "nan", "", "1e400", "soon"])
def test_seconds_that_are_none_name_their_line(tmp_path, videos, seconds):
    place(videos[0], tmp_path / "train/abcdefghijk_000001_000011.mp4")
    (tmp_path / "l.csv").write_text(
        "label,youtube_id,time_start,time_end,split\n"
        f"a,abcdefghijk,1,11,train\nb,abcdefghijk,1,{seconds},train\n"
    )
    with pytest.raises(InputError) as e:
        manifest(f"k600={tmp_path}", "train")
    one_line(e, "line 3", "seconds")


def test_two_labels_are_said_and_both_kept(tmp_path, videos, said):
    place(videos[0], tmp_path / "train/abcdefghijk_000001_000011.mp4")
    rows = [f"{label},abcdefghijk,1,11,train\n" for label in ("run", "jump", "run")]
    (tmp_path / "l.csv").write_text("label,youtube_id,time_start,time_end,split\n" + "".join(rows))
    items, classes = manifest(f"k600={tmp_path}", "train")[:2]
    assert sorted(classes[label] for _, label in items) == ["jump", "run"]
    assert "abcdefghijk_000001_000011" in said() and "run and jump" in said()


def test_links_in_circles_are_left_out_and_nothing_else(tmp_path, videos, said):
    root = tmp_path / "set"
    place(videos[0], root / "a/x.mp4", root / "b/y.mp4")
    (root / "round").symlink_to("round")
    (root / "one").symlink_to("two")
    (root / "two").symlink_to("one")
    (root / "a/up").symlink_to(root)
    (root / "self").symlink_to(root)
    (root / "c").symlink_to(root / "b")  # another class by another name: no circle
    found = [str(p.relative_to(root)) for p in video_files(root)]
    assert found == ["a/x.mp4", "b/y.mp4", "c/y.mp4"]
    assert audit(f"folder={root}", workers=1)["files"] == 3
    for name in "round", "one", "two", "self":
        assert f"{root}/{name} is a link" in said()


def test_deeper_videos_are_explained(tmp_path, videos, said):
    place(videos[0], tmp_path / "all/jump/day 1/x.mp4")
    with pytest.raises(InputError) as e:
        VideoClips(tmp_path / "all", 8, 32)
    one_line(e, "day 1/x.mp4", "deeper", f"name the folder of classes, {tmp_path / 'all/jump'}")
    assert len(VideoClips(tmp_path / "all/jump", 8, 32)) == 1
    place(videos[1], tmp_path / "all/jump/y.mp4")
    assert len(VideoClips(tmp_path / "all", 8, 32)) == 1
    assert "x.mp4 lies deeper" in said()


@pytest.mark.parametrize("ids", [[2**40, 7], [1700000000, 1700000000], [10000, 123456789012345]])
def test_ids_as_labels_are_names(tmp_path, ids):
    for number in range(2):
        (tmp_path / f"{number}.mp4").touch()
    rows = "".join(f"{number}.mp4,{id_}\n" for number, id_ in enumerate(ids))
    (tmp_path / "l.csv").write_text("path,label\n" + rows)
    pairs = [(f"{number}.mp4", id_) for number, id_ in enumerate(ids)]
    for items, classes in manifest(tmp_path / "l.csv")[:2], manifest_of(pairs):
        assert classes == [str(id_) for id_ in sorted(set(ids))]
        assert [classes[label] for _, label in items] == [str(id_) for id_ in ids]


def manifest_of(pairs):
    clips = VideoClips(pairs, 8, 32)
    return list(zip(clips.paths, clips.labels, strict=True)), clips.classes


# ---- splits, sources, weights


def test_data_without_splits_names_the_way_out(tmp_path, videos):
    place(videos[0], tmp_path / "a/x.mp4")
    (tmp_path / "l.csv").write_text("path,label\na/x.mp4,a\n")
    for source in tmp_path, tmp_path / "l.csv":
        with pytest.raises(InputError) as e:
            VideoClips(source, 8, 32, split="train")
        one_line(e, "--split none")
        assert open_clips(source, 8, 32, split=("val", "test")) is None
        assert len(open_clips(source, 8, 32, split=("train", None))) == 1
        with pytest.raises(InputError):
            open_clips(source, 8, 32, split="val")


def test_a_weight_may_follow_a_plain_path(tmp_path, videos):
    place(videos[0], tmp_path / "one/a/x.mp4", tmp_path / "two/b/y.mp4")
    both = manifest([f"{tmp_path}/one:3", f"folder={tmp_path}/two:1"])
    assert both.shares == [(1, 3.0), (1, 1.0)] and both.classes == ["a", "b"]
    assert len(manifest(f"{tmp_path}/one:2").items) == 1
    with pytest.raises(InputError) as e:
        manifest(f"{tmp_path}/none:here")
    one_line(e, "no folder", "none:here")


def test_one_folder_holds_copies_of_one_source(tmp_path, videos):
    place(videos[0], tmp_path / "one/a/x.mp4")
    place(videos[1], tmp_path / "two/a/y.mp4")
    prepare(tmp_path / "one", tmp_path / "out", size=16, workers=1)
    with pytest.raises(InputError) as e:
        prepare(tmp_path / "two", tmp_path / "out", size=16, workers=1)
    one_line(e, "copies of", "one", "two")
    assert [p.name for p in (tmp_path / "out").rglob("*.mp4")] == ["x.mp4"]
    place(videos[2], tmp_path / "one/a/z.mp4")  # the same source has grown
    assert prepare(tmp_path / "one", tmp_path / "out", size=16, workers=1)["written"] == 1
    (tmp_path / "one").rename(tmp_path / "moved")  # and moved
    assert prepare(tmp_path / "moved", tmp_path / "out", size=16, workers=1)["kept"] == 2


# ---- clips of any source, as whole numbers


def test_whole_numbers_are_the_same_clips(tmp_path, videos):
    for video in videos:
        place(video, tmp_path / "a" / video.name)
    for flip, cache in (False, False), (True, True):
        floats, whole = (
            VideoClips(tmp_path, 8, 32, flip=flip, cache=cache, as_uint8=as_uint8)
            for as_uint8 in (False, True)
        )
        for i in range(4):
            assert whole[i]["video"].dtype == torch.uint8
            assert torch.equal(as_float(whole[i]["video"]), floats[i]["video"])
    batch = next(iter(loader(whole, 4)))
    assert batch["video"].dtype == torch.uint8 and as_float(batch["video"]).dtype == torch.float32


def test_the_pocket_world_is_a_source(tmp_path):
    train = open_clips(["pocket=80"], 4, 16, split="train", as_uint8=True, sampling="uniform")
    held = open_clips("pocket=80", 4, 16, split=("val", "test"))
    assert (len(train), len(held)) == (80, 10) and train[0]["video"].dtype == torch.uint8
    exact = PocketClips(80, 4, 16)[3]["video"]
    assert (as_float(train[3]["video"]) - exact).abs().max() <= 0.51 / 255
    for name in "pocket=7", "pocket=many", "pocket=", "pocket=-80":
        with pytest.raises(InputError) as e:
            open_clips(name, 4, 16)
        one_line(e, name, "pocket=N")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_do_not_decode_what_is_kept_in_memory(tmp_path, videos, method):
    for video in videos:
        place(video, tmp_path / "a" / video.name)
    clips = VideoClips(tmp_path, 8, 32, cache=True)
    shutil.rmtree(tmp_path / "a")  # decoding again would fail
    batches = loader(clips, 2, num_workers=2, multiprocessing_context=method)
    for epoch in range(2):
        clips.set_epoch(epoch)
        assert sum(len(batch["video"]) for batch in batches) == 4


def test_a_name_that_just_fits_is_written(tmp_path):
    from dera.pocket import render, sample_factors, write_video

    file = tmp_path / ("k" * 250 + ".mp4")
    write_video(file, render(sample_factors(1, 3), 4, 32)[0])
    assert file.stat().st_size and [p.name for p in tmp_path.iterdir()] == [file.name]
