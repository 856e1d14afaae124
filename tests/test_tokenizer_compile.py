"The three tokenizers under torch.compile without a graph break, and as exported programs."

import shutil
from dataclasses import replace

import pytest
import torch

from dera.query import GridTokenizer, QueryTokenizer
from dera.streams import DeRATokenizer, TokenizerConfig

SMALL = TokenizerConfig.preset(
    "tiny", dim=64, heads=4, encoder_depth=1, decoder_depth=1, codebook_size=64
)
every = pytest.mark.parametrize("cls", [GridTokenizer, QueryTokenizer, DeRATokenizer])


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def video():
    return torch.rand(4, 3, 8, 32, 32, generator=torch.Generator().manual_seed(0))


def build(cls, config=SMALL):
    torch.manual_seed(0)
    model = cls(config).eval()
    model.out.weight.data.normal_(std=0.02)
    return model


def leaves(out):
    return [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]


def close(a, b):
    return len(leaves(a)) == len(leaves(b)) and all(
        torch.allclose(x.float(), y.float(), atol=1e-5) for x, y in zip(leaves(a), leaves(b))
    )


def whole(f, backend="eager"):
    return torch.compile(f, fullgraph=True, backend=backend)  # a graph break is an error


@every
def test_one_graph_in_evaluation(cls, video):
    model = build(cls)
    with torch.no_grad():
        code = model.encode(video)
        for method, x in (
            ("encode", video),
            ("decode", code.indices),
            ("decode", code.latents),
            ("forward", video),
        ):
            assert close(whole(getattr(model, method))(x), getattr(model, method)(x)), method


@every
@pytest.mark.parametrize("quantize, checkpoint", [(True, True), (False, False)])
def test_one_graph_in_training(cls, quantize, checkpoint, video):
    "Forward and backward, with sampling, restarts and recomputation in the graph: the same loss and gradients from the same seed."
    seen = []
    for compiled in False, True:
        model = build(cls, replace(SMALL, checkpoint=checkpoint)).train()
        f = whole(model, "aot_eager") if compiled else model
        torch.manual_seed(1)
        out = f(video, quantize)
        loss = (out.video - video).pow(2).mean() + out.encoded.quantizer_loss
        seen.append(
            [
                loss,
                *torch.autograd.grad(
                    loss,
                    [p for p in model.parameters() if p.requires_grad],
                    allow_unused=True,
                    materialize_grads=True,
                ),
            ]
        )
    assert close(*seen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_one_graph_in_half_precision(dtype, video):
    model = build(DeRATokenizer)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        out = whole(model)(video)
        assert (
            out.video.isfinite().all()
            and out.encoded.latents.dtype == torch.float32
            and torch.allclose(out.video, model(video).video, atol=0.05)
        )


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_translated_by_inductor(video):
    "The default backend. Slow: it compiles C++ for half a minute."
    model = build(DeRATokenizer)
    f = whole(model, "inductor")
    with torch.no_grad():
        a, b = f(video), model(video)
    assert torch.equal(a.encoded.indices, b.encoded.indices) and close(a, b)
    model.train()
    out = f(video)
    ((out.video - video).pow(2).mean() + out.encoded.quantizer_loss).backward()
    assert not [
        n
        for n, p in model.named_parameters()
        if p.requires_grad
        and (p.grad is None or not p.grad.isfinite().all() or not p.grad.abs().sum())
    ]


class Part(torch.nn.Module):
    "One method of a model as a module."

    def __init__(self, model, method):
        super().__init__()
        self.model, self.method = model, method

    def forward(self, x):
        return getattr(self.model, self.method)(x)


@pytest.mark.parametrize(
    "cls, strict",
    [
        (GridTokenizer, False),
        (QueryTokenizer, False),
        (DeRATokenizer, False),
        (DeRATokenizer, True),
    ],
)
def test_exported_encode_and_decode(cls, strict, video):
    "Traced with 2 clips, run with 4 and with 1."
    model, batch = build(cls), torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        code, want = model.encode(video), model(video).video
        encode, by_index, by_latent = (
            torch.export.export(
                Part(model, method), (x[:2],), dynamic_shapes=({0: batch},), strict=strict
            ).module()
            for method, x in (("encode", video), ("decode", code.indices), ("decode", code.latents))
        )
        for n in 4, 1:
            got = encode(video[:n])
            assert torch.equal(got.indices, code.indices[:n]) and torch.allclose(
                got.latents, code.latents[:n], atol=1e-6
            )
            for picture in by_index(got.indices), by_latent(got.latents):
                assert torch.allclose(picture, want[:n], atol=1e-5)


def test_an_exported_program_lives_in_a_file(video, tmp_path):
    model = build(DeRATokenizer)

    class Indices(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model.encode(x).indices

    with torch.no_grad():
        torch.export.save(torch.export.export(Indices(), (video,)), tmp_path / "encode.pt2")
        assert torch.equal(
            torch.export.load(tmp_path / "encode.pt2").module()(video), model.encode(video).indices
        )
