"The three tokenizers under torch.compile without a graph break, and as exported programs."

from dataclasses import replace

import pytest
import torch

from dera.query import GridTokenizer, QueryTokenizer
from dera.streams import DeRATokenizer, TokenizerConfig

SMALL = TokenizerConfig.preset(
    "tiny", dim=48, heads=4, encoder_depth=1, decoder_depth=1, codebook_size=64
)


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


def close(a, b):
    a, b = (torch.utils._pytree.tree_leaves(x) for x in (a, b))
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if isinstance(x, torch.Tensor)]
    return all(torch.allclose(x.float(), y.float(), atol=1e-5) for x, y in pairs)


def whole(f, backend="eager"):
    "A graph break is an error."
    return torch.compile(f, fullgraph=True, backend=backend)


def test_one_graph_in_evaluation(video):
    for cls in GridTokenizer, QueryTokenizer, DeRATokenizer:
        model = build(cls)
        with torch.no_grad():
            assert close(whole(model)(video), model(video)), cls
            torch._dynamo.reset()
    with torch.no_grad():
        indices = model.encode(video).indices
        assert close(whole(model.encode)(video), model.encode(video))
        assert close(whole(model.decode)(indices), model.decode(indices))
        with torch.autocast("cpu", torch.bfloat16):
            out = whole(model)(video)
            assert out.encoded.latents.dtype == torch.float32
            assert torch.allclose(out.video, model(video).video, atol=0.05)


@pytest.mark.parametrize(
    "cls, changes",
    [
        (GridTokenizer, dict(quantizer="fsq")),
        (QueryTokenizer, dict(quantizer="vq", larp=True)),
        (DeRATokenizer, dict(checkpoint=True)),
    ],
    ids=["fsq", "vq", "svq"],
)
def test_one_graph_in_training(cls, changes, video):
    "Sampling, restarts and recomputation in the graph: same loss and gradients from the same seed."
    seen = []
    for compiled in False, True:
        model = build(cls, replace(SMALL, **changes)).train()
        f = whole(model, "aot_eager") if compiled else model
        torch.manual_seed(1)
        out = f(video)
        loss = (out.video - video).pow(2).mean() + out.encoded.quantizer_loss
        learned = [p for p in model.parameters() if p.requires_grad]
        seen.append([loss, *torch.autograd.grad(loss, learned)])
    assert close(*seen)


def test_compiled_transformers_need_no_new_graph_for_another_batch():
    "One graph for the encoder's two streams, one for the decoder, whatever the batch size from 2 on."
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model, plain = build(DeRATokenizer), build(DeRATokenizer)
    names = list(model.state_dict())
    model.compile_transformers(backend=count)
    assert list(model.state_dict()) == names
    for batch in 3, 2, 5, 7:
        video = torch.rand(batch, 3, 8, 32, 32)
        with torch.no_grad():
            assert close(model(video), plain(video))
    assert len(graphs) == 2, f"{len(graphs)} graphs"


class Part(torch.nn.Module):
    "One method of a model as a module; files hold tensors only, so not the named tuple."

    def __init__(self, model, method):
        super().__init__()
        self.model, self.method = model, method

    def forward(self, x):
        out = getattr(self.model, self.method)(x)
        return (out.indices, out.latents) if self.method == "encode" else out


@pytest.mark.parametrize(
    "cls, strict, quantizer",
    [(GridTokenizer, False, "vq"), (QueryTokenizer, False, "fsq"), (DeRATokenizer, True, "svq")],
)
def test_exported_encode_and_decode(cls, strict, quantizer, video, tmp_path):
    "Traced with 2 clips, run with 4 and with 1; and from a file."
    model, batch = build(cls, replace(SMALL, quantizer=quantizer)), torch.export.Dim("batch", min=1)

    def export(method, x):
        part = Part(model, method)
        return torch.export.export(part, (x[:2],), dynamic_shapes=({0: batch},), strict=strict)

    with torch.no_grad():
        code, wanted = model.encode(video), model(video).video
        torch.export.save(export("encode", video), tmp_path / "encode.pt2")
        encode = torch.export.load(tmp_path / "encode.pt2").module()
        by_index = export("decode", code.indices).module()
        by_latent = export("decode", code.latents).module()
        for n in 4, 1:
            indices, latents = encode(video[:n])
            assert torch.equal(indices, code.indices[:n])
            assert torch.allclose(latents, code.latents[:n], atol=1e-6)
            for picture in by_index(indices), by_latent(latents):
                assert torch.allclose(picture, wanted[:n], atol=1e-5)
