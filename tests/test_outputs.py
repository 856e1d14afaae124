"What exists is continued or refused, and what the machine refuses is one line."

import errno
import json
import os
import threading
from dataclasses import fields, replace
from pathlib import Path

import pytest
from safetensors import SafetensorError

from dera.ar import GeneratorConfig
from dera.data import VideoClips, loader, manifest, read_clip
from dera.pocket import render, sample_factors, write_dataset, write_video
from dera.quantize import FSQ
from dera.runtime import hub
from dera.runtime.checkpoints import checkpoint_path
from dera.runtime.commands import run_command
from dera.runtime.errors import InputError
from dera.runtime.run_folder import RunFolder, claim_report, read_settings, write_atomic
from dera.runtime.training_options import check_generator_training, check_tokenizer_training
from dera.streams import load_tokenizer
from dera.tools.cli import Audit, TrainTeachers, main, run_audit, run_train_teachers
from dera.tools.demo import Demo, run_demo
from dera.tools.prepare import prepare
from dera.tools.sampling import Generate, file_stems, generate, learned
from dera.tools.videos import load_tokens_of
from dera.train_ar import ARConfig
from dera.train_tokenizer import TokenizerTraining

PAIR = dict(
    tokenizer=str(checkpoint_path("pocket-tokenizer-tiny")),
    generator=str(checkpoint_path("pocket-generator-tiny")),
)
DAMAGED = (b"", b"{", b"[]", b"7", b"null", b"\xff\xfe{\0}\0", b"[" * 100_000, b'"text"')


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_dataset(root, 8, seed=2, num_frames=8, size=32)
    return root


def test_a_file_is_written_through_links_and_into_what_is_no_file(tmp_path):
    real, link, pipe = tmp_path / "real.json", tmp_path / "link.json", tmp_path / "pipe"
    real.write_text("old")
    link.symlink_to(real)
    write_atomic(link, "new")
    assert link.is_symlink() and real.read_text() == "new"

    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write_atomic(pipe, "{}")
    reader.join(10)
    assert read == [b"{}"] and pipe.is_fifo()

    long = tmp_path / ("n" * 250 + ".json")
    write_atomic(long, "fits")
    assert long.read_text() == "fits" and len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("code", ["ENOSPC", "EROFS", "ENAMETOOLONG", "EACCES", "EMFILE"])
def test_what_the_machine_refuses_is_one_line(code, capsys):
    def refused():
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)), "where/it.is")

    assert run_command(refused) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "where/it.is" in said and "room on the disk" in said


def test_a_mistake_of_ours_is_not_hidden():
    with pytest.raises(FileNotFoundError):
        run_command(lambda: Path("/nowhere/at/all").read_text())


def test_a_report_of_something_else_stays(tmp_path, data, capsys):
    out = tmp_path / "deep" / "audit.json"
    ask = Audit(data=(str(data),), out=str(out), workers=1)
    assert run_audit(ask) == 0 and run_audit(ask) == 0
    for change in dict(split_id=2), dict(full=True), dict(data=(f"ucf101={data}",)):
        with pytest.raises(InputError, match="made otherwise; add --fresh"):
            run_audit(replace(ask, **change))
    assert run_audit(replace(ask, full=True, fresh=True)) == 0
    assert json.loads(out.read_text())["full"]

    for content in (*DAMAGED, b"my own notes"):
        out.write_bytes(content)
        with pytest.raises(InputError, match="made otherwise"):
            claim_report(out, dict(source=[str(data)]))
        assert out.read_bytes() == content
    for wrong in tmp_path, tmp_path / "..", "", out / "below", tmp_path / ("n" * 300):
        with pytest.raises(InputError, match="name a file with --out|cannot write"):
            claim_report(wrong, {})


def test_a_measurement_is_not_written_over(tmp_path):
    out = tmp_path / "speed" / "render.json"
    words = ["bench", "render", "--clips", "1", "--size", "16", "--repeats", "1"]

    def bench(*more):
        with pytest.raises(SystemExit) as end:
            main([*words, *map(str, more)])
        return end.value.code

    assert bench("--out", out) == 0
    first = out.read_bytes()
    assert bench("--out", out) == 2 and bench(f"--out={out}") == 2
    assert out.read_bytes() == first
    assert bench("--out", out, "--fresh") == 0 and bench() == 0


def test_a_run_writes_over_nothing_that_is_not_its_own(tmp_path):
    (tmp_path / "config.json").write_text('{"dim": 64}')
    with pytest.raises(InputError, match="config.json that no run wrote"):
        RunFolder(tmp_path, dict(steps=1))
    assert read_settings(tmp_path / "config.json") == dict(dim=64)

    for name in "tokenizer", "generator", "teacher":
        out = tmp_path / f"with-{name}"
        source = out / name / "source.py"
        source.parent.mkdir(parents=True)
        source.write_text("mine")
        with pytest.raises(InputError, match=f"{name} is a folder of something else"):
            RunFolder(out, dict(steps=1))
        assert source.read_text() == "mine" and not (out / "config.json").exists()

    own = tmp_path / "own"
    RunFolder(own, dict(steps=1))
    (own / "tokenizer").mkdir()
    (own / "tokenizer" / "config.json").write_text("{}")
    assert RunFolder(own, dict(steps=2)).path == own


def test_a_demo_begins_in_a_folder_of_its_own(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="holds something else .thesis.tex"):
        run_demo(Demo(out=str(tmp_path)))
    with pytest.raises(InputError, match="something else"):
        run_demo(Demo(out=str(tmp_path), fresh=True))
    other = tmp_path / "other"
    other.mkdir()
    for content in DAMAGED:
        (other / "demo.json").write_bytes(content)
        with pytest.raises(InputError, match="damaged; add --fresh"):
            run_demo(Demo(out=str(other)))


def test_copies_are_not_mixed_with_what_is_there(tmp_path, data):
    out = tmp_path / "copy"
    theirs = out / "Jump" / "mine.mp4"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    for fresh in False, True:
        with pytest.raises(InputError, match="holds something else .Jump, ...."):
            prepare(data, out, 16, workers=1, fresh=fresh)
    assert theirs.read_text() == "mine"

    out = tmp_path / "copies"
    assert prepare(data, out, 16, workers=1)["written"] == 8
    assert prepare(data, out, 16, workers=1)["kept"] == 8
    with pytest.raises(InputError, match="add --fresh"):
        prepare(data, out, 24, workers=1)
    old = out / "OfAnotherSource" / "old.mp4"
    old.parent.mkdir()
    old.write_text("a former copy")
    (out / "README").write_text("mine")
    report = prepare(data, out, 24, workers=1, fresh=True)
    assert report["written"] == 8 and not old.exists() and (out / "README").exists()

    with RunFolder(out).lock():  # a lock holds between processes; here it is only taken
        assert (out / ".lock").exists()


def test_generated_clips_are_not_mixed_with_what_is_there(tmp_path):
    ask = Generate(**PAIR, classes=("0",), count=1, out=str(tmp_path))
    (tmp_path / "grid.gif").write_text("mine")
    with pytest.raises(InputError, match="grid.gif is there and was not generated here"):
        generate(ask)
    assert (tmp_path / "grid.gif").read_text() == "mine"
    generate(replace(ask, fresh=True))
    page = tmp_path / "generated.json"
    whole = page.read_bytes()
    for content in (*DAMAGED, b'{"clips": 3}', b'{"clips": [{"seed": 1}]}'):
        page.write_bytes(content)
        with pytest.raises(InputError, match="other settings"):
            generate(ask)
    page.write_bytes(whole)
    assert len(generate(ask)) == 1


def test_teachers_start_over_when_asked(tmp_path, monkeypatch):
    from dera import teachers

    trained = []

    def train_teacher(config, out):
        trained.append((config.modality, (Path(out) / "checkpoint.safetensors").exists()))

    monkeypatch.setattr(teachers, "train_teacher", train_teacher)
    for modality in "image", "video":
        (tmp_path / modality).mkdir()
        (tmp_path / modality / "checkpoint.safetensors").write_bytes(b"old")
    ask = TrainTeachers(out=str(tmp_path), image_steps=1, video_steps=1)
    run_train_teachers(ask)
    run_train_teachers(replace(ask, fresh=True))
    assert trained == [("image", True), ("video", True), ("image", False), ("video", False)]


def test_a_model_without_room_is_one_line_and_no_half_file(tmp_path, monkeypatch):
    def full(model, file, metadata):
        Path(file).write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    model = load_tokenizer(PAIR["tokenizer"])
    monkeypatch.setattr(hub, "save_model", full)
    with pytest.raises(InputError, match="No space left.*make room"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_generators_folder_may_be_damaged(tmp_path):
    assert learned(tmp_path) == {} and learned("") == {}
    for content in DAMAGED:
        (tmp_path / "training.json").write_bytes(content)
        with pytest.raises(InputError, match="training.json is damaged"):
            learned(tmp_path)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -1.0])
def test_every_number_of_a_training_is_a_number(number):
    for check, config in (
        (check_tokenizer_training, TokenizerTraining(data=("pocket=64",), image_teacher="")),
        (check_generator_training, ARConfig(data=("pocket=64",))),
    ):
        check(config)
        names = [f.name for f in fields(config) if isinstance(getattr(config, f.name), float)]
        assert len(names) > 5
        for name in names:
            with pytest.raises(InputError, match=name):
                check(replace(config, **{name: number}))
        with pytest.raises(InputError, match="betas"):
            check(replace(config, betas=(0.9, number)))
        with pytest.raises(InputError, match="512"):
            check(replace(config, workers=2**63))


def test_a_pipe_is_not_waited_for(tmp_path):
    write_video(tmp_path / "a.mp4", render(sample_factors(1, seed=1), 8, 32)[0])
    for name in "list.csv", "tokens.npy", "tokens.json":
        os.mkfifo(tmp_path / name)
        with pytest.raises(InputError, match="pipe or a device; name a file"):
            if name.endswith(".csv"):
                manifest(tmp_path / name)
            else:
                load_tokens_of(tmp_path / name, None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a.mp4,throw, catch\n", "line 2, has more fields"),
        ("a.mp4,jump\nb.mp4\n", "line 3, has no label; is the file cut short"),
        ('a.mp4,jump\n"b.mp4,run\nc.mp4,run\n', "quotation mark without its partner"),
        ('a.mp4,"jump"s\n', "quotation mark"),
    ],
)
def test_a_csv_loses_nothing_in_silence(tmp_path, text, said):
    for name in "abc":
        (tmp_path / f"{name}.mp4").write_bytes(b"x")
    (tmp_path / "list.csv").write_text("path,label\n" + text)
    with pytest.raises(InputError, match=said):
        manifest(tmp_path / "list.csv")


def test_a_label_of_many_digits_is_a_name(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"x")
    (tmp_path / "list.csv").write_text(f"path,label\na.mp4,{'7' * 6000}\n")
    assert manifest(tmp_path / "list.csv").classes == ["7" * 6000]
    (tmp_path / "list.csv").write_text("path,label\na.mp4,\n")
    assert manifest(tmp_path / "list.csv").items[0][1] == -1
    with pytest.raises(InputError, match="no path in '';"):
        manifest("")


def test_names_that_a_mac_holds_for_one():
    names = ["Caf\u00e9", "Cafe\u0301", "CAFE\u0301", "Stra\u00dfe", "STRASSE"]
    stems = file_stems(names)
    assert len(set(stems)) == 5
    kept = [stem for stem in stems if "-" not in stem]
    assert not kept  # each got its number, as none is nearer to the name than another


def test_whole_numbers_and_rates_are_asked_for_by_name(tmp_path):
    write_video(tmp_path / "a.mp4", render(sample_factors(1, seed=1), 8, 32)[0])
    video = render(sample_factors(1, seed=1), 4, 16)[0]
    nan = float("nan")
    for name, act in (
        ("num_frames", lambda: read_clip(tmp_path / "a.mp4", 2.5, 32)),
        ("num_frames", lambda: VideoClips(tmp_path, nan, 32)[0]),
        ("size", lambda: read_clip(tmp_path / "a.mp4", 4, 31.5)),
        ("seed", lambda: read_clip(tmp_path / "a.mp4", 4, 32, seed=0.5)),
        ("seed", lambda: sample_factors(2, seed=nan)),
        ("n is", lambda: sample_factors(2**64, seed=0)),
        ("batch_size", lambda: loader(VideoClips(tmp_path, 4, 32), 1.5)),
        ("fps", lambda: write_video(tmp_path / "b.mp4", video, fps=0)),
        ("fps", lambda: write_video(tmp_path / "b.mp4", video, fps=float("inf"))),
        ("crf", lambda: write_video(tmp_path / "b.mp4", video, crf=-3)),
        ("whole levels", lambda: FSQ([nan, 5])),
        ("whole levels", lambda: FSQ([4.5, 5])),
        ("dropout", lambda: GeneratorConfig(vocab_size=8, num_tokens=4, dropout=nan)),
        ("vocab_size", lambda: GeneratorConfig(vocab_size=0, num_tokens=4)),
    ):
        with pytest.raises(InputError, match=name):
            act()
    assert not (tmp_path / "b.mp4").exists()
