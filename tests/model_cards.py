"""README.md of every shipped checkpoint: what it is, how it was trained, its numbers, limits, licence.

Numbers come from nbs/results/evidence.json, and only where it measured this folder; settings from config.json
and training.json. Run as `python tests/model_cards.py` after a checkpoint or the evidence has changed."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WHAT = {
    "pocket-classifier": ("Classifier of shape and motion", "dera.runtime.factor_classifier"),
    "pocket-generator-tiny": ("Generator of clips of a class", "dera.ar"),
    "pocket-image-teacher": ("Image teacher, 32 x 32", "dera.teachers"),
    "pocket-predictor-tiny": ("Generator that continues two frames", "dera.ar"),
    "pocket-tokenizer-tiny": ("DeRA tokenizer, clips of 8 x 32 x 32", "dera.streams"),
    "pocket-video-teacher": ("Video teacher, 8 x 32 x 32", "dera.teachers"),
    "pocket64-image-teacher": ("Image teacher, 64 x 64", "dera.teachers"),
    "pocket64-video-teacher": ("Video teacher, 16 x 64 x 64", "dera.teachers"),
}
SHOWN = (
    "data",
    "preset",
    "modality",
    "objective",
    "level",
    "tokenizer",
    "steps",
    "batch_size",
    "lr",
    "seed",
)


def read(path):
    "A JSON file; empty where it is missing."
    return json.loads(path.read_text()) if path.exists() else {}


def numbers(name, evidence):
    "Lines of a table: what was measured of this checkpoint."
    lines = []
    if evidence["tokenizer"]["folder"].endswith(f"/{name}"):
        found = evidence["reconstruction"]
        lines += [f"| PSNR of reconstructions | {found['psnr']:.2f} dB |"]
        lines += [f"| SSIM of reconstructions | {found['ssim']:.3f} |"]
        for factor, share in found["recognised"].items():
            original = found["recognised_in_originals"][factor]
            lines += [f"| {factor} recognised | {share:.1%} (originals: {original:.1%}) |"]
    if evidence.get("generator", {}).get("folder", "").endswith(f"/{name}"):
        found = evidence["generation"]
        for factor, share in found["recognised"].items():
            chance = found["chance"][factor]
            lines += [f"| {factor} as asked | {share:.1%} (chance: {chance:.1%}) |"]
    return lines


def card(folder, evidence):
    "The text of one card."
    title, module = WHAT[folder.name]
    training = read(folder / "training.json")
    lines = ["---", "library_name: dera", "license: apache-2.0", "tags:", "- video", "---", ""]
    lines += [
        f"# {folder.name}",
        "",
        f"{title}, for the pocket world of dera (`{module}`), a reproduction of",
    ]
    lines += [
        "[DeRA: Decoupled Representation Alignment for Video Tokenization](https://arxiv.org/abs/2512.04483)."
    ]
    lines += ["", "## Training", ""]
    lines += [
        "On rendered clips of the pocket world, with no real video. How it is made again: `data/README.md`."
    ]
    shown = [
        f"| {name} | {training[name]} |" for name in SHOWN if training.get(name) not in (None, "")
    ]
    if shown:
        lines += ["", "| setting (all: `training.json`) | value |", "|---|---|", *shown]
    measured = numbers(folder.name, evidence)
    lines += ["", "## Numbers", ""]
    if measured:
        lines += [f"{evidence['protocol']}.", "", "| measured | value |", "|---|---|", *measured]
    else:
        lines += [
            "Not measured by `nbs/results/evidence.json`; the log of the training lies beside this file."
        ]
    lines += ["", "## Limits and licence", ""]
    lines += [
        "It knows procedural shapes and motions only, at one size and length; on real video it fails."
    ]
    lines += [
        "It is small on purpose, and no measure of the paper's method. Apache-2.0, as the project."
    ]
    return "\n".join(lines) + "\n"


def cards(root=ROOT):
    "{path: text} of all cards."
    evidence = read(root / "nbs/results/evidence.json")
    folders = [path.parent for path in sorted((root / "data/checkpoints").glob("*/config.json"))]
    return {folder / "README.md": card(folder, evidence) for folder in folders}


if __name__ == "__main__":
    for path, text in cards().items():
        path.write_text(text, encoding="utf-8")
