"The tokenizers as a whole: interface, streams, training, sizes, and SACP on the real encoder."

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dera.align import Alignment, teacher_features
from dera.pocket import render, sample_factors
from dera.quantize import FSQ, StochasticVectorQuantizer, VectorQuantizer
from dera.query import (
    GridTokenizer,
    QueryTokenizer,
    Transformer,
    coarse_queries,
    gaussian_positions,
    num_appearance_codes,
    sincos_positions,
    summed_positions,
)
from dera.runtime.checkpoints import checkpoint_path
from dera.runtime.errors import InputError
from dera.runtime.tokenizer_config import fsq_levels
from dera.runtime.transformer import attend
from dera.sacp import project, sacp
from dera.streams import DeRATokenizer, TokenizerConfig, load_tokenizer
from dera.teachers import load_teacher

TINY = TokenizerConfig.preset("tiny")
SMALL = TokenizerConfig.preset(
    "tiny", dim=48, heads=4, encoder_depth=2, decoder_depth=2, codebook_size=64, codes_per_token=1
)
CLASSES = GridTokenizer, QueryTokenizer, DeRATokenizer
every = pytest.mark.parametrize("cls", CLASSES)


def build(cls, config=SMALL, seed=0):
    "A tokenizer whose output layer does something."
    torch.manual_seed(seed)
    model = cls(config).eval()
    model.out.weight.data.normal_(std=0.02)
    return model


def noise(config, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, config.num_frames, *config.frame, generator=generator)


def without_gradient(model):
    "Names of the learned parameters that no gradient has reached."
    learned = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [name for name, p in learned if p.grad is None or not p.grad.abs().sum()]


@pytest.fixture(scope="module")
def clips():
    return render(sample_factors(6, seed=31), 8, 32)


@pytest.fixture(scope="module")
def shipped():
    return load_tokenizer(checkpoint_path("pocket-tokenizer-tiny"))


# ---- interface


SHAPES = [
    {},
    dict(positions="sincos", queries="normal", tie=0.0),
    dict(num_frames=4, size=48, num_appearance=36, num_motion=72),
    dict(size=(8, 16), patch_t=1, tokens=32),
    dict(patch_p=4, size=20, num_motion=7, num_appearance=3),
    dict(quantizer="vq"),
    dict(quantizer="fsq", codes_per_token=2),
    dict(larp=True, positions="sincos-sum", queries="normal"),
    dict(larp=True, tie=1.5, codes_per_token=1),
]


@every
@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_one_interface(cls, changes):
    settings = dict(dim=48, heads=4, encoder_depth=1, decoder_depth=1, codebook_size=64)
    config = TokenizerConfig.preset("tiny", **settings | changes)
    model, video, patches = build(cls, config), noise(config, 3), math.prod(config.grid)
    tokens = patches if cls is GridTokenizer else config.num_tokens
    assert model.num_tokens == tokens and model.num_codes == tokens * config.codes_per_token
    with torch.no_grad():
        code = model.encode(video)
        assert code.indices.shape == (3, model.num_codes) and code.indices.dtype == torch.int64
        assert code.latents.shape == (3, tokens, config.latent_dim)
        assert code.motion.shape == (3, patches, 48) and code.quantizer_loss.shape == ()
        if cls is DeRATokenizer:
            assert code.appearance.shape == (3, patches // config.grid[0], 48)
        else:
            assert code.appearance is None
        decoded = model.decode(code.indices)
        assert torch.equal(decoded, model.decode(code.latents)) and decoded.shape == video.shape
        assert torch.equal(model(video).video, decoded)
        stored = code.indices.to(torch.uint16)  # as token files hold them
        assert torch.equal(model.decode(stored), decoded)
        continuous = model.encode(video, quantize=False)
        assert continuous.indices is None and continuous.latents.shape == code.latents.shape
    out = model.train()(video)
    assert torch.equal(
        model.decode(out.encoded.indices), model.decode(out.encoded.latents.detach())
    )
    ((out.video - video).pow(2).mean() + out.encoded.quantizer_loss).backward()
    assert not without_gradient(model)


def test_presets_and_budgets():
    paper = TokenizerConfig.preset("paper")
    sizes = paper.num_appearance, paper.num_motion, paper.dim, paper.latent_dim, paper.codebook_size
    assert sizes == (256, 768, 768, 16, 8192) and paper.heads == 12
    assert paper.encoder_depth == paper.decoder_depth == 12 and paper.grid == (4, 16, 16)
    assert paper.larp and not paper.restart and paper.codes_per_token == 1
    assert TINY.num_tokens == 64 and TokenizerConfig.preset("pocket").num_tokens == 256
    assert num_appearance_codes(TINY) == 16 * TINY.codes_per_token
    for tokens in 512, 768, 1024:
        config = TokenizerConfig.preset("paper", tokens=tokens)
        assert (config.num_appearance, config.num_motion) == (tokens // 4, 3 * tokens // 4)
        with torch.device("meta"):
            for cls in QueryTokenizer, DeRATokenizer:
                code = cls(config).encode(torch.zeros(1, 3, 16, 128, 128), quantize=False)
                assert code.latents.shape == (1, tokens, 16)
            assert GridTokenizer(config).config.num_tokens == 1024  # its patches decide


def test_levels_of_fsq():
    for bits in range(1, 17):
        assert math.prod(fsq_levels(2**bits)) == 2**bits
    config = TokenizerConfig.preset("tiny", quantizer="fsq")
    assert config.levels == (8, 8, 8) and config.latent_dim == 12
    named = TokenizerConfig.preset("tiny", quantizer="fsq", levels=[8, 5, 5], codebook_size=200)
    assert named.levels == (8, 5, 5) and named.latent_dim == 12
    assert replace(named, seed=3).levels == (8, 5, 5)
    assert type(build(GridTokenizer, named).quantizer) is FSQ


def test_the_quantizer_is_the_one_that_was_named():
    for name, kind in dict(svq=StochasticVectorQuantizer, vq=VectorQuantizer, fsq=FSQ).items():
        assert type(build(QueryTokenizer, replace(SMALL, quantizer=name)).quantizer) is kind


def test_no_two_queries_start_alike():
    for grid in (4, 4, 4), (1, 4, 4), (2, 3, 5):
        table = gaussian_positions(grid, 64, torch.Generator().manual_seed(1))
        for num in 1, 4, 8, 15, 16, 30, 32, 48, 64, 80:
            queries = coarse_queries(table, grid, num)
            assert queries.shape == (num, 64)
            assert num == 1 or torch.pdist(queries).min() > 0.05, (grid, num)
        assert torch.allclose(coarse_queries(table, grid, len(table)), table, atol=1e-6)


BAD = [
    (dict(dim=100, heads=3), "heads"),
    (dict(size=36), "patch_p"),
    (dict(size=(32, 36)), "patch_p"),
    (dict(num_frames=7), "patch_t"),
    (dict(num_motion=0), "num_motion"),
    (dict(num_appearance=-1), "num_appearance"),
    (dict(num_appearance=1.5), "num_appearance"),
    (dict(size=0), "size"),
    (dict(size=(32,)), "size"),
    (dict(size="32"), "size"),
    (dict(size=None), "size"),
    (dict(dim=128.0), "dim"),
    (dict(heads=0), "heads"),
    (dict(decoder_depth="4"), "decoder_depth"),
    (dict(patch_p=-8), "patch_p"),
    (dict(latent_dim=0), "latent_dim"),
    (dict(latent_dim=14), "codes_per_token"),
    (dict(codes_per_token=0), "codes_per_token"),
    (dict(codebook_size=1), "codebook_size"),
    (dict(temperature=0), "temperature"),
    (dict(temperature=float("nan")), "temperature"),
    (dict(temperature="hot"), "temperature"),
    (dict(positions="learned"), "positions"),
    (dict(queries=""), "queries"),
    (dict(quantizer="lfq"), "quantizer"),
    (dict(quantizer="fsq", codebook_size=1000), "levels"),
    (dict(quantizer="fsq", levels=(8, 5)), "40 codes"),
    (dict(tokens=0), "tokens"),
    (dict(tokens=30), "tokens"),
    (dict(tokens=64.0), "tokens"),
    (dict(width=64), "width"),
]


def test_bad_configurations_are_refused_when_made():
    complaints = []
    for changes, word in BAD:
        try:
            TokenizerConfig.preset("tiny", **changes)
            complaints.append(f"{changes} was accepted")
        except InputError as error:
            if word not in str(error) or "\n" in str(error):
                complaints.append(f"{changes}: {error}")
    assert not complaints, "\n".join(complaints)
    with pytest.raises(InputError, match="huge"):
        TokenizerConfig.preset("huge")


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
    model = DeRATokenizer(SMALL)
    for wrong in (clips[:, :, :4], clips[0], clips[..., :16]):
        with pytest.raises(InputError, match=r"\(B, 3, 8, 32, 32\)"):
            model.encode(wrong)
    with pytest.raises(InputError, match="uint8"):
        model.encode(clips.byte())
    for shape in (1, 10), (64,):
        with pytest.raises(InputError, match="64 tokens"):
            model.decode(torch.zeros(shape, dtype=torch.long))
    for shape in (1, 64, 8), (1, 63, 16):
        with pytest.raises(InputError, match="64 tokens"):
            model.decode(torch.zeros(shape))
    with pytest.raises(InputError, match=r"\[0, 64\)"):
        model.decode(torch.full((1, 64), 64))
    for tap in 0, 3:
        with pytest.raises(InputError, match="1 to 2"):
            model.encode(clips, tap=tap)


@every
def test_clips_and_weights_that_are_not_finite_are_told_apart(cls, clips):
    model = build(cls).train()
    broken = clips.clone()
    broken[2, 1, 3, 4, 5] = math.inf
    with pytest.raises(InputError, match=r"the clips .* got inf at \[2, 1, 3, 4, 5\]"):
        model.encode(broken)
    model.embed_motion.weight.data[0, 0] = math.nan
    with pytest.raises(InputError, match="latents that reach the quantiser .* weights"):
        model.encode(clips)


@every
def test_an_empty_batch_comes_back_empty(cls):
    for name in "svq", "vq", "fsq":
        model, none = build(cls, replace(SMALL, quantizer=name)), torch.zeros(0, 3, 8, 32, 32)
        for training in False, True:
            out = model.train(training)(none)
            assert out.video.shape == none.shape and out.encoded.indices.shape == (0, 64)
            assert out.encoded.quantizer_loss == 0


@every
def test_tap_returns_an_earlier_layer_and_the_same_tokens(cls):
    model, video, states = build(cls), noise(SMALL, 2), []
    hook = model.encoder.blocks[0].register_forward_hook(lambda m, i, o: states.append(o))
    with torch.no_grad():
        last, first, deepest = (model.encode(video, tap=tap) for tap in (None, 1, 2))
    hook.remove()
    assert torch.equal(first.indices, last.indices)
    assert torch.equal(first.motion, states[-1][:, -64:])
    assert not torch.allclose(first.motion, last.motion)
    assert torch.equal(deepest.motion, last.motion)  # the last layer: after the final norm
    if cls is DeRATokenizer:
        assert torch.equal(first.appearance, states[-2][:, -16:])


def test_normal_queries_and_the_decoders_type_vector_are_drawn_apart():
    for seed in 0, 3:
        model = QueryTokenizer(replace(SMALL, positions="sincos", queries="normal", seed=seed))
        assert not (model.queries == model.query_type).all(-1).any()
        assert abs(model.queries.std() - 0.02) < 0.001


def test_keys_start_as_the_queries_where_the_preset_ties_them():
    for preset, tie in ("tiny", 1.5), ("pocket", 1.5), ("paper", 0.0):
        config = TokenizerConfig.preset(preset, encoder_depth=1, decoder_depth=1, codebook_size=8)
        assert config.tie == tie
        model = QueryTokenizer(config)
        q, k, _ = model.encoder.blocks[0].qkv.weight.detach().chunk(3)
        assert torch.equal(q, k) == bool(tie)
        if tie:
            bound = tie / math.sqrt(config.dim)  # torch's default, times `tie`
            assert 0.99 * bound < q.abs().max() <= bound


def test_tying_acts_under_larps_initialisation_too():
    model = QueryTokenizer(replace(SMALL, larp=True, tie=1.5))
    q, k, _ = model.encoder.blocks[0].qkv.weight.chunk(3)
    assert torch.equal(q, k)


# ---- what `paper` takes from LARP


def test_larps_initialisation():
    torch.manual_seed(0)
    config = TokenizerConfig.preset("paper", encoder_depth=1, decoder_depth=1, codebook_size=64)
    model = DeRATokenizer(config)
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "out":
            bound = math.sqrt(6 / sum(layer.weight.shape))
            assert 0.98 * bound < layer.weight.abs().max() <= bound, name
            assert layer.bias is None or not layer.bias.any(), name
        if isinstance(layer, torch.nn.LayerNorm):
            assert layer.eps == 1e-6, name
    assert not model.out.weight.any() and not model.out.bias.any()
    assert [n for n, _ in model.named_parameters() if "qkv.bias" in n or n == "encoder.norm"] == []
    assert isinstance(model.decoder.norm, torch.nn.LayerNorm)


def test_unit_latents_enter_larps_decoder_as_they_are():
    torch.manual_seed(0)
    unit = F.normalize(torch.randn(400, 16), dim=-1)
    sizes = {}
    for larp in True, False:
        config = TokenizerConfig(
            larp=larp, size=16, num_frames=4, encoder_depth=1, decoder_depth=1, codebook_size=64
        )
        model = QueryTokenizer(replace(config, num_appearance=4, num_motion=12))
        entering = model.from_latent(unit * model.latent_scale)
        sizes[larp] = entering.pow(2).mean().sqrt().item()
    assert abs(sizes[True] - 0.05) < 0.01 and abs(sizes[False] - 0.6) < 0.1


def test_summed_positions():
    grid, dim = (2, 3, 4), 24
    table = summed_positions(grid, dim).view(*grid, dim)
    axes = [sincos_positions((n,), dim) for n in grid]
    for t, h, w in (0, 0, 0), (1, 2, 3), (1, 0, 2):
        assert torch.allclose(table[t, h, w], axes[0][t] + axes[1][h] + axes[2][w])


# ---- streams


def test_appearance_sees_the_first_frame_only():
    config = TokenizerConfig.preset(
        "pocket", dim=32, heads=4, encoder_depth=1, decoder_depth=1, codebook_size=64
    )
    model, a = build(DeRATokenizer, config), config.num_appearance
    one, two = noise(config, 1, seed=1), noise(config, 1, seed=2)
    with torch.no_grad():
        before = model.encode(one)
        for frame in range(16):
            mixed = one.clone()
            mixed[:, :, frame] = two[:, :, frame]
            after = model.encode(mixed)
            same = torch.equal(before.latents[:, :a], after.latents[:, :a])
            assert same == torch.equal(before.appearance, after.appearance) == (frame > 0)
            assert not torch.equal(before.motion, after.motion)


def test_later_frames_leave_appearance_alone_in_training_and_when_trained(shipped):
    one, two = (render(sample_factors(4, seed=seed), 8, 32) for seed in (1, 2))
    two[:, :, 0] = one[:, :, 0]
    a = num_appearance_codes(shipped.config)
    with torch.no_grad():
        before, after = shipped.encode(one), shipped.encode(two)
    assert torch.equal(before.indices[:, :a], after.indices[:, :a])
    assert torch.equal(before.appearance, after.appearance)
    assert not torch.equal(before.indices[:, a:], after.indices[:, a:])

    video = one.clone().requires_grad_()
    latents = build(DeRATokenizer).train().encode(video, quantize=False).latents
    (gradient,) = torch.autograd.grad(latents[:, :16].pow(3).sum(), video)
    assert gradient[:, :, 0].abs().sum() > 0 and (gradient[:, :, 1:] == 0).all()


def test_one_encoder_serves_both_streams():
    model, lengths = build(DeRATokenizer), []
    hook = model.encoder.register_forward_hook(lambda m, i, o: lengths.append(i[0].shape[1]))
    model.encode(noise(SMALL, 1))
    hook.remove()
    assert lengths == [32, 112]

    def weights(net):
        return sum(p.numel() for p in net.parameters())

    assert weights(model.encoder) == weights(Transformer(48, 2, 4))
    added = (3 * 64 * 48 + 48) + 16 * 48  # patch embedding and positions of the first frame
    assert weights(model) - weights(QueryTokenizer(SMALL)) == added


@every
def test_batch_order_never_matters(cls, clips):
    model = build(cls, replace(SMALL, codes_per_token=4))
    video = torch.cat([clips, clips[:2].flip(-1)])
    order = torch.tensor([3, 0, 7, 5, 1, 6, 2, 4])
    with torch.no_grad():
        together, shuffled = model(video), model(video[order])
        alone = [model(video[i : i + 1]) for i in range(8)]
    pieces = torch.cat([out.encoded.indices for out in alone])
    assert torch.equal(shuffled.encoded.indices, together.encoded.indices[order])
    assert torch.equal(pieces, together.encoded.indices)
    assert torch.allclose(torch.cat([out.video for out in alone]), together.video, atol=1e-5)
    assert torch.allclose(shuffled.video, together.video[order], atol=1e-5)
    assert len(pieces.unique(dim=0)) == 8  # and clips are told apart


# ---- training


@every
def test_gradients_reach_every_parameter_after_one_step(cls):
    "The output layer starts at zero and lets nothing through; one step later everything learns."
    torch.manual_seed(0)
    model = cls(replace(SMALL, positions="sincos", queries="normal")).train()
    video, adam = noise(SMALL, 2), torch.optim.Adam(model.parameters(), 1e-3)

    def silent():
        adam.zero_grad()
        out = model(video)
        ((out.video - video).pow(2).mean() + out.encoded.quantizer_loss).backward()
        return without_gradient(model)

    decoder = [
        n for n, p in model.named_parameters() if n.startswith("decoder") and p.requires_grad
    ]
    assert [name for name in silent() if name.startswith("decoder")] == decoder
    adam.step()
    assert silent() == []


def test_one_clip_is_learned_by_heart():
    "Over 24 dB in 40 steps, quantised from the first one (lesson 04 goes on, with all three)."
    torch.manual_seed(0)
    model, clip = DeRATokenizer(TINY), render(sample_factors(1, seed=8), 8, 32)
    blocks = [p for n, p in model.named_parameters() if ".blocks." in n and p.ndim == 2]
    rest = [p for n, p in model.named_parameters() if ".blocks." not in n or p.ndim != 2]
    optimizers = (
        torch.optim.Muon(blocks, lr=0.02, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0),
    )
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 40) for o in optimizers]
    for _ in range(40):
        out = model(clip)
        model.zero_grad()
        ((out.video - clip).pow(2).mean() + 0.1 * out.encoded.quantizer_loss).backward()
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        error = (model.eval()(clip).video.clamp(0, 1) - clip).pow(2).mean()
    assert -10 * error.log10() > 24


class Kept(TorchDispatchMode):
    "Bytes of the tensors that operations made and nobody has freed, weights apart."

    def __init__(self, net):
        super().__init__()
        self.made = {}
        self.weights = {StorageWeakRef(p.untyped_storage()) for p in net.parameters()}

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made[StorageWeakRef(storage)] = storage.nbytes()
        return out

    def bytes(self):
        alive = {s: n for s, n in self.made.items() if s not in self.weights and not s.expired()}
        return sum(alive.values())


@every
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bf16"])
def test_checkpointing_changes_memory_and_nothing_else(cls, half, clips):
    seen = []
    for checkpoint in False, True:
        model = build(cls, replace(TINY, checkpoint=checkpoint)).train()
        torch.manual_seed(1)
        with Kept(model) as kept, torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = model(clips[:3])
            loss = (out.video.float() - clips[:3]).pow(2).mean() + out.encoded.quantizer_loss
        size = kept.bytes()
        learned = [p for p in model.parameters() if p.requires_grad]
        seen.append((size, [loss, *torch.autograd.grad(loss, learned)]))
    (most, plain), (least, again) = seen
    close = dict(rtol=0.05, atol=1e-3) if half else dict(rtol=1e-4, atol=1e-6)
    assert all(torch.allclose(a, b, **close) for a, b in zip(plain, again))
    assert least < most / 2


def test_starting_the_codebook_keeps_no_graph_and_does_not_depend_on_parts(clips):
    books = []
    for part in 6, 2:
        model = build(DeRATokenizer).train()
        torch.manual_seed(5)
        with Kept(model) as kept:
            model.init_quantizer(clips, part=part)
        assert kept.bytes() < 1e6
        books.append(model.quantizer.codebook.detach())
    assert torch.allclose(*books, atol=1e-5)
    build(DeRATokenizer, replace(SMALL, quantizer="fsq")).init_quantizer(clips)  # nothing to do


@pytest.mark.parametrize("quantize, checkpoint", [(True, False), (False, True)])
def test_sacp_on_the_shared_encoder(clips, quantize, checkpoint):
    "Backward through SACP's losses gives the streams' projected gradients, or leaves them alone."
    torch.manual_seed(0)
    model = DeRATokenizer(replace(TINY, checkpoint=checkpoint))
    image, video = load_teacher("pocket-image"), load_teacher("pocket-video")
    align, params = Alignment(128, image.dim, video.dim, 64), list(model.encoder.parameters())
    targets = teacher_features(image, video, clips, TINY.grid)

    def flat(loss):
        gradients = torch.autograd.grad(loss, params, retain_graph=True)
        return torch.cat([g.flatten() for g in gradients])

    L_a, L_m = align(model.encode(clips, quantize), *targets)
    for sign in 1, -1:  # one of the two is a conflict
        result = sacp(L_a, sign * L_m, params, weights=(1.0, 0.5))
        g_a, g_m = flat(L_a), sign * flat(L_m)
        p_a, p_m = project(g_a, g_m)
        assert bool(result.conflict) == bool(g_a @ g_m < 0)
        assert torch.allclose(flat(result.loss_a + result.loss_m), p_a + 0.5 * p_m, atol=1e-6)
    assert model.embed_appearance.weight.grad is None  # asking leaves no gradients behind


# ---- precision


def test_half_precision(clips):
    model, seen = build(DeRATokenizer, TINY), []
    hook = model.quantizer.register_forward_hook(
        lambda m, i, o: seen.append((o.z.dtype, o.loss.dtype))
    )
    with torch.no_grad():
        full = model(clips)
    for dtype, tolerance in (torch.bfloat16, 0.05), (torch.float16, 0.005):
        with torch.no_grad(), torch.autocast("cpu", dtype):
            half, same = model.eval()(clips), model.decode(full.encoded.indices)
        assert seen[-1] == (torch.float32, torch.float32) and half.video.isfinite().all()
        assert torch.allclose(same.float(), full.video, atol=tolerance)
        assert (half.encoded.indices == full.encoded.indices).float().mean() > 0.9
        model.train().zero_grad()
        with torch.autocast("cpu", dtype):
            out = model(clips)
            loss = (out.video - clips).pow(2).mean() + out.encoded.quantizer_loss
        loss.backward()
        learned = [p for p in model.parameters() if p.requires_grad]
        assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in learned)
    hook.remove()


def test_float64_stays_float64():
    "In the attention too: finite differences of a loss through two blocks would not agree else."
    torch.manual_seed(0)
    net, x = Transformer(8, 2, 2).double(), torch.randn(1, 3, 8, dtype=torch.float64)
    assert torch.autograd.gradcheck(net, x.requires_grad_())
    q, k, v = torch.randn(3, 1, 2, 5, 4, dtype=torch.float64)
    wanted = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
    assert torch.allclose(attend(q, k, v), wanted, rtol=1e-12, atol=1e-12)
    model = build(DeRATokenizer).double()
    assert model(noise(SMALL, 1).double()).video.dtype == torch.float64


def to_pretended_gpu(model):
    "Parameters and buffers of a fake tensor mode, on a GPU that is not there."
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            moved = torch.nn.Parameter(p.detach().to("cuda"), requires_grad=p.requires_grad)
            module._parameters[name] = moved
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to("cuda")
    return model


@pytest.mark.parametrize("quantizer", ["svq", "vq", "fsq"])
def test_on_a_gpu_nothing_mixes_devices_and_training_waits_for_nothing(quantizer):
    "With pretended tensors, of which reading any value is an error."
    config = replace(SMALL, quantizer=quantizer, restart=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = to_pretended_gpu(DeRATokenizer(config)).train()
        video = torch.rand(2, 3, 8, 32, 32, device="cuda")
        model.init_quantizer(video)
        with torch.autocast("cuda", torch.bfloat16):
            out = model(video)
        assert out.video.is_cuda and out.encoded.indices.is_cuda
        assert out.encoded.quantizer_loss.dtype == torch.float32
        assert model.eval().decode(out.encoded.indices).shape == video.shape


# ---- sizes


def test_sizes_at_the_papers_scale():
    "LARP's published 85.03, 0.59 and 0.16 million weights."
    with torch.device("meta"):
        grid, query, dera = models = [cls(TokenizerConfig.preset("paper")) for cls in CLASSES]

    def size(model, *parts):
        learned = [(n.split(".")[0], p) for n, p in model.named_parameters() if p.requires_grad]
        return sum(p.numel() for n, p in learned if not parts or n in parts)

    for model in models:
        assert size(model, "encoder") == 85_026_816 == size(model, "decoder") - 2 * 768
        assert size(model, "out") == size(model, "embed_motion") == 590_592
        assert size(model, "to_latent", "quantizer", "from_latent") == 156_432
        assert len(model.encoder.blocks) == len(model.decoder.blocks) == 12
    assert size(query) - size(grid) == 1024 * 768
    assert size(dera) - size(query) == 768 * (3 * 8 * 8 + 1)


def test_operations():
    "F(n) = D (24 n d^2 + 4 n^2 d), as torch counts it."

    def operations(config, depth, *rows):
        return depth * sum(24 * n * config.dim**2 + 4 * n**2 * config.dim for n in rows)

    for preset in "tiny", "pocket", "paper":
        config = TokenizerConfig.preset(preset)
        N, frame = math.prod(config.grid), math.prod(config.grid[1:])
        a, m = config.num_appearance, config.num_motion
        rows = dict(zip(CLASSES, ([N], [N + a + m], [frame + a, N + m])))
        counted = {}
        for cls in CLASSES:
            with torch.device("meta"):
                model = cls(config).eval()
                clip = torch.zeros(1, 3, config.num_frames, *config.frame)
            with FlopCounterMode(display=False) as counter:
                model(clip, quantize=False)
            parts = {
                k.split(".")[-1]: sum(v.values()) for k, v in counter.get_flop_counts().items()
            }
            counted[cls] = parts["encoder"]
            assert parts["encoder"] == operations(config, config.encoder_depth, *rows[cls])
            assert parts["decoder"] == operations(
                config, config.decoder_depth, N + model.num_tokens
            )
    assert 1.03 < counted[DeRATokenizer] / counted[QueryTokenizer] < 1.04


# ---- shipped


def test_shipped_tokenizer_keeps_its_promise(shipped):
    "On 100 clips that no training saw: three decibels above both still pictures, a decibel lost without either group."
    video = render(sample_factors(200, seed=987654)[torch.arange(100)], 8, 32)

    def psnr(picture):
        return -10 * (picture.clamp(0, 1) - video).pow(2).mean().log10()

    with torch.no_grad():
        indices = shipped.encode(video).indices
        full = psnr(shipped.decode(indices))
        still = psnr(video.mean(2, keepdim=True)), psnr(video[:, :, :1].expand_as(video))
        assert full > max(still) + 3
        assert len(indices.unique()) > shipped.config.codebook_size / 2
        a = num_appearance_codes(shipped.config)
        for part in slice(0, a), slice(a, None):
            constant = indices.clone()
            constant[:, part] = 0
            assert psnr(shipped.decode(constant)) < full - 1
