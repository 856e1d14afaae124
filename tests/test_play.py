"The playground's functions, and its page driven in a headless browser, tab by tab."

import importlib.util
import socket
import subprocess
import sys
import time

import pytest
import torch
from browser import Browser, find_browser

from dera.runtime.errors import InputError
from dera.tools import play


@pytest.fixture(scope="module")
def studio():
    return play.open_studio()


def test_an_edit_changes_one_code(studio):
    config = studio.tokenizer.config
    indices = studio.tokenizer.encode(studio.clip(5)).indices[0]
    same = play.edit_token(
        studio, seed=5, token=3, slot=0, code=int(indices[3 * config.codes_per_token])
    )
    other = play.edit_token(studio, seed=5, token=3, slot=0, code=0)
    before, after = play.token_tiles(indices, config, 3), same[1]
    assert before.tobytes() == after.tobytes()  # the code that was there
    assert other[0] != same[0]


def test_tiles_are_found_where_they_are_drawn(studio):
    config = studio.tokenizer.config
    for token in (0, config.num_appearance, config.num_tokens - 1):
        x = token % play.COLUMNS * play.TILE + play.TILE / 2
        y = token // play.COLUMNS * play.TILE + play.TILE / 2
        assert play.token_at(x, y, config) == token
    assert play.token_at(10**6, 10**6, config) == config.num_tokens - 1


def test_the_last_stage_is_the_whole_clip(studio):
    *_, (html, _) = play.generate_clip(studio, label=4, seed=9, num_stages=2)
    indices = studio.generator.generate(labels=torch.tensor([4]), guidance=2.0, seed=9)
    clip = studio.tokenizer.decode(indices).clamp(0, 1)
    assert html == play.picture(clip, html.split('alt="')[1].split('"')[0])


def test_a_pair_that_does_not_belong_together_is_refused(tmp_path):
    from dera.ar import Generator, GeneratorConfig

    Generator(GeneratorConfig(num_tokens=8, dim=16, depth=1, heads=2)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="8 codes a clip"):
        play.open_studio(generator=str(tmp_path))


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_until(browser, expression, seconds=40):
    "Poll the page; the text says what was waited for."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if browser.evaluate(expression):
            return
        browser.listen(0.2)
    raise AssertionError(f"the page never came to: {expression}")


def open_tab(browser, name):
    browser.evaluate(
        f"[...document.querySelectorAll('button[role=tab]')].find(b => b.textContent.trim() == '{name}').click()"
    )


@pytest.mark.skipif(find_browser() is None, reason="no Chromium on this machine")
@pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="the extra `play` is not installed"
)
def test_every_tab_works_in_a_browser():
    port = free_port()
    start = f"from dera.tools.play import play; play(port={port})"
    server = subprocess.Popen(
        [sys.executable, "-c", start], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        for _ in range(300):
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, server.stderr.read().decode()
            time.sleep(0.2)
        with Browser(timeout=180) as browser:
            browser.open(f"http://127.0.0.1:{port}/", 1200, 900)
            wait_until(browser, "document.querySelector('#do-reconstruct') != null")
            for tab, job in (
                ("reconstruct", "reconstruct"),
                ("swap", "swap"),
                ("generate", "generate"),
            ):
                open_tab(browser, tab)
                wait_until(browser, f"document.querySelector('#do-{job}') != null")
                browser.evaluate(f"document.querySelector('#do-{job}').click()")
                wait_until(browser, f"document.querySelector('#out-{job} img')?.naturalWidth > 0")

            open_tab(browser, "edit")
            wait_until(browser, "document.querySelector('#edit-tiles img')?.naturalWidth > 0")
            box = browser.evaluate(
                "(() => { const r = document.querySelector('#edit-tiles img').getBoundingClientRect();"
                "return [r.left, r.top, r.width, r.height] })()"
            )
            x, y = box[0] + box[2] * 2.5 / play.COLUMNS, box[1] + box[3] / 8
            for kind in "mousePressed", "mouseReleased":
                browser.call(
                    "Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1
                )
            wait_until(
                browser, "document.querySelector('#edit-token input[type=number]').value == '2'"
            )
            browser.evaluate("document.querySelector('#do-edit').click()")
            wait_until(browser, "document.querySelector('#out-edit img')?.naturalWidth > 0")
            assert "token 2" in browser.evaluate("document.querySelector('#out-edit').textContent")

            open_tab(browser, "SACP")
            wait_until(
                browser,
                "document.querySelector('#out-sacp')?.textContent.includes('conflict: each')",
            )
            browser.evaluate(
                "(() => { const box = document.querySelector('#angle-m input[type=number]');"
                "const set = Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set;"
                "set.call(box, 60); box.dispatchEvent(new Event('input', {bubbles: true}));"
                "box.dispatchEvent(new Event('change', {bubbles: true})); box.blur() })()"
            )
            wait_until(
                browser, "document.querySelector('#out-sacp').textContent.includes('no conflict')"
            )
            asked = [
                e["params"]["request"]["url"]
                for e in browser.events
                if e.get("method") == "Network.requestWillBeSent"
            ]
            outside = [
                url
                for url in asked
                if not url.startswith((f"http://127.0.0.1:{port}", "data:", "blob:"))
            ]
            assert not outside, outside
    finally:
        server.terminate()
        server.wait(20)
