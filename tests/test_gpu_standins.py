"What a GPU would meet, found without one: meta tensors, fake CUDA, floating-point operations counted."

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dera.query import TokenizerConfig
from dera.streams import DeRATokenizer

SMALL = dict(dim=32, heads=2, encoder_depth=2, decoder_depth=2, codebook_size=32)


def operations(tokenizer, clips):
    with FlopCounterMode(display=False) as counter:
        output = tokenizer(clips, quantize=False)
        loss = output.video.mean() + output.encoded.motion.mean()
        encoder = list(tokenizer.encoder.parameters())
        torch.autograd.grad(
            output.encoded.motion.mean(), encoder, retain_graph=True, allow_unused=True
        )
        loss.backward()
    return counter.get_total_flops()


def test_a_paper_size_forward_and_backward_pass_on_meta():
    with torch.device("meta"):
        tokenizer = DeRATokenizer(TokenizerConfig.preset("paper", encoder_depth=2, decoder_depth=2))
        clips = torch.zeros(2, 3, 16, 128, 128)
    tokenizer.to("meta")
    output = tokenizer(clips, quantize=False)
    output.video.mean().backward()
    devices = {param.device.type for param in tokenizer.parameters()}
    assert devices == {"meta"} and output.video.shape == clips.shape


def test_autocast_on_a_fake_gpu():
    with FakeTensorMode(allow_non_fake_inputs=True):
        tokenizer = DeRATokenizer(TokenizerConfig.preset("tiny", **SMALL))
        for module in tokenizer.modules():
            for name, param in module.named_parameters(recurse=False):
                fake = torch.empty(param.shape, device="cuda")
                setattr(module, name, torch.nn.Parameter(fake, param.requires_grad))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(buffer.shape, device="cuda"))
        clips = torch.zeros(2, 3, 8, 32, 32, device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            output = tokenizer(clips, quantize=False)
        assert output.video.device.type == "cuda"
        assert {value.device.type for value in output.encoded if value is not None} == {"cuda"}


def test_recomputing_costs_operations_and_compiling_transformers_none():
    clips = torch.rand(1, 3, 8, 32, 32)
    config = TokenizerConfig.preset("tiny", **SMALL)
    eager = operations(DeRATokenizer(config), clips)
    compiled = DeRATokenizer(config)
    compiled.encoder.compile(backend="aot_eager", dynamic=False)
    compiled.decoder.compile(backend="aot_eager", dynamic=False)
    operations(compiled, clips)  # the first call also traces
    ratio = operations(compiled, clips) / eager
    assert ratio <= 1.02, ratio
    again = DeRATokenizer(TokenizerConfig.preset("tiny", checkpoint=True, **SMALL))
    assert operations(again, clips) > 1.2 * eager


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_on_a_gpu(tmp_path):
    from dera.train_tokenizer import TokenizerTraining, train_tokenizer

    config = TokenizerTraining(data="pocket=16", steps=2, lambda_a=0.0, lambda_m=0.0)
    train_tokenizer(config, tmp_path)
