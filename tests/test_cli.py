"The command line as a person meets it: help, one line for every mistake, nothing half-written."

import contextlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from dera.pocket import render, sample_factors, write_dataset, write_video
from dera.runtime.checkpoints import checkpoint_path
from dera.runtime.errors import InputError
from dera.tools.cli import main

PAIR = (
    "--tokenizer",
    str(checkpoint_path("pocket-tokenizer-tiny")),
    "--generator",
    str(checkpoint_path("pocket-generator-tiny")),
)


class Done(NamedTuple):
    "What a command left: exit code and both streams, as of a process of its own."

    returncode: int
    stdout: str
    stderr: str


def dera(*words):
    "A command in this process: imports are paid once."
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(word) for word in words])
            code = 0
        except SystemExit as end:
            code = end.code or 0
    return Done(code, out.getvalue(), err.getvalue())


def typed(*words, **options):
    "A command in a process of its own, as a person starts it."
    return subprocess.run(
        [sys.executable, "-m", "dera", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=300,
        **options,
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


def test_help_tells_what_a_parameter_means(capsys):
    for words, text in (
        (["demo"], "--out"),
        (["train-tokenizer"], "{tiny,pocket,paper}"),
        (["train-ar"], "paper-k600-fp"),
        (["tokenize"], "{npy,json}"),
        (["reconstruct"], "{clips,uniform,native}"),
        (["generate"], "Example: dera generate"),
        (["evaluate"], "folder of videos"),
        (["train-teachers"], "--video-steps"),
        (["audit"], "decode every frame"),
        (["prepare"], "short side in pixels"),
        (["weights"], "--check"),
        (["reproduce"], "train what is missing"),
        (["bench", "render"], "in a batch"),
        (["bench", "train"], "--teachers"),
    ):
        assert here(*words, "--help") == 0, words
        assert text in " ".join(capsys.readouterr().out.split()), words


def test_help_without_docstrings_and_without_torch():
    code = (
        "import sys; from dera.tools.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: code = end.code\n"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    for words in (["--help"], ["tokenize", "--help"], ["evaluate", "--help"]):
        done = subprocess.run([sys.executable, "-OO", "-c", code, *words], capture_output=True)
        assert done.returncode == 0, done.stderr
    heavy = "import sys; from dera.tools.cli import main; main(sys.argv[1:])"
    for words in (["train-ar", "--help"], ["bench", "data", "--help"]):
        done = subprocess.run([sys.executable, "-OO", "-c", heavy, *words], capture_output=True)
        assert done.returncode == 0, done.stderr


def test_top_level(tmp_path):
    shown = typed("--help", cwd=tmp_path)
    assert shown.returncode == 0 and "reconstruct" in shown.stdout
    assert typed("--version").stdout.startswith("dera ")
    unknown = dera("paint")
    assert unknown.returncode == 2 and "paint" in unknown.stderr
    words = dera("completion", "bash").stdout
    assert "complete -o default -F _dera dera" in words and "--tokenizer" in words
    refused(dera("completion", "basic"), "bash")


def test_streams_that_are_ascii_or_closed(tmp_path):
    video = tmp_path / "ä clip.mp4"
    write_video(video, render(sample_factors(1, seed=3), 8, 64)[0])
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    done = typed("tokenize", video, "--out", tmp_path / "a", env=ascii_only)
    assert done.returncode == 0 and "? clip" in done.stdout, done.stderr
    raw = os.fsencode(tmp_path) + b"/\xff.mp4"
    os.link(video, raw)
    for words in (["tokenize"], ["reconstruct"]):
        done = subprocess.run(
            [sys.executable, "-m", "dera", *words, raw, "--out", str(tmp_path / "b")],
            capture_output=True,
        )
        assert done.returncode == 0 and "\ufffd" in done.stdout.decode(), done.stderr
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m dera --version >&- 2>&-"], capture_output=True
    )
    assert done.returncode == 0


def test_reconstruct(tmp_path):
    write_video(tmp_path / "ä clip.mp4", render(sample_factors(1, seed=3), 5, 64)[0])
    result = dera("reconstruct", tmp_path / "ä clip.mp4", "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert (
        "has 5 frames; the last one is repeated to 8" in result.stdout and "PSNR" in result.stdout
    )
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "ä clip_reconstructed.mp4",
        "ä clip_reconstructed.mp4.json",
    ]


def test_tokens_there_and_back_of_a_video_longer_than_a_clip(tmp_path):
    from dera.data import read_clip
    from dera.streams import load_tokenizer

    tokenizer = load_tokenizer(checkpoint_path("pocket-tokenizer-tiny"))
    long = tmp_path / ("n" * 245 + ".mp4")
    write_video(tmp_path / "a.mp4", render(sample_factors(1, seed=5), 20, 64)[0])
    (tmp_path / "a.mp4").rename(long)
    assert dera("reconstruct", long, "--out", tmp_path / "r").returncode == 0
    (shown,) = (tmp_path / "r").glob("*.mp4")
    side_by_side = read_clip(shown, 16, 64)
    assert side_by_side.shape[1] == 16

    for kind in "npy", "json":
        done = dera("tokenize", long, "--kind", kind, "--out", tmp_path)
        assert done.returncode == 0, done.stderr
        assert f"2 clips of {tokenizer.num_codes} codes" in done.stdout
        (tokens,) = tmp_path.glob(f"*nn.{kind}")
        back = dera("reconstruct", "--tokens", tokens, "--out", tmp_path / kind)
        assert back.returncode == 0 and "2 clips" in back.stdout, back.stderr
    videos = [next((tmp_path / kind).glob("*.mp4")) for kind in ("npy", "json")]
    assert torch.equal(*(read_clip(video, 16, 32) for video in videos))

    rows = np.load(next(tmp_path.glob("*nn.npy")))
    for name, values in dict(
        wide=np.zeros((1, tokenizer.num_codes + 1), int),
        high=np.full((1, tokenizer.num_codes), 10**6),
        low=np.full((1, tokenizer.num_codes), -1),
        real=np.zeros((1, tokenizer.num_codes)),
        none=rows[:0],
    ).items():
        np.save(tmp_path / f"{name}.npy", values)
        refused(dera("reconstruct", "--tokens", tmp_path / f"{name}.npy"), f"{name}.npy")
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY\x01\x00")
    (tmp_path / "junk.json").write_text("{}")
    for name in "cut.npy", "junk.json", "absent.npy":
        refused(dera("reconstruct", "--tokens", tmp_path / name), name)
    other = tmp_path / "other.json"
    content = json.loads(next(tmp_path.glob("*nn.json")).read_text())
    other.write_text(json.dumps(content | dict(tokenizer="another")))
    refused(dera("reconstruct", "--tokens", other), "another tokenizer")
    refused(dera("reconstruct"), "--tokens")
    refused(dera("tokenize"), "at least one video")


def test_a_result_of_other_settings_is_not_overwritten(tmp_path):
    video = tmp_path / "a.mp4"
    write_video(video, render(sample_factors(1, seed=3), 8, 64)[0])
    ask = ("reconstruct", video, "--out", tmp_path / "out")
    assert dera(*ask).returncode == 0 and dera(*ask).returncode == 0
    refused(dera(*ask, "--sampling", "uniform"), "made otherwise", "--fresh")
    assert dera(*ask, "--sampling", "uniform", "--fresh").returncode == 0
    clips = ("generate", *PAIR, "--count", 1, "--out", tmp_path / "g", "--classes")
    assert dera(*clips, "0").returncode == 0
    refused(dera(*clips, "1"), "other settings")
    assert dera(*clips, "1", "--fresh").returncode == 0
    assert len(list((tmp_path / "g").glob("*.mp4"))) == 1


def test_classes_named_by_digits_and_strange_file_names(capsys):
    from dera.tools.sampling import class_number, class_numbers, file_stems

    names = ["7", "3", "12", "0", "1"]
    assert class_number("3", names) == 1
    assert "class number 3 is named 0" in capsys.readouterr().err
    assert class_number("2", names) == 2 and not capsys.readouterr().err
    assert class_number("WALK", ["run", "walk"]) == 1
    assert [class_number(word, ["jump", "Jump"]) for word in ("jump", "Jump")] == [0, 1]
    for wrong, known in (("JUMP", ["jump", "Jump"]), ("a", ["a", "b", "a"]), ("9", names)):
        with pytest.raises(InputError, match="number"):
            class_number(wrong, known)
    assert class_numbers((), ["one"]) == [0] and class_numbers((), names) == [0, 4]

    strange = ["run", "RUN", "a/b", "a\\\\b", "", "..", "é" * 200, "é" * 199, "run-0", "x\ud8ff"]
    stems = file_stems(strange)
    assert len({stem.casefold() for stem in stems}) == len(strange)
    for stem in stems:
        assert len(stem.encode()) < 230 and "/" not in stem and stem.strip(". ")


def test_numbers_that_mean_nothing_are_refused_before_anything_is_drawn(tmp_path):
    for words in (
        ("--seed", 2**63),
        ("--seed", -1),
        ("--batch-size", -1),
        ("--temperature", "nan"),
        ("--temperature", "1e-310"),
        ("--temperature", "-inf"),
        ("--guidance", "nan"),
        ("--count", 0),
    ):
        out = tmp_path / "out"
        refused(dera("generate", *PAIR, "--classes", "0", "--out", out, *words), str(words[1])[:4])
        assert not out.exists()


def test_what_is_not_named_is_the_last_run(tmp_path, monkeypatch):
    from dera.tools.videos import TOKENIZERS, newest

    monkeypatch.chdir(tmp_path)
    assert newest(TOKENIZERS) is None
    video = tmp_path / "a.mp4"
    write_video(video, render(sample_factors(1, seed=3), 8, 64)[0])
    said = dera("tokenize", video)
    assert "the shipped one" in said.stderr and "knows only the pocket world" in said.stderr
    for name in "first/tokenizer", "second/tokenizer/tokenizer":
        place = tmp_path / "runs" / name
        shutil.copytree(checkpoint_path("pocket-tokenizer-tiny"), place)
        os.utime(place / "model.safetensors")
    said = dera("tokenize", video)
    assert "second" in said.stderr and "pocket world" not in said.stderr


def test_what_is_missing_is_listed():
    shown = dera("weights")
    assert shown.returncode == 0 and "i3d" in shown.stdout and "licence" in shown.stdout
    missing = int(shown.stdout.splitlines()[-1].split(",")[1].split()[0])
    assert dera("weights", "--check").returncode == int(missing > 0)


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

    def train(*words):
        return dera("train-tokenizer", "--out", out, *words)

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
    wanted = ("--data", data, "--tokenizer", run / "tokenizer" / "tokenizer")
    wanted += ("--out", run / "generator", "--steps", 2, "--batch-size", 8)

    def again(*more):
        return dera("train-ar", *wanted, *more)

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


def test_ctrl_c_keeps_the_finished_clips(tmp_path, monkeypatch):
    from dera.ar import Generator

    real = Generator.generate_batches

    def stopped(self, *args, **kwargs):
        for number, batch in enumerate(real(self, *args, **kwargs)):
            if number == 2:
                raise KeyboardInterrupt
            yield batch

    out = tmp_path / "clips"
    ask = ("generate", *PAIR, "--classes", 0, 1, 2, "--count", 1, "--batch-size", 1, "--out", out)
    monkeypatch.setattr(Generator, "generate_batches", stopped)
    done = dera(*ask)
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == f"dera: stopped; 2 finished clips are in {out}"
    assert len(list(out.glob("*.mp4"))) == 2
    assert len(json.loads((out / "generated.json").read_text())["clips"]) == 2
    monkeypatch.undo()
    before = {p.name: p.read_bytes() for p in out.glob("*.mp4")}
    assert dera(*ask).returncode == 0
    assert len(list(out.glob("*.mp4"))) == 3
    assert all((out / name).read_bytes() == content for name, content in before.items())


def test_ctrl_c_says_what_is_true(monkeypatch):
    from dera.tools import cli

    def stopped(_):
        raise KeyboardInterrupt

    goes_on = "dera: stopped; the same command goes on from what is done"
    for words, said in (
        (["reconstruct", "x.mp4"], "dera: stopped"),
        (["bench", "render"], "dera: stopped"),
        (["audit", "x"], "dera: stopped"),
        (["evaluate", "--data", "x"], goes_on),
        (["train-ar", "--fresh"], goes_on.replace("command", "command without --fresh")),
    ):
        command = cli.COMMANDS[words[0]]._replace(run=stopped)
        monkeypatch.setitem(cli.COMMANDS, words[0], command)
        done = dera(*words)
        assert done.returncode == 130 and done.stderr == said + "\n", words


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
    n, codes = tokenizer.num_codes, tokenizer.config.codebook_size
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
    refused(dera("audit", tmp_path / "nowhere", "--out", tmp_path / "n.json"), "nowhere")
    refused(dera("prepare", root, root / "within"), "elsewhere")
    refused(dera("prepare", root, tmp_path / "small", "--size", 24), "--fresh", "another folder")


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

    result = bench_train("tiny", 2, 1, precision="no", out=str(tmp_path / "t.json"))
    half = bench_train("tiny", 1, 1, precision="no", teachers=False)
    assert json.loads((tmp_path / "t.json").read_text()) == result
    assert "bench train --preset tiny --batch 2" in table(result)
    assert "--no-teachers" in half["command"]
    full, bare = ({row["part"]: row for row in found["rows"]} for found in (result, half))
    parts = "encoder", "decoder", "teachers", "perceptual", "discriminator", "SACP", "optimiser"
    assert all(full[part]["seconds"] > 0 for part in (*parts, "data"))
    missing = {part for part in parts if bare[part]["seconds"] is None}
    assert missing == {"teachers", "SACP"}
    for rows in full, bare:
        shares = [rows[part]["share"] or 0 for part in (*parts, "rest")]
        assert sum(shares) == pytest.approx(1)
    for part in "decoder", "perceptual", "discriminator":
        assert full[part]["teraflop"] == pytest.approx(2 * bare[part]["teraflop"])
    assert full["step"]["mfu_matmul"] > 0 and full["step"]["mfu_nominal"] is None


@pytest.mark.parametrize("shape", [dict(), dict(dim=96, decoder_depth=2, num_motion=32)], ids=str)
def test_operations_of_the_decoder_by_hand(shape):
    "Three times each product of matrices; attention's two and, backward, five."

    from dera.streams import DeRATokenizer, TokenizerConfig
    from dera.tools.step_in_parts import operation_counter

    config = TokenizerConfig.preset("tiny", **shape)
    latents = torch.rand(1, config.num_tokens, config.latent_dim, requires_grad=True)
    tokenizer = DeRATokenizer(config)
    with operation_counter() as counter:
        tokenizer.decode(latents).sum().backward()
    d, depth = config.dim, config.decoder_depth
    patches = math.prod(config.grid)
    n = patches + config.num_tokens
    blocks = depth * 24 * n * d * d
    ends = 2 * config.num_tokens * config.latent_dim * d
    ends += 2 * patches * d * 3 * config.patch_t * config.patch_p**2
    by_hand = 3 * (blocks + ends) + 3.5 * depth * 4 * n * n * d
    assert counter.get_total_flops() == pytest.approx(by_hand, rel=0.01)


def test_nominal_peaks_by_the_names_that_cards_have():
    from dera.tools.training_speed import nominal_peak

    for card, teraflops in {
        "NVIDIA H100 80GB HBM3": 989,
        "NVIDIA H100 PCIe": 756,
        "NVIDIA H100 NVL": 836,
        "NVIDIA H200": 989,
        "NVIDIA A100-SXM4-40GB": 312,
        "NVIDIA A100 80GB PCIe": 312,
        "NVIDIA L40S": 362,
    }.items():
        assert nominal_peak(card) == teraflops * 1e12, card
    assert nominal_peak("Tesla V100-SXM2-16GB") is None


def test_bench_names_what_it_does_not_know():
    from dera.tools.bench import bench_generate, bench_train

    wrong = [dict(preset="huge"), dict(batch=0), dict(precision="fp8")]
    for changes in wrong:
        with pytest.raises(InputError):
            bench_train(**dict(preset="tiny") | changes)
    for changes in dict(sizes=["1B"]), dict(batches=[0]), dict(precision="fp64"):
        with pytest.raises(InputError):
            bench_generate(**changes)


def test_the_five_lines_of_the_readme(tmp_path, monkeypatch, root):
    readme = (root / "README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0]
    for seed, name in enumerate("ab"):
        write_video(tmp_path / f"{name}.mp4", render(sample_factors(1, seed=seed), 16, 64)[0])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(root / "data")
    names = {}
    exec(code, names)
    assert names["reconstruction"].shape == names["swapped"].shape == (1, 3, 8, 32, 32)
