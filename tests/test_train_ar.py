"Training the generator: killed, told to stop, poisoned, in several processes, on a full disk."

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn

from dera import train_ar
from dera.ar import Generator, GeneratorConfig
from dera.query import QueryTokenizer, TokenizerConfig
from dera.runtime.checkpoints import checkpoint_path, load_checkpoint, load_model, save_checkpoint
from dera.runtime.errors import InputError
from dera.runtime.run_folder import RunFolder
from dera.runtime.token_files import Layout, written_blocks
from dera.streams import load_tokenizer
from dera.train_ar import (
    TIMES,
    ARConfig,
    fingerprint,
    learning_rate,
    load_tokens,
    tokenize_dataset,
    train_from_videos,
    train_generator,
)

SHAPE = dict(vocab_size=50, num_tokens=20, num_classes=7, dim=32, depth=2, heads=2)


def quiet(it, **_):
    "No progress bar."
    return it


class Codes(nn.Module):
    "A stand-in tokenizer: 20 codes of 50; every code depends on the clip and its mirroring."

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor(50.0))
        self.clips = 0

    def encode(self, video):
        self.clips += len(video)
        x = video.mean(1)[:, :, ::4].flatten(1)
        return SimpleNamespace(
            indices=(x[:, torch.arange(20) * 3 % x.shape[1]] * self.scale).long().clamp(max=49)
        )

    def decode(self, indices):
        return (indices.float() / 50)[:, None, :, None, None].expand(-1, 3, 20, 8, 8)[:, :, :4]


class Noise(torch.utils.data.Dataset):
    "Clips that depend on their number and on the epoch; `at` calls something when a clip is read."

    def __init__(self, n=50, at=None):
        self.n, self.at, self.epoch = n, at or {}, 0

    def __len__(self):
        return self.n

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, i):
        if i in self.at:
            self.at.pop(i)()
        return dict(
            video=torch.rand(
                3, 4, 8, 8, generator=torch.Generator().manual_seed(1000 * self.epoch + i)
            ),
            label=i % 7,
        )


def config(**changes):
    shape = {k: changes.pop(k) for k in list(changes) if k in GeneratorConfig.__dataclass_fields__}
    return ARConfig(
        **dict(
            generator=GeneratorConfig(**SHAPE | shape),
            steps=12,
            batch_size=8,
            lr=3e-3,
            warmup=3,
            held_out=0.1,
            log_every=3,
            val_every=6,
            save_every=4,
            precision="no",
        )
        | changes
    )


def data(n=60):
    "Learnable rows: token i is label + start + i."
    start, labels = np.random.default_rng(0).integers(0, 5, n), np.arange(n) % 7
    return (labels[:, None] + start[:, None] + np.arange(20)) % 50, torch.from_numpy(labels)


def numbers(run):
    return [{k: v for k, v in l.items() if k not in TIMES} for l in RunFolder(run).history()]


def same(a, b):
    return all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def digest(file):
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def one_line(e, *words):
    assert "\n" not in str(e.value) and all(w in str(e.value) for w in words), e.value


def child(code, *launch):
    return subprocess.Popen(
        [
            sys.executable,
            *launch,
            "-c",
            f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from test_train_ar import *; {code}",
        ],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""),
    )


OPTIONS = dict(batch_size=8, windows=2, mirror=[1, 0, 2, 3, 4, 5, 6], progress=quiet)
EXPECTED = "[(50, 4, 20), (50, 4)]"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A token file that was written in one go."
    path = tmp_path_factory.mktemp("whole") / "tokens.npy"
    tokenize_dataset(Codes(), Noise(), path, **OPTIONS)
    return path


# ---- tokens


def test_tokens_are_what_the_tokenizer_says(whole):
    tokens, labels = load_tokens(whole, fingerprint(Codes()))
    assert str([tokens.shape, tuple(labels.shape)]) == EXPECTED
    for window in 0, 1:
        clips = Noise()
        clips.set_epoch(window)
        video = torch.stack([clips[i]["video"] for i in range(50)])
        for view, v in enumerate((video, video.flip(-1))):
            assert np.array_equal(tokens[:, 2 * window + view], Codes().encode(v).indices)
    plain = torch.arange(50) % 7
    turned = torch.tensor(OPTIONS["mirror"])[plain]
    assert (
        torch.equal(labels, torch.stack([plain, turned, plain, turned], 1))
        and labels.dtype == torch.int64
    )


def test_killed_while_tokenising(whole, tmp_path):
    "kill -9 in another process; the same call encodes what is missing, and the file is the same to the last bit."
    path, codes = tmp_path / "tokens.npy", Codes()
    layout = Layout(50, 4, 20)

    def blocks():
        return written_blocks(path, layout)

    slow = child(
        "clips = Noise(at={i: (lambda: time.sleep(.15)) for i in range(50)}); "
        f"tokenize_dataset(Codes(), clips, {str(path)!r}, **OPTIONS)"
    )
    while not blocks():
        time.sleep(0.05)
        assert slow.poll() is None, slow.stderr.read()
    slow.send_signal(signal.SIGKILL)
    slow.wait()
    left = 100 - sum(min(8, 50 - row) for row, _ in blocks())
    assert 0 < left < 100
    with pytest.raises(InputError) as e:
        load_tokens(path)
    one_line(e, "no complete token file")
    tokenize_dataset(codes, Noise(), path, **OPTIONS)
    assert (
        digest(path) == digest(whole)
        and codes.clips == 2 * left + 1  # and one for the length of a row
        and sorted(p.name for p in tmp_path.iterdir()) == ["tokens.json", "tokens.npy"]
    )


def test_stopped_at_every_batch(whole, tmp_path):
    "Ctrl-C or SIGTERM at any moment, again and again; no clip is encoded twice but those of the batch that was cut."
    path, codes = tmp_path / "tokens.npy", Codes()
    ctrl_c, term = (lambda s=s: signal.raise_signal(s) for s in (signal.SIGINT, signal.SIGTERM))
    for stop in ctrl_c, term, term, ctrl_c:
        with pytest.raises((KeyboardInterrupt, SystemExit)) as e:
            tokenize_dataset(
                codes,
                Noise(at={17: stop, 33: stop} if stop is term else {49: stop}),
                path,
                **OPTIONS,
            )
        assert stop is ctrl_c or e.value.code == 0
        if len(written_blocks(path, Layout(50, 4, 20))) == 14:
            break
    tokenize_dataset(codes, Noise(), path, **OPTIONS)
    assert digest(path) == digest(whole) and 200 < codes.clips < 206  # one a call for the length


@pytest.mark.parametrize(
    "change",
    ["fingerprint", "flips", "windows", "condition_frames", "mirror", "batch_size", "count"],
)
def test_half_a_file_of_another_call_is_not_continued(change, tmp_path):
    def stop():
        raise KeyboardInterrupt

    path, codes = tmp_path / "tokens.npy", Codes()
    with pytest.raises(KeyboardInterrupt):
        tokenize_dataset(codes, Noise(at={30: stop}), path, **OPTIONS)
    other, clips, options = Codes(), Noise(49 if change == "count" else 50), dict(OPTIONS)
    if change == "fingerprint":
        other.scale += 1
    elif change != "count":
        options[change] = dict(
            flips=False, windows=1, condition_frames=2, mirror=None, batch_size=10
        )[change]
    for name in "tokens", "fresh":
        tokenize_dataset(other, clips, tmp_path / f"{name}.npy", **options)
    assert digest(tmp_path / "tokens.npy") == digest(tmp_path / "fresh.npy") and not list(
        tmp_path.glob("*.part*")
    )
    if change == "fingerprint":
        with pytest.raises(InputError) as e:
            load_tokens(path, fingerprint(codes))
        one_line(e, fingerprint(other)[:8], fingerprint(codes)[:8])


def test_the_description_stays_small_and_codes_fit(tmp_path, monkeypatch):
    tokenize_dataset(Codes(), Noise(3000), tmp_path / "t.npy", batch_size=500, progress=quiet)
    assert (tmp_path / "t.json").stat().st_size < 1000
    big = Codes()
    big.scale.fill_(1e6)
    encode = big.encode
    big.encode = lambda v: SimpleNamespace(indices=encode(v).indices + 65500)
    with pytest.raises(InputError) as e:
        tokenize_dataset(big, Noise(), tmp_path / "big.npy", progress=quiet)
    one_line(e, "65536")
    monkeypatch.setattr(shutil, "disk_usage", lambda p: SimpleNamespace(free=1000))
    with pytest.raises(InputError) as e:
        tokenize_dataset(Codes(), Noise(), tmp_path / "full.npy", progress=quiet)
    one_line(e, "no room")
    assert not (tmp_path / "full.npy").exists()


# ---- several processes

BOTH = """
codes = Codes()
tokenize_dataset(codes, Noise(), out / "tokens.npy", **OPTIONS)
(out / ("clips" + os.environ.get("RANK", ""))).write_text(str(codes.clips))
run = config(
    steps=20, dropout=0.0, class_dropout=0.0, ema=0.9, log_every=1, val_every=5, accumulate={parts}
)
train_generator(run, *load_tokens(out / "tokens.npy"), out / "run", quiet, Codes())
"""


SHARDED = "os.environ.update(ACCELERATE_USE_FSDP='true', FSDP_VERSION='2')\n"


@pytest.mark.parametrize("way", ["", SHARDED], ids=["ddp", "fsdp2"])
def test_two_processes_equal_one(way, whole, tmp_path):
    "They share the tokenising, to the last bit; and the training, within rounding, over twenty steps."
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    exec(BOTH.format(parts=2), globals() | dict(out=tmp_path / "one"))
    pair = child(
        f"{way}out = Path({str(tmp_path / 'two')!r})\n{BOTH.format(parts=1)}",
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "29531",
        "--no-python",
        sys.executable,
    )
    assert pair.wait(200) == 0, pair.stderr.read()
    assert (
        digest(tmp_path / "two" / "tokens.npy")
        == digest(tmp_path / "one" / "tokens.npy")
        == digest(whole)
    )
    assert (tmp_path / "one" / "clips").read_text() == "201" and sorted(
        int((tmp_path / "two" / f"clips{r}").read_text()) for r in (0, 1)
    ) == [97, 105]  # 7 batches of 8, the last of 2; 4 and 3 of each window; and one each
    one, two = (numbers(tmp_path / k / "run") for k in ("one", "two"))
    assert len(one) == len(two) == 20 and "val_loss" in one[4]
    for a, b in zip(one, two):
        assert a.keys() == b.keys() and all(abs(a[k] - b[k]) < 1e-5 for k in a), (a, b)
    one, two = (
        load_model(Generator, tmp_path / k / "run" / "generator").state_dict()
        for k in ("one", "two")
    )
    assert (
        all((one[k] - two[k]).abs().max() < 1e-4 for k in one)
        and (tmp_path / "two" / "run" / "samples" / "step-0000020.png").exists()
    )


# ---- stop and go on


@pytest.mark.parametrize(
    "changes",
    [
        dict(ema=0.9, accumulate=2),
        dict(precision="fp16", clip_norm=0.5),
        dict(precision="bf16", prefix_tokens=8, num_tokens=12),
    ],
    ids=["ema", "fp16", "prefix"],
)
def test_resumed_equals_uninterrupted(changes, tmp_path):
    "Whatever the step: left behind by a kill, or saved on demand between two lines of the log."
    c, (tokens, labels) = config(**changes), data()
    whole = train_generator(c, tokens, labels, tmp_path / "whole", quiet)

    def told(steps, **_):
        for step in steps:
            if step in stops:
                stops.remove(step)
                signal.raise_signal(signal.SIGTERM)
            yield step

    stops = [1, 6, 7]
    while stops:
        with pytest.raises(SystemExit) as e:
            train_generator(c, tokens, labels, tmp_path / "told", told)
        assert e.value.code == 0
        torch.manual_seed(99)
    train_generator(c, tokens, labels, tmp_path / "killed", quiet, stop_after=11)
    assert load_checkpoint(tmp_path / "killed" / "checkpoint.safetensors")["step"] == 8
    for run in "told", "killed":
        assert same(train_generator(c, tokens, labels, tmp_path / run, told), whole) and numbers(
            tmp_path / run
        ) == numbers(tmp_path / "whole")
        assert digest(tmp_path / run / "checkpoint.safetensors") == digest(
            tmp_path / "whole" / "checkpoint.safetensors"
        )
    assert [l["step"] for l in numbers(tmp_path / "whole")] == [3, 6, 9, 12] and numbers(
        tmp_path / "whole"
    )[-1]["loss"] < 4


def test_averaged_weights_are_saved_and_validated(tmp_path):
    tokens, labels = data()
    c = config(ema=0.9)
    g = train_generator(c, tokens, labels, tmp_path, quiet)
    state = load_checkpoint(tmp_path / "checkpoint.safetensors")
    assert same(load_model(Generator, tmp_path / "generator"), g) and not torch.equal(
        state["model"]["head.weight"], g.head.weight
    )
    held = train_ar.training_data(c, tokens, labels).held
    loss = train_ar.held_out_loss(g, held, c)
    assert abs(loss - numbers(tmp_path)[-1]["val_loss"]) < 1e-6


def test_sigterm(tmp_path):
    "Sent from outside: a checkpoint, the generator, one line, exit code 0."
    run = child(
        f"train_generator(config(steps=10**6, save_every=10**6, log_every=1), *data(), {str(tmp_path)!r}, quiet)"
    )
    while len(numbers(tmp_path)) < 3:
        time.sleep(0.05)
        assert run.poll() is None, run.stderr.read()
    run.send_signal(signal.SIGTERM)
    said = run.communicate(timeout=60)[1].strip().splitlines()
    step = load_checkpoint(tmp_path / "checkpoint.safetensors")["step"]
    assert (
        run.returncode == 0
        and said[-1].startswith(f"stopped after step {step};")
        and step >= 3
        and (tmp_path / "generator" / "model.safetensors").exists()
    )


# ---- what goes wrong


def poison(monkeypatch, steps):
    "The loss of these steps is not a number."
    train_step, rows_loss, seen = train_ar.train_step, train_ar.rows_loss, []

    def broken_loss(*args):
        return rows_loss(*args) * math.nan

    def step_with_poison(config, state, data, step, *place):
        seen.append(step)
        with monkeypatch.context() as patched:
            if step in steps:
                patched.setattr(train_ar, "rows_loss", broken_loss)
            return train_step(config, state, data, step, *place)

    monkeypatch.setattr(train_ar, "train_step", step_with_poison)
    return seen


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_steps_that_are_not_numbers_are_skipped_and_counted(precision, tmp_path, monkeypatch):
    poison(monkeypatch, {2, 5, 6})
    tokens, labels = data()
    c = config(ema=0.9, log_every=1, precision=precision)
    train_generator(c, tokens, labels, tmp_path / "parts", quiet, stop_after=9)
    g, whole = (train_generator(c, tokens, labels, tmp_path / k, quiet) for k in ("parts", "whole"))
    log = numbers(tmp_path / "whole")
    assert [l["skipped"] for l in log] == [0, 0, 1, 1, 1, 2, 3, 3, 3, 3, 3, 3] and [
        l["step"] for l in log if l["loss"] is None
    ] == [3, 6, 7]
    assert (
        all(p.isfinite().all() for p in g.parameters())
        and same(g, whole)
        and numbers(tmp_path / "parts") == log
    )
    assert "NaN" not in (tmp_path / "whole" / "log.jsonl").read_text() and digest(
        tmp_path / "whole" / "checkpoint.safetensors"
    ) == digest(tmp_path / "parts" / "checkpoint.safetensors")
    state = load_checkpoint(tmp_path / "parts" / "checkpoint.safetensors")
    assert state["ema"]["n_averaged"] == 9 and state["scaler"].get("scale", 8192) == 65536 / 8


def test_ten_in_a_row_end_the_run(tmp_path, monkeypatch):
    tokens, labels = data()
    c = config(steps=40)
    seen = poison(monkeypatch, set(range(5, 40)))
    with pytest.raises(InputError) as e:
        train_generator(c, tokens, labels, tmp_path, quiet)
    one_line(e, "10 steps in a row", "step 4", "learning rate")
    state = load_checkpoint(tmp_path / "checkpoint.safetensors")
    assert (
        seen[-1] == 14
        and state["step"] == 4
        and all(v.isfinite().all() for v in state["model"].values())
    )


def test_a_full_disk(tmp_path, monkeypatch):
    "Before the first step: one line. In the middle: one line, and the checkpoint before it is whole."
    tokens, labels = data()
    calls = []
    with monkeypatch.context() as m:
        m.setattr(shutil, "disk_usage", lambda p: SimpleNamespace(free=1000))
        with pytest.raises(InputError) as e:
            train_generator(config(), tokens, labels, tmp_path / "small", quiet)
        one_line(e, "has room for", "make room")
        assert numbers(tmp_path / "small") == []
    from dera.runtime import checkpoints

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return write(*args, **kwargs)

    with monkeypatch.context() as m:
        write = checkpoints.save_file
        m.setattr(checkpoints, "save_file", full)
        with pytest.raises(InputError) as e:
            train_generator(config(), tokens, labels, tmp_path / "full", quiet)
        one_line(e, "cannot write the checkpoint", "whole", "No space")
        assert load_checkpoint(tmp_path / "full" / "checkpoint.safetensors")["step"] == 4
    whole = train_generator(config(), tokens, labels, tmp_path / "whole", quiet)
    assert same(
        train_generator(config(), tokens, labels, tmp_path / "full", quiet), whole
    ) and not list((tmp_path / "full").glob("*.tmp")) + list((tmp_path / "full").glob("rehearsal*"))


def test_other_settings_are_refused_and_free_ones_are_not(tmp_path):
    tokens, labels = data()
    train_generator(config(), tokens, labels, tmp_path, quiet, stop_after=5)
    kept = digest(tmp_path / "checkpoint.safetensors")
    for change, word in (
        (dict(lr=1e-3), "lr 0.003 then, 0.001 now"),
        (dict(ema=0.5), "ema"),
        (dict(steps=13), "steps"),
        (dict(batch_size=16), "batch_size"),
        (dict(accumulate=2), "accumulate"),
        (dict(dropout=0.0), "generator.dropout 0.1 then, 0.0 now"),
        (dict(held_out=0.2), "held_out"),
        (dict(precision="bf16"), "precision"),
        (dict(seed=1), "seed"),
        (dict(epochs=3), "epochs"),
    ):
        with pytest.raises(InputError) as e:
            train_generator(config(**change), tokens, labels, tmp_path, quiet)
        one_line(e, "with another", word, "choose another")
    with pytest.raises(InputError, match="another.*tokens"):
        train_generator(config(), tokens[:, ::-1], labels, tmp_path, quiet)
    assert digest(tmp_path / "checkpoint.safetensors") == kept
    train_generator(
        config(save_every=3, log_every=2, timeout=50, samples=2), tokens, labels, tmp_path, quiet
    )
    state = load_checkpoint(tmp_path / "checkpoint.safetensors")
    del state["format"]
    save_checkpoint(tmp_path / "checkpoint.safetensors", state)
    with pytest.raises(InputError) as e:
        train_generator(config(), tokens, labels, tmp_path, quiet)
    one_line(e, "format 1")


@pytest.mark.parametrize(
    "changes, word",
    [
        (dict(data=()), "--data"),
        (dict(batch_size=9, accumulate=2), "divide"),
        (dict(batch_size=0), "divide"),
        (dict(windows=2), "native"),
        (dict(ema=1.0), "ema"),
        (dict(held_out=1.0), "held_out"),
        (dict(steps=0), "steps"),
        (dict(warmup=-1), "warmup"),
        (dict(save_every=0), "save_every"),
        (dict(precision="fp8"), "precision"),
        (dict(tracker="paper"), "tracker"),
        (dict(condition_frames=-1), "condition_frames"),
    ],
)
def test_settings_that_cannot_work(changes, word, tmp_path):
    with pytest.raises(InputError) as e:
        train_generator(config(**changes), *data(), tmp_path / "run", quiet)
    one_line(e, word)
    assert not (tmp_path / "run").exists()


# ---- pictures, lengths, presets


@pytest.mark.parametrize("prefix", [0, 20])
def test_samples_are_drawn_and_change_nothing(prefix, tmp_path):
    from PIL import Image

    tokens, labels = data()
    tokens = np.concatenate([tokens] * 2, 1) if prefix else tokens
    c = config(prefix_tokens=prefix, sample_every=5, samples=3)
    drawn, plain = (
        train_generator(c, tokens, labels, tmp_path / k, quiet, tokenizer=t)
        for k, t in (("drawn", Codes()), ("plain", None))
    )
    files = sorted((tmp_path / "drawn" / "samples").iterdir())
    assert [f.name for f in files] == [f"step-{i:07d}.png" for i in (5, 10, 12)] and not (
        tmp_path / "plain" / "samples"
    ).exists()
    picture = Image.open(files[-1])
    assert picture.n_frames > 1 and picture.size == (
        3 * 64 + 2 * 2,
        3 * 64 + 2 * 2 if prefix else 64,
    )  # small clips are enlarged to 64 pixels
    assert same(drawn, plain) and numbers(tmp_path / "drawn") == numbers(tmp_path / "plain")


def test_epochs_are_passes_over_the_videos(tmp_path):
    tokens, labels = data(60)
    tokens, labels = (
        np.stack([tokens] * 2, 1),
        torch.stack([labels] * 2, 1),
    )  # two views of 60 clips
    train_generator(
        config(epochs=2, held_out=0.2, warmup=0.25, log_every=1), tokens, labels, tmp_path, quiet
    )
    log = numbers(tmp_path)
    assert (
        len(log) == 2 * 48 // 8 == 12
        and np.argmax([l["lr"] for l in log]) == 2
        and log[0]["lr"] == 3e-3 / 3
    )


def test_presets_have_the_papers_numbers():
    for name, epochs, warm, known in ("paper-ucf101", 3000, 4, 0), ("paper-k600-fp", 75, 1, 5):
        c = ARConfig.preset(name)
        g = c.generator
        assert (c.lr, c.betas, c.weight_decay, c.batch_size, c.epochs, c.condition_frames) == (
            6e-4,
            (0.9, 0.95),
            0.05,
            64,
            epochs,
            known,
        )
        assert (
            g.depth,
            g.dim,
            g.heads,
            g.vocab_size,
            g.num_tokens,
            g.dropout,
            g.class_dropout,
        ) == (30, 1280, 20, 8192, 1024, 0.1, 0.1)
        rates = [
            learning_rate(round(e * c.steps / epochs), c)
            for e in (0, warm / 2, warm, epochs / 2, epochs)
        ]
        assert (
            rates[0] < 1e-5
            and abs(rates[1] - 3e-4) < 2e-6
            and abs(rates[2] - 6e-4) < 1e-8
            and rates[3] < 3.2e-4
            and abs(rates[4] - 6e-6) < 1e-9
        )
    assert (
        ARConfig.preset("paper-ucf101").guidance == 1.25
        and ARConfig.preset("paper-k600-fp").guidance == 1
    )
    assert ARConfig(data="a").data == ("a",) and ARConfig.preset("tiny", data=["a", "b"]).data == (
        "a",
        "b",
    )


@pytest.mark.parametrize("name", ["pocket-generator-tiny", "pocket-predictor-tiny"])
def test_a_shipped_generator_belongs_to_a_shipped_tokenizer(name):
    g = load_model(Generator, checkpoint_path(name))
    folders = sorted(checkpoint_path("pocket-tokenizer-tiny").parent.glob("pocket-tokenizer-*"))
    tokenizers = {fingerprint(tokenizer): tokenizer for tokenizer in map(load_tokenizer, folders)}
    assert g.config.tokenizer in tokenizers, f"train {name} again, on tokens of {folders}"
    tokenizer = tokenizers[g.config.tokenizer]
    shape = tokenizer.num_codes, tokenizer.config.codebook_size
    assert (g.config.num_tokens, g.config.vocab_size) == shape


# ---- from videos


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "Videos with and without a split, and two untrained tokenizers."
    from dera.pocket import render, sample_factors, write_dataset, write_video
    from dera.streams import DeRATokenizer

    root = tmp_path_factory.mktemp("world")
    write_dataset(root / "videos", 30, seed=0, num_frames=12, size=32)
    for i, clip in enumerate(render(sample_factors(12, seed=1), 12, 32)):
        (root / "plain" / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        write_video(root / "plain" / f"class{i % 2}" / f"{i}.mp4", clip)
    for name, cls in dict(dera=DeRATokenizer, query=QueryTokenizer).items():
        cls(TokenizerConfig.preset("tiny")).save_pretrained(root / name)
    return root


def from_videos(world, out, *sources, **changes):
    c = dict(
        tokenizer=str(world / "dera"),
        data=sources or (f"ucf101={world / 'videos'}",),
        out=str(out),
        steps=1,
        batch_size=4,
        samples=2,
        held_out=0.1,
    )
    return ARConfig.preset("tiny", **c | changes)


def test_sources_splits_and_what_lies_beside_the_generator(world, tmp_path):
    plain, videos = f"folder={world / 'plain'}", f"ucf101={world / 'videos'}"
    codes = TokenizerConfig.preset("tiny").num_codes
    for name, sources, changes, clips, classes in (
        ("ucf", [videos], dict(held_out_clips=3, sampling="native", windows=2), 24, 112),
        ("plain", [plain], {}, 12, 2),
        (
            "mixed",
            [videos, plain],
            dict(tokenizer=str(world / "query"), condition_frames=3, sample_every=1),
            36,
            114,
        ),
    ):
        g = train_from_videos(c := from_videos(world, tmp_path / name, *sources, **changes), quiet)
        about = json.loads((tmp_path / name / "generator" / "training.json").read_text())
        tokens, labels = load_tokens(tmp_path / name / "tokens.npy", g.config.tokenizer)
        assert tokens.shape == (
            clips,
            c.windows * 2,
            2 * codes if c.condition_frames else codes,
        ) and g.config.num_classes == classes == len(about["classes"])
        assert (
            about["condition_frames"] == c.condition_frames
            and about["data"] == list(sources)
            and (tmp_path / name / "samples" / "step-0000001.png").exists()
        )
        assert (
            g.config.prefix_tokens == (codes if c.condition_frames else 0)
            and "val_loss" in numbers(tmp_path / name)[-1]
        )
    held, _ = load_tokens(tmp_path / "ucf" / "held.npy")
    assert held.shape == (3, 1, codes) and not (tmp_path / "plain" / "held.npy").exists()
    with pytest.raises(InputError) as e:
        train_from_videos(
            from_videos(
                world, tmp_path / "ucf", videos, sampling="native", windows=3, held_out_clips=3
            ),
            quiet,
        )
    other = replace(from_videos(world, tmp_path / "plain", plain), tokenizer=str(world / "query"))
    with pytest.raises(InputError) as f:
        train_from_videos(other, quiet)
    one_line(f, "tokens of tokenizer", "choose another --out")
    one_line(e, "windows 2 then, 3 now")
    assert (
        load_tokens(tmp_path / "ucf" / "tokens.npy")[0].shape[1] == 4
    )  # refused before anything was written


def test_a_decoding_process_that_is_killed(whole, tmp_path):
    path, codes = tmp_path / "tokens.npy", Codes()
    shot = child(
        "clips = Noise(at={30: lambda: os.kill(os.getpid(), signal.SIGKILL)}); "
        f"tokenize_dataset(Codes(), clips, {str(path)!r}, workers=1, **OPTIONS)"
    )
    said = shot.communicate(timeout=100)[1]
    assert (
        shot.returncode == 1
        and "InputError: a process that decodes was killed" in said
        and "goes on" in said
    ), said
    tokenize_dataset(codes, Noise(), path, **OPTIONS)
    assert digest(path) == digest(whole) and codes.clips <= 4 * 50


def test_bad_videos(world, tmp_path):
    "A few are replaced; too many are refused, again and again, until they are repaired."
    shutil.copytree(world / "plain", tmp_path / "some")
    next((tmp_path / "some").rglob("*.mp4")).write_bytes(b"no video")
    for _ in range(2):
        with pytest.raises(InputError) as e:
            train_from_videos(
                from_videos(world, tmp_path / "run", f"folder={tmp_path / 'some'}"), quiet
            )
        one_line(e, "1 of 12 videos cannot be read")
        assert not list((tmp_path / "run").glob("tokens*"))
    for file in (world / "plain").rglob("*.mp4"):
        shutil.copy(file, tmp_path / "some" / file.relative_to(world / "plain"))
    train_from_videos(from_videos(world, tmp_path / "run", f"folder={tmp_path / 'some'}"), quiet)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(condition_frames=8), ["condition_frames", "8 frames"]),
        (dict(tokenizer="nowhere"), ["no tokenizer in nowhere"]),
        (dict(data="k500=x"), ["k500"]),
        (dict(data="ucf101=nowhere"), ["nowhere"]),
        (dict(split="validation"), ["split"]),
    ],
    ids=lambda x: "",
)
def test_bad_requests(changes, words, world, tmp_path):
    with pytest.raises(InputError) as e:
        train_from_videos(from_videos(world, tmp_path / "run", **changes), quiet)
    one_line(e, *words)
    assert not (tmp_path / "run").exists()


def test_the_command_takes_several_sources(world, tmp_path, capsys):
    words = [
        "--preset",
        "tiny",
        "--tokenizer",
        world / "dera",
        "--data",
        world / "videos",
        f"folder={world / 'plain'}",
        "--out",
        tmp_path / "run",
        "--steps",
        1,
        "--batch-size",
        4,
        "--ema",
        0.9,
        "--samples",
        0,
    ]
    train_ar.main(list(map(str, words)))
    assert len(json.loads((tmp_path / "run" / "config.json").read_text())["data"]) == 2
    with pytest.raises(SystemExit) as e:
        train_ar.main([*map(str, words), "--seed", "4"])
    assert e.value.code == 2 and capsys.readouterr().err.strip().splitlines()[-1].startswith(
        "dera: "
    )
