"What mkdocs needs to know of this project: the order of pages, pages made from code and results, formulas as MathML."

import html
import json
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "nbs"
TOP_FILES = ["LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "data/README.md"]


def notebook_title(path):
    "The heading of a notebook's first cell."
    first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"]
    return "".join(first).splitlines()[0].removeprefix("# ")


def room(folder):
    "The notebooks of a folder as entries of the navigation."
    paths = sorted((NOTEBOOKS / folder).glob("*.ipynb"))
    return [
        {notebook_title(p): p.relative_to(NOTEBOOKS).as_posix()} for p in paths if p.stem != "index"
    ]


def modules(folder):
    "Modules of a floor, as dotted names."
    paths = sorted((ROOT / "dera" / folder).glob("*.py"))
    prefix = ".".join(["dera", *([folder] if folder else [])])
    return [f"{prefix}.{p.stem}" for p in paths if not p.stem.startswith("_")]


def api_pages():
    "(address, title, text) of a page for every module."
    for floor in ("", "runtime", "tools"):
        for name in modules(floor):
            yield f"api/{name}.md", name, f"# {name}\n\n::: {name}\n"


def shown(value):
    "A number to four digits, anything else as it is."
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def rows_of(tree, path=""):
    "Every number and text of a result file, with its path."
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from rows_of(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list):
        yield path, f"{len(tree)} entries"
    else:
        yield path, shown(tree)


def results_page(most=40):
    "All result files, each as a table of what it holds."
    parts = ["# Results\n\nEvery file of `nbs/results`, as the lessons read them."]
    for file in sorted((NOTEBOOKS / "results").rglob("*.json")):
        parts.append(f"\n## {file.relative_to(NOTEBOOKS / 'results').with_suffix('').as_posix()}\n")
        rows = list(rows_of(json.loads(file.read_text(encoding="utf-8"))))
        parts.append("| entry | value |\n|---|---|")
        for path, value in rows[:most]:
            value = html.escape(value[:300]).replace("|", "&#124;").replace("\n", " ")
            parts.append(f"| `{path}` | {value} |")
        if len(rows) > most:
            parts.append(f"| | and {len(rows) - most} more entries in the file |")
    return "\n".join(parts)


def on_config(config):
    "Navigation: lessons in reading order, then what stands below and above them."
    papers = [
        p for p in ("glossary.md", "reading_group.md", "paper_run.md") if (NOTEBOOKS / p).exists()
    ]
    config.nav = [
        {"Home": "index.ipynb"},
        {"Lessons": room("")},
        {"To read beside them": papers + ["results.md"]},
        {"Solutions": room("solutions")},
        {"Runtime": room("runtime")},
        {"Tools": room("tools")},
        {"API": [{title: address} for address, title, _ in api_pages()]},
    ]
    config.nav = [entry for entry in config.nav if list(entry.values())[0]]
    return config


def on_files(files, config):
    "Pages that stand in no file of the course."
    for address, _, text in api_pages():
        files.append(File.generated(config, address, content=text))
    files.append(File.generated(config, "results.md", content=results_page()))
    for name in TOP_FILES:
        if (ROOT / name).exists():
            target = "top/" + name.replace("/", "_")
            files.append(File.generated(config, target, content=(ROOT / name).read_text("utf-8")))
    return files


def mathml(match):
    "A formula that a browser draws by itself."
    display, inline = match.groups()
    formula = html.unescape(display or inline)
    try:
        return convert(formula, display="block" if display else "inline")
    except Exception:
        return f"<code>{html.escape(formula)}</code>"


FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<![\\$\w])\$(?!\s)([^$\n<]+?)(?<!\s)\$(?![\w$])", re.S)
CODE = re.compile(r"(<pre.*?</pre>|<code.*?</code>|<script.*?</script>|<style.*?</style>)", re.S)


def on_page_content(text, page, config, files):
    "Formulas as MathML, and links out of the course to copies beside it."
    parts = CODE.split(text)
    parts[::2] = [FORMULA.sub(mathml, part) for part in parts[::2]]
    text = "".join(parts)
    depth = page.file.dest_uri.count("/")

    def moved(match):
        name = match[1]
        if name not in TOP_FILES:
            return match[0]
        target = (
            "top/"
            + name.replace("/", "_").removesuffix(".md")
            + (".html" if name.endswith(".md") else "")
        )
        return f'href="{"../" * depth}{target}"'

    text = re.sub(r'href="(?:\.\./)+([\w./-]+)"', moved, text)
    # links between notebooks were written for a reader of files
    return re.sub(r'href="((?!https?:)[^"#]+)\.(?:ipynb|md)(#[^"]*)?"', r'href="\1.html\2"', text)
