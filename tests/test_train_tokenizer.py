"The tokenizer's loop: exact resume, what can go wrong, several processes, every switch."

import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import dera.data
import dera.runtime.checkpoints as checkpoints
import dera.runtime.run_folder as run_folder
import dera.train_tokenizer as module
from dera.losses import ReconstructionLoss, total_loss
from dera.pocket import render, sample_factors, write_dataset
from dera.query import GridTokenizer, QueryTokenizer
from dera.runtime.checkpoints import load_checkpoint, load_model
from dera.runtime.errors import InputError
from dera.runtime.feed import BatchRows
from dera.runtime.run_folder import RunFolder
from dera.streams import DeRATokenizer, TokenizerConfig
from dera.train_tokenizer import (
    TIMES,
    TokenizerTraining,
    learning_rate,
    train_tokenizer,
)

SMALL = dict(dim=32, heads=2, encoder_depth=2, decoder_depth=1, codebook_size=32)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_dataset(root, 40, seed=1, num_frames=8, size=32)
    return str(root)


def config(folder, **changes):
    base = dict(
        data=folder,
        steps=8,
        batch_size=4,
        quantizer_start=2,
        warmup=2,
        log_every=1,
        save_every=3,
        projector_hidden=16,
        validation_clips=0,
        cache=False,
    )
    return TokenizerTraining(**base | changes)


def small(seed=0, cls=DeRATokenizer):
    torch.manual_seed(seed)
    return cls(TokenizerConfig.preset("tiny", seed=seed, **SMALL))


def log(out):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in RunFolder(out).history()]


def step_of(out):
    return load_checkpoint(Path(out) / "checkpoint.safetensors")["step"]


def apart(work, timeout=120):
    "Run in a child process; its exit code."
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(timeout)
    if child.exitcode is None:
        child.kill()
        child.join()
        raise AssertionError("the child did not end")
    return child.exitcode


EVERYTHING = dict(
    ema=0.9,
    discriminator_weight=0.1,
    discriminator_start=1,
    discriminator_every=2,
    surgery_every=2,
    norms_every=4,
    align_share=0.8,
)

# resume ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        EVERYTHING,
        dict(accumulate=2),
        dict(precision="fp16", clip_norm=1.0),
        dict(surgery="soft", precision="bf16"),
        dict(surgery_level="encoder", muon_lr=0.0, betas=(0.5, 0.9)),
    ],
    ids=str,
)
def test_a_run_that_stops_anywhere_is_the_run_that_never_stopped(data, tmp_path, changes):
    c = config(data, **changes)
    whole = train_tokenizer(c, tmp_path / "whole", small())
    for stop in 4, 7:
        train_tokenizer(c, tmp_path / "parts", small(), stop_after=stop)
    parts = train_tokenizer(c, tmp_path / "parts", small())
    assert log(tmp_path / "whole") == log(tmp_path / "parts") and len(log(tmp_path / "whole")) == 8
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), parts.state_dict().values())
    )
    a, b = (load_checkpoint(tmp_path / p / "checkpoint.safetensors") for p in ("whole", "parts"))
    flat = [], []
    for tree, tensors in zip((a, b), flat):
        checkpoints._flatten(tree, store := {})
        tensors += store.values()
    assert len(flat[0]) == len(flat[1]) > 50 and all(torch.equal(x, y) for x, y in zip(*flat))


def test_workers_and_epochs_change_nothing(data, tmp_path):
    c = config(data, steps=20)  # 32 clips: epochs of 8 steps
    train_tokenizer(c, tmp_path / "a", small())
    train_tokenizer(replace(c, workers=1), tmp_path / "b", small(), stop_after=11)
    train_tokenizer(replace(c, workers=2, cache=True), tmp_path / "b", small())
    assert log(tmp_path / "a") == log(tmp_path / "b")


def test_every_epoch_is_another_order_of_all_clips():
    rows = BatchRows(13, 4, 5, 0, 1)
    epochs = []
    for rows.epoch in range(3):
        epochs.append([i for batch in rows for i in batch])
    assert all(len(set(e)) == len(e) == 12 for e in epochs) and epochs[0] != epochs[1] != epochs[2]
    for rows.epoch in range(3):
        shares = [BatchRows(13, 4, 5, r, 4) for r in range(4)]
        for s in shares:
            s.epoch = rows.epoch
        assert [sum(parts, []) for parts in zip(*shares)] == list(rows)


# faults ---------------------------------------------------------------------------------------------------------------


def test_kill_at_random_moments(data, tmp_path):
    c, out = config(data, steps=30, save_every=2, log_every=1), tmp_path / "run"
    train_tokenizer(c, tmp_path / "whole", small())

    def work():
        torch.set_num_threads(1)
        train_tokenizer(c, out, small())

    random.seed(0)
    before, in_save, moments = 0, 0, 0
    while moments < 6:
        child = multiprocessing.get_context("fork").Process(target=work)
        child.start()
        moments += 1
        deadline = time.time() + 60
        while not (out / "checkpoint.safetensors").exists() and child.is_alive():
            time.sleep(0.01)
            assert time.time() < deadline
        time.sleep(random.uniform(0, 0.6))
        child.kill()
        child.join()
        in_save += bool(list(out.glob("checkpoint*.tmp")))
        reached = [l["step"] for l in log(out)]
        now = step_of(out)
        assert before <= now and (
            not reached or now >= reached[-1] - 2
        )  # never more lost than one interval
        before = now

    def save_and_die(*args, **kwargs):
        real(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    real, checkpoints.save_file = (
        checkpoints.save_file,
        save_and_die,
    )  # killed inside a save, for certain
    try:
        child = multiprocessing.get_context("fork").Process(target=work)
        child.start()
        child.join()
    finally:
        checkpoints.save_file = real
    assert child.exitcode == -signal.SIGKILL or before == 30
    assert step_of(out) == before
    train_tokenizer(c, out, small())
    assert log(out) == log(tmp_path / "whole") and not list(out.glob("*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves(data, tmp_path, number):
    c, out = config(data, steps=100_000, save_every=50_000), tmp_path / "run"

    def work():
        torch.set_num_threads(1)
        try:
            train_tokenizer(c, out, small())
        except KeyboardInterrupt:
            os._exit(130)

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    deadline = time.time() + 90
    while not (out / "log.jsonl").exists() or len(log(out)) < 3:
        time.sleep(0.05)
        assert child.is_alive() and time.time() < deadline
    os.kill(child.pid, number)
    child.join(60)
    assert (
        child.exitcode == (0 if number == signal.SIGTERM else 130)
        and step_of(out) == log(out)[-1]["step"] >= 3
    )
    assert load_model(DeRATokenizer, out / "tokenizer").config.dim == 32


def test_a_full_disk(data, tmp_path, monkeypatch):
    c = config(data)
    train_tokenizer(c, tmp_path / "whole", small())
    calls = []

    def full(tensors, path, **kwargs):
        calls.append(path)
        if len(calls) == 3:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return real(tensors, path, **kwargs)

    real = checkpoints.save_file
    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(
        InputError, match=r"cannot write the checkpoint .*No space left.*the one before it is whole"
    ) as e:
        train_tokenizer(c, tmp_path / "run", small())
    assert (
        "\n" not in str(e.value)
        and step_of(tmp_path / "run") == 3
        and not list((tmp_path / "run").glob("*.tmp"))
    )
    train_tokenizer(c, tmp_path / "run", small())
    assert log(tmp_path / "run") == log(tmp_path / "whole")


def test_a_disk_without_room_is_found_before_the_first_step(data, tmp_path, monkeypatch):
    usage = run_folder.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda p: usage._replace(free=1000))
    with pytest.raises(InputError, match="has room for 0 MB; two checkpoints need"):
        train_tokenizer(config(data), tmp_path / "run", small())
    assert not (tmp_path / "run" / "log.jsonl").exists() or not log(tmp_path / "run")

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        monkeypatch.undo()
        try:
            train_tokenizer(config(data), tmp_path / "limited", small())
        except InputError as e:
            os._exit(
                7
                if "cannot write the checkpoint" in str(e) and "there is none yet" in str(e)
                else 8
            )

    assert apart(limited) == 7


def poisoned(monkeypatch, steps):
    "The reconstruction loss is not a number at these steps."
    calls, forward = [], ReconstructionLoss.forward

    def bad(self, pred, target):
        total, terms = forward(self, pred, target)
        calls.append(1)
        poison = math.nan if len(calls) in steps else 1.0
        return total * poison, {k: v * poison for k, v in terms.items()}

    monkeypatch.setattr(ReconstructionLoss, "forward", bad)


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_steps_that_are_not_finite_are_skipped_and_counted(data, tmp_path, monkeypatch, precision):
    poisoned(monkeypatch, {4, 5})
    kept = []
    real = module.train_step

    def watch(c, t, *args):
        before = [p.clone() for p in t.tokenizer.parameters()]
        found, finite = real(c, t, *args)
        same = all(torch.equal(a, b) for a, b in zip(before, t.tokenizer.parameters()))
        kept.append((finite, same))
        return found, finite

    monkeypatch.setattr(module, "train_step", watch)
    net = train_tokenizer(
        config(data, precision=precision, ema=0.5, quantizer_start=0), tmp_path, small()
    )
    assert [finite for finite, _ in kept] == [True] * 3 + [False] * 2 + [True] * 3
    assert all(same != finite for finite, same in kept)
    assert (
        log(tmp_path)[-1]["skipped"] == 2
        and log(tmp_path)[3]["l1"] is None
        and all(v.isfinite().all() for v in net.state_dict().values())
    )


def test_ten_in_a_row_stop_the_run(data, tmp_path, monkeypatch):
    poisoned(monkeypatch, set(range(6, 100)))
    with pytest.raises(
        InputError, match="10 steps in a row, up to step 15, .* the checkpoint of step 3 "
    ) as e:
        train_tokenizer(config(data, steps=100), tmp_path, small())
    state = load_checkpoint(tmp_path / "checkpoint.safetensors")
    assert state["step"] == 3 and "\n" not in str(e.value)
    assert all(v.isfinite().all() for v in state["parts"]["tokenizer"].values())


def test_a_killed_worker(data, tmp_path, monkeypatch):
    c = config(data, workers=1, save_every=100)
    train_tokenizer(replace(c, workers=0), tmp_path / "whole", small())
    get, taken = dera.data.VideoClips.__getitem__, torch.zeros(1, dtype=torch.int64).share_memory_()

    def item(self, i):
        taken.add_(1)
        if torch.utils.data.get_worker_info() and taken == 18:
            time.sleep(2)
            os.kill(os.getpid(), signal.SIGKILL)
        return get(self, i)

    monkeypatch.setattr(dera.data.VideoClips, "__getitem__", item)
    with pytest.raises(InputError, match="a process that decodes was killed"):
        train_tokenizer(c, tmp_path / "run", small())
    assert 0 < step_of(tmp_path / "run") <= 4
    monkeypatch.undo()
    torch.set_num_threads(1)
    train_tokenizer(replace(c, workers=0), tmp_path / "run", small())
    assert log(tmp_path / "run") == log(tmp_path / "whole")


def test_videos_that_vanish_during_a_run(tmp_path):
    root = tmp_path / "data"
    write_dataset(root, 40, seed=1, num_frames=8, size=32)
    real, out = module.train_step, tmp_path / "run"

    def step(c, t, x, n, steps):
        if n == 2:
            [p.unlink() for p in sorted(root.rglob("*.mp4"))[::2]]
        return real(c, t, x, n, steps)

    module.train_step = step
    try:
        with pytest.raises(InputError, match=r"videos cannot be read .*run dera audit"):
            train_tokenizer(config(str(root), steps=40, save_every=100), out, small())
    finally:
        module.train_step = real
    assert (
        step_of(out) % 8 == 0 and step_of(out) == len(log(out)) > 0
    )  # at the start of an epoch, nothing lost


# several processes ----------------------------------------------------------------------------------------------------

SCRIPT = (
    "import sys, json; from dera.train_tokenizer import *; import torch; torch.set_num_threads(1)\n"
    "try: train_tokenizer(TokenizerTraining(**json.loads(sys.argv[1])), sys.argv[2])\n"
    "except ValueError as e: print('SAID', e, flush=True); import os; os._exit(3)"
)


def start(c, out, n):
    with socket.socket() as s:
        s.bind(("", 0))
        port = s.getsockname()[1]
    env = os.environ | dict(
        WORLD_SIZE=str(n),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        TQDM_DISABLE="1",
        LOCAL_WORLD_SIZE=str(n),
    )
    return [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, json.dumps(asdict(c)), str(out)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env | dict(RANK=str(r), LOCAL_RANK=str(r)),
        )
        for r in range(n)
    ]


def joint(data):
    "A training with everything in it that processes share."
    return config(
        data,
        steps=20,
        batch_size=8,
        lr=1e-4,
        muon_lr=0.0,
        precision="no",
        quantizer_start=8,
        discriminator_weight=0.1,
        discriminator_every=2,
        ema=0.9,
        save_every=20,
        validation_clips=4,
        num_appearance=4,
        num_motion=12,
        prior_weight=0.0,
    )


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    "The log of one process."
    folder = tmp_path_factory.mktemp("alone")
    train_tokenizer(joint(data), folder / "run")
    return log(folder / "run")


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_together_are_one(processes, data, alone, tmp_path):
    "Over twenty steps with SACP, discriminator and averaged weights, within rounding."
    jobs = start(joint(data), tmp_path / "joined", processes)
    for job in jobs:
        assert job.wait(300) == 0, job.communicate()[1][-2000:]
    joined = log(tmp_path / "joined")
    terms = ("loss", "l1", "l2", "perceptual", "quantizer", "align_a", "align_m")
    terms += ("adversarial", "cosine", "conflict")
    assert len(alone) == len(joined) == 20
    for one, many in zip(alone, joined, strict=True):
        differences = {name: one[name] - many[name] for name in terms}
        near = all(abs(d) <= 1e-5 * max(1, abs(one[name])) for name, d in differences.items())
        assert near, (one["step"], differences)
    assert {"discriminator", "lecam"} <= set(alone[0])
    assert (tmp_path / "joined" / "validation").is_dir()


def test_a_killed_rank(data, tmp_path):
    jobs = start(
        config(data, steps=100_000, batch_size=4, save_every=2, timeout=30), tmp_path / "run", 2
    )
    deadline = time.time() + 120
    while not (tmp_path / "run" / "log.jsonl").exists() or len(log(tmp_path / "run")) < 3:
        time.sleep(0.1)
        assert time.time() < deadline and jobs[0].poll() is None, jobs[0].communicate()
    jobs[1].kill()
    said = jobs[0].communicate(timeout=60)[0]
    assert (
        jobs[0].returncode == 3
        and "lost another one" in said
        and "goes on from the checkpoint" in said
        and step_of(tmp_path / "run") >= 2
    ), said


# settings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(data=""), "name the videos"),
        (dict(model="vae"), "unknown model"),
        (dict(surgery="none"), "unknown surgery"),
        (dict(batch_size=400), "larger than the 32"),
        (dict(accumulate=3), "3 parts"),
        (dict(batch_size=0), "does not divide"),
        (dict(ema=1.0), "ema"),
        (dict(steps=0), "steps is 0"),
        (dict(precision="int8"), "unknown precision"),
        (dict(tracker="notebook"), "unknown tracker"),
        (dict(model="query"), "no first-frame stream"),
        (dict(model="grid", lambda_a=0.0, prior_weight=1.0), "grid tokenizer has none"),
        (dict(align_layer=9), "align_layer 9"),
        (dict(preset="pocket"), "does not average"),
        (dict(save_every=0), "count steps from 1"),
        (dict(tokens=30), "do not split"),
        (dict(image_teacher="nobody"), "nobody"),
        (dict(surgery_every=0), "at least 1"),
        (dict(accumulate=2, surgery_every=2), "accumulate above 1"),
        (dict(surgery_level="both"), "unknown surgery_level"),
        (dict(surgery_level="both", accumulate=2), "unknown surgery_level"),
        (dict(align_share=20.0), "from 0 to 1, got 20.0"),
        (dict(align_share=-0.1), "from 0 to 1"),
        (dict(lr=0.0), "lr must be above 0"),
        (dict(muon_lr=-0.1), "muon_lr"),
        (dict(timeout=-1), "timeout"),
    ],
    ids=str,
)
def test_refused_before_the_first_step(data, tmp_path, changes, words):
    with pytest.raises(InputError) as e:
        train_tokenizer(config(data, **changes), tmp_path / "run")
    assert (
        words in str(e.value)
        and "\n" not in str(e.value)
        and not (tmp_path / "run" / "checkpoint.safetensors").exists()
    )


@pytest.mark.parametrize(
    "change",
    [dict(lr=1.0), dict(data="other"), dict(format=1), dict(broken=True), dict(pickle=True)],
    ids=str,
)
def test_a_checkpoint_of_something_else(data, tmp_path, change):
    c, out, file = (
        config(data, steps=3),
        tmp_path / "run",
        tmp_path / "run" / "checkpoint.safetensors",
    )
    train_tokenizer(c, out, small(), stop_after=3)
    if "format" in change:
        state = load_checkpoint(file)
        del state["format"]
        checkpoints.save_checkpoint(file, state)
    if "broken" in change:
        file.write_bytes(file.read_bytes()[:5000])
    if "pickle" in change:
        torch.save(dict(step=3), file)
    if "data" in change:
        root = tmp_path / "other"
        write_dataset(root, 30, seed=1, num_frames=8, size=32)
        c = replace(c, data=(str(root),))
    if "lr" in change:
        c = replace(c, lr=1.0)
    with pytest.raises(InputError) as e:
        train_tokenizer(c, out, small())
    words = dict(
        lr=f"another lr {config(data).lr} then, 1.0 now",
        data="another data",
        format="format 1 and this version writes 2",
        broken="not a checkpoint",
        pickle="not a checkpoint",
    )
    assert words[next(iter(change))] in str(e.value) and "\n" not in str(e.value)


def test_files_of_another_name_are_refused_and_old_checkpoints_are_not(data, tmp_path):
    root, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(data, root)
    c = config(str(root), steps=6)
    train_tokenizer(c, out, small(), stop_after=3)
    state = load_checkpoint(out / "checkpoint.safetensors")
    digest = state["identity"].pop("files")
    assert len(digest) == 16
    shutil.copytree(out, tmp_path / "old")
    checkpoints.save_checkpoint(
        tmp_path / "old" / "checkpoint.safetensors", state
    )  # as it was written before
    train_tokenizer(c, tmp_path / "old", small(), stop_after=4)
    assert step_of(tmp_path / "old") == 3 and len(log(tmp_path / "old")) == 4
    train_tokenizer(c, tmp_path / "old", small())
    assert (
        load_checkpoint(tmp_path / "old" / "checkpoint.safetensors")["identity"]["files"] == digest
    )
    video = Path(dera.data.VideoClips(str(root), 8, 32, split="train").paths[0])
    rename = video.with_name(video.name.replace("_c0", "_c9"))
    video.rename(rename)
    for f in (root / "ucfTrainTestlist").iterdir():
        f.write_text(f.read_text().replace(video.name, rename.name))
    with pytest.raises(InputError, match=f"another files {digest} then"):
        train_tokenizer(c, out, small())


@pytest.mark.parametrize("model, cls", [("query", QueryTokenizer), ("grid", GridTokenizer)])
def test_the_other_tokenizers(data, tmp_path, model, cls):
    prior = dict(prior_weight=0.06, prior_lr_scale=2.0) if model == "query" else {}
    net = train_tokenizer(
        config(
            data,
            model=model,
            lambda_a=0.0,
            lambda_m=0.0,
            validation_clips=4,
            validate_every=4,
            **prior,
        ),
        tmp_path,
    )
    lines = log(tmp_path)
    assert (
        type(net) is cls and ("prior" in lines[-1]) == bool(prior) and "prior" not in lines[0]
    )  # only once there are codes
    assert [l["step"] for l in lines if "val_psnr" in l] == [4, 8] and sorted(
        p.name for p in (tmp_path / "validation").iterdir()
    ) == ["step-0000004.png", "step-0000008.png"]
    again = load_model(cls, tmp_path / "tokenizer")
    assert again.config == net.config


def test_everything_is_in_the_log(data, tmp_path):
    train_tokenizer(config(data, **EVERYTHING), tmp_path, small())
    first, fourth = log(tmp_path)[2], log(tmp_path)[3]
    raw = RunFolder(tmp_path).history()[-1]
    assert {
        "l1",
        "l2",
        "perceptual",
        "quantizer",
        "adversarial",
        "align_a",
        "align_m",
        "loss",
        "gradient",
        "psnr",
        "codes_in_use",
        "conflict",
        "cosine",
        "norm_a",
        "norm_m",
        "cosine_by_block",
        "discriminator",
        "logit_real",
        "lecam",
        "skipped",
    } <= set(log(tmp_path)[1] | first)
    assert {
        f"gradient_{k}"
        for k in ("l1", "l2", "perceptual", "quantizer", "adversarial", "align_a", "align_m")
    } <= set(fourth) and not any(k.startswith("gradient_") for k in first)
    assert (
        set(TIMES) - {"tokens_per_second"} <= set(raw)  # that one belongs to the generator's log
        and raw["clips_per_second"] > 0
        and 0 <= raw["waiting"] <= 1
        and raw["memory_gb"] > 0.1
    )
    assert (
        json.loads((tmp_path / "config.json").read_text())["ema"] == 0.9
        and (tmp_path / "environment.json").exists()
    )


def test_norms_know_the_scale_of_half_precision(data, tmp_path, monkeypatch):
    layer, x = (
        torch.nn.Linear(64, 64),
        torch.randn(8, 64, generator=torch.Generator().manual_seed(0)),
    )
    norm = module.term_norms
    with torch.autocast("cpu", torch.float16):
        terms = dict(tiny=layer(x).float().mean() * 1e-6, none=torch.zeros(()))
    want = norm(dict(tiny=layer(x).mean() * 1e-6), list(layer.parameters()))["gradient_tiny"]
    assert norm(terms, list(layer.parameters()))["gradient_tiny"] == 0 and torch.allclose(
        norm(terms, list(layer.parameters()), 2.0**16)["gradient_tiny"], want, rtol=0.01
    )
    seen = []
    monkeypatch.setattr(
        module,
        "term_norms",
        lambda terms, params, scale=1.0: seen.append(scale) or norm(terms, params, scale),
    )
    for precision in "fp16", "no":
        train_tokenizer(
            config(data, steps=1, precision=precision, norms_every=1), tmp_path / precision, small()
        )
    assert seen == [2.0**16, 1.0]
    half, full = log(tmp_path / "fp16")[0], log(tmp_path / "no")[0]
    assert (
        all(
            half[k] == pytest.approx(full[k], rel=0.1)
            for k in full
            if k.startswith("gradient_") and full[k] > 0
        )
        and full["gradient_l1"] > 0
    )
    train_tokenizer(config(data, steps=1, accumulate=2, norms_every=1), tmp_path / "parts", small())
    parts = log(tmp_path / "parts")[0]
    assert (
        "gradient_l1" in parts and "align_a" in parts and "gradient_align_a" not in parts
    )  # only the whole batch has them


@pytest.mark.parametrize(
    "changes",
    [dict(discriminator_weight=0.3, prior_weight=0.06, l2_weight=4.0), dict(l2_weight=0.0)],
    ids=str,
)
def test_terms_sum_to_total_loss(changes):
    c = config(
        "none",
        surgery="sum",
        quantizer_start=0,
        reconstruction_weight=3.0,
        perceptual_weight=0.7,
        **changes,
    )
    t = module.build_state(c, small(), torch.device("cpu"))
    x = render(sample_factors(2, seed=0), 8, 32)
    torch.manual_seed(0)
    terms, found, video = module.losses(c, t, x, 5, 10)
    total = total_loss(
        t.reconstruction(video, x)[0],
        found["quantizer"],
        found.get("adversarial"),
        found.get("prior"),
        c.quantizer_weight,
        c.discriminator_weight,
        c.prior_weight,
    )
    assert ("adversarial" in found) == ("prior" in found) == ("prior_weight" in changes)
    assert torch.allclose(
        sum(terms.values()), 3 * total + 1.0 * found["align_a"] + 0.5 * found["align_m"], rtol=1e-5
    )


def test_two_stages_and_averaged_weights(data, tmp_path):
    seen = []
    real = module.train_step

    def watch(c, t, *args):
        out = real(c, t, *args)
        seen.append([p.detach().clone() for p in t.tokenizer.parameters()])
        return out

    module.train_step = watch
    try:
        net = train_tokenizer(config(data, ema=0.5, align_share=0.5), tmp_path, small())
    finally:
        module.train_step = real
    mean = seen[0]
    for weights in seen[1:]:
        mean = [0.5 * m + 0.5 * w for m, w in zip(mean, weights)]
    assert all(torch.allclose(m, p, atol=1e-6) for m, p in zip(mean, net.parameters()))
    lines = log(tmp_path)
    assert all(l["align_a"] != 0 for l in lines[:4]) and all(l["align_a"] == 0 for l in lines[4:])


def test_several_data_sets(data, tmp_path):
    (plain := tmp_path / "plain").mkdir()
    for i, p in enumerate(sorted(Path(data).rglob("*.mp4"))[:6]):
        (plain / f"{i}.mp4").write_bytes(p.read_bytes())
    train_tokenizer(
        config((f"ucf101={data}:3", f"folder={plain}:1"), steps=3, validation_clips=4),
        tmp_path / "mixed",
        small(),
    )
    assert "val_psnr" in log(tmp_path / "mixed")[-1]
    shape = TokenizerConfig.preset("tiny")

    def held(count):
        sources = (f"ucf101={data}:3", f"ucf101={data}:1")
        return module.validation_clips(config(sources, validation_clips=count), shape)

    assert (
        held(1).shape == held(2).shape == (2, 3, 8, 32, 32)
        and len(held(4)) == 4
        and held(0) is None
    )  # at least one of each
    train_tokenizer(config(str(plain), steps=1), tmp_path / "alone", small())
    assert json.loads((tmp_path / "alone" / "config.json").read_text())["data"] == [str(plain)]
    with pytest.raises(InputError, match="write folder=PATH"):
        train_tokenizer(config((data, str(plain))), tmp_path / "wrong", small())


def test_the_paper_preset():
    c = TokenizerTraining.preset("paper")
    assert (
        c.batch_size,
        c.lr,
        c.betas,
        c.muon_lr,
        c.epochs,
        c.discriminator_weight,
        c.discriminator_every,
        c.quantizer_weight,
    ) == (128, 1e-4, (0.5, 0.9), 0.0, 75, 0.3, 5, 0.1)
    assert (
        c.perceptual == "lpips-vgg"
        and c.prior_weight == 0
        and (c.reconstruction_weight, c.l2_weight, c.perceptual_weight, c.discriminator_lr)
        == (1.0, 0.0, 1.0, 3e-5)
    )

    def rate(step):
        return learning_rate(step, 7500, c.warmup)

    assert (
        rate(0) < 0.01
        and max(map(rate, range(7500))) == pytest.approx(rate(799), abs=0.01)
        and rate(7499) == pytest.approx(0.01, abs=1e-3)
    )


# what the user says, and what a run says ------------------------------------------------------------------------------


def test_steps_that_are_named_win_over_epochs():
    assert TokenizerTraining.preset("paper", steps=2).epochs == 0
    assert TokenizerTraining.preset("paper", steps=2, epochs=3).epochs == 3
    assert TokenizerTraining.preset("paper").epochs == 75


def test_a_run_that_never_quantises_says_so(data, tmp_path, capsys):
    c = config(data, steps=3, quantizer_start=5, validation_clips=2, validate_every=2)
    train_tokenizer(c, tmp_path / "run", small())
    assert "ends before it quantises" in capsys.readouterr().err
    lines = log(tmp_path / "run")
    assert all(line["codes_in_use"] is None for line in lines)
    assert lines[-1]["val_quantized"] is False and lines[-1]["val_usage"] is None
    train_tokenizer(replace(c, quantizer_start=1), tmp_path / "other", small())
    last = log(tmp_path / "other")[-1]
    assert last["val_quantized"] is True and last["codes_in_use"] is not None
    assert "ends before" not in capsys.readouterr().err


def test_a_folder_without_splits_gives_a_share_away(data, tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir()
    for i, video in enumerate(sorted(Path(data).rglob("*.mp4"))[:12]):
        (plain / f"{i}.mp4").write_bytes(video.read_bytes())
    c = config(str(plain), steps=2, validate_every=1, validation_clips=3)
    shape = TokenizerConfig.preset("tiny")
    learn, held = module.training_clips(c, shape)
    assert len(held) == 1 and len(learn) == 11
    assert not {path for path, _ in held} & set(learn.paths)
    assert len(module.validation_clips(c, shape, held)) == 3
    train_tokenizer(c, tmp_path / "run", small())
    assert all(line["val_psnr"] for line in log(tmp_path / "run"))


def test_a_longer_run_names_the_ways_on(data, tmp_path):
    train_tokenizer(config(data, steps=2), tmp_path, small())
    with pytest.raises(InputError, match="steps 2 then, 5 now; .*--fresh.*--init") as error:
        train_tokenizer(config(data, steps=5), tmp_path, small())
    assert "\n" not in str(error.value)


def test_missing_weights_are_named_together(data, tmp_path):
    c = config(data, image_teacher="nobody", video_teacher="nowhere", perceptual="nothing")
    with pytest.raises(InputError) as error:
        train_tokenizer(c, tmp_path)
    assert all(name in str(error.value) for name in ("nobody", "nowhere", "nothing"))


def test_the_decoder_alone(data, tmp_path):
    small().save_pretrained(tmp_path / "start")
    c = config(data, steps=2, freeze="encoder", init=str(tmp_path / "start"), muon_lr=0.01)
    net = train_tokenizer(c, tmp_path / "run")
    start = load_model(DeRATokenizer, tmp_path / "start")
    for (name, now), then in zip(net.named_parameters(), start.parameters()):
        learns = name.split(".")[0] in ("decoder", "decoder_queries", "from_latent", "out")
        assert learns or torch.equal(now, then), name
    with pytest.raises(InputError, match="--init"):
        train_tokenizer(replace(c, init=""), tmp_path / "wrong")
