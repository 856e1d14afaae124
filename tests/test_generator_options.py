"Options of the generator and of its training that the shipped one uses, and torn token files."

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn

from dera.ar import Attention, Generator, GeneratorConfig, fast_decoder, prepare_heads
from dera.pocket import CLASSES, MOTIONS, SHAPES
from dera.query import TokenizerConfig, num_appearance_codes
from dera.runtime.checkpoints import fingerprint
from dera.runtime.errors import InputError
from dera.runtime.run_folder import RunFolder
from dera.streams import DeRATokenizer
from dera.train_ar import (
    TIMES,
    ARConfig,
    codes_at,
    generator_shape,
    label_factors,
    learning_rate,
    load_tokens,
    tokenize_dataset,
    train_generator,
    wrong_labels,
)


def quiet(it, **_):
    "No progress bar."
    return it


def generator(**changes):
    "A generator whose logits are far from uniform."
    shape = dict(vocab_size=50, num_tokens=20, num_classes=6, dim=32, depth=2, heads=2)
    torch.manual_seed(0)
    model = Generator(GeneratorConfig(**(shape | changes))).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.4)
    return model


def one_line(caught, *words):
    said = str(caught.value)
    assert "\n" not in said and all(word in said for word in words), said


# ---- wrong labels


@pytest.mark.parametrize(
    "factors", [dict(shape=7, motion=16), dict(a=2, b=3, c=5), dict(one=1, many=9)]
)
def test_wrong_labels_change_one_factor_and_nothing_else(factors):
    sizes = list(factors.values())
    total = int(np.prod(sizes))
    labels = torch.arange(total).repeat(200)
    found = wrong_labels(labels, total, factors, seed=3)
    assert list(found) == [name for name, size in factors.items() if size > 1]
    true = dict(zip(factors, np.unravel_index(labels.numpy(), sizes), strict=True))
    for changed, wrong in found.items():
        assert wrong.min() >= 0 and wrong.max() < total
        other = dict(zip(factors, np.unravel_index(wrong.numpy(), sizes), strict=True))
        for name in factors:
            assert ((other[name] == true[name]) == (name != changed)).all(), (changed, name)
        pairs = set(zip(true[changed].tolist(), other[changed].tolist(), strict=True))
        assert len(pairs) == factors[changed] * (factors[changed] - 1)  # each other value occurs
    again = wrong_labels(labels, total, factors, seed=3)
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_without_factors_the_whole_class_is_wrong():
    labels = torch.arange(6).repeat(50)
    found = wrong_labels(labels, 6, {})
    assert list(found) == ["class"] and (found["class"] != labels).all()
    assert found["class"].unique().tolist() == list(range(6))
    assert wrong_labels(torch.zeros(4, dtype=torch.long), 1, {}) == {}  # no other class


def test_factors_are_read_off_the_class_names_of_the_pocket_world():
    factors = label_factors(CLASSES)
    assert factors == dict(shape=len(SHAPES), motion=len(MOTIONS))
    label = 3 * len(MOTIONS) + 5
    assert CLASSES[label].startswith(SHAPES[3])
    motions = [name.removeprefix(SHAPES[i // len(MOTIONS)]) for i, name in enumerate(CLASSES)]
    assert motions == motions[: len(MOTIONS)] * len(SHAPES)  # shape is the slower factor
    assert label_factors(["Archery", "Diving"]) == label_factors(CLASSES[:-1]) == {}
    assert label_factors(None) == {}


# ---- factored classes


def test_a_factored_class_is_the_sum_of_its_vectors():
    model = generator(class_factors=(2, 3))
    own, factors = model.classes.weight, model.factors.weight
    assert len(factors) == 2 + 1 + 3 + 1  # values, and one row of each factor for "no class"
    for label in range(6):
        expected = own[label] + factors[label // 3] + factors[3 + label % 3]
        assert torch.allclose(model.embed_class(torch.tensor([label]))[0], expected)
    nothing = model.embed_class(torch.tensor([6]))[0]
    assert torch.allclose(nothing, own[6] + factors[2] + factors[6])
    with pytest.raises(InputError) as caught:
        GeneratorConfig(num_classes=6, class_factors=(2, 2))
    one_line(caught, "class_factors (2, 2)", "6 classes")


def test_factors_survive_saving_and_are_left_out_with_a_prefix(tmp_path):
    model = generator(class_factors=(2, 3), class_everywhere=True)
    model.save_pretrained(tmp_path)
    again = Generator.from_pretrained(tmp_path)
    assert again.config == model.config and again.config.class_factors == (2, 3)
    labels = torch.arange(6)
    written = model.generate(labels, guidance=2.0, seed=1)
    assert torch.equal(again.generate(labels, guidance=2.0, seed=1), written)
    config = GeneratorConfig(prefix_tokens=4, class_factors=(2, 3), class_everywhere=True)
    assert config.class_factors == () and not config.class_everywhere


def test_the_shape_of_a_generator_follows_tokenizer_and_data():
    tokenizer = DeRATokenizer(TokenizerConfig.preset("tiny"))
    config = ARConfig.preset("tiny", factored_classes=True)
    shape = generator_shape(config, tokenizer, CLASSES)
    assert shape.class_factors == (len(SHAPES), len(MOTIONS))
    assert (shape.num_tokens, shape.num_classes) == (tokenizer.num_codes, len(CLASSES))
    assert shape.appearance_tokens == num_appearance_codes(tokenizer.config)
    assert shape.tokenizer == fingerprint(tokenizer)
    assert generator_shape(config, tokenizer, ["a", "b"]).class_factors == ()
    config.condition_frames = 3
    shape = generator_shape(config, tokenizer, CLASSES)
    assert (shape.class_factors, shape.prefix_tokens) == ((), tokenizer.num_codes)


# ---- rotary positions, normalised queries and keys, the class everywhere


@pytest.mark.parametrize(
    "options",
    [
        dict(rotary=True),
        dict(qk_norm=True),
        dict(rotary=True, qk_norm=True, class_everywhere=True, class_factors=(2, 3)),
        dict(rotary=True, qk_norm=True, prefix_tokens=6),
    ],
    ids=str,
)
def test_cache_equals_the_full_forward(options):
    "Step by step with `step` and with the fast decoder; and greedy clips, with guidance."
    model = generator(**options)
    indices = torch.randint(50, (3, 20))
    given = dict(labels=torch.tensor([1, 5, 6]))  # 6: no class
    if model.config.prefix_tokens:
        given = dict(prefix=torch.randint(50, (3, 6)))
    with torch.inference_mode():
        logits = model(indices, **given)
        condition = model.condition(**given)
        everywhere = condition[:, 0] if model.config.class_everywhere else 0
        cache = model.new_cache(3).fill_(torch.nan)
        decoder = fast_decoder(model, 3)
        decoder.cache.fill_(torch.nan)
        if model.config.prefix_tokens:
            model.step(condition[:, :-1], 0, decoder.cache)
        x, start = condition, 0
        for i in range(20):
            assert torch.allclose(model.step(x, start, cache), logits[:, i], atol=1e-4), i
            start += x.shape[1]
            last = x[:, -1] + model.positions[start - 1]
            assert torch.allclose(decoder.step(last, start - 1), logits[:, i], atol=1e-4), i
            x = (model.tokens(indices[:, i]) + everywhere)[:, None]
    model._decoder = None
    scale = 1.0
    if "labels" in given:
        given, scale = dict(labels=torch.tensor([1, 5, 3])), 2.0
    greedy = model.generate(**given, temperature=0, guidance=scale)
    with torch.no_grad():
        again = model(greedy, **given)
        if scale != 1:
            none = model(greedy, torch.full((3,), 6))
            again = none + scale * (again - none)
    assert torch.equal(again.argmax(-1), greedy) and len(greedy.unique()) > 3


def test_rotary_scores_depend_on_the_distance_and_normalised_ones_not_on_length():
    def scores(attention, x):
        queries, keys = attention.qkv(x).view(1, 20, 3, 2, 16).permute(2, 0, 3, 1, 4)[:2]
        queries = prepare_heads(queries, attention.qk_norm, attention.angles)
        keys = prepare_heads(keys, attention.qk_norm, attention.angles)
        return queries @ keys.transpose(-1, -2)

    torch.manual_seed(0)
    shape = dict(num_tokens=20, dim=32, heads=2)
    x = torch.randn(1, 1, 32).expand(1, 20, 32)  # the same token everywhere
    found = scores(Attention(GeneratorConfig(rotary=True, **shape)), x)[0]
    for distance in (0, 1, 7):
        diagonal = found.diagonal(distance, 1, 2)
        assert torch.allclose(diagonal, diagonal[:, :1].expand_as(diagonal), atol=1e-5)
    assert found.std() > 0.01
    normalised = Attention(GeneratorConfig(rotary=True, qk_norm=True, **shape))
    x = torch.randn(1, 20, 32)
    assert torch.allclose(scores(normalised, 5 * x), scores(normalised, x), atol=1e-4)
    assert "angles" not in normalised.state_dict()  # weights stay those of any length


# ---- appearance first


def run_config(**changes):
    shape = GeneratorConfig(
        vocab_size=50,
        num_tokens=20,
        num_classes=6,
        dim=32,
        depth=2,
        heads=2,
        appearance_tokens=5,
        rotary=True,
        qk_norm=True,
        class_factors=(2, 3),
    )
    settings = dict(
        generator=shape,
        steps=10,
        batch_size=8,
        lr=3e-3,
        warmup=2,
        held_out=0.1,
        log_every=1,
        val_every=3,
        save_every=3,
        precision="no",
        appearance_steps=0.5,
    )
    return ARConfig(**(settings | changes))


def rows(n=60):
    "Learnable rows: token i is label + start + i."
    start, labels = np.random.default_rng(0).integers(0, 5, n), np.arange(n) % 6
    return (labels[:, None] + start[:, None] + np.arange(20)) % 50, torch.from_numpy(labels)


def weights_are_equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def log_of(run):
    lines = RunFolder(run).history()
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


@pytest.mark.parametrize("changes", [dict(ema=0.9), dict(muon_lr=0.02)], ids=str)
def test_resumed_on_either_side_of_the_switch_equals_uninterrupted(changes, tmp_path):
    config, (tokens, labels) = run_config(**changes), rows()
    whole = train_generator(config, tokens, labels, tmp_path / "whole", quiet)
    for stop_after in (4, 5, 6, 8):  # killed: goes on from steps 3, 3, 6 and 6
        train_generator(config, tokens, labels, tmp_path / "parts", quiet, stop_after=stop_after)
    parts = train_generator(config, tokens, labels, tmp_path / "parts", quiet)
    assert weights_are_equal(parts, whole)
    log = log_of(tmp_path / "whole")
    assert log_of(tmp_path / "parts") == log
    assert [line["codes"] for line in log] == [5] * 5 + [20] * 5
    validated = [line for line in log if "val_loss" in line]
    assert [line["step"] for line in validated] == [3, 6, 9, 10]
    for line in validated:
        assert abs(line["val_nats"] - line["val_loss"] * line["codes"]) < 1e-9
        assert line["val_nats_wrong_class"] > 0


def test_the_first_steps_see_nothing_of_the_motion_codes(tmp_path):
    tokens, labels = rows()
    other = tokens.copy()
    other[:, 5:] = other[:, 5:] * 7 % 50
    found = {}
    for name, some in dict(tokens=tokens, other=other).items():
        for steps in (5, 6):
            found[name, steps] = train_generator(
                run_config(save_every=1), some, labels, tmp_path / name, quiet, stop_after=steps
            )
    assert weights_are_equal(found["tokens", 5], found["other", 5])
    assert not weights_are_equal(found["tokens", 6], found["other", 6])


def test_the_rate_falls_over_the_codes_that_are_read():
    config = run_config(steps=100, warmup=10)
    assert [codes_at(step, config) for step in (0, 49, 50, 99)] == [5, 5, 20, 20]
    rates = [learning_rate(step, config) for step in range(10, 101)]
    assert rates[0] == config.lr and abs(rates[-1] - config.lr * config.min_lr) < 1e-12
    assert all(a > b for a, b in zip(rates, rates[1:], strict=False))
    done = 40 * 5 / (40 * 5 + 50 * 20)  # codes read by step 50, as a share of all after warm-up
    cosine = (1 + np.cos(np.pi * done)) / 2
    expected = config.lr * (config.min_lr + (1 - config.min_lr) * cosine)
    assert abs(learning_rate(50, config) - expected) < 1e-12


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(appearance_steps=-1), ["appearance_steps"]),
        (dict(appearance_steps=11), ["appearance_steps", "10"]),
        (dict(generator=GeneratorConfig(num_tokens=20)), ["appearance_tokens"]),
        (dict(muon_lr=float("nan")), ["muon_lr"]),
    ],
    ids=str,
)
def test_appearance_first_refuses_what_cannot_work(changes, words, tmp_path):
    with pytest.raises(InputError) as caught:
        train_generator(run_config(**changes), *rows(), tmp_path / "run", quiet)
    one_line(caught, *words)
    assert not (tmp_path / "run").exists()


# ---- torn token files


class Clips(torch.utils.data.Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, i):
        random = torch.Generator().manual_seed(i)
        return dict(video=torch.rand(3, 4, 8, 8, generator=random), label=i % 6)


class Codes(nn.Module):
    "A stand-in tokenizer: 20 codes of 50."

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor(50.0))

    def encode(self, video):
        codes = (video.flatten(1)[:, :20] * self.scale).long()
        return SimpleNamespace(indices=codes.clamp(max=49))


def test_torn_token_files_are_refused_in_one_line(tmp_path):
    path, about = tmp_path / "tokens.npy", tmp_path / "tokens.json"
    tokenize_dataset(Codes(), Clips(), path, progress=quiet)
    whole, described = path.read_bytes(), about.read_bytes()
    torn = [(path, whole[:size]) for size in (0, 5, 60, 200, len(whole) // 2, len(whole) - 1)]
    torn += [(path, whole + b"x"), (path, b"\x93NUMPY\x01\x00v\x00{'descr': (" + whole[20:])]
    torn += [(about, described[:size]) for size in (0, 1, 40, len(described) - 1)]
    torn += [(about, text) for text in (b"[]", b"{}", b"null", b"\xff\xfe")]
    for file, content in torn:
        path.write_bytes(whole)
        about.write_bytes(described)
        file.write_bytes(content)
        for act in (
            lambda: load_tokens(path),
            lambda: tokenize_dataset(Codes(), Clips(), path, progress=quiet),
        ):
            with pytest.raises(InputError) as caught:
                act()
            one_line(caught, file.name, "cut short or damaged", "delete tokens.npy and tokens.json")
    path.unlink()
    about.unlink()
    tokenize_dataset(Codes(), Clips(), path, progress=quiet)
    assert path.read_bytes() == whole
