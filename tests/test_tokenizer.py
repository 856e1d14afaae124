"What crosses the notebooks of the tokenizer: interface, streams, SACP on the real encoder, checkpoints, shipped models."
import json

import pytest, torch
from safetensors import safe_open

from dera.align import Alignment, teacher_features
from dera.metrics import baselines, psnr
from dera.pocket import render, sample_factors
from dera.query import GridTokenizer, QueryTokenizer
from dera.sacp import project, sacp
from dera.streams import DeRATokenizer, TokenizerConfig
from dera.teachers import load_teacher
from dera.train_tokenizer import reconstruct_set
from dera.utils import InputError, checkpoint_path, load_model

TINY = TokenizerConfig.preset('tiny')

@pytest.fixture(scope='module')
def clips(): return render(sample_factors(6, seed=31), 8, 32)

@pytest.fixture(scope='module')
def shipped(): return load_model(DeRATokenizer, checkpoint_path('pocket-tokenizer-tiny'))

@pytest.mark.parametrize('cls', [GridTokenizer, QueryTokenizer, DeRATokenizer])
@pytest.mark.parametrize('changes', [{}, dict(positions='sincos', queries='normal', tie=0.), dict(num_frames=4, size=48, num_appearance=36, num_motion=72)])
def test_one_interface(cls, changes):
    config = TokenizerConfig.preset('tiny', dim=96, encoder_depth=2, decoder_depth=2, **changes); torch.manual_seed(0)
    model, c = cls(config).eval(), config; model.out.weight.data.normal_(std=.02)
    video = torch.rand(3, 3, c.num_frames, c.size, c.size)
    with torch.no_grad():
        code = model.encode(video)
        assert code.indices.shape == (3, model.num_tokens) and code.indices.dtype == torch.int64
        assert torch.equal(model.decode(code.indices), model.decode(code.latents)) and torch.equal(model(video).video, model.decode(code.indices))
    out = model.train()(video); ((out.video - video).pow(2).mean() + out.encoded.quantizer_loss).backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().sum())]

def test_wrong_input_is_named(clips):
    model = DeRATokenizer(TINY)
    for wrong in (clips[:, :, :4], clips[0], clips[..., :16]):
        with pytest.raises(InputError, match=r'\(B, 3, 8, 32, 32\)'): model.encode(wrong)
    with pytest.raises(InputError, match='64 tokens'): model.decode(torch.zeros(1, 10, dtype=torch.long))
    with pytest.raises(InputError, match=r'\[0, 512\)'): model.decode(torch.full((1, 64), 512))
    with pytest.raises(InputError, match='huge'): TokenizerConfig.preset('huge')
    with pytest.raises(InputError, match='multiple of 16'): DeRATokenizer(TokenizerConfig.preset('tiny', num_motion=40))

@pytest.mark.parametrize('quantize', [True, False])
def test_sacp_on_the_shared_encoder(clips, quantize):
    "Backward through SACP's losses gives the projected gradients of the two streams, and nothing when they agree."
    torch.manual_seed(0); model = DeRATokenizer(TINY); image, video = load_teacher('pocket-image'), load_teacher('pocket-video')
    align, params = Alignment(128, image.dim, video.dim, 64), list(model.encoder.parameters())
    targets = teacher_features(image, video, clips, TINY.grid)
    flat = lambda loss: torch.cat([g.flatten() for g in torch.autograd.grad(loss, params, retain_graph=True)])
    L_a, L_m = align(model.encode(clips, quantize), *targets)
    for sign in 1, -1:                                                           # one of the two is a conflict
        r = sacp(L_a, sign*L_m, params, weights=(1., .5)); g_a, g_m = flat(L_a), sign*flat(L_m); p_a, p_m = project(g_a, g_m)
        assert bool(r.conflict) == bool(g_a @ g_m < 0)
        assert torch.allclose(flat(r.loss_a + r.loss_m), p_a + .5*p_m, atol=1e-6)
    assert model.embed_appearance.weight.grad is None                            # asking leaves no gradients behind

def test_checkpoints_hold_no_teacher_and_no_pickle(tmp_path, shipped):
    for folder in checkpoint_path('pocket-tokenizer-tiny').parent.iterdir():
        assert not [p for p in folder.iterdir() if p.suffix not in ('.safetensors', '.json', '.jsonl', '.md')], folder
    with safe_open(checkpoint_path('pocket-tokenizer-tiny')/'model.safetensors', 'pt') as f:
        assert set(f.keys()) == set(shipped.state_dict())                        # nothing of teachers or projectors
    torch.save(shipped.state_dict(), tmp_path/'model.safetensors'); (tmp_path/'config.json').write_text('{}')
    with pytest.raises(InputError, match='DeRATokenizer'): load_model(DeRATokenizer, tmp_path)

def test_a_file_of_another_configuration_is_refused(tmp_path, shipped):
    shipped.save_pretrained(tmp_path); config = json.loads((tmp_path/'config.json').read_text())
    config['dim'] = 64; (tmp_path/'config.json').write_text(json.dumps(config))
    with pytest.raises(InputError, match='does not hold a DeRATokenizer'): load_model(DeRATokenizer, tmp_path)

def test_shipped_tokenizer_keeps_its_promise(shipped):
    "On 200 clips that no training saw: three decibels above both still pictures, both groups of tokens needed."
    x = torch.cat([render(sample_factors(200, seed=987654)[torch.arange(i, i + 50)], 8, 32) for i in range(0, 200, 50)])
    pictures, indices = reconstruct_set(shipped, x); still, full = baselines(x), psnr(pictures, x)
    assert full > still['temporal_mean'] + 3 and full > still['first_frame'] + 3 and still['first_frame'] < 20
    assert len(indices.unique()) > 256
    for part in slice(0, 16), slice(16, 64):
        constant = indices.clone(); constant[:, part] = 0
        with torch.no_grad(): assert psnr(shipped.decode(constant).clamp(0, 1), x) < full - 2
