"Models in a folder or on the Hub: what comes back is what was saved, and everything else is refused in one line."

import json
import os
from dataclasses import replace
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dera import metrics
from dera.query import GridTokenizer, QueryTokenizer
from dera.runtime.checkpoints import checkpoint_path, load_model
from dera.runtime.errors import InputError
from dera.streams import DeRATokenizer, TokenizerConfig, load_tokenizer

SMALL = TokenizerConfig.preset(
    "tiny", dim=32, heads=4, encoder_depth=1, decoder_depth=1, codebook_size=64
)
CLASSES = GridTokenizer, QueryTokenizer, DeRATokenizer
FILES = ["README.md", "config.json", "model.safetensors"]


def build(cls, config=SMALL):
    torch.manual_seed(0)
    model = cls(config).eval()
    model.out.weight.data.normal_(std=0.02)
    return model


def refusal(action):
    "The message of a refusal, which must be one line."
    with pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def no_network(monkeypatch):
    "Every wish to download, which is refused."
    wishes = []

    def download(*args, **kwargs):
        wishes.append(kwargs.get("filename") or args[1])
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.hub_mixin, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return wishes


class Bomb:
    "Unpickling this leaves a folder behind."

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("cls", CLASSES)
def test_saved_and_loaded(cls, tmp_path, no_network):
    model, video = build(cls, replace(SMALL, size=(24, 16))), torch.rand(2, 3, 8, 24, 16)
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == FILES
    for load in (
        cls.from_pretrained,
        load_tokenizer,
        metrics.load_tokenizer,
        lambda p: load_model(cls, p),
    ):
        again = load(str(tmp_path))
        assert again.config == model.config and not again.training and type(again) is cls
        with torch.no_grad():
            assert torch.equal(again(video).video, model(video).video)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict())
    assert no_network == []


def test_class_names_travel_with_the_weights(tmp_path):
    model = build(QueryTokenizer)
    model.save_pretrained(tmp_path / "none")
    assert QueryTokenizer.from_pretrained(tmp_path / "none").class_names is None
    model.class_names = ("10", "jump", "Jump")
    model.save_pretrained(tmp_path / "three")
    assert QueryTokenizer.from_pretrained(tmp_path / "three").class_names == ["10", "jump", "Jump"]


def test_the_card_claims_only_what_is_known(tmp_path):
    build(QueryTokenizer).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "library_name: dera" in card and "QueryTokenizer.from_pretrained" in card
    for claim in "has been pushed", "license:", "apache":
        assert claim not in card
    (tmp_path / "README.md").write_text("my own words")
    build(QueryTokenizer).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my own words"


def rewrite(name, change):
    "A function that changes one file of a folder."

    def act(folder):
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return act


def other(**settings):
    return rewrite(
        "config.json", lambda text: json.dumps(json.loads(text) | settings).encode("utf-8")
    )


def pickle_inside(folder):
    torch.save(dict(a=Bomb(folder / "boom")), folder / "model.safetensors")


def pickle_beside(folder):
    (folder / "model.safetensors").unlink()
    torch.save(dict(a=Bomb(folder / "boom")), folder / "pytorch_model.bin")


def other_tensors(change):
    def act(folder):
        file = folder / "model.safetensors"
        save_file(change(load_file(file)), file)

    return act


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
BREAKS = dict(
    cut_in_the_header=(rewrite("model.safetensors", lambda b: b[:100]), "damaged"),
    cut_at_the_end=(rewrite("model.safetensors", lambda b: b[:-1]), "damaged"),
    empty=(rewrite("model.safetensors", lambda b: b""), "damaged"),
    grown=(rewrite("model.safetensors", lambda b: b + b"0"), "damaged"),
    pointer=(rewrite("model.safetensors", lambda b: POINTER), "git lfs pull"),
    pointer_to_settings=(rewrite("config.json", lambda b: POINTER), "git lfs pull"),
    pickle_inside=(pickle_inside, "damaged"),
    pickle_beside=(pickle_beside, "pickles"),
    no_weights=(lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
    no_config=(lambda folder: (folder / "config.json").unlink(), "no config.json"),
    config_cut=(rewrite("config.json", lambda b: b[:50]), "config.json is damaged"),
    config_a_list=(rewrite("config.json", lambda b: b"[1]"), "config.json is damaged"),
    config_bytes=(rewrite("config.json", lambda b: b"\xff\xfe\x00"), "config.json is damaged"),
    missing_tensor=(other_tensors(lambda t: {k: t[k] for k in t if k != "out.bias"}), "out.bias"),
    extra_tensor=(other_tensors(lambda t: t | {"teacher": torch.zeros(2)}), "teacher"),
    other_heads=(other(heads=2), "heads 4 and not 2"),
    other_width=(other(dim=64), "dim"),
    other_depth=(other(decoder_depth=2), "decoder_depth"),
    other_positions=(other(positions="sincos"), "positions"),
    other_quantizer=(other(quantizer="vq"), "quantizer"),
    other_groups=(other(codes_per_token=2), "codes_per_token"),
    other_start=(other(larp=True), "larp"),
    no_such_value=(other(heads=0), "heads"),
)


def test_a_broken_folder_is_refused(tmp_path, no_network):
    model, complaints = build(DeRATokenizer), []
    for name, (damage, word) in BREAKS.items():
        folder = tmp_path / name
        model.save_pretrained(folder)
        damage(folder)
        for load in (
            DeRATokenizer.from_pretrained,
            lambda p: load_model(DeRATokenizer, p),
            load_tokenizer,
        ):
            message = refusal(lambda load=load, folder=folder: load(folder))
            if str(folder) not in message:
                complaints.append(f"{name}: {message}")
        if word not in refusal(lambda folder=folder: DeRATokenizer.from_pretrained(folder)):
            complaints.append(f"{name}: {word!r} not in {message}")
        assert not (folder / "boom").exists(), name
    assert not complaints, "\n".join(complaints)
    assert no_network == []


def test_a_file_of_another_tokenizer_is_refused(tmp_path):
    for saved in CLASSES:
        build(saved).save_pretrained(tmp_path / saved.__name__)
        for loaded in CLASSES:
            if loaded is not saved:
                folder = tmp_path / saved.__name__
                message = refusal(lambda l=loaded, f=folder: l.from_pretrained(f))
                assert loaded.__name__ in message


def test_what_may_differ_from_the_saved_configuration(tmp_path):
    model, clips = build(DeRATokenizer), torch.rand(2, 3, 8, 32, 32)
    model.save_pretrained(tmp_path)
    changed = replace(SMALL, checkpoint=True, temperature=0.1)
    again = DeRATokenizer.from_pretrained(tmp_path, config=changed)
    assert again.encoder.checkpoint and again.quantizer.temperature == 0.1
    with torch.no_grad():
        assert torch.equal(again(clips).video, model(clips).video)


def test_folders_from_before_a_field_existed_load(tmp_path):
    build(DeRATokenizer).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for field in "checkpoint", "larp", "quantizer", "levels":
        del config[field]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert DeRATokenizer.from_pretrained(tmp_path).config == SMALL
    shipped = load_tokenizer(checkpoint_path("pocket-tokenizer-tiny"))
    assert shipped.config.quantizer == "svq" and not shipped.config.larp


def test_a_missing_folder_is_not_looked_for_elsewhere(tmp_path, monkeypatch, no_network, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for name in (tmp_path / "none", "./none", "../none", "~/none", "a/b/none", "file", ""):
        for load in DeRATokenizer.from_pretrained, load_tokenizer:
            assert str(name) in refusal(lambda load=load, name=name: load(name))
    assert no_network == [] and capsys.readouterr().err == ""
    for load in DeRATokenizer.from_pretrained, load_tokenizer:
        assert "someone/model" in refusal(lambda load=load: load("someone/model"))
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "Hugging Face Hub" in said
    assert no_network == ["config.json", "model.safetensors"]


def test_pushed_to_the_hub_and_back(tmp_path, monkeypatch):
    model, pushed = build(DeRATokenizer), {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **kwargs):
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, repo_id, folder_path, **kwargs):
            pushed.update({p.name: p.read_bytes() for p in folder_path.iterdir()})
            return "done"

    def download(repo_id, filename, **kwargs):
        if filename not in pushed:
            raise EntryNotFoundError(filename)
        (tmp_path / filename).write_bytes(pushed[filename])
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub.hub_mixin, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert model.push_to_hub("someone/model") == "done" and sorted(pushed) == FILES
    for load in DeRATokenizer.from_pretrained, load_tokenizer:
        again = load("someone/model")
        assert again.config == model.config and torch.equal(again.out.weight, model.out.weight)

    # a pickle in place of the weights is not opened
    torch.save(dict(a=Bomb(tmp_path / "boom")), tmp_path / "pickle")
    pushed["pytorch_model.bin"] = (tmp_path / "pickle").read_bytes()
    del pushed["model.safetensors"]
    assert "pickle" in refusal(lambda: DeRATokenizer.from_pretrained("someone/model"))
    assert not (tmp_path / "boom").exists()


def test_shipped_folders_hold_no_pickle_and_no_teacher():
    folder = checkpoint_path("pocket-tokenizer-tiny")
    known = {".safetensors", ".json", ".jsonl", ".md"}
    for model in folder.parent.iterdir():
        assert {p.suffix for p in model.iterdir()} <= known, model
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(load_tokenizer(folder).state_dict())
