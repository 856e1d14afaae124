"""Published teachers: architectures with random weights (grid, order, normalisation), the names of
their tensors, and the table of what others publish. Nothing is downloaded. References are written
here from the publications, not with the package's code."""

import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models import AlexNet_Weights, VGG16_Weights
from transformers import VJEPA2VideoProcessor

from dera.pocket import render, sample_factors
from dera.runtime import weights
from dera.runtime.errors import InputError
from dera.runtime.published_teachers import (
    PUBLISHED_TEACHERS,
    InternVideo2,
    build_published,
    load_strict,
)
from dera.runtime.weights import (
    PUBLISHED,
    find_weights,
    missing_weights,
    require_weights,
    weights_table,
)
from dera.teachers import Teacher, load_teacher

NAMES = list(PUBLISHED_TEACHERS)
IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.fixture(scope="module")
def clips():
    return render(sample_factors(4, seed=31, level="busy"), 16, 64)


@pytest.fixture(scope="module")
def backbones():
    "Every published network, cut down to its first block."
    torch.manual_seed(0)
    return {name: build_published(name, depth=1) for name in NAMES}


@pytest.fixture(scope="module")
def one_block(backbones):
    return {name: Teacher(name, backbones[name], PUBLISHED_TEACHERS[name]) for name in NAMES}


@pytest.fixture
def no_hub(monkeypatch):
    "Nothing is in the cache and nothing can be fetched."

    def refuse(*args, **options):
        raise OSError("not in the cache")

    monkeypatch.delenv("DERA_TEACHERS", raising=False)
    monkeypatch.delenv("DERA_I3D", raising=False)
    monkeypatch.setattr(weights, "_online", lambda: False)
    monkeypatch.setattr(weights, "hf_hub_download", refuse)


def box(grid, shape, place):
    "Slices of a clip that belong to one token."
    return tuple(slice(s // g * i, s // g * (i + 1)) for g, s, i in zip(grid, shape, place))


# ---- architectures


@pytest.mark.parametrize("name", NAMES)
def test_tokens_stand_where_their_patches_are(name, backbones):
    "The most changed token after one block is the one whose patch changed; the grid is the paper's."
    teacher = Teacher(name, backbones[name], PUBLISHED_TEACHERS[name], layer=1)
    assert teacher.grid == ((1, 16, 16) if teacher.modality == "image" else (4, 16, 16))
    steps, rows, columns = teacher.grid
    place = (steps - 1, 1, columns - 3)
    shape = (teacher.frames, teacher.size, teacher.size)
    clip = torch.rand(1, 3, *shape, generator=torch.Generator().manual_seed(1))
    changed = clip.clone()
    at = (slice(None), slice(None), *box(teacher.grid, shape, place))
    changed[at] = 1 - changed[at]
    out = teacher(torch.cat([clip, changed]))
    assert out.shape == (2, math.prod(teacher.grid), teacher.dim)
    assert out.dtype == torch.float32
    assert not out.requires_grad
    moved = (out[1] - out[0]).norm(dim=-1)
    assert moved.argmax() == (place[0] * rows + place[1]) * columns + place[2]


def published_constants(name):
    "Mean and deviation where the weights come from."
    if name.startswith("vit_"):
        config = timm.get_pretrained_cfg(name)
        return list(config.mean), list(config.std)
    if name.startswith("vjepa2"):
        return list(VJEPA2VideoProcessor.image_mean), list(VJEPA2VideoProcessor.image_std)
    # videomae-base's preprocessor_config.json, VideoMAE v2's and InternVideo2's transforms
    return IMAGENET


def test_normalisation(one_block):
    "The first convolution gets zeros for the mean colour and ones one deviation above."
    for name, teacher in one_block.items():
        mean, std = (torch.tensor(v).view(1, 3, 1, 1, 1) for v in published_constants(name))
        convolutions = (torch.nn.Conv2d, torch.nn.Conv3d)
        first = next(m for m in teacher.model.modules() if isinstance(m, convolutions))
        seen = []

        def stop(module, inputs, seen=seen):
            seen.append(inputs[0])
            raise StopIteration

        hook = first.register_forward_pre_hook(stop)
        for level in (0, 1):
            colour = mean + level * std
            with pytest.raises(StopIteration):
                teacher(colour.expand(1, 3, teacher.frames, 50, 50))
            assert torch.allclose(seen[level], torch.full_like(seen[level], level), atol=1e-5), name
        hook.remove()
        assert seen[0].shape[-1] == teacher.size, name


def test_the_default_layer_is_the_last_after_its_norm(backbones, one_block, clips):
    for name in ("vit_small_patch16_dinov3.lvd1689m", "vit_small_patch14_dinov2.lvd142m"):
        teacher = one_block[name]
        norm = teacher.model.norm
        torch.manual_seed(0)
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_()
        last = Teacher(name, backbones[name], PUBLISHED_TEACHERS[name], layer=1)(clips[:1])
        wanted = F.layer_norm(last, (teacher.dim,), norm.weight, norm.bias, norm.eps)
        assert torch.allclose(teacher(clips[:1]), wanted, atol=1e-4)
        assert not torch.allclose(last, wanted, atol=0.1)


def test_video_teachers_average_pairs_after_the_norm(one_block, clips):
    teacher = one_block["videomae-base"]
    large = F.interpolate(clips[:1], (16, 256, 256), mode="nearest")
    with torch.no_grad():  # transformers' own forward
        theirs = teacher.model(((large - teacher.mean) / teacher.std).transpose(1, 2))
    theirs = theirs.last_hidden_state
    ours = teacher(large).view(4, 256, 768)
    assert theirs.shape == (1, 2048, 768)
    assert torch.allclose(ours, theirs.view(4, 2, 256, 768).mean(1), atol=1e-4)
    assert abs(theirs[0].mean(-1)).max() < 1e-4  # a fresh LayerNorm
    assert abs(theirs[0].var(-1) - 1).max() < 1e-2


def rms_norm(x, weight):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def internvideo2_block(z, w, prefix, heads):
    "One block of the published forward pass: naive attention, head by head."
    width = z.shape[-1]

    def linear(x, key):
        return x @ w[f"{prefix}{key}.weight"].T + w[f"{prefix}{key}.bias"]

    y = rms_norm(z, w[prefix + "norm1.weight"])
    q, k, v = (y @ w[prefix + "attn.qkv.weight"].T).split(width, -1)
    q = rms_norm(q, w[prefix + "attn.q_norm.weight"])
    k = rms_norm(k, w[prefix + "attn.k_norm.weight"])
    out = torch.empty_like(v)
    for start in range(0, width, width // heads):
        head = slice(start, start + width // heads)
        scores = q[..., head] @ k[..., head].transpose(1, 2) * (width // heads) ** -0.5
        out[..., head] = scores.softmax(-1) @ v[..., head]
    z = z + w[prefix + "ls1.gamma"] * linear(out, "attn.proj")
    hidden = F.gelu(linear(rms_norm(z, w[prefix + "norm2.weight"]), "mlp.fc1"))
    return z + w[prefix + "ls2.gamma"] * linear(hidden, "mlp.fc2")


def test_internvideo2_against_a_reference():
    "The published forward pass, step by step in float64."
    torch.manual_seed(0)
    model = InternVideo2(dim=24, depth=3, heads=4, frames=2, size=42).double()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.5 if "norm" in name or "gamma" in name else 0.3)
    w = model.state_dict()
    x = torch.randn(2, 3, 2, 42, 42).double()
    patches = x.unfold(3, 14, 14).unfold(4, 14, 14)  # frames, rows, columns
    patches = patches.permute(0, 2, 3, 4, 1, 5, 6).flatten(4).flatten(1, 3)
    z = patches @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"]
    z = torch.cat([w["cls_token"].expand(2, -1, -1), z], 1) + w["pos_embed"]
    states = []
    for i in range(3):
        z = internvideo2_block(z, w, f"blocks.{i}.", heads=4)
        states.append(z[:, 1:])
    assert torch.allclose(model(x), states[2], rtol=1e-9)
    assert torch.allclose(model(x, 2), states[1], rtol=1e-9)


# ---- other devices and precisions


def make_fake(module, mode, device):
    "Give every parameter and buffer a shape and a device, and no values."
    for part in module.modules():
        for key, parameter in part._parameters.items():
            if parameter is not None:
                fake = mode.from_tensor(parameter.detach()).to(device)
                part._parameters[key] = torch.nn.Parameter(fake, requires_grad=False)
        for key, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[key] = mode.from_tensor(buffer).to(device)


@pytest.mark.parametrize("name", [*NAMES, "pocket64-image", "pocket64-video"])
def test_on_a_gpu_nothing_stays_behind(name, one_block):
    "With shapes and devices but no values: no constant on the CPU, no mixture of precisions."
    teacher = one_block.get(name) or load_teacher(name, pretrained=False)
    # autocast of "cuda" is off where there is no card; the CPU's mixes the same precisions
    for device, autocast in (("cuda", False), ("cpu", True)):
        for weights_dtype in (torch.float32, torch.bfloat16):
            fake = copy.deepcopy(teacher)
            fake.model.to(weights_dtype)
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                make_fake(fake, mode, device)
                for dtype in (torch.float32, torch.bfloat16):
                    video = torch.empty(2, 3, 16, 48, 48, device=device, dtype=dtype)
                    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                        out = fake(video)
                    assert out.device.type == device
                    assert out.dtype == torch.float32
                    assert out.shape == (2, math.prod(teacher.grid), teacher.dim)


def test_autocast_and_bf16_change_little(one_block, clips):
    for name in ("vit_small_patch16_dinov3.lvd1689m", "internvideo2-b14"):
        teacher = one_block[name]
        exact = teacher(clips[:1])
        with torch.autocast("cpu", torch.bfloat16):
            close = teacher(clips[:1])
        assert close.dtype == torch.float32
        assert 0.99 < F.cosine_similarity(close, exact, dim=-1).mean() < 1


# ---- names of published tensors


def internvideo_names():
    "InternVideo2's distilled B/14: 160 tensors of the encoder, 57 that belong to the heads."
    d = 768
    shapes = {
        "cls_token": (1, 1, d),
        "pos_embed": (1, 2049, d),
        "clip_pos_embed": (1, 2049, d),
        "patch_embed.proj.weight": (d, 3, 1, 14, 14),
        "patch_embed.proj.bias": (d,),
        "clip_projector.cross_attn.proj.bias": (d,),
    }
    block = {
        "norm1.weight": (d,),
        "attn.qkv.weight": (3 * d, d),
        "attn.proj.weight": (d, d),
        "attn.proj.bias": (d,),
        "attn.q_norm.weight": (d,),
        "attn.k_norm.weight": (d,),
        "ls1.gamma": (d,),
        "norm2.weight": (d,),
        "mlp.fc1.weight": (4 * d, d),
        "mlp.fc1.bias": (4 * d,),
        "mlp.fc2.weight": (d, 4 * d),
        "mlp.fc2.bias": (d,),
        "ls2.gamma": (d,),
    }
    for i in range(12):
        shapes |= {f"blocks.{i}.{key}": shape for key, shape in block.items()}
    for k in "qkv":
        shapes[f"clip_projector.norm1_{k}.weight"] = (d,)
        shapes[f"clip_projector.norm1_{k}.bias"] = (d,)
        shapes[f"clip_projector.cross_attn.{k}_bias"] = (d,)
    for k in ("q", "k", "v", "proj"):
        shapes[f"clip_projector.cross_attn.{k}.weight"] = (d, d)
    heads = [(f"clip_decoder.{i}", 1408) for i in range(6)] + [("final_clip_decoder", d)]
    for head, width in heads:
        shapes |= {
            f"{head}.head.0.weight": (d, d),
            f"{head}.head.0.bias": (d,),
            f"{head}.head.2.weight": (width, d),
            f"{head}.head.2.bias": (width,),
            f"{head}.norm.weight": (width,),
            f"{head}.norm.bias": (width,),
        }
    return shapes


def with_changes(state, changes):
    "The state with some tensors replaced; None takes one out."
    return {k: v for k, v in (state | changes).items() if v is not None}


def test_internvideo2_loads_the_published_names(tmp_path):
    names = internvideo_names()
    assert len(names) == 217
    generator = torch.Generator().manual_seed(0)
    state = {
        key: torch.empty(shape).uniform_(-0.05, 0.05, generator=generator).half()
        for key, shape in names.items()
    }
    file = tmp_path / "internvideo2-b14.safetensors"
    save_file(state, file)
    teacher = load_teacher("internvideo2-b14", weights=file, layer=1)
    own = teacher.model.state_dict()
    assert len(own) == 160
    assert all(torch.equal(v, state[k].float()) for k, v in own.items() if k != "pos_embed")

    # time i of 4 lies midway between 2i and 2i + 1 of 8
    table = own["pos_embed"]
    old = state["pos_embed"].float()
    assert torch.equal(table[:, 0], old[:, 0])
    pairs = old[:, 1:].view(4, 2, 256, 768).mean(1)
    assert torch.allclose(table[0, 1:].view(4, 256, 768), pairs, atol=1e-3)
    assert teacher(torch.rand(1, 3, 4, 32, 32)).isfinite().all()

    wrong = [
        (
            {"blocks.7.attn.q_norm.weight": torch.zeros(64)},
            r"blocks\.7\.attn\.q_norm\.weight.*\(64,\).*\(768,\)",
        ),
        ({"blocks.3.ls1.gamma": None}, r"no blocks\.3\.ls1\.gamma"),
        ({"blocks.12.norm1.weight": torch.zeros(768)}, r"has blocks\.12\.norm1\.weight"),
        ({"blocks.2.attn.qkv.bias": torch.zeros(2304)}, r"has blocks\.2\.attn\.qkv\.bias"),
        ({"pos_embed": torch.zeros(1, 2000, 768)}, "pos_embed.*2000"),
    ]
    facts = PUBLISHED_TEACHERS["internvideo2-b14"]
    for changes, complaint in wrong:
        with pytest.raises(InputError, match=complaint) as error:
            load_strict(teacher.model, with_changes(state, changes), facts, file)
        assert "\n" not in str(error.value)
    after = teacher.model.state_dict()
    assert all(torch.equal(v, own[k]) for k, v in after.items())  # a refused file changes nothing


def norm(key, d):
    return {f"{key}.weight": (d,), f"{key}.bias": (d,)}


def linear(key, inputs, outputs, bias=True):
    return {f"{key}.weight": (outputs, inputs)} | ({f"{key}.bias": (outputs,)} if bias else {})


def timm_names(name):
    v3 = "dinov3" in name
    d = 768 if "base" in name else 384
    p = 16 if v3 else 14
    shapes = {
        "cls_token": (1, 1, d),
        "patch_embed.proj.weight": (d, 3, p, p),
        "patch_embed.proj.bias": (d,),
    } | norm("norm", d)
    shapes |= {"reg_token": (1, 4, d)} if v3 else {"pos_embed": (1, 1370, d)}
    scales = ("gamma_1", "gamma_2") if v3 else ("ls1.gamma", "ls2.gamma")
    for block in (f"blocks.{i}" for i in range(12)):
        shapes |= norm(f"{block}.norm1", d) | norm(f"{block}.norm2", d)
        shapes |= linear(f"{block}.attn.qkv", d, 3 * d, bias=not v3)
        shapes |= linear(f"{block}.attn.proj", d, d)
        shapes |= linear(f"{block}.mlp.fc1", d, 4 * d) | linear(f"{block}.mlp.fc2", 4 * d, d)
        shapes |= {f"{block}.{scale}": (d,) for scale in scales}
    return shapes


def vjepa2_names():
    d, embed = 1024, "encoder.embeddings.patch_embeddings.proj"
    shapes = {
        f"{embed}.weight": (d, 3, 2, 16, 16),
        f"{embed}.bias": (d,),
        "predictor.embeddings.mask_tokens": (10, 1, 1, 384),
    }
    shapes |= norm("encoder.layernorm", d) | linear("predictor.proj", 384, d)
    for block in (f"encoder.layer.{i}" for i in range(24)):
        shapes |= norm(f"{block}.norm1", d) | norm(f"{block}.norm2", d)
        shapes |= linear(f"{block}.mlp.fc1", d, 4 * d) | linear(f"{block}.mlp.fc2", 4 * d, d)
        for key in ("query", "key", "value", "proj"):
            shapes |= linear(f"{block}.attention.{key}", d, d)
    return shapes


def videomae_names():
    d, embed = 768, "videomae.embeddings.patch_embeddings.projection"
    shapes = {
        f"{embed}.weight": (d, 3, 2, 16, 16),
        f"{embed}.bias": (d,),
        "mask_token": (1, 1, 384),
        "encoder_to_decoder.weight": (384, d),
        "decoder.head.bias": (1536,),
    } | norm("videomae.layernorm", d)
    for block in (f"videomae.encoder.layer.{i}" for i in range(12)):
        attention = f"{block}.attention.attention"
        shapes |= {f"{attention}.q_bias": (d,), f"{attention}.v_bias": (d,)}
        shapes |= norm(f"{block}.layernorm_before", d) | norm(f"{block}.layernorm_after", d)
        for key in ("query", "key", "value"):
            shapes |= linear(f"{attention}.{key}", d, d, bias=False)
        shapes |= linear(f"{block}.attention.output.dense", d, d)
        shapes |= linear(f"{block}.intermediate.dense", d, 4 * d)
        shapes |= linear(f"{block}.output.dense", 4 * d, d)
    return shapes


HUB_NAMES = {name: timm_names(name) for name in NAMES if name.startswith("vit_")} | {
    "vjepa2-vitl-fpc64-256": vjepa2_names(),
    "videomae-base": videomae_names(),
}


@pytest.mark.parametrize("name", HUB_NAMES)
def test_published_names_load(name):
    "Key by key, on the meta device, where tensors have a shape and no values."
    facts, names = PUBLISHED_TEACHERS[name], HUB_NAMES[name]
    with torch.device("meta"):
        model = build_published(name).model
        state = {key: torch.empty(shape) for key, shape in names.items()}
        wrong_shape, stranger = torch.empty(3, 1), torch.empty(1)
    load_strict(model, state, facts, "file")
    heads = ("predictor", "decoder", "encoder_to", "mask")
    needed = [key for key in names if not key.startswith(heads)]
    assert len(needed) == len(model.state_dict())
    for key in (needed[7], needed[-1]):
        shown = key.replace("q_bias", "query.bias").replace("v_bias", "value.bias")
        with pytest.raises(InputError, match=f"no {shown};.*{facts.repo}"):
            load_strict(model, with_changes(state, {key: None}), facts, "file")
        with pytest.raises(InputError, match=f"file: {shown} is"):
            load_strict(model, state | {key: wrong_shape}, facts, "file")
    with pytest.raises(InputError, match="stranger"):
        load_strict(model, state | {"stranger": stranger}, facts, "file")


def videomaev2_names():
    d = 768
    shapes = {
        "patch_embed.proj.weight": (d, 3, 2, 16, 16),
        "patch_embed.proj.bias": (d,),
    } | norm("fc_norm", d)
    for block in (f"blocks.{i}" for i in range(12)):
        shapes |= norm(f"{block}.norm1", d) | norm(f"{block}.norm2", d)
        shapes |= {f"{block}.attn.q_bias": (d,), f"{block}.attn.v_bias": (d,)}
        shapes |= linear(f"{block}.attn.qkv", d, 3 * d, bias=False)
        shapes |= linear(f"{block}.attn.proj", d, d)
        shapes |= linear(f"{block}.mlp.fc1", d, 4 * d) | linear(f"{block}.mlp.fc2", 4 * d, d)
    return shapes


def videomaev2_block(z, w):
    "The first block of VideoMAE v2's published forward pass."
    d, heads = 768, 12

    def linear(x, key):
        return x @ w[f"blocks.0.{key}.weight"].T + w[f"blocks.0.{key}.bias"]

    def normed(x, key):
        return F.layer_norm(x, (d,), w[f"blocks.0.{key}.weight"], w[f"blocks.0.{key}.bias"], 1e-6)

    bias = torch.cat([w["blocks.0.attn.q_bias"], torch.zeros(d), w["blocks.0.attn.v_bias"]])
    qkv = normed(z, "norm1") @ w["blocks.0.attn.qkv.weight"].T + bias
    q, k, v = qkv.view(1, -1, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
    attended = (q * (d // heads) ** -0.5 @ k.mT).softmax(-1) @ v
    z = z + linear(attended.transpose(1, 2).flatten(2), "attn.proj")
    return z + linear(F.gelu(linear(normed(z, "norm2"), "mlp.fc1")), "mlp.fc2")


def test_videomaev2_loads_its_own_names_and_computes_its_forward(backbones):
    facts, names = PUBLISHED_TEACHERS["videomaev2-base"], videomaev2_names()
    assert len(names) == 160
    generator = torch.Generator().manual_seed(0)
    w = {}
    for key, shape in names.items():
        if key.startswith("blocks.0.") or "blocks" not in key:
            w[key] = torch.empty(shape).normal_(std=0.05, generator=generator)
    backbone = backbones["videomaev2-base"]
    load_strict(backbone.model, {f"model.{k}": v for k, v in w.items()}, facts, "file")

    clip = torch.rand(1, 3, 16, 256, 256, generator=generator)
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in IMAGENET)
    embed = w["patch_embed.proj.weight"], w["patch_embed.proj.bias"]
    z = F.conv3d((clip - mean) / std, *embed, stride=(2, 16, 16)).flatten(2).transpose(1, 2)
    z = videomaev2_block(z + backbone.model.embeddings.position_embeddings, w)
    normed = F.layer_norm(z, (768,), w["fc_norm.weight"], w["fc_norm.bias"], 1e-6)

    one = Teacher("", backbone, facts, layer=1)(clip)
    last = Teacher("", backbone, facts)(clip)
    for ours, theirs in ((one, z), (last, normed)):
        pairs = theirs.view(4, 2, 256, 768).mean(1)
        assert torch.allclose(ours.view(4, 256, 768), pairs, atol=1e-3)

    with torch.device("meta"):
        model = build_published("videomaev2-base").model
        w = {key: torch.empty(shape) for key, shape in names.items()}
        short = torch.empty(6, 2)
    wrong = [
        ({"blocks.3.norm2.bias": None}, r"no encoder\.layer\.3\.layernorm_after\.bias"),
        ({"stranger": short}, "has stranger"),
        ({"blocks.4.attn.qkv.weight": short}, r"attention\.attention\.query\.weight is \(2, 2\)"),
    ]
    for changes, complaint in wrong:
        with pytest.raises(InputError, match=complaint):
            load_strict(model, with_changes(w, changes), facts, "file")


# ---- finding weights


def small_dinov2(folder):
    "A file with the published names of DINOv2 ViT-S/14; its table of positions is a ramp over rows."
    name = "vit_small_patch14_dinov2.lvd142m"
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, shape in HUB_NAMES[name].items():
        state[key] = torch.empty(shape).normal_(std=0.02, generator=generator)
    ramp = torch.linspace(-1, 1, 37)[:, None, None].expand(37, 37, 384).reshape(1, -1, 384)
    state["pos_embed"] = torch.cat([torch.zeros(1, 1, 384), ramp], 1).contiguous()
    file = folder / f"{name}.safetensors"
    save_file(state, file)
    return name, file, state


def test_a_local_file_is_used_and_its_values_arrive(tmp_path, monkeypatch, clips):
    name, file, state = small_dinov2(tmp_path)
    named = load_teacher(name, weights=file)
    monkeypatch.setenv("DERA_TEACHERS", str(tmp_path))
    found = load_teacher(name)
    assert torch.equal(named(clips), found(clips))
    own = named.model.state_dict()
    assert all(torch.equal(own[k], v) for k, v in state.items() if k != "pos_embed")
    grid = own["pos_embed"][0, 1:, 0].view(16, 16)
    ramp = ((torch.arange(16) + 0.5) * 37 / 16 - 0.5) * 2 / 36 - 1  # a ramp over rows stays one
    assert torch.allclose(grid[1:-1, 3], ramp[1:-1], atol=0.01)
    assert torch.allclose(grid, grid[:, :1].expand(-1, 16), atol=1e-5)

    folder = tmp_path / "folder"
    folder.mkdir()
    file.rename(folder / "model.safetensors")
    assert load_teacher(name, weights=folder).fingerprint == named.fingerprint


def test_junk_is_named_as_what_it_is(tmp_path, monkeypatch, no_hub):
    "A broken download, another kind of file, a Git LFS pointer, an empty file: named or found."
    name = "vit_small_patch14_dinov2.lvd142m"
    whole = tmp_path / "whole.safetensors"
    save_file({"weight": torch.ones(1000)}, whole)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 88000000\n"
    junk = {
        "short": (whole.read_bytes()[:1000], "damaged"),
        "page": (b"<!doctype html><html>not found</html>", "damaged"),
        "empty": (b"", "damaged"),
        "pointer": (pointer.encode(), "Git LFS pointer.*git lfs pull"),
    }
    file = tmp_path / f"{name}.safetensors"
    monkeypatch.setenv("DERA_TEACHERS", str(tmp_path))
    for content, complaint in junk.values():
        file.write_bytes(content)
        for options in ({}, {"weights": file}):
            with pytest.raises(InputError, match=complaint) as error:
                load_teacher(name, **options)
            assert str(file) in str(error.value)
            assert "\n" not in str(error.value)
    for absent in (tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(InputError, match="no safetensors file"):
            load_teacher(name, weights=absent)
    pickle = tmp_path / "weights.bin"
    pickle.write_bytes(b"x")
    with pytest.raises(InputError, match="no safetensors file"):
        load_teacher(name, weights=pickle)


def test_without_weights_one_line_says_where_they_are(no_hub):
    for name, facts in PUBLISHED_TEACHERS.items():
        with pytest.raises(InputError) as error:
            load_teacher(name)
        line = str(error.value)
        parts = (facts.repo, facts.licence, "DERA_TEACHERS", f"{name}.safetensors")
        assert all(part in line for part in parts), line
        assert "weights=" not in line  # no command has such an option
        assert "\n" not in line


def test_all_that_is_missing_is_said_at_once(no_hub, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    wanted = ["pocket-image", "", "internvideo2-b14", "lpips-vgg", "i3d", "lpips-vgg"]
    lines = missing_weights(wanted)
    assert len(lines) == 3
    with pytest.raises(InputError) as error:
        require_weights(wanted)
    assert all(line in str(error.value) for line in lines)
    assert "\n" not in str(error.value)

    # one of them arrives
    place = tmp_path / "checkpoints" / "vgg16-397923af.pth"
    place.parent.mkdir()
    place.write_bytes(b"weights")
    assert len(missing_weights(wanted)) == 2
    monkeypatch.setenv("DERA_I3D", str(place))
    assert len(missing_weights(wanted)) == 1
    assert missing_weights(["pocket64-video", ""]) == []
    require_weights([""])


def test_a_failed_download_says_why(monkeypatch, no_hub):
    monkeypatch.setattr(weights, "_online", lambda: True)
    with pytest.raises(InputError, match="fetching them failed: not in the cache"):
        find_weights("videomae-base")


def test_the_hub_is_asked_for_the_right_file(monkeypatch, no_hub, tmp_path):
    asked = []

    def ask(repository, file, local_files_only):
        asked.append((repository, file, local_files_only))
        raise OSError

    monkeypatch.setattr(weights, "hf_hub_download", ask)
    monkeypatch.setattr(weights, "_online", lambda: True)
    with pytest.raises(InputError):
        load_teacher("vjepa2-vitl-fpc64-256")
    repository = "facebook/vjepa2-vitl-fpc64-256"
    assert asked == [(repository, "model.safetensors", local) for local in (True, False)]
    asked.clear()
    assert len(missing_weights(["vjepa2-vitl-fpc64-256"], fetch=False)) == 1
    assert asked == [(repository, "model.safetensors", True)]
    monkeypatch.setattr(weights, "hf_hub_download", lambda *args, **options: "/the/file")
    assert str(find_weights("videomae-base")) == "/the/file"


def test_the_table_lists_everything(no_hub, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.chdir(tmp_path)
    table = {row.name: row for row in weights_table()}
    assert set(table) == set(PUBLISHED) >= {*PUBLISHED_TEACHERS, "ucf101", "k600", "i3d"}
    assert not any(row.there for row in table.values())
    assert all(row.source.startswith("https://") and row.licence for row in table.values())
    assert all(row.size and row.place for row in table.values())
    (tmp_path / "my-ucf").mkdir()
    given = {row.name: row for row in weights_table({"ucf101": "my-ucf"})}
    assert given["ucf101"].there
    assert given["ucf101"].place == "my-ucf"
    for name, published in (("lpips-vgg", VGG16_Weights), ("lpips-alex", AlexNet_Weights)):
        assert table[name].source == published.DEFAULT.url
        assert table[name].size == f"{published.DEFAULT.meta['_file_size']:.0f} MB"
        assert table[name].place.endswith(published.DEFAULT.url.rsplit("/", 1)[1])
    with pytest.raises(InputError, match="'imagenet' is not known"):
        find_weights("imagenet")
