"""What only a GPU can show: steps equal the CPU's, graphs equal plain decoding, commands run and resume.

They are skipped where there is no GPU; DERA_TEST_DEVICE=cpu rehearses them without one.
"""

import copy
import json
import os
from dataclasses import replace

import pytest
import torch

from dera.ar import Generator, GeneratorConfig, choose_tokens, uniform_rows
from dera.decoupling import token_swap
from dera.pocket import render, sample_factors
from dera.query import TokenizerConfig
from dera.runtime.measuring import computing_in
from dera.streams import DeRATokenizer, load_tokenizer
from dera.tools.bench import bench_generate, bench_render, bench_tokenizers, bench_train
from dera.train_ar import ARConfig, train_from_videos
from dera.train_tokenizer import (
    TokenizerTraining,
    build_state,
    build_tokenizer,
    train_step,
    train_tokenizer,
)

DEVICE = os.environ.get("DERA_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU"
)
TOKENIZER = "data/checkpoints/pocket-tokenizer-tiny"
GENERATOR = "data/checkpoints/pocket-generator-tiny"
ALL = dict(discriminator_weight=0.3, discriminator_start=0, prior_weight=0.06, quantizer_start=0)


def one_step(device, clips, **changes):
    "Losses of a step and the weights after it, in float32."
    options = dict(batch_size=len(clips), precision="no", warmup=0, perceptual="pocket-video")
    config = TokenizerTraining.preset("tiny", **(ALL | options | changes))
    torch.manual_seed(0)
    state = build_state(config, build_tokenizer(config), torch.device(device))
    with computing_in("float32", device):
        log, finite = train_step(config, state, clips.to(device), 1, 100)
    assert finite or config.precision == "fp16"  # whose scaler begins too high and comes down
    weights = {name: value.cpu() for name, value in state.tokenizer.state_dict().items()}
    return {name: float(value) for name, value in log.items() if value.numel() == 1}, weights


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(surgery="soft"),
        dict(accumulate=2),
        dict(lambda_a=0.0, lambda_m=0.0),
        dict(model="query", lambda_a=0.0),
        dict(quantizer="fsq", codes_per_token=1, prior_weight=0.0),
    ],
    ids=["sacp", "soft", "parts", "no-teacher", "query", "fsq"],
)
def test_a_training_step_equals_the_cpus(changes):
    # continuous latents: a draw of codes differs from device to device
    changes = dict(quantizer_start=50, prior_weight=0.0) | changes
    clips = render(sample_factors(4, 1), 8, 32)
    cpu_log, cpu_weights = one_step("cpu", clips, **changes)
    gpu_log, gpu_weights = one_step(DEVICE, clips, **changes)
    assert cpu_log.keys() == gpu_log.keys()
    for name, value in cpu_log.items():
        assert gpu_log[name] == pytest.approx(value, rel=1e-2, abs=1e-3), name
    for name, value in cpu_weights.items():
        # Muon and AdamW normalise, so a gradient near zero may move its weight either way
        assert (gpu_weights[name].float() - value.float()).abs().mean() < 1e-3, name


def test_a_quantised_step_with_everything_on():
    log, _ = one_step(DEVICE, render(sample_factors(4, 1), 8, 32))
    for name in ("quantizer", "adversarial", "prior", "align_a", "align_m", "psnr"):
        if name in log:
            assert log[name] == log[name], name
    assert {"quantizer", "adversarial", "prior"} <= log.keys()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_near(precision):
    clips = render(sample_factors(4, 1), 8, 32)
    options = dict(quantizer_start=50, prior_weight=0.0)
    whole, _ = one_step(DEVICE, clips, **options)
    half, _ = one_step(DEVICE, clips, precision=precision, **options)
    assert half["l1"] == pytest.approx(whole["l1"], rel=0.05)
    assert half["align_m"] == pytest.approx(whole["align_m"], abs=0.05)


def test_compiled_transformers_compute_the_same():
    clips = render(sample_factors(4, 1), 8, 32)
    options = dict(quantizer_start=50, prior_weight=0.0)
    eager, _ = one_step(DEVICE, clips, **options)
    compiled, _ = one_step(DEVICE, clips, compile=True, **options)
    for name in ("l1", "align_a", "align_m", "loss"):
        assert compiled[name] == pytest.approx(eager[name], rel=1e-2, abs=1e-3), name


@pytest.mark.parametrize("together", [1, 4])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_recorded_graphs_write_what_plain_steps_write(together, guidance):
    torch.manual_seed(0)
    config = GeneratorConfig(
        vocab_size=64,
        num_tokens=160,
        num_classes=5,
        dim=64,
        depth=3,
        heads=4,
        rotary=True,
        qk_norm=True,
        codes_per_step=together,
        class_everywhere=True,
    )
    model = Generator(config).eval().to(DEVICE)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    labels = torch.arange(5, device=DEVICE)
    with computing_in("float32", DEVICE):
        written = model.generate(labels, guidance=guidance, seed=7)
        again = model.generate(labels, guidance=guidance, seed=7)
        # teacher forcing on what was written must choose the same codes
        with torch.inference_mode():
            logits = model(written, labels)
            if guidance != 1:
                nothing = torch.full_like(labels, config.num_classes)
                without = model(written, nothing)
                logits = without + guidance * (logits - without)
    assert torch.equal(written, again)
    uniform = uniform_rows([7 + i for i in range(5)], config.num_tokens).to(DEVICE)
    chosen = [choose_tokens(logits[:, i], uniform[:, i]) for i in range(config.num_tokens)]
    agreement = (torch.stack(chosen, 1) == written).float().mean()
    assert agreement > 0.99, agreement


def test_shipped_models_write_and_read_the_same_clips():
    tokenizer = load_tokenizer(TOKENIZER)
    clips = render(sample_factors(8, 3), 8, 32)
    with torch.inference_mode(), computing_in("float32", DEVICE):
        here = tokenizer.encode(clips).indices
        reconstruction = tokenizer.decode(here)
        tokenizer.to(DEVICE)
        there = tokenizer.encode(clips.to(DEVICE)).indices
        assert (there.cpu() == here).float().mean() > 0.995
        again = tokenizer.decode(here.to(DEVICE)).cpu()
    assert (again - reconstruction).abs().max() < 1e-3
    swapped = token_swap(tokenizer, clips[:2].to(DEVICE), clips[2:4].to(DEVICE))
    assert swapped.device.type == DEVICE


def test_tokenizer_training_resumes(tmp_path):
    options = dict(data="pocket=64", batch_size=4, log_every=1, validation_clips=4, **ALL)
    config = TokenizerTraining.preset("tiny", steps=6, save_every=3, **options)
    whole = train_tokenizer(config, tmp_path / "whole")
    train_tokenizer(config, tmp_path / "parts", stop_after=3)
    parts = train_tokenizer(config, tmp_path / "parts")
    for name, value in whole.state_dict().items():
        assert torch.allclose(parts.state_dict()[name], value, atol=1e-2), name
    log = (tmp_path / "parts" / "log.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in log]
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("frames", [0, 2], ids=["classes", "prediction"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_generator_training_resumes(tmp_path, frames, precision):
    shape = GeneratorConfig.preset("tiny", dim=32, depth=2, heads=2, codes_per_step=4)
    options = dict(
        tokenizer=TOKENIZER, data="pocket=64", flips=False, batch_size=8, generator=shape
    )
    options |= dict(condition_frames=frames, muon_lr=0.01, log_every=1, save_every=3, warmup=1)
    config = ARConfig.preset("tiny", steps=6, precision=precision, held_out_clips=8, **options)
    if frames:
        config = replace(config, guidance=1.0)
    whole = train_from_videos(replace(config, out=str(tmp_path / "whole")))
    log = (tmp_path / "whole" / "log.jsonl").read_text().splitlines()
    assert len(log) == 6 and all(json.loads(line)["loss"] for line in log)
    assert all(value.isfinite().all() for value in whole.state_dict().values())


def test_paper_size_step_and_benches(tmp_path):
    if DEVICE == "cpu":
        pytest.skip("takes minutes without a GPU")
    pytest.importorskip("av", reason="bench train also reads clips")
    result = bench_train("paper", batch=2, repeats=1, device=DEVICE, precision="bf16")
    step = next(row for row in result["rows"] if row["part"] == "step")
    assert step["gigabytes"] < 70
    bench_render(clips=8, repeats=1, device=DEVICE)
    bench_tokenizers(batch=1, repeats=1, device=DEVICE)
    bench_generate(("pocket",), (2,), guidance=True, seconds=0.2, repeats=1, device=DEVICE)


def test_first_codebook_of_a_whole_share_needs_no_graph():
    if DEVICE == "cpu":
        pytest.skip("there is no meter of a CPU's memory")
    config = TokenizerTraining.preset("tiny", batch_size=64, quantizer_start=0, accumulate=4)
    state = build_state(config, build_tokenizer(config), torch.device(DEVICE))
    clips = torch.rand(64, 3, 8, 32, 32, device=DEVICE)
    torch.cuda.reset_peak_memory_stats()
    train_step(config, state, clips, 0, 10)
    first = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    train_step(config, state, clips, 1, 10)
    assert first < 1.5 * torch.cuda.max_memory_allocated()


def test_weights_that_were_averaged_on_a_gpu_are_saved_whole(tmp_path):
    config = TokenizerTraining.preset("tiny", data="pocket=16", steps=2, ema=0.9, **ALL)
    averaged = train_tokenizer(config, tmp_path)
    loaded = load_tokenizer(tmp_path / "tokenizer")
    kept = copy.deepcopy(averaged).state_dict()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, kept[name].to(value.dtype)), name


def test_memory_of_the_tokenizer_at_paper_size():
    if DEVICE == "cpu":
        pytest.skip("takes minutes without a GPU")
    tokenizer = DeRATokenizer(TokenizerConfig.preset("paper")).to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        output = tokenizer(torch.rand(2, 3, 16, 128, 128, device=DEVICE))
        output.video.float().mean().backward()
    assert torch.cuda.max_memory_allocated() < 70e9
