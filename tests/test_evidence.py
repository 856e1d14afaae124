"A frame predictor judged beside frames held still and the tokenizer's own limit."

import json

import pytest
import torch

from dera.ar import Generator, GeneratorConfig
from dera.pocket import render, sample_factors
from dera.runtime.checkpoints import checkpoint_path, fingerprint
from dera.runtime.errors import InputError
from dera.streams import load_tokenizer
from dera.tools.evidence import evidence, evidence_table, predict_clips, prediction_evidence


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(checkpoint_path("pocket-tokenizer-tiny"))


@pytest.fixture(scope="module")
def predictor(tokenizer, tmp_path_factory):
    "An untrained one, as a folder."
    torch.manual_seed(0)
    codes = tokenizer.num_codes
    shape = GeneratorConfig.preset("tiny", dim=32, depth=1, heads=2, codes_per_step=4)
    shape.vocab_size, shape.num_tokens, shape.prefix_tokens = 512, codes, codes
    shape.tokenizer = fingerprint(tokenizer)
    folder = tmp_path_factory.mktemp("predictor")
    Generator(shape).eval().save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(dict(condition_frames=3, steps=7)))
    return folder


def test_what_is_known_is_not_measured():
    clips = render(sample_factors(100, 1), 8, 32)
    labels = sample_factors(100, 1).label
    right = prediction_evidence(clips, clips, clips, labels, known=3)
    assert right["predicted"]["psnr"] == right["reconstructed"]["psnr"] > 60
    assert right["predicted"]["motion"] > 0.9 > right["held_still"]["motion"]
    worse = clips.clone()
    worse[:, :, :3] = 0  # known frames do not count for PSNR
    again = prediction_evidence(worse, clips, clips, labels, known=3)
    assert again["predicted"]["psnr"] == right["predicted"]["psnr"]


def test_predictions_keep_what_is_known_and_do_not_depend_on_the_batch(tokenizer, predictor):
    model = Generator.from_pretrained(predictor)
    clips = render(sample_factors(5, 2), 8, 32)
    whole = predict_clips(model, tokenizer, clips, known=3, seed=4, batch_size=5)
    parts = predict_clips(model, tokenizer, clips, known=3, seed=4, batch_size=2)
    assert torch.equal(whole[:, :, :3], clips[:, :, :3])
    assert torch.allclose(whole, parts, atol=1e-5)
    assert not torch.allclose(whole[:, :, 3:], clips[:, :, 3:], atol=0.1)


def test_evidence_of_a_predictor(tokenizer, predictor, tmp_path):
    found = evidence(tokenizer, predictor, tmp_path / "out", num_clips=97)
    assert "generation" not in found and found["prediction"]["known_frames"] == 3
    assert "3 known frames" in found["protocol"] and found["generator"]["steps"] == "7"
    assert "predicted: PSNR" in evidence_table(found)
    assert (tmp_path / "out" / "predictions.png").exists()
    (predictor / "training.json").unlink()
    with pytest.raises(InputError, match="how many frames are known"):
        evidence(tokenizer, str(predictor), num_clips=97)
