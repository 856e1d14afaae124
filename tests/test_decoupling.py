"The studies of the two streams, on tokenizers whose answers are known."

import json
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dera.decoupling import (
    FactorReader,
    Verdict,
    decoupling_verdict,
    factor_classes,
    fit_probes,
    followed,
    for_reader,
    probe_accuracy,
    probe_study,
    share_study,
    swap_study,
    token_groups,
)
from dera.metrics import linear_probe
from dera.pocket import MOTION_FACTORS, Factors, render, sample_factors
from dera.runtime.checkpoints import checkpoint_path
from dera.runtime.errors import InputError
from dera.tools import study
from dera.tools.study import decoupling_study, study_once


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def test_motion_factors_are_what_a_swap_takes_from_the_other():
    a, b = sample_factors(50, 1), sample_factors(50, 2)
    swapped = a.swap(motion_of=b)
    for name in vars(a):
        giver = b if name in MOTION_FACTORS else a
        assert torch.equal(getattr(swapped, name), getattr(giver, name))


def test_factor_classes_are_equal_bins_of_what_varies():
    f = sample_factors(4000, 3)
    classes = factor_classes(f)
    textured = factor_classes(sample_factors(99, 3, "textured"))
    assert "texture" not in classes and set(textured) - set(classes) == {"texture"}
    assert classes["hue"].tolist() == (6 * f.hue).long().tolist()
    assert torch.equal(classes["motion"], f.motion)
    for value in classes.values():
        assert value.dtype == torch.int64
        assert value.bincount().min() > 0.8 * 4000 / len(value.unique())


def test_probes_of_many_factors_agree_with_one_at_a_time():
    x = torch.randn(900, 9, generator=gen())
    classes = dict(a=(x[:, 0] + 0.5 * x[:, 1] > 0).long(), b=x[:, 2:6].argmax(1))
    train = {name: label[:600] for name, label in classes.items()}
    test = {name: label[600:] for name, label in classes.items()}
    found = probe_accuracy(fit_probes(x[:600], train), x[600:], test)
    for name in classes:
        alone = linear_probe(x[:600], train[name], x[600:], test[name], weight_decay=1e-2)
        assert found[name] == pytest.approx(alone["test"], abs=0.02)
    twice = [fit_probes(x[:600], train, 8, seed=3) for _ in range(2)]
    assert probe_accuracy(twice[0], x, classes) == probe_accuracy(twice[1], x, classes)

    below_zero = {name: label - 1 for name, label in train.items()}
    for bad in (
        (x * torch.nan, classes),
        (x[:600], classes),
        (x[:600], {}),
        (x[:0], {}),
        (x[:600], below_zero),
        (x[:600], {name: label.float() for name, label in train.items()}),
    ):
        with pytest.raises(InputError):
            fit_probes(*bad)


def test_probes_leave_the_global_generator_alone_and_work_without_gradients():
    torch.manual_seed(4)
    before = torch.random.get_rng_state()
    x = torch.randn(50, 3, generator=gen())
    with torch.no_grad():
        fit_probes(x, dict(a=(x[:, 0] > 0).long()), 4)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.fixture(scope="module")
def reader():
    return FactorReader(n=400)


class Known(nn.Module):
    """A tokenizer that knows its clips: token 0 names the appearance and token 1 the motion;
    or, entangled, token 1 names both."""

    def __init__(self, factors, entangled=False):
        super().__init__()
        self.factors, self.entangled = factors, entangled
        self.bank = render(factors, 8, 32).flatten(1)
        self.config = SimpleNamespace(
            num_appearance=1, num_tokens=2, num_codes=2, codebook_size=len(factors)
        )

    def encode(self, video):
        nearest = torch.cdist(video.flatten(1), self.bank).argmin(1)
        indices = torch.stack([nearest, nearest], 1)
        return SimpleNamespace(indices=indices, latents=F.one_hot(indices, len(self.bank)).float())

    def decode(self, indices):
        look, move = indices.unbind(1)
        look = move if self.entangled else look
        return render(self.factors[look].swap(motion_of=self.factors[move]), 8, 32)


def join(*parts):
    return Factors(**{k: torch.cat([getattr(p, k) for p in parts]) for k in vars(parts[0])})


def test_swap_study_tells_decoupled_from_entangled(reader):
    a, b = sample_factors(40, 1), sample_factors(40, 2)
    bank = join(a, b, a.swap(motion_of=b))
    good = swap_study(Known(bank), a, b, reader, few=40)
    bad = swap_study(Known(bank, entangled=True), a, b, reader, few=40)
    assert good["swapped"]["psnr"] > 80 and bad["swapped"]["psnr"] < 25
    assert good["truth"]["psnr"] is None
    for name in good["truth"].keys() - {"psnr"}:  # perfect tokens read as the truth does
        assert good["swapped"][name] == good["truth"][name]
        assert bad["swapped"][name] == pytest.approx(bad["B"][name], abs=1e-6)
    assert good["swapped"]["shape"].own > 0.9
    assert bad["swapped"]["shape"].own < 0.1 and bad["swapped"]["shape"].other > 0.9
    assert good["A"]["motion"].own < 0.1 < 0.9 < good["B"]["motion"].own
    assert max(good["random_codes"][k].own for k in ("shape", "motion")) < 0.4


def test_share_study_blames_the_right_stream(reader):
    f = sample_factors(30, 5)
    found = share_study(Known(f), f, reader, shares=(0, 1.0))
    look, move = found["appearance"], found["motion"]
    assert look[0] == move[0] and look[0]["shape"] > 0.9 and look[0]["motion"] > 0.9
    assert look[1]["shape"] < 0.4 and look[1]["motion"] > 0.9
    assert move[1]["shape"] > 0.8 and move[1]["motion"] < 0.4


def test_token_groups_and_probe_study():
    tokenizer, f = Known(sample_factors(20, 6)), sample_factors(200, 8)
    look, move = (F.one_hot(v).float() for v in (f.shape, f.motion))
    noise = torch.randn(200, 4, generator=gen())
    planted = dict(appearance=torch.cat([look, noise], 1), motion=torch.cat([move, noise], 1))
    found = probe_study(planted, f, hidden=16)
    own = found["factors"]
    assert own["appearance"]["shape"]["linear"] > 0.95
    assert own["appearance"]["motion"]["linear"] < 0.4 < 0.9 < own["motion"]["motion"]["linear"]
    assert found["pairs"]["appearance"]["held_out"]["shape"] > 0.95
    assert found["chance"]["shape"] < 0.35
    groups, error = token_groups(tokenizer, render(tokenizer.factors, 8, 32))
    assert error.max() < 1e-10 and groups["motion"].shape == (20, 20)
    assert torch.equal(groups["appearance"].argmax(1), torch.arange(20))


def study_of(own, other, reach=0.9, random=0.2):
    "A study in which swapped clips follow the right clip in `own` and the wrong one in `other`."
    pair = dict(hue=(own, other), motion=(own, other))
    answers = dict(hue=dict(linear=0.5, network=0.6), motion=dict(linear=0.5, network=0.6))
    return dict(
        swap=dict(
            swapped=dict(psnr=20.0) | pair,
            truth_through_tokens=dict(psnr=25.0, hue=(reach, 0.05), motion=(reach, 0.05)),
            A=dict(psnr=13.0),
            random_codes=dict(psnr=12.0, hue=(random, random), motion=(random, random)),
        ),
        probes=dict(
            factors=dict.fromkeys(("appearance", "motion", "teachers"), answers),
            chance=dict(hue=0.2, motion=0.1),
        ),
    )


def test_the_verdict_follows_its_rule():
    cases = {(0.85, 0.1): "yes", (0.5, 0.3): "partly", (0.2, 0.5): "no", (0.85, 0.3): "partly"}
    unreadable = study_of(0.25, 0.2, reach=0.29)
    assert decoupling_verdict([unreadable]).decoupled == "cannot be judged"
    for (own, other), answer in cases.items():
        verdict = decoupling_verdict([study_of(own, other)])
        assert isinstance(verdict, Verdict) and verdict.decoupled == answer, (own, other)
    two = [study_of(0.2, 0.5), study_of(0.4, 0.1)]
    assert followed(two, "swapped", "motion") == (pytest.approx(0.3), pytest.approx(0.3))
    text = " ".join(decoupling_verdict(two).sentences)
    assert "in 30% and B's in 30%" in text and "20.0 dB" in text and "60%" in text


def test_the_kept_study_has_its_verdict(root):
    kept = json.loads((root / "nbs" / "results" / "decoupling.json").read_text())
    for row in kept["rows"].values():
        verdict = decoupling_verdict(list(row["seeds"].values()))
        assert verdict.decoupled in ("yes", "partly", "no") and len(verdict.sentences) == 5


def test_any_tokenizer_can_be_studied_and_one_that_shows_nothing_cannot_be_judged(
    reader, monkeypatch
):
    from dera import query, streams

    linear_only = partial(probe_study, hidden=0)  # networks have their test above
    monkeypatch.setattr(study, "probe_study", linear_only)
    torch.manual_seed(0)
    config = query.TokenizerConfig.preset("tiny", encoder_depth=1, decoder_depth=1)
    untrained = streams.DeRATokenizer(config).eval()
    assert untrained.num_codes > untrained.num_tokens  # several codes a token
    found = study_once(untrained, reader, 0, pairs=60, probes=40, shares=2)
    assert math.isfinite(found["psnr"]["all"])
    assert decoupling_verdict([found]).decoupled == "cannot be judged"

    a, b = sample_factors(6, 1), sample_factors(6, 2)
    for kind in (query.QueryTokenizer, query.GridTokenizer):
        one_stream = kind(config).eval()
        groups, _ = token_groups(one_stream, render(a, 8, 32))
        assert 3 * groups["appearance"].shape[1] == groups["motion"].shape[1]
        assert math.isfinite(swap_study(one_stream, a, b, reader)["swapped"]["psnr"])


def test_larger_clips_are_read_at_the_readers_size():
    video = torch.rand(2, 3, 16, 64, 64, generator=gen())
    small = for_reader(video)
    assert small.shape == (2, 3, 8, 32, 32)
    assert small[0, 0, 0, 0, 0] == pytest.approx(video[0, 0, 0, :2, :2].mean().item(), abs=1e-6)
    assert small[0, 0, -1, 0, 0] == pytest.approx(video[0, 0, -1, :2, :2].mean().item(), abs=1e-6)
    assert for_reader(small) is small


def test_decoupling_study_goes_on_where_it_was(tmp_path, monkeypatch):
    calls = []
    shipped = checkpoint_path("pocket-tokenizer-tiny")
    out = tmp_path / "d.json"
    monkeypatch.setattr(study, "FactorReader", lambda **_: "reader")

    def once(tokenizer, reader, seed, **sizes):
        calls.append((seed, sizes))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return dict(seed=seed)

    monkeypatch.setattr(study, "study_once", once)
    with pytest.raises(KeyboardInterrupt):
        decoupling_study(dict(a=shipped), out, pairs=5)
    found = decoupling_study(dict(a=shipped), out, pairs=5)
    assert [seed for seed, _ in calls] == [0, 1, 2, 2]
    assert found["rows"]["a"]["seeds"] == {str(s): dict(seed=s) for s in range(3)}
    decoupling_study(dict(b=shipped), out, pairs=5)
    assert len(calls) == 7 and set(json.loads(out.read_text())["rows"]) == {"a", "b"}
    decoupling_study(dict(a=shipped, b=shipped), out, pairs=5)
    assert len(calls) == 7
    decoupling_study(dict(a=shipped), out, seeds=(0,), pairs=6)
    assert len(calls) == 8  # other sizes: measured again
    assert "6 swapped pairs" in json.loads(out.read_text())["protocol"]
    with pytest.raises(InputError, match="no tokenizers"):
        decoupling_study({}, out)


def test_studies_refuse_other_clips_and_torn_files(tmp_path):
    from dera.streams import DeRATokenizer, TokenizerConfig

    short = DeRATokenizer(TokenizerConfig.preset("tiny", num_frames=4))
    with pytest.raises(InputError, match="at least 8 x 32 x 32"):
        study_once(short, None, 0)
    torn = tmp_path / "d.json"
    torn.write_text('{"rows": {"a"')
    with pytest.raises(InputError, match="cut short"):
        decoupling_study(dict(a=checkpoint_path("pocket-tokenizer-tiny")), torn)
    assert torn.read_text() == '{"rows": {"a"'
