"The course as static pages: every page opens in a browser without a complaint, every link inside leads somewhere."

import os
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from browser import PICTURES, Browser, _complaint, find_browser


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    root = Path(__file__).resolve().parent.parent
    command = [Path(sys.executable).with_name("mkdocs"), "build", "-q", "--site-dir", folder]
    # the index for searching takes nearly half of the time, and no page opened as a file can fetch it
    env = os.environ | dict(SEARCH="false")
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=1500, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def pages(site):
    return sorted(p for p in site.rglob("*.html") if p.name != "404.html")


def test_every_link_inside_leads_somewhere(site):
    dead = []
    for page in pages(site):
        text = re.sub(r"<(script|pre|code)\b.*?</\1>", "", page.read_text("utf-8"), flags=re.S)
        for link in set(re.findall(r'(?:href|src)="([^"]+)"', text)):
            parts = urlsplit(unescape(link))
            if parts.scheme or parts.netloc or not parts.path:
                continue
            target = (page.parent / unquote(parts.path)).resolve()
            if not target.exists():
                dead.append(f"{page.relative_to(site)}: {link}")
    assert not dead, "\n".join(dead)


def test_formulas_are_drawn_and_not_raw(site):
    text = (site / "07_sacp_geometry.html").read_text("utf-8")
    assert "<math" in text
    prose = re.sub(r"<(script|pre|code|math)\b.*?</\1>", "", text, flags=re.S)
    assert not re.search(r"\$\\?[a-z]\w*_", re.sub(r"<[^>]+>", "", prose))


@pytest.mark.skipif(find_browser() is None, reason="no Chromium on this machine")
def test_every_page_opens_without_a_complaint(site):
    complaints = []
    with Browser(timeout=600) as browser:
        for page in pages(site):
            browser.events = []
            browser.open(page.as_uri(), 1200, 900)
            browser.listen(0.1)
            broken = [p["src"] for p in browser.evaluate(PICTURES) if p["done"] and not p["width"]]
            heard = [text for text in map(_complaint, browser.events) if text]
            # a page opened as a file may not fetch its search index; a server may
            heard = [text for text in heard if "search" not in text and "file://" not in text]
            outside = [
                e["params"]["request"]["url"]
                for e in browser.events
                if e.get("method") == "Network.requestWillBeSent"
                and not e["params"]["request"]["url"].startswith(("file:", "data:", "blob:"))
            ]
            name = page.relative_to(site).as_posix()
            complaints += [
                f"{name}: {kind} {found[:3]}"
                for kind, found in (
                    ("broken pictures", broken),
                    ("errors", heard),
                    ("asks outside", outside),
                )
                if found
            ]
            browser.session = None  # the next call is to the browser, not to the tab
            for info in browser.call("Target.getTargets")["targetInfos"]:
                if info["type"] == "page" and info.get("attached"):
                    browser.call("Target.closeTarget", targetId=info["targetId"])
    assert not complaints, "\n".join(complaints)
