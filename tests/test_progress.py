"What a training says while it runs: bars, lines of a log, and trackers."

import contextlib
import io
import sys
import time
import types

import pytest
import torch

import dera.runtime.progress as progress_module
import dera.runtime.training_options as training_options
from dera.pocket import write_dataset
from dera.runtime.errors import InputError
from dera.runtime.pictures import animation
from dera.runtime.progress import progress
from dera.runtime.trackers import track_picture
from dera.streams import DeRATokenizer, TokenizerConfig
from dera.train_ar import ARConfig, train_generator
from dera.train_tokenizer import TokenizerTraining, train_tokenizer


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    write_dataset(root, 24, seed=1, num_frames=8, size=32)
    return str(root)


def config(videos, **changes):
    base = dict(
        data=videos,
        steps=4,
        batch_size=2,
        quantizer_start=1,
        log_every=1,
        save_every=100,
        projector_hidden=16,
        validation_clips=2,
    )
    return TokenizerTraining(**base | changes)


def small():
    shape = dict(dim=32, heads=2, encoder_depth=2, decoder_depth=1, codebook_size=32)
    return DeRATokenizer(TokenizerConfig.preset("tiny", **shape))


def test_a_log_has_whole_lines_and_few(videos, tmp_path, monkeypatch):
    "No carriage return, and no line within some seconds of the one before."
    monkeypatch.setattr(progress_module, "SECONDS", 0.5)
    monkeypatch.setattr(progress_module, "SHORT", 0)
    tokens, labels = torch.randint(0, 16, (40, 16)), torch.zeros(40, dtype=torch.long)
    shape = dict(vocab_size=16, num_tokens=16, num_classes=1, dim=32, depth=1, heads=2)
    settings = ARConfig.preset("tiny", steps=30, batch_size=8, log_every=1, val_every=10)
    settings.generator = type(settings.generator)(**shape)
    jobs = [
        lambda: train_tokenizer(config(videos, steps=12), tmp_path / "tokenizer", small()),
        lambda: train_generator(settings, tokens, labels, tmp_path / "ar"),
    ]
    for job in jobs:
        log, start = io.StringIO(), time.time()
        with contextlib.redirect_stderr(log):
            job()
        text = log.getvalue()
        bars = [line for line in text.splitlines() if "%|" in line or "step/s" in line]
        assert "\r" not in text and "\x1b" not in text
        # the first drawing, one each half second, the last one
        assert 1 <= len(bars) <= 2 + (time.time() - start) / 0.5


def test_bars_inside_bars_and_short_ones(monkeypatch):
    monkeypatch.setattr(progress_module, "SECONDS", 0)
    log = io.StringIO()
    with contextlib.redirect_stderr(log):
        for _ in progress(range(5), desc="short"):
            pass
    assert log.getvalue() == ""
    monkeypatch.setattr(progress_module, "SHORT", 0)
    with contextlib.redirect_stderr(log):
        for _ in progress(range(3), desc="outer"):
            list(progress(range(2), desc="inner"))
    assert "inner" in log.getvalue() and "\x1b" not in log.getvalue()


def test_one_bar_for_a_job_of_several_processes(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert progress(range(2)).disable
    monkeypatch.setenv("RANK", "0")
    assert not progress(range(2)).disable


def test_a_tracker_that_is_not_installed(videos, tmp_path, monkeypatch):
    for name in "tensorboard", "wandb":
        monkeypatch.setattr(training_options, f"is_{name}_available", lambda: False)
        with pytest.raises(InputError, match=rf"pip install 'dera\[{name}\]'"):
            train_tokenizer(config(videos, tracker=name), tmp_path)


def test_tensorboard_has_groups_and_a_moving_picture(videos, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_tokenizer(config(videos, tracker="tensorboard"), tmp_path, small())
    (file,) = [
        path
        for path in tmp_path.rglob("events.out.tfevents*")
        if EventAccumulator(str(path)).Reload().Tags()["images"]
    ]
    events = EventAccumulator(str(file)).Reload()
    tags = events.Tags()
    groups = {name.split("/")[0] for name in tags["scalars"]}
    assert groups == {"train", "validation", "gradients", "machine"}
    assert {"train/loss", "validation/psnr", "gradients/norm"} <= set(tags["scalars"])
    (picture,) = events.Images("validation/clips")
    (path,) = (tmp_path / "validation").glob("*.png")
    assert picture.encoded_image_string == path.read_bytes() and picture.step == 4


def test_wandb_gets_a_video(monkeypatch):
    "A stand-in for the package: what it is given, and under which step."
    stand_in = types.ModuleType("wandb")
    stand_in.Video = lambda data, format: (format, data.read()[:3])
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    seen = {}
    run = types.SimpleNamespace(log=lambda values, step: seen.update(values, step=step))
    accelerator = types.SimpleNamespace(get_tracker=lambda name, unwrap: run)
    png = animation(torch.rand(2, 3, 4, 8, 8))
    track_picture(accelerator, "wandb", "samples/clips", png, step=7)
    assert seen == {"samples/clips": ("gif", b"GIF"), "step": 7}
