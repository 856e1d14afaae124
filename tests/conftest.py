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


def pytest_terminal_summary(terminalreporter):
    "How many tests did not run, where one looks first."
    skipped = len(terminalreporter.stats.get("skipped", []))
    terminalreporter.write_line(f"== {skipped} tests skipped")
