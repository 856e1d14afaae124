"""Rules that every notebook and the exported package keep, and proof that each check can fail.
A check takes a notebook's name and content and returns its complaints, one line each."""

import ast
import base64
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
import check_tree
import render_readme
import style_counts

NBS = ROOT / "nbs"
NOTEBOOKS = {
    p.relative_to(NBS).with_suffix("").as_posix(): p
    for p in sorted(NBS.rglob("*.ipynb"))
    if ".ipynb_checkpoints" not in p.parts
}
MODULES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts): p
    for p in sorted((ROOT / "dera").rglob("*.py"))
    if p.name not in ("__init__.py", "_modidx.py")
}
# may be imported inside functions, never at the top: readers of videos, and extras of setup.py
LAZY = {"decord", "av", "IPython", "gradio", "tensorboard", "wandb"}
IMPORT_NAMES = dict(pillow="PIL")


def requirements(key):
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    return [re.match(r"[\w-]+", l)[0] for l in config["DEFAULT"][key].splitlines() if l.strip()]


def import_name(distribution):
    return IMPORT_NAMES.get(distribution, distribution.replace("-", "_"))


def code_cells(nb):
    return [c for c in nb["cells"] if c["cell_type"] == "code"]


def exported(cell):
    return bool(re.match(r"(#\|.*\n)*#\|\s*export[si]?\b", cell["source"]))


def is_lesson(name):
    return bool(re.match(r"\d\d_", name)) and name != "00_tour"


def parse(source):
    return ast.parse(re.sub(r"^([ \t]*)[%!].*$", r"\1pass", source, flags=re.M)).body


def texts(cell):
    "The source, and what the outputs say in words: not their pictures."
    yield cell["source"]
    for output in cell.get("outputs", []):
        yield output.get("text", "")
        for kind, content in output.get("data", {}).items():
            if kind.startswith("text/") or kind == "image/svg+xml":
                yield content


def pictures(cell):
    for output in cell.get("outputs", []):
        for kind, content in output.get("data", {}).items():
            if kind in ("image/png", "image/gif"):
                yield base64.b64decode(content)


# ---- the checks of one notebook


def check_valid(name, nb):
    try:
        nbformat.validate(nbformat.from_dict(nb))
    except nbformat.ValidationError as e:
        yield f"not a valid notebook: {str(e).splitlines()[0]}"


def check_opening(name, nb):
    cells = nb["cells"]
    first = cells[0]["source"] if cells and cells[0]["cell_type"] == "markdown" else ""
    lines = first.splitlines() or [""]
    if not lines[0].startswith("# "):
        yield 'the first cell must be markdown that starts with "# title"'
    if not any(l.startswith("> ") and len(l) > 20 for l in lines):
        yield 'the first cell has no "> promise" line'
    if not any("**Time and memory:**" in l and "**Covers:**" in l for l in lines):
        yield 'the first cell has no "**Time and memory:** ... **Covers:** ..." line'


def check_exercises(name, nb):
    headings = [
        l
        for c in nb["cells"]
        if c["cell_type"] == "markdown"
        for l in c["source"].splitlines()
        if l.startswith("## ")
    ]
    if is_lesson(name) and headings[-1:] != ["## Exercises"]:
        yield 'the last section must be "## Exercises"'


def check_ids(name, nb):
    ids = [c.get("id", "") for c in nb["cells"]]
    for i in {i for i in ids if ids.count(i) > 1}:
        yield f"cell id {i!r} is there twice"
    for i in ids:
        if not i or re.fullmatch(r"(?=.*\d)[0-9a-f-]{8,}", i):
            yield f"cell id {i!r} is random; name the cell by what it does"


def check_outputs(name, nb):
    if not name.startswith("solutions/") and not any(c.get("outputs") for c in code_cells(nb)):
        yield "no cell has an output: run the notebook and keep its outputs"
    for c in code_cells(nb):
        shown = [
            n.value.func
            for n in parse(c["source"])
            if isinstance(n, ast.Expr) and isinstance(n.value, ast.Call)
        ]
        shown = {getattr(f, "id", None) for f in shown} & {"print", "show"}
        if shown and not c.get("outputs"):
            yield f"cell {c['id']!r} calls {shown.pop()} and has no output"
        if any(o["output_type"] == "error" for o in c.get("outputs", [])):
            yield f"cell {c['id']!r} ends in an error"


def check_paths(name, nb):
    for c in nb["cells"]:
        for found in {
            m[0]
            for t in texts(c)
            for m in re.finditer(r"(?<![\w.:/-])/(home|root|work|Users)/[\w.-]+", t)
        }:
            yield f"cell {c['id']!r} has the absolute path {found}"


def check_words(name, nb):
    for c in nb["cells"]:
        if re.search(r"\b(TODO|FIXME|XXX)\b", c["source"]):
            yield f"cell {c['id']!r} is unfinished: TODO, FIXME or XXX"


def check_pictures(name, nb):
    for c in nb["cells"]:
        for p in pictures(c):
            moves = p[:3] == b"GIF" or b"acTL" in p[:4096]
            if moves and len(p) > 300_000:
                yield f"the animation of cell {c['id']!r} has {len(p) // 1000} kB, over 300"


def check_leftovers(name, nb):
    if "widgets" in nb.metadata:
        yield "the state of widgets is saved with it; it shows nothing without a kernel"
    for c in code_cells(nb):
        if any(o.get("name") == "stderr" and not o.text.strip() for o in c.outputs):
            yield f"cell {c['id']!r} has an empty output"


def check_links(name, nb):
    folder = NBS / Path(name).parent
    for c in nb["cells"]:
        if c["cell_type"] != "markdown":
            continue
        for link in re.findall(r"\]\(([^)#\s]+)", c["source"]):
            if not re.match(r"https?:|data:|attachment:", link) and not (folder / link).exists():
                yield f"cell {c['id']!r} links to {link}, which is not there"


CHECKS = [v for k, v in list(globals().items()) if k.startswith("check_") and callable(v)]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook(name):
    nb = nbformat.read(NOTEBOOKS[name], 4)
    complaints = [complaint for check in CHECKS for complaint in check(name, nb)]
    size = NOTEBOOKS[name].stat().st_size
    if size >= 3_000_000:
        complaints.append(f"it has {size / 1e6:.1f} MB, over 3")
    assert not complaints, "\n".join(complaints)


# ---- the checks can fail


def _sound():
    "A small notebook without a fault."
    png = base64.b64encode(b"\x89PNG").decode()
    return nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_markdown_cell(
                "# Title\n\n> A promise of some length.\n\n**Time and memory:** seconds. **Covers:** nothing.",
                id="title",
            ),
            nbformat.v4.new_code_cell("#| export\nimport torch", id="imports"),
            nbformat.v4.new_code_cell("#| export\ndef f(): return 1", id="facade"),
            nbformat.v4.new_code_cell(
                "%time f()\nprint(f())",
                id="demo",
                outputs=[
                    nbformat.v4.new_output("stream", text="1\n"),
                    nbformat.v4.new_output(
                        "display_data", {"image/png": png, "text/plain": "tests/home/work"}
                    ),
                ],
            ),
            nbformat.v4.new_markdown_cell(
                "## Exercises\n\n1. Read https://a.b/home/x.", id="exercises"
            ),
        ]
    )


def _output(kind, content):
    return lambda nb: nb.cells[3].outputs.append(
        nbformat.v4.new_output("display_data", {kind: content})
    )


def _source(i, text):
    return lambda nb: nb.cells[i].update(source=text)


def _id(i, text):
    return lambda nb: nb.cells[i].update(id=text)


BREAKS = [
    (check_valid, lambda nb: nb.cells[1].pop("outputs")),
    (check_valid, lambda nb: nb.cells[1].update(id="two words")),
    (
        check_opening,
        _source(0, "Title\n\n> A promise of some length.\n\n**Time and memory:** x **Covers:** y"),
    ),
    (check_opening, _source(0, "# Title\n\n**Time and memory:** x **Covers:** y")),
    (check_opening, _source(0, "# Title\n\n> A promise of some length.\n\n**Covers:** y")),
    (check_opening, lambda nb: nb.cells.pop(0)),
    (check_exercises, _source(4, "## Exercises\n\n## More")),
    (check_exercises, lambda nb: nb.cells.pop()),
    (check_ids, _id(1, "demo")),
    (check_ids, _id(1, "1f0c22ab")),
    (check_ids, _id(1, "")),
    (check_ids, _id(1, "4b2b2b1e-09d5-4f8a-9d5e-8f0d1c2b3a4f")),
    (check_outputs, lambda nb: nb.cells[3].update(outputs=[])),
    (
        check_outputs,
        lambda nb: nb.cells[3].outputs.append(
            nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])
        ),
    ),
    (check_outputs, _source(2, "print(1)")),
    (check_outputs, _source(2, "x = 1\nshow(x)")),
    (check_paths, _source(2, "open('/home/me/x')")),
    (check_paths, _output("text/plain", "in /Users/me/x")),
    (check_paths, lambda nb: nb.cells[3].outputs[0].update(text="/root/dera and more")),
    (check_paths, _source(4, "see /work/x")),
    (check_words, _source(4, "## Exercises\nTODO")),
    (
        check_pictures,
        _output("image/png", base64.b64encode(b"\x89PNG....acTL" + bytes(300_000)).decode()),
    ),
    (check_pictures, _output("image/gif", base64.b64encode(b"GIF89a" + bytes(300_000)).decode())),
    (check_leftovers, lambda nb: nb.metadata.update(widgets={})),
    (
        check_leftovers,
        lambda nb: nb.cells[3].outputs.append(
            nbformat.v4.new_output("stream", name="stderr", text="\n")
        ),
    ),
    (check_links, _source(4, "## Exercises\n\n[gone](nowhere.ipynb)")),
]


def test_a_sound_notebook_passes():
    assert [c for check in CHECKS for c in check("01_sound", _sound())] == []


def test_every_check_can_fail():
    silent = []
    for i, (check, breakage) in enumerate(BREAKS):
        nb = _sound()
        breakage(nb)
        if not list(check("01_broken", nb)):
            silent.append(f"{i}: {check.__name__}")
    assert not silent
    assert {check for check, _ in BREAKS} == set(CHECKS)


def test_what_is_asked_of_lessons_is_not_asked_of_rooms_and_solutions():
    nb = _sound()
    nb.cells.pop()
    assert list(check_exercises("01_x", nb)) and list(check_exercises("16_scaling_up", nb))
    for name in "index", "00_tour", "runtime/x", "tools/x", "solutions/01_x":
        assert not list(check_exercises(name, nb))


# ---- the package


def imports(tree, top=False):
    "Import roots of a module; with `top`, only those that run when it is imported."
    nodes = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from (a.name.partition(".")[0] for a in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0] if not node.level else "dera"
        if not (top and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))):
            nodes += ast.iter_child_nodes(node)


def import_faults(source):
    "What a module imports that it must not."
    tree = ast.parse(source)
    allowed = (
        {import_name(r) for r in requirements("requirements")}
        | {"dera"}
        | LAZY
        | set(sys.stdlib_module_names)
    )
    return sorted(set(imports(tree)) - allowed | set(imports(tree, top=True)) & LAZY)


PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def pickle_faults(source):
    "Where a module could unpickle something."
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Import)
            and {a.name.partition(".")[0] for a in node.names} & PICKLES
        ):
            yield f"line {node.lineno}: import"
        if isinstance(node, ast.ImportFrom) and (
            (node.module or "").partition(".")[0] in PICKLES
            or node.module == "torch"
            and "load" in {a.name for a in node.names}
        ):
            yield f"line {node.lineno}: import"
        if isinstance(node, ast.Attribute) and ast.unparse(node) in (
            "torch.load",
            "torch.serialization.load",
        ):
            yield f"line {node.lineno}: torch.load"
        if (
            isinstance(node, ast.keyword)
            and node.arg == "allow_pickle"
            and ast.unparse(node.value) != "False"
        ):
            yield f"line {node.value.lineno}: allow_pickle"


def test_module_sources():
    faults = []
    for name, path in MODULES.items():
        source = path.read_text()
        faults += [f"{name} imports {x}" for x in import_faults(source)]
        faults += [f"{name}, {x}" for x in pickle_faults(source)]
    assert not faults, "\n".join(faults)


def test_import_faults_are_found():
    for bad in (
        "import nbdev",
        "from fastcore.all import *",
        "import decord",
        "try:\n import av\nexcept ImportError: pass",
        "def f():\n import scipy",
        "class A:\n import IPython",
    ):
        assert import_faults(bad), bad
    assert not import_faults(
        "import torch, PIL\ndef f():\n  import decord, av\n  from .utils import show"
    )


def test_pickle_faults_are_found():
    for bad in (
        "import pickle",
        "def f():\n from joblib import load",
        'torch.load("x")',
        "from torch import load",
        "x = torch.load",
        'np.load("x", allow_pickle=True)',
    ):
        assert list(pickle_faults(bad)), bad
    assert not list(
        pickle_faults('np.load("x", allow_pickle=False)\n"nothing is unpickled: no torch.load("')
    )


# Runs in a fresh process: the named packages look as if they had never been installed, and touching CUDA is an error.
GUARD = """
import sys
from importlib.machinery import PathFinder
absent = set(sys.argv[1].split(','))
class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition('.')[0] in absent else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
import torch
def touched(*a, **k): raise SystemExit('CUDA was initialised at import')
torch.cuda._lazy_init = torch.cuda.init = touched
import importlib
for module in sys.argv[2:]: importlib.import_module(module)
assert not torch.cuda.is_initialized()
print('imported', len(sys.argv) - 2)
"""
ABSENT = (
    {import_name(r) for r in requirements("dev_requirements")}
    | LAZY
    | {"sklearn", "jupyter_client", "jupyter_core", "nbformat", "nbclient"}
)


def guarded(*modules, cwd=None):
    return subprocess.run(
        [sys.executable, "-c", GUARD, ",".join(sorted(ABSENT)), *modules],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=300,
    )


def test_package_imports_with_runtime_dependencies_only():
    done = guarded(*MODULES, cwd=ROOT)
    assert done.returncode == 0 and f"imported {len(MODULES)}" in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize(
    "source, complaint",
    [("import decord", "No module named"), ('import torch; torch.zeros(1, device="cuda")', "CUDA")],
)
def test_the_import_guard_can_fail(tmp_path, source, complaint):
    (tmp_path / "bad.py").write_text(source)
    done = guarded("bad", cwd=tmp_path)
    assert done.returncode and complaint in done.stderr


def test_wheel_carries_the_shipped_checkpoints(tmp_path):
    kept = (
        "setup.py",
        "settings.ini",
        "pyproject.toml",
        "MANIFEST.in",
        "LICENSE",
        "dera",
        "data/checkpoints",
    )
    for name in kept:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "data/checkpoints/one/two").mkdir(parents=True)
    (tmp_path / "data/checkpoints/one/two/x.safetensors").write_bytes(b"x")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            "--no-index",
            "-w",
            tmp_path / "wheel",
            tmp_path,
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    names = set(zipfile.ZipFile(next((tmp_path / "wheel").glob("*.whl"))).namelist())
    shipped = {
        p.relative_to(ROOT / "data").as_posix()
        for p in (ROOT / "data/checkpoints").rglob("*")
        if p.is_file()
    }
    modules = {p.relative_to(ROOT).as_posix() for p in MODULES.values()}
    assert (
        modules | {f"dera/{s}" for s in shipped} | {"dera/checkpoints/one/two/x.safetensors"}
        <= names
    )
    assert not [n for n in names if n.startswith(("tests", "nbs", "data"))]


def test_shipped_checkpoints_are_small_and_safe():
    files = [p for p in (ROOT / "data/checkpoints").rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 25e6
    assert {p.suffix for p in files} <= {".safetensors", ".json", ".jsonl", ".md"}


# ---- style, counted


def test_style_is_within_its_limits():
    counts, found = style_counts.count_package(style_counts.modules())
    worse = style_counts.complaints(counts)
    assert not worse, f"{worse} {found}"


def test_what_style_counts():
    dense = {
        "dera.a": "from .b import _c\ndef f(x, y):  # y\n    a, b, c = 1, 2, 3; d = 4\n    return d\n",
        "dera.b": "def g():\n    'text'\n    from dera.a import f\n    return f\n",
        "dera.c": "import torch\n",
    }
    counts, found = style_counts.count_package(dense)
    assert counts["lines"] == 9 and counts["lines with two statements"] == 1
    assert counts["packed assignments of three or more, per 1,000 lines"] == pytest.approx(1000 / 9)
    assert sorted(found["circle"]) == ["dera.a", "dera.b"]
    assert found["private"] == ["dera.a: dera.b._c"]
    assert counts["public definitions documented (%)"] == 50
    wide = style_counts.count_package({"dera.a": "x = 1\n" + "y" * 121})[0]
    assert wide["lines over 120 characters"] == 1
    assert len(style_counts.complaints(counts)) >= 4


# ---- README


def test_readme_is_the_rendered_index():
    text, figures = render_readme.render()
    assert (ROOT / "README.md").read_text() == text, "README.md is stale: run `make export`"
    assert {
        p.relative_to(ROOT).as_posix(): p.read_bytes()
        for p in (ROOT / render_readme.FIGURES).iterdir()
    } == figures


def test_readme_shows_no_directives_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    assert "#|" not in text and "default_exp" not in text
    links = re.findall(r"\]\(([^)#\s]+)", text)
    missing = [l for l in links if not l.startswith("http") and not (ROOT / l).exists()]
    assert links and not missing, f"README.md links to files that are not there: {missing}"


def test_readme_lists_every_notebook():
    text = (ROOT / "README.md").read_text()
    assert not [
        n
        for n in NOTEBOOKS
        if n != "index" and not n.startswith("solutions/") and f"nbs/{n}.ipynb" not in text
    ], "run index.ipynb again and `make export`"


def test_rendering_rewrites_links_and_drops_code(tmp_path):
    (tmp_path / "nbs").mkdir()
    png = base64.b64encode(b"\x89PNG").decode()
    nb = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_markdown_cell(
                "# T\n[a](01_a.ipynb) [b](../LICENSE) [c](https://x.y/z) [d](#e)"
            ),
            nbformat.v4.new_code_cell("#| default_exp x"),
            nbformat.v4.new_code_cell(
                "#| hide\nsecret", outputs=[nbformat.v4.new_output("stream", text="hidden")]
            ),
            nbformat.v4.new_code_cell(
                "#| echo: false\nsecret",
                outputs=[nbformat.v4.new_output("display_data", {"image/png": png})],
            ),
        ]
    )
    nbformat.write(nb, tmp_path / "nbs/index.ipynb")
    (tmp_path / "nbs/index_files").mkdir()
    (tmp_path / "nbs/index_files/old.png").touch()
    render_readme.write(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "[a](nbs/01_a.ipynb) [b](LICENSE) [c](https://x.y/z) [d](#e)" in text
    assert "secret" not in text and "hidden" not in text and "#|" not in text
    (figure,) = (tmp_path / "nbs/index_files").iterdir()
    assert f"](nbs/index_files/{figure.name})" in text and figure.read_bytes() == b"\x89PNG"


# ---- the tree check itself


def test_tree_check_finds_what_changed(tmp_path):
    (tmp_path / "nbs").mkdir()
    for name in "settings.ini", "pyproject.toml":
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(
        ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__")
    )
    cells = [
        nbformat.v4.new_markdown_cell("# T", id="title"),
        nbformat.v4.new_code_cell("#| default_exp small", id="exp"),
        nbformat.v4.new_code_cell("#| export\ndef f(): return 1", id="f"),
    ]
    kernel = dict(kernelspec=dict(display_name="python3", language="python", name="python3"))
    for name, n in ("index", 1), ("01_small", 3):
        nbformat.write(
            nbformat.v4.new_notebook(cells=cells[:n], metadata=kernel),
            tmp_path / f"nbs/{name}.ipynb",
        )
    assert check_tree.write(tmp_path) is None
    before = check_tree.files(tmp_path)
    assert "dera/small.py" in before and check_tree.check(tmp_path) == ""
    (tmp_path / "dera/small.py").write_text(
        before["dera/small.py"].decode().replace("return 1", "return 2")
    )
    (tmp_path / "dera/stray.py").write_text("x = 1\n")
    (tmp_path / "README.md").unlink()
    book = before["nbs/01_small.ipynb"].replace(b'"execution_count": null', b'"execution_count": 7')
    (tmp_path / "nbs/01_small.ipynb").write_bytes(book)
    found, broken = check_tree.check(tmp_path), check_tree.files(tmp_path)
    for line in (
        "-def f(): return 2",
        "+def f(): return 1",
        "dera/stray.py: no notebook writes it",
        "README.md: missing",
        '"execution_count": 7',
    ):
        assert line in found
    assert (
        check_tree.files(tmp_path) == broken and broken["nbs/01_small.ipynb"] == book
    )  # looking changes nothing


def test_the_version_is_one(root):
    import dera

    settings = (root / "settings.ini").read_text()
    version = re.search(r"^version = (.+)$", settings, re.M)[1]
    cited = re.search(r"^version: (.+)$", (root / "CITATION.cff").read_text(), re.M)[1]
    dated = re.search(r"^## ([\d.]+), \d{4}-\d\d-\d\d$", (root / "CHANGELOG.md").read_text(), re.M)[
        1
    ]
    assert dera.__version__ == version == cited == dated


def test_the_package_index_sees_no_relative_link(root):
    tree = ast.parse((root / "setup.py").read_text())
    tree.body = [part for part in tree.body if getattr(part, "name", "") == "for_the_index"]
    names = {"re": re}
    exec(compile(tree, "setup.py", "exec"), names)
    readme = (root / "README.md").read_text()
    link = r"\]\((?!https?:|#|mailto:)[^)\s]+\)"
    for repository in "", "https://example.org/dera":
        assert not re.search(link, names["for_the_index"](readme, repository, "v1"))
    shown = names["for_the_index"]("[a](b.md) ![p](q.png) [w](https://x.y)", "https://h/r", "v1")
    assert shown == "[a](https://h/r/blob/v1/b.md) ![p](https://h/r/raw/v1/q.png) [w](https://x.y)"


def test_cards_of_checkpoints_say_what_was_measured(root):
    "Run `python tests/model_cards.py` after a checkpoint or the evidence has changed."
    from model_cards import cards

    for path, text in cards(root).items():
        assert path.read_text() == text, path
        assert "apache-2.0" in text and "More Information Needed" not in text
