"The generator and its training, where it crosses notebooks, processes and libraries."

import copy
import gc
import json
import os
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
import torch.nn.functional as F

from dera import ar, train_ar
from dera.ar import Block, Generator, GeneratorConfig, choose_tokens, frame_prefix
from dera.runtime import fast_decoder
from dera.runtime.checkpoints import load_checkpoint
from dera.runtime.errors import InputError
from dera.runtime.run_folder import RunFolder
from dera.train_ar import (
    ARConfig,
    fingerprint,
    load_tokens,
    tokenize_dataset,
    train_generator,
)

SMALL = dict(vocab_size=50, num_tokens=20, num_classes=7, dim=32, depth=2, heads=2)


def quiet(it, **_):
    "No progress bar."
    return it


def small(**changes):
    "A generator whose logits are far from uniform."
    torch.manual_seed(0)
    g = Generator(GeneratorConfig(**{**SMALL, **changes})).eval()
    nn.init.normal_(g.head.weight, std=0.8)
    nn.init.normal_(g.positions, std=0.5)
    nn.init.normal_(g.tokens.weight, std=0.5)
    if not g.config.prefix_tokens:
        nn.init.normal_(g.classes.weight, std=0.5)
    return g


@pytest.mark.parametrize("dim,heads,multiple", [(48, 3, 32), (64, 2, 256)])
def test_block_equals_transformers_llama(dim, heads, multiple):
    "Same weights, rotary positions switched off (cos 1, sin 0): same output."
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    torch.manual_seed(0)
    block = Block(GeneratorConfig(dim=dim, heads=heads, multiple=multiple)).eval()
    for norm in (block.norm1, block.norm2):
        nn.init.normal_(norm.weight)
    hidden = block.feed_forward.w2.in_features
    config = LlamaConfig(
        hidden_size=dim,
        intermediate_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        rms_norm_eps=1e-5,
        attn_implementation="eager",
    )
    llama = LlamaDecoderLayer(config, 0).eval()
    q, k, v = block.attention.qkv.weight.chunk(3)
    gate, up = block.feed_forward.w13.weight.chunk(2)
    llama.load_state_dict(
        {
            "self_attn.q_proj.weight": q,
            "self_attn.k_proj.weight": k,
            "self_attn.v_proj.weight": v,
            "self_attn.o_proj.weight": block.attention.out.weight,
            "mlp.gate_proj.weight": gate,
            "mlp.up_proj.weight": up,
            "mlp.down_proj.weight": block.feed_forward.w2.weight,
            "input_layernorm.weight": block.norm1.weight,
            "post_attention_layernorm.weight": block.norm2.weight,
        }
    )
    x = torch.randn(2, 9, dim)
    mask = torch.full((9, 9), -torch.inf).triu(1)[None, None].expand(2, 1, 9, 9)
    rotary = torch.ones(2, 9, dim // heads), torch.zeros(2, 9, dim // heads)
    theirs = llama(
        x, attention_mask=mask, position_ids=torch.arange(9)[None], position_embeddings=rotary
    )
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    assert torch.allclose(block(x), theirs, atol=1e-5)


@pytest.mark.parametrize("prefix", [0, 6])
def test_later_tokens_never_change_earlier_logits(prefix):
    g = small(prefix_tokens=prefix)
    y = torch.randint(50, (2, 20))
    given = (
        dict(prefix=torch.randint(50, (2, prefix))) if prefix else dict(labels=torch.tensor([1, 6]))
    )
    logits = g(y, **given)
    for i in range(20):
        other = y.clone()
        other[:, i] = (other[:, i] + 1) % 50
        changed = (g(other, **given) - logits).abs().amax((0, 2))
        assert (changed[: i + 1] == 0).all() and (changed[i + 1 :] > 0).all(), i


@pytest.mark.parametrize(
    "size,total", [("pocket", 10_691_200), ("343M", 326_261_760), ("632M", 631_975_680)]
)
def test_sizes_have_the_parameters_that_their_shape_says(size, total):
    c = GeneratorConfig.preset(size)
    D, H = c.dim, -(-(8 * c.dim // 3) // c.multiple) * c.multiple
    with torch.device("meta"):
        g = Generator(c)
    tables = (
        sum(p.numel() for m in (g.tokens, g.head, g.classes) for p in m.parameters())
        + g.positions.numel()
        + D
    )
    assert tables == (2 * c.vocab_size + c.num_tokens + c.num_classes + 2) * D
    assert (
        sum(p.numel() for p in g.parameters())
        == c.depth * (4 * D * D + 3 * D * H + 2 * D) + tables
        == total
    )
    assert (
        size == "pocket"
        or (c.depth, c.dim, c.heads, c.vocab_size, c.num_tokens)
        == {"343M": (24, 1024, 16, 8192, 1024), "632M": (30, 1280, 20, 8192, 1024)}[size]
    )


def test_loss_is_cross_entropy_of_every_token_and_starts_at_log_v():
    for g, given in (
        (small(), dict(labels=torch.tensor([1, 6, 7]))),
        (small(prefix_tokens=6), dict(prefix=torch.randint(50, (3, 6)))),
    ):
        y = torch.randint(50, (3, 20))
        p = g(y, **given).double().softmax(-1)
        by_hand = -sum(p[b, i, y[b, i]].log() for b in range(3) for i in range(20)) / 60
        assert abs(g.loss(y, **given) - by_hand) < 1e-5
        nn.init.zeros_(g.head.weight)
        assert abs(g.loss(y, **given) - np.log(50)) < 1e-6
    assert (Generator(GeneratorConfig(**SMALL)).head.weight == 0).all()


def test_dropout_is_off_in_eval_and_sits_on_tokens_attention_and_feed_forward():
    g, y, label = small(), torch.randint(50, (2, 20)), torch.tensor([1, 6])
    assert torch.equal(g(y, label), g(y, label))
    g.train()
    assert not torch.allclose(g(y, label), g(y, label), atol=1e-3)
    g, x = (
        small(dropout=1.0, class_dropout=0.0).train(),
        torch.randn(2, 5, 32),
    )  # everything that can be dropped is
    assert torch.equal(g.blocks[0](x), x) and not torch.allclose(
        g.eval().blocks[0](x), x, atol=1e-3
    )
    bare = g.head(g.norm(g.positions))
    assert torch.allclose(
        g.train()(y, label), bare.expand(2, -1, -1), atol=1e-6
    )  # positions are not


def test_class_dropout_hides_the_class_in_training_only():
    g, many = small(class_dropout=0.3).train(), torch.full((5000,), 3)
    hidden = (g.condition(many)[:, 0] == g.classes.weight[7]).all(1).float().mean()
    assert 0.27 < hidden < 0.33
    assert torch.equal(g.eval().condition(many)[:, 0], g.classes.weight[3].expand(5000, -1))


@pytest.mark.parametrize("prefix", [0, 6])
def test_there_is_no_padding(prefix):
    "A logit row for each token, none for a filler; shorter sequences begin longer ones."
    g = small(prefix_tokens=prefix)
    y = torch.randint(50, (2, 20))
    given = (
        dict(prefix=torch.randint(50, (2, prefix))) if prefix else dict(labels=torch.tensor([1, 6]))
    )
    whole = g(y, **given)
    assert (
        whole.shape == (2, 20, 50)
        and len(g.positions) == prefix + 20
        and g.tokens.num_embeddings == 50 + bool(prefix)
    )
    for n in (1, 7, 19):
        assert torch.allclose(g(y[:, :n], **given), whole[:, :n], atol=1e-5)


@pytest.mark.parametrize(
    "prefix,dtype", [(0, torch.float32), (6, torch.float32), (0, torch.float64)]
)
def test_cache_equals_no_cache(prefix, dtype):
    "The plain step and the fast one, at every position, with whatever was in the memory before."
    g = small(prefix_tokens=prefix).to(dtype)
    y = torch.randint(50, (3, 20))
    given = (
        dict(prefix=torch.randint(50, (3, prefix)))
        if prefix
        else dict(labels=torch.tensor([1, 6, 7]))
    )  # 7: no class
    logits, cache, x, start = (
        g(y, **given),
        g.new_cache(3).fill_(torch.nan),
        g.condition(**given),
        0,
    )
    decoder = ar.fast_decoder(g, 3)
    decoder.cache.fill_(torch.nan)
    if prefix:
        g.step(x[:, :-1], 0, decoder.cache)
    for i in range(20):
        assert torch.allclose(g.step(x, start, cache), logits[:, i], atol=1e-4), i
        start += x.shape[1]
        with torch.inference_mode():
            assert torch.allclose(
                decoder.step(x[:, -1] + g.positions[start - 1], start - 1), logits[:, i], atol=1e-4
            ), i
        x = g.tokens(y[:, i : i + 1])


def test_captured_steps_equal_uncached_ones(monkeypatch):
    "What a GPU replays: fixed shapes, a mask, the position in a tensor; here recorded and replayed without a GPU."

    class Recorded:
        def __init__(self, run):
            self.run, self.result = run, run().clone()

        def replay(self):
            self.result.copy_(self.run())

    recorded = []

    def capture(run):
        recorded.append(Recorded(run))
        return recorded[-1], recorded[-1].result

    monkeypatch.setattr(fast_decoder, "capture", capture)
    g = small(num_tokens=150)
    y, label = torch.randint(50, (3, 150)), torch.tensor([1, 6, 7])
    x = g.condition(label)[:, 0]
    with torch.inference_mode():
        decoder, logits = ar.fast_decoder(g, 3), g(y, label)
        decoder.cache.normal_()
        for i in range(150):
            assert torch.allclose(decoder.replay(x + g.positions[i], i), logits[:, i], atol=1e-4), i
            x = g.tokens(y[:, i])
    assert len(recorded) == 2 and sorted(decoder.graphs) == [(3, 128), (3, 150)]


def test_the_step_works_without_packed_weights_and_drops_packed_ones(monkeypatch):
    g, labels, linear, packed = small(), torch.arange(7), fast_decoder.linear, []
    greedy = g.generate(labels, temperature=0, guidance=2.0)
    assert g._decoder.layers == []  # copies of the weights do not outlive the call

    def unsupported(weight, rows):
        raise RuntimeError("no such layout")

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", unsupported, raising=False)
    monkeypatch.setattr(
        fast_decoder,
        "linear",
        lambda x, weight: (packed.append(weight.is_mkldnn), linear(x, weight))[1],
    )
    assert (
        torch.equal(g.generate(labels, temperature=0, guidance=2.0), greedy)
        and packed
        and not any(packed)
    )


def test_a_compiled_step_writes_the_same_tokens(monkeypatch):
    "Traced by torch.compile, run without the code generator, which needs a C++ compiler."
    whole, calls = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda f: calls.append(f) or whole(f, backend="eager"))
    g, labels = small(num_tokens=6), torch.arange(7)
    greedy = g.generate(labels, temperature=0, guidance=2.0)
    assert torch.equal(
        g.generate(labels, temperature=0, guidance=2.0, compile=True), greedy
    ) and calls == [fast_decoder.decode_layer]


def test_the_memory_is_used_again_and_never_stale():
    g, labels = small(), torch.arange(7)
    first = g.generate(labels, seed=1)
    kept = g._decoder
    g.generate(labels[:2], seed=5)
    assert torch.equal(g.generate(labels, seed=1), first) and g._decoder is kept
    assert copy.deepcopy(g)._decoder is None and set(g.state_dict()) == set(small().state_dict())
    with torch.no_grad():
        g.head.weight.copy_(-g.head.weight)
    assert not torch.equal(g.generate(labels, seed=1), first)
    g.head.weight.data = -g.head.weight.data
    assert torch.equal(g.generate(labels, seed=1), first) and g._decoder is kept
    low = copy.deepcopy(g).bfloat16().generate(labels, seed=1)
    assert low.shape == first.shape
    assert (
        torch.equal(g.generate(labels.repeat(3), seed=[*range(1, 8)] * 3), first.repeat(3, 1))
        and g._decoder is not kept
    )


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_greedy_equals_recomputing_everything(guidance):
    g, labels = small(), torch.arange(7)
    none = torch.full_like(labels, 7)
    y = torch.zeros(7, 20, dtype=torch.long)
    with torch.no_grad():
        for i in range(20):
            c, n = (g(y[:, : i + 1], l)[:, i] for l in (labels, none))
            y[:, i] = (n + guidance * (c - n)).argmax(-1)
    assert torch.equal(g.generate(labels, temperature=0, guidance=guidance), y)
    assert len(y.unique(dim=0)) > 1  # the class matters, or this test shows nothing


@pytest.mark.parametrize(
    "options",
    [{}, dict(guidance=2.0), dict(temperature=0.7, top_k=9), dict(top_p=0.8, guidance=1.5)],
)
def test_a_sample_depends_on_its_seed_alone(options):
    g, labels = small(), torch.tensor([0, 3, 6, 3, 1, 2, 5])
    every = g.generate(labels, seed=100, **options)
    assert torch.equal(every, g.generate(labels, seed=100, **options))
    for size in (1, 2, 3):
        parts = [
            g.generate(labels[i : i + size], seed=100 + i, **options) for i in range(0, 7, size)
        ]
        assert torch.equal(torch.cat(parts), every)
    order = torch.tensor([4, 0, 6, 2])
    assert torch.equal(
        g.generate(labels[order], seed=(100 + order).tolist(), **options), every[order]
    )
    same = g.generate([3] * 20, seed=0, **options)
    assert len(same.unique(dim=0)) > 10


def test_guidance_only_in_its_interval():
    g, labels = small(), torch.arange(7).repeat(4)

    def run(**options):
        return g.generate(labels, **(dict(seed=3, guidance=6.0) | options))

    plain, every = run(guidance=1.0), run()
    assert (
        torch.equal(run(guidance_interval=(0, 20)), every)
        and torch.equal(run(guidance_interval=(5, 5)), plain)
        and not torch.equal(plain, every)
    )
    some = run(guidance_interval=(5, 15))
    assert torch.equal(some[:, :5], plain[:, :5]) and not torch.equal(some[:, 5:], plain[:, 5:])
    greedy = run(temperature=0, guidance_interval=(5, 15))
    scale = torch.ones(20, 1)
    scale[5:15] = 6
    given, none = g(greedy, labels), g(greedy, torch.full_like(labels, 7))
    assert torch.equal((none + scale * (given - none)).argmax(-1), greedy)
    for wrong in ((-1, 5), (6, 5), (0, 21)):
        with pytest.raises(InputError, match="guidance_interval"):
            run(guidance_interval=wrong)


RANK = """
import sys, torch
sys.path.insert(0, {tests!r})
import test_ar as t
from safetensors.torch import save_file
torch.set_num_threads(1); rank, rows = int(sys.argv[1]), torch.arange(9)[int(sys.argv[1])::2]
options = dict(guidance=2., top_k=20, seed=(40 + rows).tolist(), batch_size=2)
save_file(dict(y=t.small().generate(rows % 7, **options)), sys.argv[2])
"""


def test_samples_do_not_depend_on_the_number_of_processes(tmp_path):
    from safetensors.torch import load_file

    (tmp_path / "rank.py").write_text(RANK.format(tests=str(Path(__file__).parent)))
    subprocess.run(
        [sys.executable, tmp_path / "rank.py", "1", tmp_path / "1.safetensors"],
        check=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    whole = small().generate(torch.arange(9) % 7, guidance=2.0, top_k=20, seed=40)
    assert torch.equal(load_file(tmp_path / "1.safetensors")["y"], whole[1::2])


def test_interrupted_generation_keeps_finished_batches():
    g, labels, done, ticks = small(), torch.arange(7), [], []

    def bar(it, **about):
        assert (
            len(it) == 7 * 20 and about["unit"] == "token"
        )  # one tick a token of a clip: the bar shows tokens a second
        for i in it:
            if len(ticks) == 4 * 20 + 11:
                raise KeyboardInterrupt
            ticks.append(i)
            yield i

    with pytest.raises(KeyboardInterrupt):
        for rows, y in g.train().generate_batches(labels, batch_size=2, seed=9, progress=bar):
            done.append((rows.tolist(), y))
    assert g.training and [rows for rows, _ in done] == [[0, 1], [2, 3]]
    assert torch.equal(torch.cat([y for _, y in done]), g.generate(labels, seed=9)[:4])
    count = []
    g.generate(
        labels,
        batch_size=3,
        guidance=2.0,
        progress=lambda it, **_: (count.append(i) or i for i in it),
    )
    assert count == [*range(140)]


def test_any_number_of_known_frames_gives_one_prefix():
    class Frames:  # a tokenizer that writes down each frame's mean
        config = SimpleNamespace(num_frames=5)

        def encode(self, video):
            return SimpleNamespace(
                indices=(video.mean((1, 3, 4)) * 49).long().repeat_interleave(4, 1)
            )

    video = torch.rand(2, 3, 5, 1, 1).expand(-1, -1, -1, 4, 4)
    tokens = Frames().encode(video).indices
    g = small(prefix_tokens=20)
    for t in (1, 2, 3, 4, 5):
        prefix = frame_prefix(Frames(), video[:, :, :t])
        assert torch.equal(prefix[:, : 4 * t], tokens[:, : 4 * t]) and prefix.shape == (2, 20)
        assert torch.equal(
            prefix[:, 4 * t - 4 :].view(2, -1, 4),
            tokens[:, None, 4 * t - 4 : 4 * t].expand(-1, 6 - t, -1),
        )
        y = g.generate(prefix=prefix, temperature=0)
        naive = torch.zeros(2, 20, dtype=torch.long)
        for i in range(20):
            naive[:, i] = g(naive[:, : i + 1], prefix=prefix)[:, i].argmax(-1)
        assert torch.equal(y, naive)
    for wrong in (video[:, :, :0], video.repeat(1, 1, 2, 1, 1)):
        with pytest.raises(InputError, match="known frames"):
            frame_prefix(Frames(), wrong)


def test_frame_prediction_refuses_guidance_and_foreign_conditions_in_one_line():
    g, prefix = small(prefix_tokens=6), torch.randint(50, (2, 6))
    for wrong, word in (
        (dict(prefix=prefix, guidance=2.0), "guidance"),
        (dict(prefix=prefix[:, :5]), "prefix"),
        (dict(labels=[1]), "prefix"),
        (dict(prefix=prefix, labels=[1, 2]), "prefix"),
        (dict(), "prefix"),
    ):
        with pytest.raises(InputError, match=word) as caught:
            g.generate(**wrong)
        assert "\n" not in str(caught.value)
    assert g.generate(prefix=prefix, seed=3).max() < 50  # the separator is never written
    assert torch.equal(g.generate(prefix=prefix[1:], seed=4), g.generate(prefix=prefix, seed=3)[1:])


def test_samples_follow_the_model():
    "Frequencies of the first two tokens over many seeds against exact probabilities."
    g = small(vocab_size=4, num_tokens=2)
    n = 8000
    y = g.generate([2] * n, temperature=0.8, seed=0)
    label = torch.tensor([2] * 4)
    first = (g(torch.zeros(1, 1, dtype=torch.long), label[:1])[0, 0] / 0.8).softmax(-1)
    pairs = torch.arange(4)[:, None].expand(4, 2)
    second = (g(pairs, label)[:, 1] / 0.8).softmax(-1)
    expected = (first[:, None] * second).detach()
    seen = torch.bincount(y[:, 0] * 4 + y[:, 1], minlength=16).view(4, 4) / n
    assert (
        (seen - expected) ** 2 / expected
    ).sum() * n < 37.7  # chi-square, 15 degrees of freedom, 0.1% point


def test_no_probabilities_are_kept():
    "As many tensors as wide as the vocabulary are alive after the last step as after the third."
    alive = []

    def count(it, **_):
        for i in it:
            if i in (7, 39):
                alive.append(
                    sum(type(o) is torch.Tensor and o.shape == (2, 50) for o in gc.get_objects())
                )
            yield i

    y = small().generate([1, 2], progress=count)
    assert (
        y.shape == (2, 20) and y.dtype == torch.int64 and y.untyped_storage().nbytes() == 2 * 20 * 8
    )
    assert len(alive) == 2 and alive[1] <= alive[0]
    y.sum()
    F.embedding(
        y, nn.Parameter(torch.zeros(50, 1))
    ).sum().backward()  # an ordinary tensor, fit for training


def test_top_p_of_ties_and_extremes():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1e4, 0.0, 0.0, -1e4]])
    u = torch.tensor([0.99, 0.99])
    assert choose_tokens(logits, u).tolist() == [3, 0] and choose_tokens(
        logits, u, top_p=1e-9
    ).tolist() == [0, 0]
    assert choose_tokens(logits, u, temperature=1e-3, top_k=100, top_p=0.5).tolist() == [1, 0]


def test_logits_that_are_not_finite_are_refused_in_one_line():
    "Not as token V and an IndexError, nor, greedy, as whatever argmax says of NaN."
    for value, g, ask in (
        (float("nan"), small(), dict(labels=[1, 2])),
        (float("inf"), small(), dict(labels=[1], guidance=2.0)),
        (float("nan"), small(prefix_tokens=20), dict(prefix=torch.zeros(2, 20).long())),
    ):
        g.head.weight.data[3, 0] = value
        for options in {}, dict(temperature=0), dict(top_k=5, top_p=0.9):
            with pytest.raises(InputError, match="NaN or infinite") as e:
                g.generate(**ask, **options)
            assert "\n" not in str(e.value)


def test_generates_under_autocast_and_leaves_training_mode():
    g = small().train()
    with torch.autocast("cpu", torch.bfloat16):
        y = g.generate([1, 2], guidance=2.0)
    assert g.training and y.max() < 50
    with pytest.raises(InputError):
        g.generate([9])
    assert g.training


def test_save_load_and_refuse_missing_tensors(tmp_path):
    from safetensors.torch import load_file, save_file

    g = small(tokenizer="abc")
    g.save_pretrained(tmp_path)
    back = Generator.from_pretrained(tmp_path)
    assert back.config == g.config and not back.training and fingerprint(back) == fingerprint(g)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="head.weight"):
        Generator.from_pretrained(tmp_path)


# training


class Codes(nn.Module):
    "A stand-in tokenizer: 20 codes of 50."

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor(50.0))
        self.calls = 0

    def encode(self, video):
        self.calls += 1
        mean = video.mean(1)[:, :, ::4, :].flatten(1)[:, :20]
        return type("Encoded", (), dict(indices=(mean * self.scale).long().clamp(max=49)))()


class Noise(torch.utils.data.Dataset):
    def __init__(self, n=40, stop=None):
        self.n, self.stop = n, stop

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if i == self.stop:
            raise KeyboardInterrupt
        return dict(
            video=torch.rand(3, 4, 8, 8, generator=torch.Generator().manual_seed(i)), label=i % 7
        )


def config(**changes):
    return ARConfig(
        **{
            **dict(
                generator=GeneratorConfig(**SMALL),
                steps=12,
                batch_size=8,
                lr=3e-3,
                warmup=3,
                held_out=0.1,
                log_every=2,
                val_every=4,
                save_every=4,
                precision="no",
            ),
            **changes,
        }
    )


def data(n=40):
    "Learnable rows: token i is label + i, with a random start."
    start, labels = np.random.default_rng(0).integers(0, 5, n), np.arange(n) % 7
    return (labels[:, None] + start[:, None] + np.arange(20)) % 50, torch.from_numpy(labels)


def numbers(run):
    return [
        {k: v for k, v in l.items() if k != "tokens_per_second"} for l in RunFolder(run).history()
    ]


def test_interrupted_tokenising_leaves_nothing_usable(tmp_path):
    path, codes = tmp_path / "tokens.npy", Codes()
    tokenize_dataset(codes, Noise(), path, progress=quiet)
    old = np.load(path).copy()
    calls = codes.calls
    tokenize_dataset(codes, Noise(), path, progress=quiet)
    assert codes.calls == calls
    with pytest.raises(KeyboardInterrupt):
        tokenize_dataset(codes, Noise(41, stop=38), path, progress=quiet)
    with pytest.raises(InputError):
        load_tokens(path)
    tokenize_dataset(codes, Noise(), path, progress=quiet)
    tokens, labels = load_tokens(path, fingerprint(codes))
    assert np.array_equal(tokens, old) and labels[:, 0].tolist() == [i % 7 for i in range(40)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tokens.json", "tokens.npy"]


def test_token_file_is_redone_when_anything_changed(tmp_path):
    path, codes = tmp_path / "tokens.npy", Codes()
    tokenize_dataset(codes, Noise(), path, progress=quiet)
    codes.scale += 1
    tokenize_dataset(codes, Noise(), path, flips=False, progress=quiet)
    tokens, _ = load_tokens(path, fingerprint(codes))
    assert tokens.shape == (40, 1, 20)
    with pytest.raises(InputError, match="another|not of"):
        load_tokens(path, fingerprint(Codes()))
    with pytest.raises(InputError, match="no clips"):
        tokenize_dataset(codes, Noise(0), path, progress=quiet)


def test_training_learns(tmp_path):
    tokens, labels = data(200)
    c = config(steps=150, batch_size=16)
    g = train_generator(c, tokens, labels, tmp_path / "run", quiet)
    log = RunFolder(tmp_path / "run").history()
    assert abs(log[0]["loss"] - np.log(50)) < 0.2 and log[-1]["val_loss"] < 0.6 and not g.training
    y = g.generate([3] * 40, temperature=0.5, seed=1)
    first = y[:, 0]
    assert ((y[:, 1:] - y[:, :-1]) == 1).float().mean() > 0.9 and (
        (first >= 3) & (first < 8)
    ).float().mean() > 0.9
    assert ((first == 3) | (first == 7)).any()


def test_frame_prediction_trains_on_its_prefix(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 50, (300, 20))
    tokens = np.concatenate([tokens[:, :4], np.repeat(tokens[:, :4], 5, 1)], 1)
    c = config(steps=5, batch_size=16)
    c = replace(c, generator=replace(c.generator, prefix_tokens=4))
    g = train_generator(c, tokens, torch.zeros(300, dtype=torch.long), tmp_path / "run", quiet)
    assert g.generate(prefix=tokens[:3, :4]).shape == (3, 20)
    with pytest.raises(InputError, match="do not fit"):
        train_generator(
            replace(c, generator=replace(c.generator, prefix_tokens=5)),
            tokens,
            torch.zeros(300, dtype=torch.long),
            tmp_path / "other",
            quiet,
        )


def test_dropout_and_hidden_classes_follow_seed_and_step(tmp_path):
    "Two runs in one process, the global generator in any state: the same losses; another seed: others."
    tokens, labels = data()
    runs = []
    for i, seed in enumerate((0, 0, 1)):
        torch.rand(i * 17 + 1)
        train_generator(config(seed=seed), tokens, labels, tmp_path / str(i), quiet)
        runs.append(numbers(tmp_path / str(i)))
    assert runs[0] == runs[1] != runs[2]


def test_a_finished_run_is_loaded_and_a_foreign_one_refused(tmp_path):
    tokens, labels = data()
    g = train_generator(config(), tokens, labels, tmp_path, quiet)
    log = numbers(tmp_path)
    again = train_generator(config(log_every=5), tokens, labels, tmp_path, quiet)
    assert fingerprint(g) == fingerprint(again) and numbers(tmp_path) == log
    kept = (tmp_path / "config.json").read_text()
    with pytest.raises(InputError, match="another.*steps"):
        train_generator(config(steps=20), tokens, labels, tmp_path, quiet)
    with pytest.raises(InputError, match="another.*tokens"):
        train_generator(config(), tokens, (labels + 1) % 7, tmp_path, quiet)
    assert (tmp_path / "config.json").read_text() == kept
    torch.save({}, tmp_path / "checkpoint.safetensors")
    with pytest.raises(InputError, match="not a checkpoint"):
        train_generator(config(), tokens, labels, tmp_path, quiet)


SCRIPT = """
import sys, time, torch
sys.path.insert(0, {tests!r})
import test_ar as t

def slow(steps, **_):
    for step in steps:
        time.sleep({pause})
        yield step

torch.set_num_threads(1)
{first}
t.train_generator(t.config(), *t.data(), {out!r}, slow)
"""


def run_script(out, pause=0.0, first=""):
    "Train into `out` in another process."
    tests = str(Path(__file__).parent)
    code = SCRIPT.format(tests=tests, pause=pause, out=str(out), first=first)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture
def whole(tmp_path):
    "The run that the others must equal, in one go and in this process."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train_generator(config(), *data(), tmp_path / "whole", quiet)
    yield tmp_path / "whole"
    torch.set_num_threads(threads)


def same_run(one, two):
    weights = "generator/model.safetensors"
    assert numbers(one) == numbers(two)
    assert (one / weights).read_bytes() == (two / weights).read_bytes()


def test_killed_and_resumed_equals_uninterrupted(whole, tmp_path):
    "kill -9 in another process; the rest of the run and its weights are the same to the last bit."
    process = run_script(tmp_path / "parts", pause=0.2)
    checkpoint = tmp_path / "parts" / "checkpoint.safetensors"
    while not checkpoint.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert 0 < load_checkpoint(checkpoint)["step"] < 12
    assert not (tmp_path / "parts" / "generator").exists()
    train_generator(config(), *data(), tmp_path / "parts", quiet)
    same_run(whole, tmp_path / "parts")


def test_an_earlier_accelerator_does_not_decide_the_precision(whole, tmp_path):
    "accelerate's state is one for the whole process; bf16 before must not leak into float32."
    first = 'import accelerate; accelerate.Accelerator(mixed_precision="bf16")'
    process = run_script(tmp_path / "after", first=first)
    assert process.wait(200) == 0, process.stderr.read()
    same_run(whole, tmp_path / "after")


# the command


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "A folder of videos and an untrained tokenizer."
    from dera.pocket import write_dataset
    from dera.query import TokenizerConfig
    from dera.streams import DeRATokenizer

    root = tmp_path_factory.mktemp("world")
    write_dataset(root / "videos", 30, seed=0, num_frames=8, size=32)
    DeRATokenizer(TokenizerConfig.preset("tiny")).save_pretrained(root / "tokenizer")
    return root


def command(options):
    "Words of a command line."
    return [str(word) for name, value in options.items() for word in (f"--{name}", value)]


def test_command_trains_and_continues(world, capsys):
    options = {
        "preset": "tiny",
        "tokenizer": world / "tokenizer",
        "data": world / "videos",
        "out": world / "run",
        "steps": 2,
        "batch-size": 8,
        "generator.depth": 1,
        "held-out": 0.1,
    }
    done = subprocess.run(
        [sys.executable, "-m", "dera.train_ar", *command(options)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0 and "generator saved in" in done.stdout, done.stderr
    train_ar.main(command(options))
    assert "generator saved in" in capsys.readouterr().out and len(numbers(world / "run")) == 1
    settings = json.loads((world / "run" / "config.json").read_text())
    g = Generator.from_pretrained(world / "run" / "generator")
    assert settings["generator"]["depth"] == 1 and settings["steps"] == 2
    assert g.config.tokenizer == settings["generator"]["tokenizer"] != ""


def test_bad_input_is_one_line_and_exit_code_2(world, tmp_path, capsys):
    good = {
        "tokenizer": world / "tokenizer",
        "data": world / "videos",
        "out": tmp_path / "run",
        "batch-size": 8,
    }
    (tmp_path / "file").write_text("")
    for wrong, word in (
        ({"preset": "huge"}, "preset"),
        ({"tokenizer": tmp_path / "none"}, "tokenizer"),
        ({"data": tmp_path / "none"}, "folder"),
        ({"batch-size": 5000}, "batch"),
        ({"out": tmp_path / "file" / "run"}, "file"),
        ({"precision": "fp8"}, "precision"),
    ):
        with pytest.raises(SystemExit) as caught:
            train_ar.main(command(good | wrong))
        said = capsys.readouterr().err
        last = said.strip().splitlines()[-1]
        assert caught.value.code == 2 and last.startswith("dera: ") and word in last, (wrong, said)
        assert "Traceback" not in said
        assert not (tmp_path / "run").exists(), wrong  # refused before anything was written


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as caught:
        train_ar.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert not caught.value.code
    for words in (
        "usage: dera train-ar",
        "--fresh",
        "paper-k600-fp",
        "folder of a saved tokenizer",
        "optimiser steps",
        "highest learning rate",
        "attention heads",
        "known frames",
    ):
        assert words in text, words
