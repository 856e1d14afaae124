"""How the package and the lessons read, in numbers: `make style`, or `python tests/style_counts.py [--json]`.
Counted on dera/ as exported (its _modidx.py and the list of names at each top apart) and on the lessons of nbs/."""

import ast
import json
import re
import statistics
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent

# What the project holds itself to. A count may be better than its limit, never worse.
LIMITS = {
    "lines over 100 characters (%)": 3.0,
    "lines over 120 characters": 0,
    "lines with two statements": 0,
    "packed assignments of three or more, per 1,000 lines": 1.0,
    "syntax nodes a line": 6.5,
    "largest import circle (modules)": 1,
    "private names imported across modules": 0,
}
AT_LEAST = {
    "public definitions documented (%)": 89.0,  # as it was before style was counted
    "public parameters documented (%)": 82.0,
}
WORDS = 110  # of markdown for 1,000 characters of code, over all lessons
CELL = 7  # lines of the median code cell, over all lessons


# ---- the package


def modules(root=ROOT):
    "{dotted name: source} of everything exported."
    found = {}
    for path in sorted((root / "dera").rglob("*.py")):
        if path.name not in ("_modidx.py", "__init__.py"):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            found[name] = path.read_text()
    return found


def code_lines(source):
    "Lines that say something, without what nbdev writes."
    source = re.sub(r"^__all__ = \[.*?\]$", "", source, flags=re.M | re.S)
    lines = source.splitlines()
    return [line for line in lines if line.strip() and not line.startswith(("# %%", "# AUTOGEN"))]


def crowded_lines(tree):
    "Numbers of lines on which two statements begin."
    first = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    return {number for number in first if first.count(number) > 1}


def packed_assignments(tree):
    "Assignments of three or more different things at once."
    count = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            targets = node.targets[0]
            count += isinstance(targets, ast.Tuple) and len(targets.elts) >= 3
    return count


def imported_modules(name, tree, known):
    "(module, names) of every import of the package's own modules, inside functions too."
    package = name.rsplit(".", 1)[0].split(".")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in known:
                    yield alias.name, []
        if not isinstance(node, ast.ImportFrom):
            continue
        parts = node.module.split(".") if node.module else []
        if node.level:
            parts = package[: len(package) + 1 - node.level] + parts
        origin = ".".join(parts)
        names = [alias.name for alias in node.names]
        inner = [n for n in names if f"{origin}.{n}" in known]
        for n in inner:
            yield f"{origin}.{n}", []
        if origin in known:
            yield origin, names


def largest_circle(graph):
    "Modules of the largest set in which each reaches each other."
    reach = {name: set(graph[name]) for name in graph}
    for middle in graph:
        for name in graph:
            if middle in reach[name]:
                reach[name] |= reach[middle]
    circles = [[b for b in graph if b in reach[a] and a in reach[b]] for a in graph]
    return max(circles, key=len, default=[])


def public_definitions(tree):
    "Public functions and classes, and the public methods of public classes."
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in tree.body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, kinds) and not inner.name.startswith("_"):
                        yield inner


def documented_parameters(node, lines):
    "(parameters, how many have a comment at their line or just below) of a public function."
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    arguments = [a for a in arguments if a.arg not in ("self", "cls")]
    documented = 0
    for argument in arguments:
        end = argument.end_lineno
        here = lines[end - 1]
        below = lines[end].strip() if end < len(lines) else ""
        documented += "#" in here or below.startswith("#")
    return len(arguments), documented


def count_package(sources):
    "The counts of dera/ by name."
    widths, statements, packed, nodes, private = [], 0, 0, 0, []
    definitions = documented = parameters = explained = 0
    graph = {}
    for name, source in sources.items():
        tree = ast.parse(source)
        own = code_lines(source)
        widths += [len(line) for line in own]
        statements += len(crowded_lines(tree))
        packed += packed_assignments(tree)
        nodes += sum(not isinstance(node, ast.expr_context) for node in ast.walk(tree))
        graph[name] = set()
        for module, names in imported_modules(name, tree, sources):
            graph[name].add(module)
            private += [f"{name}: {module}.{n}" for n in names if n.startswith("_")]
        lines = source.splitlines()
        for node in public_definitions(tree):
            definitions += 1
            documented += ast.get_docstring(node) is not None
            if not isinstance(node, ast.ClassDef):
                total, told = documented_parameters(node, lines)
                parameters += total
                explained += told
    widths.sort()
    num_lines = len(widths)
    circle = largest_circle(graph)
    return {
        "lines": num_lines,
        "modules": len(sources),
        "line width, 90th percentile": widths[int(0.9 * num_lines)],
        "line width, 99th percentile": widths[int(0.99 * num_lines)],
        "lines over 100 characters (%)": 100 * sum(w > 100 for w in widths) / num_lines,
        "lines over 120 characters": sum(w > 120 for w in widths),
        "lines with two statements": statements,
        "packed assignments of three or more, per 1,000 lines": 1000 * packed / num_lines,
        "syntax nodes a line": nodes / num_lines,
        "largest import circle (modules)": max(1, len(circle)),
        "private names imported across modules": len(private),
        "public definitions documented (%)": 100 * documented / max(1, definitions),
        "public parameters documented (%)": 100 * explained / max(1, parameters),
    }, dict(circle=circle, private=private)


# ---- the lessons


def names_of(source):
    "Names that a cell uses."
    source = re.sub(r"^([ \t]*)[%!].*$", r"\1pass", source, flags=re.M)
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            found.add(node.id)
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
    return found


def count_lesson(path):
    "Words, cells, new names, exercises and solutions of one lesson."
    words = characters = 0
    lengths, new_names, known = [], [], set()
    exercises = 0
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "markdown":
            words += len(re.findall(r"[A-Za-z][\w'-]*", cell.source))
            if re.search(r"^## Exercises", cell.source, re.M):
                tail = cell.source.split("## Exercises")[1]
                exercises += len(re.findall(r"^(?:\d+\.|- |\* )", tail, re.M))
        elif cell.cell_type == "code":
            lines = [x for x in cell.source.splitlines() if x.strip() and not x.startswith("#|")]
            if not lines:
                continue
            characters += sum(len(x.strip()) for x in lines)
            lengths.append(len(lines))
            used = names_of(cell.source)
            new_names.append(len(used - known))
            known |= used
    solution = path.parent / "solutions" / path.name
    solved = 0
    if solution.exists():
        text = "\n".join(c.source for c in nbformat.read(solution, 4).cells if "source" in c)
        solved = len(re.findall(r"^## ", text, re.M))
    new_names.sort()
    return dict(
        words=words,
        characters=characters,
        lengths=lengths,
        words_per_1000=round(1000 * words / max(1, characters)),
        median_cell=statistics.median(lengths) if lengths else 0,
        new_names_90=new_names[int(0.9 * len(new_names))] if new_names else 0,
        exercises=exercises,
        solutions=solved,
    )


def count_lessons(root=ROOT):
    "{lesson: counts} of the numbered notebooks, and over 00 to 14 together."
    lessons = {p.stem: count_lesson(p) for p in sorted((root / "nbs").glob("[0-9][0-9]_*.ipynb"))}
    walked = [c for name, c in lessons.items() if int(name[:2]) <= 14]
    characters = sum(c["characters"] for c in walked)
    together = dict(
        words_per_1000=round(1000 * sum(c["words"] for c in walked) / max(1, characters)),
        median_cell=statistics.median([n for c in walked for n in c["lengths"]]),
    )
    return lessons, together


# ---- said


def complaints(counts):
    "Which counts of the package are worse than their limits."
    worse = [f"{k} is {counts[k]:.4g}, over {v}" for k, v in LIMITS.items() if counts[k] > v]
    worse += [f"{k} is {counts[k]:.4g}, under {v}" for k, v in AT_LEAST.items() if counts[k] < v]
    return worse


def report(root=ROOT):
    counts, found = count_package(modules(root))
    lessons, together = count_lessons(root)
    lines = [f"{name:55} {value:8.4g}" for name, value in counts.items()]
    if found["circle"]:
        lines.append("circle: " + " ".join(sorted(found["circle"])))
    lines += [f"private: {name}" for name in found["private"]]
    head = "words/1,000", "median cell", "new names 90th", "exercises", "solutions"
    keys = "words_per_1000", "median_cell", "new_names_90", "exercises", "solutions"
    lines += ["", f"{'lesson':26}" + "".join(f"{h:>16}" for h in head)]
    for name, c in lessons.items():
        lines.append(f"{name:26}" + "".join(f"{c[k]:16}" for k in keys))
    lines.append(
        f"{'00 to 14 together':26}{together['words_per_1000']:16}{together['median_cell']:16}"
        f"     (aims: at least {WORDS}, at most {CELL})"
    )
    lines += ["", *(complaints(counts) or ["every count of the package is within its limit"])]
    return "\n".join(lines)


if __name__ == "__main__":
    if "--json" in sys.argv:
        lessons, together = count_lessons()
        for lesson in lessons.values():
            lesson.pop("lengths")
        print(json.dumps([count_package(modules())[0], lessons, together], indent=1))
    else:
        print(report())
