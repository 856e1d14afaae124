"The small helpers: what a run says about where it ran."

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dera.runtime import run_folder
from dera.runtime.checkpoints import checkpoint_path, load_model
from dera.runtime.errors import InputError
from dera.runtime.run_folder import RunFolder, environment


def test_a_machine_without_git_can_begin_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment()["commit"] == "unknown"
    run = RunFolder(tmp_path / "run", dict(steps=1))
    assert json.loads((run.path / "environment.json").read_text())["commit"] == "unknown"


def test_the_commit_is_that_of_the_package_and_of_no_other_repository(tmp_path):
    def git(*words):
        return subprocess.run(
            ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=b", *words],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()

    git("init")
    git("commit", "--allow-empty", "-m", "theirs")
    theirs = git("rev-parse", "--short", "HEAD")
    installed = tmp_path / "venv" / "dera"
    installed.mkdir(parents=True)
    (tmp_path / "dera").mkdir()
    assert (
        run_folder._commit(installed) == "unknown"
        and run_folder._commit(tmp_path / "dera") == theirs
    )
    said = subprocess.run(
        [
            sys.executable,
            "-c",
            'from dera.utils import environment; print(environment()["commit"])',
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert said.stdout.strip() == environment()["commit"] != theirs, (
        said.stderr
    )  # wherever it is started


def test_load_model_refuses_in_one_line():
    from dera.metrics import FactorClassifier

    assert not load_model(FactorClassifier, checkpoint_path("pocket-classifier")).training
    for folder in "nowhere", checkpoint_path("pocket-generator-tiny"):
        with pytest.raises(InputError) as e:
            load_model(FactorClassifier, folder)
        assert Path(folder).name in str(e.value) and "\n" not in str(e.value)
