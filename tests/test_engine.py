"What every training stands on: locks, torn logs, launcher flags, updates, feeds, one line of reasons."

import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch

from dera.runtime.checkpoints import fingerprint, refuse_other_run
from dera.runtime.engine import (
    CheckpointWriter,
    Meter,
    apply_gradients,
    collect_signals,
    leave,
    refuse_launcher_flags,
    warmup_cosine,
)
from dera.runtime.errors import InputError
from dera.runtime.feed import BatchRows, worker_died
from dera.runtime.run_folder import RunFolder

HOLD = """
import sys, time
from dera.runtime.run_folder import RunFolder
with RunFolder(sys.argv[1]).lock():
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_while_the_first_lives(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout.readline() == "locked\n"
        with (
            pytest.raises(InputError, match="another run is writing into .*--out") as error,
            RunFolder(tmp_path).lock(),
        ):
            pass
        assert "\n" not in str(error.value)
    finally:
        child.kill()
        child.wait()
    with RunFolder(tmp_path).lock():  # the lock died with its process, however it died
        pass


@pytest.mark.parametrize("tail", [b'{"step": 4, "loss"', b"\xff\xfe{", b"[1, 2]\n", b"\n\n7\n"])
def test_a_torn_log_is_read_and_rewound(tmp_path, tail):
    run = RunFolder(tmp_path)
    for step in range(1, 4):
        run.log(step=step, loss=1.0)
    with open(tmp_path / "log.jsonl", "ab") as file:
        file.write(tail)
    assert [line["step"] for line in run.history()] == [1, 2, 3]
    run.rewind(2)
    text = (tmp_path / "log.jsonl").read_text()
    assert [json.loads(line)["step"] for line in text.splitlines()] == [1, 2]


def test_flags_of_the_launcher_that_contradict_are_said(monkeypatch):
    refuse_launcher_flags("no")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    refuse_launcher_flags("bf16")
    for name, value, precision, words in (
        ("ACCELERATE_MIXED_PRECISION", "bf16", "no", "--mixed_precision bf16"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "bf16", "DeepSpeed is not supported"),
        ("ACCELERATE_USE_FSDP", "true", "bf16", "leave --use_fsdp out"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "bf16", "--compile"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "bf16", "--accumulate"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(InputError, match=words) as error:
                refuse_launcher_flags(precision)
            assert "\n" not in str(error.value)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    refuse_launcher_flags("bf16", sharded=True)


def test_a_gradient_that_is_not_finite_changes_nothing():
    layer = torch.nn.Linear(3, 1)
    before = fingerprint(layer)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    (layer(torch.ones(1, 3)).sum() * math.nan).backward()
    assert not apply_gradients([optimizer], scaler)[1] and fingerprint(layer) == before
    optimizer.zero_grad()
    (100 * layer(torch.ones(1, 3))).sum().backward()
    norm, finite = apply_gradients([optimizer], scaler, clip_norm=1.0)
    assert finite and norm > 100 and fingerprint(layer) != before
    assert layer.weight.grad.norm() < 1.001


def test_meter_writer_and_schedule(tmp_path):
    meter, written = Meter(), []
    for step in range(10):
        meter.refuse_ten(step, 0, tmp_path)
        meter.count(0.0, finite=False)
    with pytest.raises(InputError, match="10 steps in a row, up to step 10, .* of step 3 "):
        meter.refuse_ten(10, 3, tmp_path)
    writer = CheckpointWriter(4, written.append)
    for step in (4, 5, 5, 6):
        writer(step)
    assert written == [5, 6]
    assert warmup_cosine(0, 100, 0.1) == pytest.approx(0.1) and warmup_cosine(100, 100, 1) == 0.01


def test_signals_end_a_run_as_they_ask():
    with collect_signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert signals == [signal.SIGTERM] * 2
    with pytest.raises(SystemExit) as end:
        leave(signal.SIGTERM, False, "")
    assert end.value.code == 0
    with pytest.raises(KeyboardInterrupt):
        leave(signal.SIGINT, False, "")


def test_processes_share_every_batch():
    for epoch in range(3):
        whole = BatchRows(13, 4, 5)
        shares = [BatchRows(13, 4, 5, rank, 4) for rank in range(4)]
        for rows in (whole, *shares):
            rows.epoch = epoch
        assert [sum(parts, []) for parts in zip(*shares)] == list(whole)
        assert len({i for batch in whole for i in batch}) == 12
    assert worker_died(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."))
    assert worker_died(ConnectionResetError()) and not worker_died(RuntimeError("CUDA error"))


def test_other_settings_are_named_and_nothing_else():
    saved = dict(lr=0.1, model=dict(dim=8, depth=2), data=["a"] * 40)
    refuse_other_run("run", saved, saved)
    asked = dict(lr=0.2, model=dict(dim=8, depth=3), data=["b"] * 40)
    with pytest.raises(InputError) as error:
        refuse_other_run("run", saved, asked, "use --fresh")
    text = str(error.value)
    assert "lr 0.1 then, 0.2 now; model.depth 2 then, 3 now; data; use --fresh" in text
    assert "dim" not in text and "\n" not in text
