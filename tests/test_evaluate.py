"Evaluations against the metrics themselves; stopped and continued; what they refuse before they start."

import base64
import copy
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch

from dera.ar import Generator, GeneratorConfig
from dera.data import VideoClips
from dera.metrics import FrechetVideoDistance, load_extractor, load_tokenizer, psnr, ssim
from dera.pocket import PocketClips, render, sample_factors, write_dataset
from dera.quantize import codebook_stats
from dera.runtime.checkpoints import checkpoint_path, load_model
from dera.runtime.errors import InputError
from dera.tools import evaluate
from dera.tools import evaluate_generator as evaluate_generator_room
from dera.tools.evaluate import (
    evaluate_generator,
    evaluate_prediction,
    evaluate_tokenizer,
    evaluation_table,
    run_evaluation,
)
from dera.tools.evidence import evidence, evidence_table, nearest_training_clips
from dera.tools.parts import run_parts
from dera.tools.protocols import (
    PROTOCOLS,
    Protocol,
    extractor_for,
    named_protocol,
    protocol_rows,
    refuse_missing_weights,
)
from dera.tools.real_video import h264, reconstruct_beside_h264


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world") / "data"
    write_dataset(root, 80, seed=3)
    return root


@pytest.fixture(scope="module")
def shipped():
    return load_tokenizer(checkpoint_path("pocket-tokenizer-tiny"))


@pytest.fixture(scope="module")
def drawing():
    return load_model(Generator, checkpoint_path("pocket-generator-tiny"))


def uniform(name, **changes):
    return named_protocol(name, sampling="uniform", **changes)


def frechet_of(result):
    (value,) = (v for k, v in result["values"].items() if k.startswith("frechet"))
    return value


def distance_of(real, fake):
    score = FrechetVideoDistance(load_extractor())
    score.update(real, fake)
    return score.compute(allow_few=True)


# --- protocols


def test_protocols_are_those_of_the_papers():
    r, g, h, k = (PROTOCOLS[n] for n in ("larp-rfvd", "larp-gfvd", "heldout", "k600-fp"))
    paper = ("train", "native", 9537, 16, 128)
    assert (r.split, r.sampling, r.samples, r.num_frames, r.size) == paper
    assert (g.split, g.sampling, g.samples) == ("train", "all", 10000) and h.split == "test"
    assert (k.score_size, k.samples, k.given, k.num_frames) == (64, 50000, 5, 16)
    assert {protocol.precision for protocol in PROTOCOLS.values()} == {"float32"}


def test_a_changed_protocol_says_so():
    p = named_protocol("larp-rfvd", size=64, seed=5)
    assert p.name == "larp-rfvd changed in size"
    assert p.change(num_frames=8).name == "larp-rfvd changed in num_frames, size"
    assert p.change(size=128, seed=0) == PROTOCOLS["larp-rfvd"]  # set back
    assert p.change(num_frames=8).change(size=128).name == "larp-rfvd changed in num_frames"
    assert p.change(precision="bf16").name == "larp-rfvd changed in precision, size"
    own = Protocol("own", None, "all")  # no value to go back to
    assert own.change(size=64).change(given=2, size=128).name == "own changed in given, size"
    assert p.change(size=64) == p and PROTOCOLS["larp-rfvd"].name == "larp-rfvd"
    with pytest.raises(InputError, match="larp-gfvd"):
        named_protocol("fvd")
    with pytest.raises(InputError, match="num_frames"):
        p.change(frames=8)


def test_a_protocols_line_has_everything():
    p = named_protocol("larp-rfvd", size=64, seed=5)
    extractor = load_extractor("pocket-video")
    line = p.describe(extractor, 100, 90)
    wanted = (extractor.name, "64", "antialias", "16 frames", "stride 1", "native", "split train")
    for part in (*wanted, "100 real", "90 fake", "seed 5", "32 x 32", "computed in float32"):
        assert part in line, part
    changes = (
        dict(size=65),
        dict(num_frames=8),
        dict(split="test"),
        dict(sampling="uniform"),
        dict(seed=6),
        dict(given=2),
        dict(score_size=32),
        dict(precision="tf32"),
    )
    lines = {p.change(**change).describe(extractor, 100, 90) for change in ({}, *changes)}
    lines |= {p.describe(None, 100, 90), p.describe(extractor, 100, 91)}
    assert len(lines) == 11


def test_rows_of_a_protocol_are_a_seeded_choice():
    p = named_protocol("heldout", samples=30)
    rows = protocol_rows(p, 100)
    assert rows.unique().numel() == 30 and rows.max() > 60  # not the first ones
    assert torch.equal(rows, protocol_rows(p, 100))
    assert not torch.equal(rows, protocol_rows(p.change(seed=1), 100))
    assert len(protocol_rows(PROTOCOLS["heldout"], 7)) == 7
    assert protocol_rows(p, 20).sort().values.tolist() == list(range(20))
    assert protocol_rows(p, 20, repeat=True).bincount(minlength=20).tolist().count(2) == 10
    with pytest.raises(InputError, match="no clips"):
        protocol_rows(p, 0)


def test_the_papers_numbers_choose_i3d_and_all_missing_weights_are_one_line(tmp_path, monkeypatch):
    for name, protocol in PROTOCOLS.items():
        assert extractor_for(protocol) == "i3d", name
        assert extractor_for(protocol.change(num_frames=8, size=32)) == "pocket-video"
    monkeypatch.setenv("DERA_I3D", str(tmp_path / "absent.pt"))
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path))
    try:
        with pytest.raises(InputError) as error:
            refuse_missing_weights("i3d", lpips_net="alex")
        refuse_missing_weights("i3d", download=True)
        refuse_missing_weights("pocket-video")
    finally:
        torch.hub.set_dir(before)
    line = str(error.value)
    assert "I3D" in line and "absent.pt" in line and "LPIPS-alex" in line and "\n" not in line


# --- parts and folders


def squares(rows, clips):
    return dict(square=np.array(rows) ** 2)


def test_parts_load_their_clips_in_any_number_of_processes(tmp_path):
    def load(rows):
        return torch.tensor(rows) * 10

    def work(rows, clips):
        return dict(row=np.array(rows), clip=clips)

    for workers in (1, 2):
        found = run_parts(work, 120, tmp_path / str(workers), {}, load=load, workers=workers)
        assert found["row"].tolist() == list(range(120))
        assert found["clip"].tolist() == [10 * i for i in range(120)]

    def broken(rows):
        raise InputError(f"clip {rows[0]} is broken")

    for workers in (1, 2):
        with pytest.raises(InputError, match="^clip (0|50) is broken$"):
            run_parts(work, 60, tmp_path / f"x{workers}", {}, load=broken, workers=workers)


def test_an_accelerator_has_its_clips_decoded_by_workers(tmp_path):
    "On meta, as on a GPU, the workers of a DataLoader read and this process computes."
    own = os.getpid()

    def load(rows):
        return torch.full((len(rows),), os.getpid())

    def work(rows, clips):
        return dict(reader=clips, computer=np.full(len(rows), os.getpid()))

    found = run_parts(work, 120, tmp_path, {}, load=load, workers=2, device="meta")
    assert set(found["computer"].tolist()) == {own} and own not in found["reader"].tolist()
    assert len(set(found["reader"].tolist())) == 2


def test_a_folder_is_continued_refused_or_started_over(world, shipped, tmp_path):
    four = uniform("heldout", samples=4)
    evaluate_tokenizer(shipped, world, tmp_path / "a", four)
    for other in (uniform("heldout", samples=5), uniform("heldout", samples=4, seed=1)):
        with pytest.raises(InputError, match="another evaluation.*--fresh"):
            evaluate_tokenizer(shipped, world, tmp_path / "a", other)
    (part,) = (tmp_path / "a" / "parts").glob("part-*")
    part.write_text("broken")
    with pytest.raises(InputError, match="damaged"):
        evaluate_tokenizer(shipped, world, tmp_path / "a", four)
    five = uniform("heldout", samples=5)
    result = evaluate_tokenizer(shipped, world, tmp_path / "a", five, fresh=True)
    assert len(result["clips"]) == 5

    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_text("{}")  # of a training
    for fresh in (False, True):
        with pytest.raises(InputError, match="holds something else .config.json"):
            evaluate_tokenizer(shipped, world, tmp_path / "b", four, fresh=fresh)
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["config.json"]


# --- a tokenizer


def test_evaluate_tokenizer_against_the_metrics_themselves(world, shipped, tmp_path):
    result = evaluate_tokenizer(shipped, world, tmp_path, uniform("larp-rfvd"))
    data = VideoClips(world, 8, 32, "uniform", split="train", seed=0)
    x = torch.stack([item["video"] for item in data])
    with torch.no_grad():
        output = shipped(x)
    y = output.video.clamp(0, 1)
    values = result["values"]
    assert values["psnr"] == pytest.approx(psnr(y, x), abs=1e-4)
    assert values["ssim"] == pytest.approx(ssim(y, x), abs=1e-5)
    clip_mean = psnr(y, x, per_clip=True).mean().item()
    assert values["psnr_mean_of_clips"] == pytest.approx(clip_mean, abs=1e-4)
    assert frechet_of(result) == pytest.approx(distance_of(x, y), rel=1e-3)
    assert f"frechet[{load_extractor().name}, only 64 samples for 96 dimensions]" in values
    size = shipped.config.codebook_size
    usage = codebook_stats(output.encoded.indices, size)["usage"]
    assert values["code_usage"] == pytest.approx(usage, abs=0.005)
    assert len(result["clips"]) == 64 and "split train" in result["protocol"]

    held = result["held_out"]
    assert "split test" in held["protocol"] and len(held["clips"]) == 16
    assert held["values"]["psnr"] != values["psnr"]
    text = evaluation_table(result)
    assert "split test" in text and f"{values['psnr']:.4f}" in text and "held-out" in text


def test_the_page_moves_and_the_json_is_json(world, shipped, tmp_path):
    result = evaluate_tokenizer(shipped, world, tmp_path, uniform("heldout", samples=12))

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    stored = json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=refuse)
    assert stored["values"]["psnr"] == result["values"]["psnr"]
    page = (tmp_path / "report.html").read_text()
    worst = min(result["clips"], key=lambda clip: clip["psnr"])
    assert worst["file"].replace("_", " ") in page.replace("<wbr>", "")
    assert "Worst" in page and "Best" in page and page.count("data:image/png") == 2
    assert "http://" not in page and "https://" not in page
    assert b"acTL" in base64.b64decode(re.search(r'base64,([^"]+)', page)[1])  # they move


def test_evaluation_goes_on_and_any_number_of_processes_agrees(
    world, shipped, tmp_path, monkeypatch
):
    protocol = uniform("heldout", split=None, samples=64)  # without held-out clips beside them
    calls = []
    measure = evaluate.measure_reconstructions

    def stopping(rows, clips, evaluation):
        calls.append(len(rows))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(rows, clips, evaluation)

    monkeypatch.setattr(evaluate, "measure_reconstructions", stopping)
    with pytest.raises(KeyboardInterrupt):
        evaluate_tokenizer(shipped, world, tmp_path / "a", protocol)
    found = evaluate_tokenizer(shipped, world, tmp_path / "a", protocol)
    monkeypatch.undo()
    assert calls[:3] == [50, 14, 14]  # the first part was kept
    whole = evaluate_tokenizer(shipped, world, tmp_path / "b", protocol)
    two = evaluate_tokenizer(shipped, world, tmp_path / "c", protocol, workers=2)
    for other in (found, two):
        for name, value in whole["values"].items():
            assert other["values"][name] == pytest.approx(value, rel=1e-5), name


def test_bf16_is_said_and_moves_the_numbers_a_little(world, shipped, tmp_path):
    exact, half = (
        evaluate_tokenizer(
            shipped, world, tmp_path / name, uniform("heldout", samples=8, precision=name)
        )
        for name in ("float32", "bf16")
    )
    assert "computed in float32" in exact["protocol"] and "computed in bf16" in half["protocol"]
    assert "changed in" in half["protocol"] and "precision" in half["protocol"]
    difference = abs(exact["values"]["psnr"] - half["values"]["psnr"])
    assert 0 < difference < 0.5
    with pytest.raises(InputError, match="unknown precision 'fp8'"):
        protocol = uniform("heldout", samples=4, precision="fp8")
        evaluate_tokenizer(shipped, world, tmp_path / "x", protocol)


def test_evaluation_of_bad_input(world, shipped, tmp_path):
    (tmp_path / "empty").mkdir()
    no_split = uniform("heldout", split=None)
    with pytest.raises(InputError, match="no videos"):
        evaluate_tokenizer(shipped, tmp_path / "empty", tmp_path / "a", no_split)
    with pytest.raises(InputError, match="1 samples have no covariance"):
        evaluate_tokenizer(shipped, world, tmp_path / "b", uniform("heldout", samples=1))
    broken = copy.deepcopy(shipped)
    broken.out.bias.data[:] = torch.nan
    for workers in (1, 2):
        with pytest.raises(InputError, match="a reconstruction holds NaN") as error:
            four = uniform("heldout", samples=4)
            evaluate_tokenizer(broken, world, tmp_path / f"c{workers}", four, workers=workers)
        assert "\n" not in str(error.value)
    alone = tmp_path / "plain"
    alone.mkdir()
    for file in sorted(world.rglob("*.mp4"))[:4]:
        shutil.copy(file, alone)
    with pytest.raises(InputError, match="split"):
        evaluate_tokenizer(shipped, alone, tmp_path / "d", uniform("heldout"))
    assert len(evaluate_tokenizer(shipped, alone, tmp_path / "e", no_split)["clips"]) == 4


def test_file_names_that_are_no_text_are_shown_with_replacement(world, shipped, tmp_path):
    folder = tmp_path / "names"
    folder.mkdir()
    for i, file in enumerate(sorted(world.rglob("*.mp4"))[:3]):
        name = [b"caf\xe9.mp4", b"\xff\xfe.mp4", b"plain.mp4"][i]
        shutil.copy(file, os.path.join(os.fsencode(folder), name))
    result = evaluate_tokenizer(shipped, folder, tmp_path / "out", uniform("heldout", split=None))
    names = {clip["file"] for clip in result["clips"]}
    assert names == {"caf\ufffd", "\ufffd\ufffd", "plain"}
    evaluation_table(result).encode()
    assert "Worst" in (tmp_path / "out" / "report.html").read_text("utf-8")


def test_clips_without_files_can_be_evaluated(shipped, tmp_path):
    protocol = named_protocol("heldout", split="train", samples=8)
    result = evaluate_tokenizer(shipped, "pocket=64", tmp_path, protocol)
    rows = protocol_rows(protocol, 64)
    clips = PocketClips(64, 8, 32).factors[rows]
    x = (render(clips, 8, 32) * 255).round() / 255
    with torch.no_grad():
        y = shipped(x).video.clamp(0, 1)
    assert result["values"]["psnr"] == pytest.approx(psnr(y, x), abs=0.02)
    assert "split test" in result["held_out"]["protocol"]


# --- generation and prediction


def test_evaluate_generator(world, shipped, drawing, tmp_path, monkeypatch):
    protocol = named_protocol("larp-gfvd", samples=6)  # chunks
    result = evaluate_generator(drawing, shipped, world, tmp_path / "a", protocol, guidance=1.5)
    with torch.no_grad():
        indices = drawing.generate(labels=torch.arange(6), guidance=1.5, seed=list(range(6)))
        video = shipped.decode(indices).clamp(0, 1)
    data = VideoClips(world, 8, 32, "all", split="train", seed=0)
    assert len(data) == 128
    rows = protocol_rows(protocol, len(data)).tolist()
    real = torch.stack([data[i]["video"] for i in rows])
    assert frechet_of(result) == pytest.approx(distance_of(real, video), rel=1e-3)
    assert "guidance 1.5" in result["protocol"] and "6 real and 6 fake" in result["protocol"]
    assert "split test" in result["held_out"]["protocol"] and len(result["clips"]) == 6
    assert len(list((tmp_path / "a").glob("reference-*.npz"))) == 2

    def fail(*args, **kwargs):
        pytest.fail("the reference was computed again")

    monkeypatch.setattr(evaluate_generator_room, "measure_real", fail)
    again = evaluate_generator(drawing, shipped, world, tmp_path / "a", protocol, guidance=1.5)
    assert again["values"] == result["values"]
    other = copy.deepcopy(drawing)
    size = shipped.config.codebook_size
    for name, codes in (("another", size), ("", size - 12)):  # one that names none must fit in size
        other.config.tokenizer, other.config.vocab_size = name, codes
        with pytest.raises(InputError, match="another tokenizer"):
            evaluate_generator(other, shipped, world, tmp_path / "b", protocol)


def test_evaluate_prediction_scores_the_predicted_frames_only(world, shipped, drawing, tmp_path):
    torch.manual_seed(0)
    config = shipped.config
    sizes = dict(vocab_size=config.codebook_size, num_tokens=config.num_codes, depth=1)
    generator = Generator(
        GeneratorConfig.preset("tiny", **sizes, num_classes=1, prefix_tokens=config.num_codes)
    ).eval()
    protocol = uniform("k600-fp", split="test", samples=20, score_size=0)
    result = evaluate_prediction(generator, shipped, world, tmp_path / "a", protocol)
    data = VideoClips(world, 8, 32, "uniform", split="test", seed=0)
    rows = protocol_rows(protocol, 16, repeat=True).tolist()
    assert len(rows) == 20
    x = torch.stack([data[i]["video"] for i in rows])
    known = x[:, :, [0, 1, 2, 3, 4, 4, 4, 4]]
    with torch.no_grad():
        prefix = shipped.encode(known).indices
        y = shipped.decode(generator.generate(prefix=prefix, seed=list(range(20)))).clamp(0, 1)
    found = result["values"]["psnr"]
    assert found == pytest.approx(psnr(y[:, :, 5:], x[:, :, 5:]), abs=1e-3)
    assert "5 of them given" in result["protocol"]
    y[:, :, :5] = x[:, :, :5]
    assert frechet_of(result) == pytest.approx(distance_of(x, y), rel=1e-3)

    scored_small = protocol.change(score_size=16)
    small = evaluate_prediction(generator, shipped, world, tmp_path / "b", scored_small)
    assert "scored at 16 x 16" in small["protocol"] and small["values"]["psnr"] > found
    with pytest.raises(InputError, match="no frames to continue"):
        nothing = protocol.change(given=0)
        evaluate_prediction(generator, shipped, world, tmp_path / "c", nothing)
    with pytest.raises(InputError, match="continues no prefix"):
        evaluate_prediction(drawing, shipped, world, tmp_path / "c", protocol)


# --- the function of the command line


def test_the_command_finds_what_is_missing_before_it_starts(world, tmp_path, monkeypatch):
    monkeypatch.setenv("DERA_I3D", str(tmp_path / "absent.pt"))
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path))
    out = tmp_path / "out"
    try:
        for words in (dict(lpips_net="vgg"), dict(extractor="i3d"), {}):
            words = dict(data="" if not words else str(world)) | words
            with pytest.raises(InputError) as error:
                run_evaluation(out=str(out), **words)
            assert "\n" not in str(error.value) and not out.exists()
    finally:
        torch.hub.set_dir(before)


# --- evidence


def test_evidence_is_the_metrics_on_clips_of_its_seed(shipped, drawing, tmp_path):
    settings = dict(num_clips=120, per_class=1, num_training_clips=300, num_nearest=4)
    found = evidence(shipped, drawing, tmp_path, **settings)
    x = render(sample_factors(120, 2**43), 8, 32)
    with torch.no_grad():
        y = torch.cat([shipped(part).video.clamp(0, 1) for part in x.split(50)])
    assert found["reconstruction"]["psnr"] == pytest.approx(psnr(y, x), abs=1e-3)
    assert found["reconstruction"]["recognised_in_originals"]["shape"] > 0.95
    made = found["generation"]
    assert sum(made["right"].values()) == pytest.approx(1)
    assert made["right"]["both"] == pytest.approx(made["recognised"]["class"])
    shapes = torch.tensor(made["confusion"]["shape"])
    assert shapes.sum(1).tolist() == [14] * 8
    assert shapes.diag().sum().item() / 112 == pytest.approx(made["recognised"]["shape"])
    assert len(made["nearest"]["pairs"]) == 4 and made["nearest"]["training_clips"] == 300
    assert "guidance 2.0" in found["protocol"] and "float32" in found["protocol"]
    assert {"preset", "seed", "steps", "device", "torch", "commit"} <= found.keys()
    assert found["preset"] == "tiny"
    assert json.loads((tmp_path / "evidence.json").read_text()) == json.loads(json.dumps(found))
    assert "generated: shape" in evidence_table(found)
    with pytest.raises(InputError, match="holds evidence already.*--fresh"):
        evidence(shipped, out=tmp_path, num_clips=120)


def test_the_nearest_training_clip_of_a_training_clip_is_itself():
    training = PocketClips(200, 8, 32)
    rows = torch.tensor([3, 150, 77])
    clips = render(training.factors[rows], 8, 32)
    found = nearest_training_clips(clips + 1e-4, training, part=64)
    assert torch.equal(found.rows, rows) and (found.psnr > 60).all()


def test_evidence_with_several_codes_a_token(tmp_path):
    from dera.streams import DeRATokenizer, TokenizerConfig

    torch.manual_seed(0)
    shape = dict(encoder_depth=1, decoder_depth=1, codes_per_token=4, codebook_size=64)
    shape |= dict(num_appearance=4, num_motion=12)
    tokenizer = DeRATokenizer(TokenizerConfig.preset("tiny", **shape)).eval()
    torch.nn.init.normal_(tokenizer.out.weight)  # an untrained one draws grey clips, all alike
    sizes = dict(vocab_size=64, num_tokens=tokenizer.num_codes, depth=1)
    generator = Generator(GeneratorConfig.preset("tiny", **sizes, num_classes=112)).eval()
    found = evidence(tokenizer, generator, num_clips=97, per_class=1, num_nearest=0)
    assert found["reconstruction"]["codes"] == 4 * tokenizer.num_tokens
    assert found["steps"] == "unknown" and "nearest" not in found["generation"]
    other = Generator(GeneratorConfig.preset("tiny", **sizes, num_classes=3))
    with pytest.raises(InputError, match="3 classes"):
        evidence(tokenizer, other, num_clips=97)
    with pytest.raises(InputError, match="96 feature dimensions"):
        evidence(tokenizer, num_clips=12)


# --- another codec


def test_h264_is_repeatable_and_pays_for_quality():
    x = render(sample_factors(1, 4), 8, 32)[0]
    low, low_bits = h264(x)
    high, high_bits = h264(x, 15)
    again, again_bits = h264(x)
    assert low_bits == again_bits and torch.equal(low, again) and low.shape == x.shape
    assert high_bits > 2 * low_bits > 1000
    assert psnr(high[None], x[None]) > psnr(low[None], x[None]) + 4


def test_reconstruct_beside_h264(shipped):
    x = render(sample_factors(2, 4), 8, 32)
    r = reconstruct_beside_h264(shipped, x)
    bits = shipped.num_codes * np.log2(shipped.config.codebook_size)
    assert r["bits"] == [bits, bits] and r["bits_h264"] == [h264(v)[1] for v in x]
    expected = psnr(shipped(x).video.detach().clamp(0, 1), x, per_clip=True).tolist()
    assert r["psnr"] == pytest.approx(expected, abs=1e-3)
    assert r["psnr_h264"][1] == pytest.approx(psnr(r["h264"][1:], x[1:]))
    with pytest.raises(InputError, match="video"):
        reconstruct_beside_h264(shipped, x * torch.nan)
