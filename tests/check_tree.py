"""Does exporting, cleaning and rendering leave the tree as it is? Tried in a copy, so that nothing here is touched.
dera/ is written from nothing there: a module that no notebook exports is found too."""

import difflib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WRITTEN = "dera", "nbs", "README.md", "pyproject.toml"  # what the three steps may write
INPUTS = "settings.ini", "tests"
SKIP = "__pycache__", ".ipynb_checkpoints", ".last_checked"


def files(root):
    "Everything the steps may write, as {path from the root: bytes}."
    paths = [
        p
        for name in WRITTEN
        for p in ([root / name] if (root / name).is_file() else (root / name).rglob("*"))
    ]
    return {
        p.relative_to(root).as_posix(): p.read_bytes()
        for p in paths
        if p.is_file() and not set(p.parts) & set(SKIP)
    }


def copy(root, to):
    for name in WRITTEN + INPUTS:
        if (root / name).is_dir():
            shutil.copytree(root / name, to / name, ignore=shutil.ignore_patterns(*SKIP))
        elif (root / name).exists():
            shutil.copy(root / name, to / name)


def difference(name, old, new, most=60):
    "A short unified diff of two versions of a file."
    if new is None:
        return f"{name}: no notebook writes it; delete it, or export it from a notebook\n"
    if old is None:
        return f"{name}: missing; the notebooks write it\n"
    try:
        old, new = (x.decode().splitlines() for x in (old, new))
    except UnicodeDecodeError:
        return f"{name}: the content differs\n"
    lines = [
        l[:160]
        for l in difflib.unified_diff(
            old, new, f"{name} (tree)", f"{name} (exported, cleaned, rendered)", lineterm="", n=1
        )
    ]
    return (
        "\n".join(lines[:most] + [f"... {len(lines) - most} more lines"] * (len(lines) > most))
        + "\n"
    )


def write(root):
    "What `make export` does; the error's text if a step fails."
    for step in ["nbdev_export"], ["nbdev_clean"], ["python", "tests/render_readme.py"]:
        done = subprocess.run(
            [Path(sys.executable).with_name(step[0]), *step[1:]],
            cwd=root,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            return f"{step[-1]} failed:\n{done.stdout}{done.stderr}"
    return None


def check(root):
    "Differences as one text; empty if there are none."
    with tempfile.TemporaryDirectory() as d:
        there = Path(d) / "tree"
        there.mkdir()
        copy(root, there)
        shutil.rmtree(there / "dera", ignore_errors=True)
        (there / "dera").mkdir()
        failed = write(there)
        if failed:
            return failed
        before, after = files(root), files(there)
    return "".join(
        difference(name, before.get(name), after.get(name))
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    )


if __name__ == "__main__":
    found = check(ROOT)
    if found:
        sys.exit(
            found
            + "\nThe tree is not what its notebooks say. Run `make export`, look at the changes, commit them."
        )
    print("export, clean and README leave the tree unchanged")
