"The tokenizer as a whole: interface, streams, sizes, training, files, and what crosses notebooks (SACP on the real encoder, shipped models)."

import copy
import json
import math
import os
from dataclasses import asdict, replace
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dera.align import Alignment, teacher_features
from dera.metrics import baselines, psnr
from dera.pocket import render, sample_factors
from dera.query import (
    GridTokenizer,
    QueryTokenizer,
    Transformer,
    coarse_queries,
    gaussian_positions,
)
from dera.runtime.checkpoints import checkpoint_path, load_model
from dera.runtime.errors import InputError
from dera.sacp import project, sacp
from dera.streams import DeRATokenizer, TokenizerConfig
from dera.teachers import load_teacher
from dera.train_tokenizer import reconstruct_set

TINY = TokenizerConfig.preset("tiny")
SMALL = TokenizerConfig.preset(
    "tiny", dim=48, heads=4, encoder_depth=2, decoder_depth=2, codebook_size=64
)
CLASSES = GridTokenizer, QueryTokenizer, DeRATokenizer
every = pytest.mark.parametrize("cls", CLASSES)


def build(cls, config, seed=0):  # with an output layer that does something
    torch.manual_seed(seed)
    model = cls(config).eval()
    model.out.weight.data.normal_(std=0.02)
    return model


def noise(config, n, seed=0):
    return torch.rand(
        n, 3, config.num_frames, *config.frame, generator=torch.Generator().manual_seed(seed)
    )


@pytest.fixture(scope="module")
def clips():
    return render(sample_factors(6, seed=31), 8, 32)


@pytest.fixture(scope="module")
def shipped():
    return load_model(DeRATokenizer, checkpoint_path("pocket-tokenizer-tiny"))


# ---- interface


@every
@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(positions="sincos", queries="normal", tie=0.0),
        dict(num_frames=4, size=48, num_appearance=36, num_motion=72),
        dict(num_frames=6, size=(24, 40)),
        dict(size=56, patch_t=4),
        dict(size=(8, 16), patch_t=1, tokens=32),
        dict(patch_p=4, size=20, num_motion=7, num_appearance=3),
    ],
)
def test_one_interface(cls, changes):
    config = TokenizerConfig.preset(
        "tiny", **dict(dim=96, encoder_depth=2, decoder_depth=2) | changes
    )
    model, c = build(cls, config), config
    video, patches = noise(c, 3), math.prod(c.grid)
    with torch.no_grad():
        code = model.encode(video)
        assert model.num_tokens == (patches if cls is GridTokenizer else c.num_tokens)
        assert code.indices.shape == (3, model.num_codes) and code.indices.dtype == torch.int64
        assert (
            code.latents.shape == (3, model.num_tokens, 16)
            and code.motion.shape == (3, patches, 96)
            and code.quantizer_loss.shape == ()
        )
        assert (
            code.appearance.shape == (3, patches // c.grid[0], 96)
            if cls is DeRATokenizer
            else code.appearance is None
        )
        assert torch.equal(model.decode(code.indices), model.decode(code.latents)) and torch.equal(
            model(video).video, model.decode(code.indices)
        )
        assert model(video).video.shape == video.shape
    out = model.train()(video)
    ((out.video - video).pow(2).mean() + out.encoded.quantizer_loss).backward()
    assert not [
        n
        for n, p in model.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.abs().sum())
    ]


@every
def test_decoding_indices_is_decoding_latents_also_in_training(cls):
    model, video = build(cls, SMALL).train(), noise(SMALL, 4)
    with torch.no_grad():
        code = model.encode(video)
        assert torch.equal(model.decode(code.indices), model.decode(code.latents))


def test_presets():
    p = TokenizerConfig.preset("paper")
    assert (
        p.num_appearance,
        p.num_motion,
        p.dim,
        p.encoder_depth,
        p.decoder_depth,
        p.heads,
        p.latent_dim,
        p.codebook_size,
    ) == (256, 768, 768, 12, 12, 12, 16, 8192)
    assert (
        p.grid == (4, 16, 16)
        and p == TokenizerConfig()
        and TINY.num_tokens == 64
        and TokenizerConfig.preset("pocket").num_tokens == 256
    )


@pytest.mark.parametrize(
    "tokens, parts", [(512, (128, 384)), (768, (192, 576)), (1024, (256, 768))]
)
def test_token_budgets(tokens, parts):
    c = TokenizerConfig.preset("paper", tokens=tokens)
    assert (c.num_appearance, c.num_motion) == parts
    with torch.device("meta"):
        for cls in QueryTokenizer, DeRATokenizer:
            model = cls(c)
            assert model.num_tokens == tokens
            code = model.encode(torch.zeros(1, 3, 16, 128, 128), quantize=False)
            assert code.latents.shape == (1, tokens, 16)
        assert (
            GridTokenizer(c).num_tokens == 1024 == GridTokenizer(c).config.num_tokens
        )  # its patches decide


@pytest.mark.parametrize(
    "preset, tokens", [("tiny", 32), ("tiny", 48), ("pocket", 128), ("pocket", 192)]
)
def test_smaller_budgets_of_the_small_presets(preset, tokens):
    c = TokenizerConfig.preset(preset, tokens=tokens, encoder_depth=1, decoder_depth=1)
    for cls in QueryTokenizer, DeRATokenizer:
        with torch.no_grad():
            assert build(cls, c).encode(noise(c, 1)).indices.shape == (1, tokens)


@pytest.mark.parametrize("grid", [(4, 4, 4), (1, 4, 4), (2, 3, 5)])
@pytest.mark.parametrize("num", [1, 4, 8, 15, 16, 30, 32, 48, 64, 80])
def test_no_two_queries_start_alike(grid, num):
    table = gaussian_positions(grid, 64, torch.Generator().manual_seed(1))
    q = coarse_queries(table, grid, num)
    assert q.shape == (num, 64) and (num == 1 or torch.pdist(q).min() > 0.05)
    if num == len(table):
        assert torch.allclose(q, table, atol=1e-6)


BAD = [
    (dict(dim=100, heads=3), "heads"),
    (dict(size=36), "patch_p"),
    (dict(size=(32, 36)), "patch_p"),
    (dict(num_frames=7), "patch_t"),
    (dict(num_motion=0), "num_motion"),
    (dict(num_motion=-1), "num_motion"),
    (dict(num_appearance=-1), "num_appearance"),
    (dict(num_appearance=1.5), "num_appearance"),
    (dict(size=0), "size"),
    (dict(size=(32,)), "size"),
    (dict(size="32"), "size"),
    (dict(size=None), "size"),
    (dict(dim=0), "dim"),
    (dict(dim=128.0), "dim"),
    (dict(heads=0), "heads"),
    (dict(encoder_depth=0), "encoder_depth"),
    (dict(decoder_depth="4"), "decoder_depth"),
    (dict(patch_t=0), "patch_t"),
    (dict(patch_p=-8), "patch_p"),
    (dict(latent_dim=0), "latent_dim"),
    (dict(codebook_size=1), "codebook_size"),
    (dict(temperature=0), "temperature"),
    (dict(temperature=float("nan")), "temperature"),
    (dict(temperature="hot"), "temperature"),
    (dict(positions="learned"), "positions"),
    (dict(queries=""), "queries"),
    (dict(tokens=0), "tokens"),
    (dict(tokens=30), "tokens"),
    (dict(tokens=-4), "tokens"),
    (dict(tokens=64.0), "tokens"),
    (dict(width=64), "width"),
]


@pytest.mark.parametrize("changes, word", BAD, ids=str)
def test_bad_configurations_are_refused_when_made(changes, word):
    with pytest.raises(InputError, match=word) as e:
        TokenizerConfig.preset("tiny", **changes)
    assert "\n" not in str(e.value)


def test_a_configuration_changed_later_is_checked_again():
    for cls in CLASSES:
        config = TokenizerConfig.preset("tiny")
        config.heads = 5
        with pytest.raises(InputError, match="heads"):
            cls(config)
    config = copy.copy(SMALL)
    model = DeRATokenizer(config)
    config.dim = 96
    assert model.config.dim == 48  # the model keeps its own
    with pytest.raises(InputError, match="appearance"):
        DeRATokenizer(replace(SMALL, num_appearance=0))
    assert QueryTokenizer(replace(SMALL, num_appearance=0)).num_tokens == 48


def test_wrong_input_is_named(clips):
    model = DeRATokenizer(TINY)
    for wrong in (clips[:, :, :4], clips[0], clips[..., :16]):
        with pytest.raises(InputError, match=r"\(B, 3, 8, 32, 32\)"):
            model.encode(wrong)
    with pytest.raises(InputError, match="uint8"):
        model.encode(clips.byte())
    for wrong in (
        torch.zeros(1, 10, dtype=torch.long),
        torch.zeros(64, dtype=torch.long),
        torch.zeros(1, 64, 8),
        torch.zeros(1, 63, 16),
    ):
        with pytest.raises(InputError, match="64 tokens"):
            model.decode(wrong)
    with pytest.raises(InputError, match=r"\[0, 512\)"):
        model.decode(torch.full((1, 64), 512))
    with pytest.raises(InputError, match="huge"):
        TokenizerConfig.preset("huge")
    for tap in 0, 5:
        with pytest.raises(InputError, match="1 to 4"):
            model.encode(clips, tap=tap)


@every
def test_tap_returns_an_earlier_layer_and_the_same_tokens(cls):
    model, video, states = build(cls, SMALL), noise(SMALL, 2), []
    hook = model.encoder.blocks[0].register_forward_hook(lambda m, i, o: states.append(o))
    with torch.no_grad():
        last, first = model.encode(video), model.encode(video, tap=1)
    hook.remove()
    N = 64
    assert (
        torch.equal(first.indices, last.indices)
        and torch.equal(first.motion, states[-1][:, -N:])
        and not torch.allclose(first.motion, last.motion)
    )
    if cls is DeRATokenizer:
        assert torch.equal(first.appearance, states[-2][:, -16:])
    with torch.no_grad():
        assert torch.equal(
            model.encode(video, tap=2).motion, last.motion
        )  # the last layer: after the final norm


def test_normal_queries_and_the_decoders_type_vector_are_drawn_apart():
    for seed in 0, 3:
        q = QueryTokenizer(replace(SMALL, positions="sincos", queries="normal", seed=seed))
        assert not (q.queries == q.query_type).all(-1).any() and abs(q.queries.std() - 0.02) < 0.001


@pytest.mark.parametrize("preset, tie", [("tiny", 1.5), ("pocket", 1.5), ("paper", 0.0)])
def test_keys_start_as_the_queries_where_the_preset_ties_them(preset, tie):
    c = TokenizerConfig.preset(preset, encoder_depth=1, decoder_depth=1)
    assert c.tie == tie
    torch.manual_seed(0)
    q, k, _ = QueryTokenizer(c).encoder.blocks[0].qkv.weight.detach().chunk(3)
    assert torch.equal(q, k) == bool(tie)
    bound = (tie or 1) / math.sqrt(c.dim)
    assert 0.99 * bound < q.abs().max() <= bound  # torch's default, times `tie`


# ---- streams


@pytest.mark.parametrize("frame", range(16))
def test_appearance_sees_the_first_frame_only(frame):
    c = TokenizerConfig.preset(
        "pocket", dim=64, heads=4, encoder_depth=2, decoder_depth=1, codebook_size=64
    )
    model = build(DeRATokenizer, c)
    a = c.num_appearance
    x = noise(c, 2, seed=1)
    y = x.clone()
    y[:, :, frame] = noise(c, 2, seed=2)[:, :, frame]
    with torch.no_grad():
        before, after = model.encode(x), model.encode(y)
    same = lambda part: (
        torch.equal(before.latents[:, part], after.latents[:, part])
        and torch.equal(before.indices[:, part], after.indices[:, part])
    )
    assert same(slice(0, a)) == torch.equal(before.appearance, after.appearance) == (frame > 0)
    assert not same(slice(a, None)) and not torch.equal(before.motion, after.motion)


def test_later_frames_leave_appearance_alone_in_training_and_when_trained(shipped):
    x, y = render(sample_factors(4, seed=1), 8, 32), render(sample_factors(4, seed=2), 8, 32)
    y[:, :, 0] = x[:, :, 0]
    with torch.no_grad():
        a, b = shipped.encode(x), shipped.encode(y)
    assert (
        torch.equal(a.indices[:, :16], b.indices[:, :16])
        and torch.equal(a.appearance, b.appearance)
        and not torch.equal(a.indices[:, 16:], b.indices[:, 16:])
    )
    z = x.clone().requires_grad_()
    model = build(DeRATokenizer, SMALL).train()
    (g,) = torch.autograd.grad(model.encode(z, quantize=False).latents[:, :16].pow(3).sum(), z)
    assert g[:, :, 0].abs().sum() > 0 and (g[:, :, 1:] == 0).all()


def test_one_encoder_serves_both_streams():
    model, used = build(DeRATokenizer, SMALL), []
    hooks = [
        m.register_forward_hook(
            lambda m, i, o: used.append((i[0].shape[1], *map(id, m.parameters())))
        )
        for m in model.encoder.modules()
        if [*m.parameters(recurse=False)]
    ]
    model.encode(noise(SMALL, 1))
    [h.remove() for h in hooks]
    first, second = used[: len(hooks)], used[len(hooks) :]
    assert (
        {u[0] for u in first} == {32}
        and {u[0] for u in second} == {112}
        and [u[1:] for u in first] == [u[1:] for u in second]
    )
    assert {i for u in used for i in u[1:]} == {id(p) for p in model.encoder.parameters()}
    weights = lambda m: sum(p.numel() for p in m.parameters())
    assert weights(model.encoder) == weights(Transformer(48, 2, 4))
    assert (
        weights(model) - weights(QueryTokenizer(SMALL)) == (3 * 64 * 48 + 48) + 16 * 48
    )  # a patch embedding and positions for the first frame


@every
def test_batch_order_never_matters(cls, clips):
    model = build(cls, TINY)
    x = torch.cat([clips, clips[:2].flip(-1)])
    order = torch.tensor([3, 0, 7, 5, 1, 6, 2, 4])
    with torch.no_grad():
        together, shuffled, alone = (
            model(x),
            model(x[order]),
            [model(x[i : i + 1]) for i in range(8)],
        )
    for field in "indices", "latents", "motion":
        whole = getattr(together.encoded, field)
        pieces = torch.cat([getattr(o.encoded, field) for o in alone])
        compare = (
            torch.equal if field == "indices" else lambda a, b: torch.allclose(a, b, atol=1e-5)
        )
        assert compare(getattr(shuffled.encoded, field), whole[order]) and compare(pieces, whole)
    assert torch.allclose(
        torch.cat([o.video for o in alone]), together.video, atol=1e-5
    ) and torch.allclose(shuffled.video, together.video[order], atol=1e-5)
    assert len(together.encoded.indices.unique(dim=0)) == 8  # and clips are told apart


# ---- training


@every
def test_gradients_reach_every_parameter_after_one_step(cls):
    "The output layer starts at zero and lets nothing through; one step later everything learns."
    torch.manual_seed(0)
    model, video = (
        cls(replace(SMALL, positions="sincos", queries="normal")).train(),
        noise(SMALL, 2),
    )
    adam = torch.optim.Adam(model.parameters(), 1e-3)

    def silent():
        adam.zero_grad()
        out = model(video)
        ((out.video - video).pow(2).mean() + out.encoded.quantizer_loss).backward()
        return [
            n
            for n, p in model.named_parameters()
            if p.requires_grad and (p.grad is None or not p.grad.abs().sum())
        ]

    assert [n for n in silent() if n.startswith("decoder")] == [
        n for n, p in model.named_parameters() if n.startswith("decoder") and p.requires_grad
    ]
    adam.step()
    assert silent() == []


@every
def test_one_clip_is_learned_by_heart(cls):
    "Over 35 dB, quantised from the first step, by notebook 10's optimisers."
    torch.manual_seed(0)
    model, clip = cls(TINY), render(sample_factors(1, seed=8), 8, 32)
    steps = 100
    muon = [p for n, p in model.named_parameters() if ".blocks." in n and p.ndim == 2]
    ids = {id(p) for p in muon}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]
    optimizers = (
        torch.optim.Muon(muon, lr=0.02, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0),
    )
    for step in range(steps):
        for o, rate in zip(optimizers, (0.02, 4e-3)):
            o.param_groups[0]["lr"] = rate * (
                0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))
            )
            o.zero_grad()
        out = model(clip)
        ((out.video - clip).pow(2).mean() + 0.1 * out.encoded.quantizer_loss).backward()
        for o in optimizers:
            o.step()
    with torch.no_grad():
        assert psnr(model.eval()(clip).video.clamp(0, 1), clip) > 35


class Kept(TorchDispatchMode):
    "Bytes of the tensors that operations made and nobody has freed, weights apart."

    def __init__(self, net):
        super().__init__()
        self.made, self.weights = (
            {},
            {StorageWeakRef(p.untyped_storage()) for p in net.parameters()},
        )

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.made[StorageWeakRef(t.untyped_storage())] = t.untyped_storage().nbytes()
        return out

    def bytes(self):
        return sum(n for s, n in self.made.items() if s not in self.weights and not s.expired())


@every
@pytest.mark.parametrize("half", [False, True])
def test_checkpointing_changes_memory_and_nothing_else(cls, half, clips):
    seen = []
    for checkpoint in False, True:
        model = build(cls, replace(TINY, checkpoint=checkpoint)).train()
        torch.manual_seed(1)
        with Kept(model) as kept, torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = model(clips)
            loss = (out.video.float() - clips).pow(2).mean() + out.encoded.quantizer_loss
        seen.append(
            (
                kept.bytes(),
                [
                    loss,
                    *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]),
                ],
            )
        )
    (most, plain), (least, again) = seen
    close = dict(rtol=0.05, atol=1e-3) if half else dict(rtol=1e-4, atol=1e-6)
    assert all(torch.allclose(a, b, **close) for a, b in zip(plain, again)) and least < most / 2.5
    with torch.no_grad():
        assert torch.equal(model.eval()(clips).video, build(cls, TINY)(clips).video)


@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize("checkpoint", [True, False])
def test_sacp_on_the_shared_encoder(clips, quantize, checkpoint):
    "Backward through SACP's losses gives the projected gradients of the two streams, and nothing when they agree."
    torch.manual_seed(0)
    model = DeRATokenizer(replace(TINY, checkpoint=checkpoint))
    image, video = load_teacher("pocket-image"), load_teacher("pocket-video")
    align, params = Alignment(128, image.dim, video.dim, 64), list(model.encoder.parameters())
    targets = teacher_features(image, video, clips, TINY.grid)
    flat = lambda loss: torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, params, retain_graph=True)]
    )
    L_a, L_m = align(model.encode(clips, quantize), *targets)
    for sign in 1, -1:  # one of the two is a conflict
        r = sacp(L_a, sign * L_m, params, weights=(1.0, 0.5))
        g_a, g_m = flat(L_a), sign * flat(L_m)
        p_a, p_m = project(g_a, g_m)
        assert bool(r.conflict) == bool(g_a @ g_m < 0)
        assert torch.allclose(flat(r.loss_a + r.loss_m), p_a + 0.5 * p_m, atol=1e-6)
    assert model.embed_appearance.weight.grad is None  # asking leaves no gradients behind


@every
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float16, 0.005)], ids=["bf16", "fp16"]
)
def test_half_precision(cls, dtype, tolerance, clips):
    model, seen = build(cls, TINY), []
    hook = model.quantizer.register_forward_hook(
        lambda m, i, o: seen.append((o.z.dtype, o.loss.dtype))
    )
    with torch.no_grad():
        full = model(clips)
        with torch.autocast("cpu", dtype):
            half, same = model(clips), model.decode(full.encoded.indices)
    assert seen[-1] == (torch.float32, torch.float32) and half.video.isfinite().all()
    assert (
        torch.allclose(same.float(), full.video, atol=tolerance)
        and (half.encoded.indices == full.encoded.indices).float().mean() > 0.9
    )
    model.train()
    with torch.autocast("cpu", dtype):
        out = model(clips)
        loss = (out.video - clips).pow(2).mean() + out.encoded.quantizer_loss
    loss.backward()
    hook.remove()
    assert all(
        p.grad.isfinite().all() and p.grad.dtype == torch.float32
        for p in model.parameters()
        if p.requires_grad
    )


# ---- sizes


def test_sizes_at_the_papers_scale():
    with torch.device("meta"):
        grid, query, dera = (cls(TokenizerConfig.preset("paper")) for cls in CLASSES)
    size = lambda m, *parts: sum(
        p.numel() for n, p in m.named_parameters() if n.split(".")[0] in parts and p.requires_grad
    )
    for m in grid, query, dera:
        assert (
            size(m, "encoder") == size(m, "decoder") == 85_056_000
            and size(m, "out") == size(m, "embed_motion") == 590_592
        )
        assert size(m, "to_latent", "quantizer", "from_latent") == 156_432 and m.num_tokens == 1024
        assert len(m.encoder.blocks) == len(m.decoder.blocks) == 12
    learned = lambda m: sum(p.numel() for p in m.parameters() if p.requires_grad)
    assert learned(query) - learned(grid) == 1024 * 768 and learned(dera) - learned(
        query
    ) == 768 * (3 * 8 * 8 + 1)
    assert (
        round((85_056_000 - 12 * 3 * 768 - 2 * 768) / 1e6, 2) == 85.03
    )  # LARP's: no biases on q, k, v, no final norm


@pytest.mark.parametrize("preset", ["tiny", "pocket", "paper"])
def test_operations(preset):
    c = TokenizerConfig.preset(preset)
    N, s, a, m = math.prod(c.grid), math.prod(c.grid[1:]), c.num_appearance, c.num_motion
    F = lambda D, *rows: D * sum(24 * n * c.dim**2 + 4 * n**2 * c.dim for n in rows)
    counted = {}
    for cls, rows in zip(CLASSES, ([N], [N + a + m], [s + a, N + m])):
        with torch.device("meta"):
            model, clip = cls(c).eval(), torch.zeros(1, 3, c.num_frames, *c.frame)
        with FlopCounterMode(display=False) as counter:
            model(clip, quantize=False)
        part = {k.split(".")[-1]: sum(v.values()) for k, v in counter.get_flop_counts().items()}
        counted[cls] = part["encoder"]
        assert part["encoder"] == F(c.encoder_depth, *rows) and part["decoder"] == F(
            c.decoder_depth, N + model.num_tokens
        )
    if preset == "paper":
        assert 1.03 < counted[DeRATokenizer] / counted[QueryTokenizer] < 1.04


# ---- files


def one_line(action, *words):
    with pytest.raises(InputError) as e:
        action()
    assert "\n" not in str(e.value) and all(w in str(e.value) for w in words), e.value


@pytest.fixture
def no_network(monkeypatch):
    "Every wish to download, which is refused."
    wishes = []

    def download(*args, **kwargs):
        wishes.append(kwargs.get("filename"))
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.hub_mixin, "hf_hub_download", download)
    return wishes


class Bomb:
    "Unpickling this leaves a folder behind."

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@every
def test_saved_and_loaded(cls, tmp_path, no_network):
    model, video = build(cls, replace(SMALL, size=(24, 16))), torch.rand(2, 3, 8, 24, 16)
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    for again in (
        cls.from_pretrained(tmp_path),
        cls.from_pretrained(str(tmp_path)),
        load_model(cls, tmp_path),
    ):
        assert again.config == model.config and not again.training and type(again) is cls
        with torch.no_grad():
            assert torch.equal(again(video).video, model(video).video)
    with safe_open(tmp_path / "model.safetensors", "pt") as f:
        assert set(f.keys()) == set(model.state_dict()) and f.metadata()["format"] == "pt"
    assert "dera" in (tmp_path / "README.md").read_text() and no_network == []


BREAKS = dict(
    cut_in_the_header=lambda d: (d / "model.safetensors").write_bytes(
        (d / "model.safetensors").read_bytes()[:100]
    ),
    cut_at_the_end=lambda d: (d / "model.safetensors").write_bytes(
        (d / "model.safetensors").read_bytes()[:-1]
    ),
    empty=lambda d: (d / "model.safetensors").write_bytes(b""),
    grown=lambda d: (d / "model.safetensors").write_bytes(
        (d / "model.safetensors").read_bytes() + b"0"
    ),
    pickle_inside=lambda d: torch.save(dict(a=Bomb(d / "boom")), d / "model.safetensors"),
    pickle_beside=lambda d: (
        (d / "model.safetensors").unlink(),
        torch.save(dict(a=Bomb(d / "boom")), d / "pytorch_model.bin"),
    ),
    no_weights=lambda d: (d / "model.safetensors").unlink(),
    no_config=lambda d: (d / "config.json").unlink(),
    config_cut=lambda d: (d / "config.json").write_text((d / "config.json").read_text()[:50]),
    config_a_list=lambda d: (d / "config.json").write_text("[1]"),
    missing_tensor=lambda d: save_file(
        {k: v for k, v in load_file(d / "model.safetensors").items() if k != "out.bias"},
        d / "model.safetensors",
    ),
    extra_tensor=lambda d: save_file(
        load_file(d / "model.safetensors") | {"teacher": torch.zeros(2)}, d / "model.safetensors"
    ),
    **{
        f"other_{k}": lambda d, k=k, v=v: (d / "config.json").write_text(
            json.dumps(json.loads((d / "config.json").read_text()) | {k: v})
        )
        for k, v in dict(
            dim=64,
            heads=2,
            encoder_depth=3,
            decoder_depth=1,
            num_motion=40,
            size=64,
            num_frames=4,
            codebook_size=128,
            positions="sincos",
            patch_p=16,
            heads_bad=None,
        ).items()
        if v
    },
)


@pytest.mark.parametrize("how", BREAKS)
@pytest.mark.parametrize(
    "load",
    [lambda cls, d: cls.from_pretrained(d), load_model],
    ids=["from_pretrained", "load_model"],
)
def test_a_broken_folder_is_refused(how, load, tmp_path, no_network):
    build(DeRATokenizer, SMALL).save_pretrained(tmp_path)
    BREAKS[how](tmp_path)
    one_line(lambda: load(DeRATokenizer, tmp_path), "DeRATokenizer", str(tmp_path))
    assert not (tmp_path / "boom").exists() and no_network == []


@pytest.mark.parametrize("saved, loaded", [(a, b) for a in CLASSES for b in CLASSES if a is not b])
def test_a_file_of_another_tokenizer_is_refused(saved, loaded, tmp_path):
    build(saved, SMALL).save_pretrained(tmp_path)
    one_line(lambda: loaded.from_pretrained(tmp_path), loaded.__name__)


def test_what_may_differ_from_the_saved_configuration(tmp_path, clips):
    model = build(DeRATokenizer, SMALL)
    model.save_pretrained(tmp_path)
    again = DeRATokenizer.from_pretrained(
        tmp_path, config=replace(SMALL, checkpoint=True, temperature=0.1)
    )
    assert again.encoder.checkpoint and again.quantizer.temperature == 0.1
    with torch.no_grad():
        assert torch.equal(again(clips).video, model(clips).video)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["checkpoint"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert (
        DeRATokenizer.from_pretrained(tmp_path).config == SMALL
    )  # a folder from before the field existed


def test_a_missing_folder_is_not_looked_for_elsewhere(tmp_path, monkeypatch, no_network, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for name in (tmp_path / "none", "./none", "../none", "~/none", "a/b/none", "file", ""):
        one_line(lambda: DeRATokenizer.from_pretrained(name), str(name))
    assert no_network == [] and capsys.readouterr().err == ""
    one_line(lambda: DeRATokenizer.from_pretrained("someone/tokenizer"), "someone/tokenizer")
    assert no_network == ["config.json"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Hugging Face Hub" in said


def test_a_pickle_on_the_hub_is_refused(tmp_path, monkeypatch):
    build(DeRATokenizer, SMALL).save_pretrained(tmp_path)
    BREAKS["pickle_beside"](tmp_path)

    def download(repo_id, filename, **kwargs):
        if not (tmp_path / filename).exists():
            raise EntryNotFoundError(filename)
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub.hub_mixin, "hf_hub_download", download)
    one_line(lambda: DeRATokenizer.from_pretrained("someone/tokenizer"), "pickle")
    assert not (tmp_path / "boom").exists()


@every
def test_pushed_to_the_hub_and_back(cls, tmp_path, monkeypatch):
    model, pushed = build(cls, SMALL), {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **kwargs):
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, repo_id, folder_path, **kwargs):
            pushed[repo_id] = {p.name: p.read_bytes() for p in folder_path.iterdir()}
            return "done"

    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Api)
    assert model.push_to_hub("someone/tokenizer") == "done" and set(
        pushed["someone/tokenizer"]
    ) == {"README.md", "config.json", "model.safetensors"}

    def download(repo_id, filename, **kwargs):
        (tmp_path / filename).write_bytes(pushed[repo_id][filename])
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub.hub_mixin, "hf_hub_download", download)
    again = cls.from_pretrained("someone/tokenizer")
    assert again.config == model.config
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values())
    )


# ---- shipped


def test_checkpoints_hold_no_teacher_and_no_pickle(tmp_path, shipped):
    for folder in checkpoint_path("pocket-tokenizer-tiny").parent.iterdir():
        assert not [
            p
            for p in folder.iterdir()
            if p.suffix not in (".safetensors", ".json", ".jsonl", ".md")
        ], folder
    with safe_open(checkpoint_path("pocket-tokenizer-tiny") / "model.safetensors", "pt") as f:
        assert set(f.keys()) == set(shipped.state_dict())  # nothing of teachers or projectors
    torch.save(shipped.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="DeRATokenizer"):
        load_model(DeRATokenizer, tmp_path)


def test_a_file_of_another_configuration_is_refused(tmp_path, shipped):
    shipped.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["dim"] = 64
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="no DeRATokenizer in"):
        load_model(DeRATokenizer, tmp_path)


def test_shipped_tokenizer_keeps_its_promise(shipped):
    "On 200 clips that no training saw: three decibels above both still pictures, both groups of tokens needed."
    x = torch.cat(
        [
            render(sample_factors(200, seed=987654)[torch.arange(i, i + 50)], 8, 32)
            for i in range(0, 200, 50)
        ]
    )
    pictures, indices = reconstruct_set(shipped, x)
    still, full = baselines(x), psnr(pictures, x)
    assert (
        full > still["temporal_mean"] + 3
        and full > still["first_frame"] + 3
        and still["first_frame"] < 20
    )
    assert len(indices.unique()) > 256
    for part in slice(0, 16), slice(16, 64):
        constant = indices.clone()
        constant[:, part] = 0
        with torch.no_grad():
            assert psnr(shipped.decode(constant).clamp(0, 1), x) < full - 2
