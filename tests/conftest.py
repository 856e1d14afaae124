"What all tests share: no display, no downloads, and the `dera` command."

import os
import subprocess
import sys
from pathlib import Path

import pytest

for name, value in dict(
    MPLBACKEND="Agg", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false"
).items():
    os.environ.setdefault(name, value)
ROOT = Path(__file__).resolve().parent.parent
# the files that take longest, so that no process is left with one of them at the end
LONGEST = ("site", "train_tokenizer", "train_ar", "demo", "evaluate", "cli", "reading", "hygiene")


@pytest.fixture
def root():
    return ROOT


@pytest.fixture
def dera():
    "Run the command line as a user would: dera('demo', '--help') -> CompletedProcess with text output."

    def run(*args, cwd=None, timeout=600, env=None):
        return subprocess.run(
            [Path(sys.executable).with_name("dera"), *map(str, args)],
            cwd=cwd,
            timeout=timeout,
            text=True,
            capture_output=True,
            env={**os.environ, **(env or {})},
        )

    return run


def pytest_collection_modifyitems(items):
    "Longest files first; within a file the order stays."
    order = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_terminal_summary(terminalreporter):
    "How many tests did not run, where one looks first."
    skipped = len(terminalreporter.stats.get("skipped", []))
    terminalreporter.write_line(f"== {skipped} tests skipped")
