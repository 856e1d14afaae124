"The whole pipeline, small: files, stages, resuming, sameness, the page in a browser."

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from dera.runtime.errors import InputError
from dera.tools.demo import Demo, run_demo

SMALL = dict(clips=600, tokenizer_steps=6, generator_steps=6, per_class=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "run"
    return folder, run_demo(Demo(out=str(folder), **SMALL))


def test_everything_is_there(run):
    folder, metrics = run
    for name in [
        "metrics.json",
        "report.html",
        "demo.json",
        "tokens.npy",
        "generated.safetensors",
        "tokenizer/tokenizer/model.safetensors",
        "generator/generator/model.safetensors",
    ]:
        assert (folder / name).stat().st_size > 0, name
    assert len(list((folder / "data").glob("*/*.mp4"))) == 600
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert not [p for p in folder.rglob("*") if p.suffix in (".part", ".tmp")]


def test_numbers_are_sane(run):
    m = run[1]
    assert all(math.isfinite(v) for v in m.values())
    assert (
        m["psnr_first_frame"] < m["psnr_temporal_mean"] < m["psnr"]
    )  # the shipped tokenizer, hardly trained on
    assert m["psnr"] > m["psnr_without_motion"] + 2 and m["psnr"] > m["psnr_without_appearance"] + 1
    assert m["code_usage"] >= 0.5 and 0 < m["ssim"] < 1
    assert not any("fvd" in k.lower() for k in m) and any(
        k.startswith("frechet[pocket-video]") for k in m
    )
    assert m["class recognised, real"] > 0.9


def test_second_call_changes_nothing(run):
    folder, metrics = run
    before = (
        (folder / "tokenizer" / "log.jsonl").read_text(),
        (folder / "generated.safetensors").stat().st_mtime_ns,
    )
    assert run_demo(Demo(out=str(folder), **SMALL)) == metrics
    assert before == (
        (folder / "tokenizer" / "log.jsonl").read_text(),
        (folder / "generated.safetensors").stat().st_mtime_ns,
    )


def test_another_configuration_is_refused(run):
    with pytest.raises(InputError, match="another seed.*--fresh"):
        run_demo(Demo(out=str(run[0]), seed=1, **SMALL))
    with pytest.raises(InputError, match="at least 600"):
        run_demo(Demo(out=str(run[0].parent / "x"), clips=10))
    assert not (run[0].parent / "x").exists()


def test_same_seed_same_metrics(run, tmp_path):
    "A run that was stopped in the tokenizer's training and went on gives the same numbers as one that was not."
    from dera.tools import demo as module

    small = Demo(out=str(tmp_path / "again"), **SMALL)
    folder = module._open(small)
    shutil.copytree(run[0] / "data", folder / "data")  # written twice in test_pocket
    module.train_tokenizer(
        module.tokenizer_training(small, folder), folder / "tokenizer", stop_after=3
    )
    assert run_demo(small) == run[1]
    assert torch.equal(*(load_file(f / "generated.safetensors")["video"] for f in (run[0], folder)))


def test_page_in_a_browser(run):
    from browser import check_page

    seen = check_page(run[0] / "report.html")
    assert seen["images"] == 5 and not (seen["broken"] or seen["errors"] or seen["outside"]), seen
