"""README.md from nbs/index.ipynb: outputs without their code, figures in nbs/index_files/.

Links are made relative to the root.
Run as `python tests/render_readme.py` (or `make export`); nbconvert is all it needs."""

import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
FIGURES = "nbs/index_files"
RULES = Config(
    TemplateExporter=dict(exclude_input=True),
    ExtractOutputPreprocessor=dict(
        output_filename_template="figure_{cell_index}_{index}{extension}"
    ),
)


def render(root=ROOT):
    "The README's text, and its figures as {path from the root: bytes}."
    nb = nbformat.read(root / "nbs" / "index.ipynb", 4)
    nb.cells = [c for c in nb.cells if not re.match(r"#\|\s*(hide|default_exp)\b", c.source)]
    text, resources = MarkdownExporter(config=RULES).from_notebook_node(nb)
    figures = {}
    for old, content in resources["outputs"].items():
        cell, index, ending = re.fullmatch(r"figure_(\d+)_(\d+)(\..+)", old).groups()
        name = nb.cells[int(cell)].id
        new = f"{name}{'-' + index if index != '0' else ''}{ending}"
        text = re.sub(
            rf"!\[\w*\]\({re.escape(old)}\)",
            f"![{name.replace('-', ' ')}](index_files/{new})",
            text,
        )
        figures[f"{FIGURES}/{new}"] = content
    text = re.sub(r"\]\((?!https?:|#|\.\./)([^)]+)\)", r"](nbs/\1)", text).replace("](../", "](")
    text = re.sub(r"[ \t]+$", "", text, flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n", figures


def write(root=ROOT):
    "Write the README and its figures; figures of an earlier rendering go."
    text, figures = render(root)
    folder = root / FIGURES
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        if f"{FIGURES}/{old.name}" not in figures:
            old.unlink()
    for name, content in figures.items():
        (root / name).write_bytes(content)
    (root / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
