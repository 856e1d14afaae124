"The package as settings.ini describes it; the shipped checkpoints travel inside the wheel as dera/checkpoints."

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]


def lines(key):
    "The lines of a setting that are not empty."
    return [line for line in cfg[key].splitlines() if line.strip()]


def read(name):
    "A file's text; empty where it is missing."
    path = here / name
    return path.read_text(encoding="utf-8") if path.exists() else ""


def for_the_index(text, repository, version):
    """The README as the package index shows it: links to files of the repository are absolute.

    Where settings.ini names no `git_url`, a link keeps its words alone, and a picture is left out."""

    def absolute(match):
        mark, words, target = match.groups()
        if re.match(r"https?:|#|mailto:", target):
            return match[0]
        if not repository:
            return "" if mark else words
        kind = "raw" if mark else "blob"
        return f"{mark}[{words}]({repository.rstrip('/')}/{kind}/{version}/{target})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", absolute, text)


shipped = [
    p.relative_to(here / "data")
    for p in sorted((here / "data" / "checkpoints").glob("**"))
    if p.is_dir()
]
folders = {".".join(("dera", *p.parts)): f"data/{p.as_posix()}" for p in shipped}

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    keywords=cfg["keywords"].split(),
    long_description=for_the_index(read("README.md"), cfg["git_url"], f"v{cfg['version']}"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="Apache-2.0",
    python_requires=f">={cfg['min_python']}",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
    ],
    install_requires=lines("requirements"),
    extras_require=dict(
        dev=lines("dev_requirements"),
        play=lines("play_requirements"),
        tensorboard=["tensorboard"],
        wandb=["wandb"],
    ),
    entry_points=dict(console_scripts=lines("console_scripts")),
    packages=[*find_packages(include=["dera", "dera.*"]), *folders],
    package_dir={"dera": "dera", **folders},
    package_data={name: ["*"] for name in folders},
    zip_safe=False,
)
