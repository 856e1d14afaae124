"The command line as a person meets it: help, one line for every mistake, nothing half-written."

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dera.pocket import render, sample_factors, write_dataset, write_video
from dera.runtime.checkpoints import checkpoint_path
from dera.tools.cli import main


def dera(*words):
    return subprocess.run(
        [sys.executable, "-c", "from dera.tools.cli import main; main()", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=300,
    )


def here(*words):
    "The same without a new process; returns the exit code."
    with pytest.raises(SystemExit) as e:
        main(list(words))
    return e.value.code


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_dataset(root, 60, seed=1)
    return root


def refused(result, *words):
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    lines = [l for l in result.stderr.splitlines() if l.startswith("dera: ")]
    assert len(lines) == 1 and all(w in lines[0] for w in words), result.stderr


@pytest.mark.parametrize(
    "command",
    [
        "demo",
        "train-tokenizer",
        "train-ar",
        "reconstruct",
        "generate",
        "evaluate",
        "train-teachers",
        "audit",
        "bench render",
        "bench data",
        "bench tokenizers",
        "bench generate",
        "bench train",
    ],
)
def test_help(command, capsys):
    assert here(*command.split(), "--help") == 0 and "--out" in capsys.readouterr().out


def test_help_tells_what_a_parameter_means(capsys):
    for words, text in (
        (["evaluate"], "folder of videos"),
        (["prepare"], "short side in pixels"),
        (["bench", "render"], "in a batch"),
    ):
        assert here(*words, "--help") == 0 and text in capsys.readouterr().out


def test_top_level():
    assert (
        dera("--help").returncode == 0
        and "reconstruct" in dera("--help").stdout
        and dera("paint").returncode == 2
    )


def test_reconstruct(tmp_path):
    write_video(tmp_path / "ä clip.mp4", render(sample_factors(1, seed=3), 5, 64)[0])
    result = dera("reconstruct", tmp_path / "ä clip.mp4", "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert (
        "has 5 frames; the last one is repeated to 8" in result.stdout and "PSNR" in result.stdout
    )
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["ä clip_reconstructed.mp4"]


def test_reconstruct_mistakes(tmp_path):
    (tmp_path / "text.mp4").write_text("hello")
    (tmp_path / "empty.mp4").touch()
    out = tmp_path / "out"
    for name, word in (
        ("missing.mp4", "missing.mp4"),
        ("text.mp4", "text.mp4"),
        ("empty.mp4", "empty"),
        ("", str(tmp_path)),
    ):
        refused(dera("reconstruct", tmp_path / name, "--out", out), word)
    refused(dera("reconstruct", tmp_path / "text.mp4", "--tokenizer", tmp_path), "no tokenizer")
    assert not out.exists()


def test_training_mistakes(data, tmp_path):
    out, one = tmp_path / "out", tmp_path / "one"
    (tmp_path / "none").mkdir()
    one.mkdir()
    for i in range(3):
        write_video(one / f"{i}.mp4", render(sample_factors(1, seed=i), 8, 32)[0])
    train = lambda *words: dera("train-tokenizer", "--out", out, *words)
    refused(train("--data", tmp_path / "none"), "none")
    refused(train("--data", one), "larger than the 3")
    refused(train("--data", data, "--preset", "huge"), "huge", "tiny")
    refused(train("--data", data, "--batch-size", 500), "500", "48")
    refused(train(), "--data")
    assert not (out / "config.json").exists()


def test_unwritable_run_folder(data, tmp_path):
    (tmp_path / "file").write_text("")  # also stops root, whom permissions do not
    refused(
        dera("train-tokenizer", "--data", data, "--out", tmp_path / "file" / "run"),
        "cannot write",
        "--out",
    )
    refused(dera("demo", "--out", tmp_path / "file" / "run"), "cannot write", "--out")


def test_train_then_evaluate_then_generate(data, tmp_path):
    run = tmp_path / "run"
    result = dera(
        "train-tokenizer",
        "--data",
        data,
        "--out",
        run / "tokenizer",
        "--steps",
        3,
        "--quantizer-start",
        1,
    )
    assert result.returncode == 0, result.stderr
    result = dera(
        "evaluate",
        "--data",
        data,
        "--tokenizer",
        run / "tokenizer" / "tokenizer",
        "--out",
        tmp_path / "e",
        "--clips",
        4,
        "--sampling",
        "uniform",
    )
    assert (
        result.returncode == 0
        and "psnr" in result.stdout
        and (tmp_path / "e" / "report.html").exists()
    ), result.stderr
    result = dera(
        "train-ar",
        "--data",
        data,
        "--tokenizer",
        run / "tokenizer" / "tokenizer",
        "--out",
        run / "generator",
        "--steps",
        2,
        "--batch-size",
        8,
    )
    assert result.returncode == 0, result.stderr
    assert f"generator saved in {run / 'generator' / 'generator'}" in result.stdout
    again = lambda *more: dera(
        "train-ar",
        "--data",
        data,
        "--tokenizer",
        run / "tokenizer" / "tokenizer",
        "--out",
        run / "generator",
        "--steps",
        2,
        "--batch-size",
        8,
        *more,
    )
    refused(again("--seed", 1), "seed")
    weights = run / "generator" / "generator" / "model.safetensors"
    before = weights.read_bytes()
    assert again().returncode == 0 and weights.read_bytes() == before
    fresh = again("--seed", 1, "--fresh")
    assert fresh.returncode == 0 and weights.read_bytes() != before, fresh.stderr
    result = dera(
        "generate",
        "--run",
        run,
        "--classes",
        "StarCircle",
        "7",
        "--count",
        1,
        "--out",
        tmp_path / "clips",
    )
    assert result.returncode == 0 and (tmp_path / "clips" / "StarCircle_0.mp4").exists(), (
        result.stderr
    )
    refused(dera("generate", "--run", run, "--classes", "Elephant"), "Elephant")
    refused(dera("generate", "--run", tmp_path), "no tokenizer")
    about = json.loads((tmp_path / "clips" / "generated.json").read_text())
    assert [c["seed"] for c in about["clips"]] == [0, 1] and [c["label"] for c in about["clips"]][
        1
    ] == 7
    assert (tmp_path / "clips" / "grid.gif").read_bytes()[:4] == b"GIF8"
    video = next(Path(data).rglob("*.mp4"))
    refused(dera("generate", "--run", run, "--first-frames", video), "trained on classes")
    refused(
        dera("generate", "--run", run, "--tokenizer", checkpoint_path("pocket-tokenizer-tiny")),
        "another tokenizer",
    )
    refused(dera("generate", "--run", run, "--count", 0), "count is 0")
    result = dera(
        "train-ar",
        "--data",
        data,
        "--tokenizer",
        run / "tokenizer" / "tokenizer",
        "--out",
        run / "predictor",
        "--steps",
        2,
        "--batch-size",
        8,
        "--condition-frames",
        3,
    )
    assert result.returncode == 0, result.stderr
    ask = (
        "generate",
        "--run",
        run,
        "--generator",
        run / "predictor" / "generator",
        "--out",
        tmp_path / "next",
    )
    refused(dera(*ask), "--first-frames")
    refused(dera(*ask, "--first-frames", video, "--guidance", 2), "no guidance")
    refused(dera(*ask, "--first-frames", tmp_path / "none.mp4"), "none.mp4")
    result = dera(*ask, "--first-frames", video, "--frames", 3, "--count", 2)
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "next").glob("*.mp4"))) == 2


def test_ctrl_c_keeps_the_finished_clips(tmp_path, monkeypatch, capsys):
    from dera.ar import Generator
    from dera.tools import cli

    real = Generator.generate_batches

    def stopped(self, *args, **kwargs):
        for n, batch in enumerate(real(self, *args, **kwargs)):
            if n == 2:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(Generator, "generate_batches", stopped)
    out = tmp_path / "clips"
    ask = lambda: cli.generate(
        ("0", "1", "2"),
        tokenizer=str(checkpoint_path("pocket-tokenizer-tiny")),
        generator=str(checkpoint_path("pocket-generator-tiny")),
        count=1,
        batch_size=1,
        out=str(out),
    )
    assert (
        cli.run_command(ask, "not this") == 130
        and capsys.readouterr().err.splitlines()[-1]
        == f"dera: stopped; 2 finished clips are in {out}"
    )
    assert (
        len(list(out.glob("*.mp4"))) == 2
        and len(json.loads((out / "generated.json").read_text())["clips"]) == 2
    )
    monkeypatch.undo()
    before = {p.name: p.read_bytes() for p in out.glob("*.mp4")}
    assert cli.run_command(ask) == 0
    assert len(list(out.glob("*.mp4"))) == 3 and all(
        (out / n).read_bytes() == b for n, b in before.items()
    )


@pytest.mark.parametrize(
    "words, said",
    [
        (["reconstruct", "x.mp4"], "dera: stopped"),
        (["bench", "render"], "dera: stopped"),
        (["audit", "x"], "dera: stopped"),
        (["evaluate", "--data", "x"], "dera: stopped; the same command goes on from what is done"),
        (
            ["train-tokenizer", "--data", "x", "--fresh"],
            "dera: stopped; the same command without --fresh goes on from what is done",
        ),
    ],
    ids=lambda x: x[0] if type(x) is list else "",
)
def test_ctrl_c_says_what_is_true(words, said, monkeypatch, capsys):
    from dera.tools import cli

    def stopped():
        raise KeyboardInterrupt

    monkeypatch.setitem(cli._COMMANDS, words[0], (lambda args: stopped, ""))
    assert here(*words) == 130 and capsys.readouterr().err == said + "\n"


PAIR = (
    "--tokenizer",
    str(checkpoint_path("pocket-tokenizer-tiny")),
    "--generator",
    str(checkpoint_path("pocket-generator-tiny")),
)


def test_clips_can_be_drawn_again_from_what_is_written(tmp_path):
    from dera.ar import Generator
    from dera.data import read_clip
    from dera.metrics import load_tokenizer
    from dera.pocket import write_video
    from dera.runtime.checkpoints import load_model
    from dera.train_ar import fingerprint

    assert (
        here(
            "generate",
            *PAIR,
            "--classes",
            "StarCircle",
            "7",
            "--count",
            "1",
            "--seed",
            "3",
            "--temperature",
            ".8",
            "--top-k",
            "40",
            "--top-p",
            ".9",
            "--guidance",
            "2",
            "--out",
            str(tmp_path / "a"),
        )
        == 0
    )
    about = json.loads((tmp_path / "a" / "generated.json").read_text())
    model, writer = load_tokenizer(PAIR[1]), load_model(Generator, PAIR[3])
    assert (about["tokenizer"], about["generator"], about["first_frames"]) == (
        fingerprint(model),
        fingerprint(writer),
        None,
    )
    sampling = {k: about[k] for k in ("guidance", "temperature", "top_k", "top_p")}
    assert sampling == dict(guidance=2, temperature=0.8, top_k=40, top_p=0.9)
    for c in about["clips"]:
        with torch.no_grad():
            write_video(
                tmp_path / "b.mp4",
                model.decode(writer.generate([c["label"]], seed=c["seed"], **sampling))[0].clamp(
                    0, 1
                ),
            )
        assert torch.allclose(
            read_clip(tmp_path / "b.mp4", 8, 32),
            read_clip(tmp_path / "a" / c["file"], 8, 32),
            atol=0.02,
        )


def test_a_class_named_twice_would_write_one_file_twice(tmp_path, capsys):
    for classes in ("StarCircle", "starcircle"), ("7", "7"):
        assert (
            here("generate", *PAIR, "--classes", *classes, "--out", str(tmp_path / "out")) == 2
            and "named twice" in capsys.readouterr().err
        )
    assert not (tmp_path / "out").exists()


def test_oblong_tokenizers_are_refused_where_files_are_read(tmp_path, capsys):
    from dera.ar import Generator, GeneratorConfig
    from dera.query import TokenizerConfig
    from dera.streams import DeRATokenizer
    from dera.train_ar import fingerprint

    tokenizer = DeRATokenizer(TokenizerConfig.preset("tiny", size=(32, 48)))
    tokenizer.save_pretrained(tmp_path / "t")
    write_video(tmp_path / "v.mp4", render(sample_factors(1, seed=3), 8, 64)[0])
    n, codes = tokenizer.num_tokens, tokenizer.config.codebook_size
    shape = dict(depth=1, vocab_size=codes, num_tokens=n, tokenizer=fingerprint(tokenizer))
    Generator(
        GeneratorConfig.preset("tiny", **shape, prefix_tokens=n, num_classes=1)
    ).save_pretrained(tmp_path / "g")
    Generator(GeneratorConfig.preset("tiny", **shape)).save_pretrained(tmp_path / "c")
    video, t = (
        str(tmp_path / "v.mp4"),
        ("--tokenizer", str(tmp_path / "t"), "--out", str(tmp_path / "out")),
    )
    for words in (
        ("reconstruct", video, *t),
        ("generate", *t, "--generator", str(tmp_path / "g"), "--first-frames", video),
        ("evaluate", "--data", str(tmp_path), *t),
    ):
        assert here(*words) == 2
        (line,) = (l for l in capsys.readouterr().err.splitlines() if l.startswith("dera: "))
        assert "square clips" in line and "32" in line and "48" in line
    assert (
        here("generate", *t, "--generator", str(tmp_path / "c"), "--classes", "1", "--count", "1")
        == 0
    )  # reads no file, so it may be oblong


def test_evaluate_goes_to_the_accelerator(data, tmp_path, monkeypatch):
    import accelerate

    from dera.runtime.measuring import device_of
    from dera.tools import cli, evaluate

    class State:
        device, is_main_process = torch.device("meta"), False

    seen = []
    monkeypatch.setattr(accelerate, "PartialState", lambda **_: State)
    monkeypatch.setattr(evaluate, "load_extractor", lambda *words: words[3])

    def measure(model, data, out, extractor, **_):
        seen.append((device_of(model).type, str(extractor)))

    monkeypatch.setattr(evaluate, "evaluate_tokenizer", measure)
    monkeypatch.setattr(evaluate, "evaluation_table", lambda result: "")
    cli.evaluate(str(data), workers=2, out=str(tmp_path))
    assert seen == [("meta", "meta")]


def test_the_command_line_is_a_module_too(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "dera.tools.cli", "evaluate", "--data", str(tmp_path / "none")],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    refused(result, "none")


def test_audit_and_prepare(data, tmp_path):
    import json
    import shutil

    root, out = tmp_path / "copy", tmp_path / "audit.json"
    shutil.copytree(data, root)
    result = dera("audit", root, "--out", out)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "nothing is wrong" in result.stdout and json.loads(out.read_text())["ok"]
    first = sorted(root.glob("*/*.mp4"))[0]
    first.write_bytes(first.read_bytes()[:200])
    result = dera("audit", root, "--out", out)
    report = json.loads(out.read_text())
    assert (
        result.returncode == 1
        and first.name in result.stdout
        and [d["path"] for d in report["undecodable"]] == [str(first)]
    )
    result = dera("prepare", root, tmp_path / "small", "--size", 16)
    assert result.returncode == 0, result.stderr
    assert "59 videos written, 0 kept, 1 left out" in result.stdout and first.name in result.stdout
    assert (
        "0 videos written, 59 kept"
        in dera("prepare", root, tmp_path / "small", "--size", 16).stdout
    )
    refused(dera("audit", "--out", out), "name the data")
    refused(dera("audit", tmp_path / "nowhere", "--out", out), "nowhere")
    refused(dera("prepare", root, root / "within"), "elsewhere")
    refused(dera("prepare", root, tmp_path / "small", "--size", 24), "another folder")


def test_bench(tmp_path):
    result = dera(
        "bench", "render", "--clips", 2, "--size", 16, "--repeats", 1, "--out", tmp_path / "b.json"
    )
    assert result.returncode == 0, result.stderr
    saved = json.loads((tmp_path / "b.json").read_text())
    assert (
        saved["command"] in result.stdout
        and saved["torch"] in result.stdout
        and all(r["clips_per_second"] > 0 for r in saved["rows"])
    )
    refused(dera("bench", "paint"), "paint", "render")
    refused(dera("bench"), "nothing")
    refused(dera("bench", "render", "--repeats", 0), "repeats")


def test_bench_train(tmp_path):
    from dera.tools.bench import bench_train, table

    result, half = (
        bench_train("tiny", 2, 1, precision="no", out=str(tmp_path / "t.json")),
        bench_train("tiny", 1, 1, precision="no", teachers=False),
    )
    assert (
        json.loads((tmp_path / "t.json").read_text()) == result
        and "bench train --preset tiny --batch 2" in table(result)
        and "--no-teachers" in half["command"]
    )
    full, bare = ({r["part"]: r for r in found["rows"]} for found in (result, half))
    parts = "encoder", "decoder", "teachers", "perceptual", "discriminator", "SACP", "optimiser"
    assert all(full[p]["seconds"] > 0 for p in (*parts, "data")) and {
        p for p in parts if bare[p]["seconds"] is None
    } == {"teachers", "SACP"}
    for rows in full, bare:
        assert sum(rows[p]["share"] or 0 for p in (*parts, "rest")) == pytest.approx(1)
    for p in "decoder", "perceptual", "discriminator":
        assert full[p]["teraflop"] == pytest.approx(2 * bare[p]["teraflop"])
    d, n, depth, pixels = (
        128,
        64 + 64,
        4,
        3 * 2 * 8 * 8,
    )  # the decoder by hand: forward, and twice as much backward; 5 products of attention there
    linear = 2 * n * 12 * d * d * depth + 2 * 64 * 16 * d + 2 * 64 * d * pixels
    attention = 4 * n * n * d * depth
    assert full["decoder"]["teraflop"] == pytest.approx(
        2 * (3 * linear + 3.5 * attention) / 1e12, rel=0.02
    )
    assert full["step"]["mfu_matmul"] > 0 and full["step"]["mfu_nominal"] is None
