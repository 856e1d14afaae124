"The report opens in a real browser, pictures loaded, console silent; and the check can fail."

import math
import re
import subprocess
import sys

import browser
import pytest
import torch

from dera.pocket import render, sample_factors
from dera.runtime.errors import InputError
from dera.runtime.pictures import animation
from dera.tools import report
from dera.tools.report import (
    clip_grid,
    curves,
    note,
    page,
    picture,
    settings,
    swap_grid,
    table,
    tiles,
    write_report,
)

needs_browser = pytest.mark.skipif(
    browser.find_browser() is None,
    reason="no chromium or chrome on PATH; Debian: apt-get install chromium",
)
PNG = animation(torch.rand(1, 3, 2, 8, 8, generator=torch.Generator().manual_seed(0)))


def clips(n, seed=0):
    return render(sample_factors(n, seed), 8, 32)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "A report with everything in it, as the demo writes it."
    history = [
        dict(step=s, loss=math.exp(-s / 50), psnr=20 + s / 50 if s % 10 == 0 else None)
        for s in range(200)
    ]
    sections = [
        (
            "At a glance",
            [
                tiles(
                    [
                        ("24.5 dB", "reconstruction", "temporal mean 21.4 dB"),
                        (0.71, "of the codes in use", ""),
                    ]
                ),
                note("Made by `dera demo`."),
            ],
        ),
        (
            "Clips",
            clip_grid(
                clips(24),
                ["real", "reconstructed", "generated"],
                ["CircleStar"] * 8,
                "Side by side.",
                "three rows of eight clips",
            ),
        ),
        (
            "Swaps",
            swap_grid(
                clips(4, 1), clips(5, 2), clips(20, 3), list("ABCD"), list("VWXYZ"), "Swapped."
            ),
        ),
        (
            "Numbers",
            [
                table(
                    [dict(what="DeRA", psnr=24.5, ssim=0.91), dict(what="mean", psnr=21.4)],
                    "Held out",
                    "200 clips, seed 0",
                ),
                settings(dict(seed=0, model=dict(dim=128)), "Configuration"),
            ],
        ),
        (
            "Training",
            picture(
                curves(history, dict(loss="loss", psnr="PSNR, dB")),
                "Two curves.",
                "loss falls, PSNR rises",
            ),
        ),
    ]
    return write_report(
        tmp_path_factory.mktemp("run") / "demo" / "report.html", "Demo", sections, "What it is."
    )


# --- in the browser


@needs_browser
@pytest.mark.parametrize(
    "width,dark", [(1280, False), (1280, True), (390, False)], ids=["light", "dark", "telephone"]
)
def test_report_in_a_browser(built, width, dark):
    found = browser.check_page(built, width=width, dark=dark)
    assert found == dict(images=3, broken=[], errors=[], outside=[], overflow=0)


@needs_browser
def test_page_follows_the_bright_or_dark_screen(built):
    def colours(dark):
        with browser.Browser() as b:
            b.open(built.as_uri(), 800, 600, dark)
            return [
                b.evaluate(f"getComputedStyle(document.body).{k}")
                for k in ("backgroundColor", "color")
            ]

    def brightness(rgb):
        return sum(map(int, re.findall(r"\d+", rgb)[:3]))

    (page, ink), (dark_page, dark_ink) = colours(False), colours(True)
    assert (
        brightness(page) > 700
        and brightness(ink) < 150
        and brightness(dark_page) < 100
        and brightness(dark_ink) > 600
    )


@needs_browser
def test_screenshot_shows_the_whole_page(built, tmp_path):
    browser.check_page(built, screenshot=tmp_path / "page.png")
    data = (tmp_path / "page.png").read_bytes()
    assert (
        data[:4] == b"\x89PNG"
        and int.from_bytes(data[16:20], "big") == 1280
        and int.from_bytes(data[20:24], "big") > 1500
    )


# --- the check can fail


def broken_page(tmp_path, body, head=""):
    path = tmp_path / "page.html"
    path.write_text(
        f'<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,">{head}<body>{body}'
    )
    return path


def image(data):
    return f'<img alt="" src="data:image/png;base64,{report.base64.b64encode(data).decode()}">'


@needs_browser
def test_sound_page_is_sound(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    page = broken_page(
        tmp_path,
        image(PNG)
        + '<img src="a.png" alt=""><script>console.log("fine"); console.warn("fine")</script>',
    )
    assert browser.check_page(page) == dict(images=2, broken=[], errors=[], outside=[], overflow=0)


@needs_browser
@pytest.mark.parametrize(
    "source",
    ["data:image/png;base64,AAAA", "missing.png", image(PNG[:40]).split('"')[3], "text.png"],
    ids=["garbage", "missing", "truncated", "text"],
)
def test_broken_picture_is_found(tmp_path, source):
    (tmp_path / "text.png").write_text("no picture")
    found = browser.check_page(broken_page(tmp_path, image(PNG) + f'<img src="{source}" alt="">'))
    assert (
        found["images"] == 2
        and len(found["broken"]) == 1
        and (source != "missing.png" or found["errors"])
    )


@needs_browser
@pytest.mark.parametrize(
    "script,message",
    [
        ('console.error("it went wrong")', "it went wrong"),
        ('throw new Error("uncaught one")', "uncaught one"),
        ("setTimeout(() => nosuchname(), 50)", "nosuchname"),
        ('Promise.reject(new Error("rejected one"))', "rejected one"),
        ('console.assert(1 > 2, "asserted")', "asserted"),
    ],
    ids=["logged", "thrown", "late", "rejected", "asserted"],
)
def test_console_error_is_found(tmp_path, script, message):
    found = browser.check_page(broken_page(tmp_path, image(PNG) + f"<script>{script}</script>"))
    assert not found["broken"] and len(found["errors"]) == 1 and message in found["errors"][0]


@needs_browser
def test_picture_that_comes_late_is_waited_for(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    page = broken_page(
        tmp_path,
        '<img id="i" alt="" src="a.png"><script>setTimeout(() => i.src = "missing.png", 60)</script>',
    )
    assert len(browser.check_page(page)["broken"]) == 1


@needs_browser
def test_request_to_the_outside_is_found(tmp_path):
    found = browser.check_page(broken_page(tmp_path, '<img alt="" src="http://127.0.0.1:9/x.png">'))
    assert found["outside"] == ["http://127.0.0.1:9/x.png"] and found["broken"] and found["errors"]


@needs_browser
def test_page_wider_than_the_window_is_found(tmp_path):
    assert (
        browser.check_page(broken_page(tmp_path, '<div style="width:1500px">x</div>'))["overflow"]
        > 200
    )


@needs_browser
@pytest.mark.parametrize(
    "html",
    [
        '<script>document.title = "ran"</script>',
        '<img alt="" src="http://127.0.0.1:9/x.png">',
        '<img alt="" src="x.png">',
        '<p onclick="1">x</p><script src="x.js"></script>',
    ],
    ids=["script", "outside", "beside", "file"],
)
def test_report_itself_refuses_scripts_and_the_outside(tmp_path, html):
    found = browser.check_page(write_report(tmp_path / "r.html", "x", [("part", html)]))
    assert any("Content Security Policy" in e for e in found["errors"]) and not found["outside"]


@needs_browser
def test_check_as_a_command(tmp_path, built):
    def run(page):
        return subprocess.run(
            [sys.executable, browser.__file__, str(page)], capture_output=True, text=True
        )

    assert run(built).returncode == 0
    failed = run(broken_page(tmp_path, '<script>console.error("no")</script>'))
    assert failed.returncode == 1 and '"no"' in failed.stdout


@needs_browser
def test_check_leaves_nothing_behind(tmp_path, built, monkeypatch):
    monkeypatch.setattr(browser.tempfile, "tempdir", str(tmp_path))
    browser.check_page(built)
    assert not list(tmp_path.iterdir())


# --- without one


def test_page_is_self_contained_and_small(built):
    text = built.read_text()
    assert (
        len(text) < 5e6
        and not re.search(r'(src|href)="(?!data:|#)', text)
        and "url(" not in text
        and "<script" not in text
    )
    assert all(
        re.search('alt="[^"]+"', tag)
        for tag in re.findall('<img[^>]*?alt="[^"]*"|<img[^>]*>', text)
    )
    assert [p.name for p in built.parent.iterdir()] == ["report.html"]


def test_everything_from_data_is_escaped():
    evil = "<script>\"&'"
    html = page(
        evil,
        evil,
        [
            (
                evil,
                [
                    picture(PNG, evil, evil),
                    table([{evil: evil}], evil, evil),
                    tiles([(evil, evil, evil)]),
                    note(evil),
                    settings({evil: evil}, evil),
                    clip_grid(clips(1), [evil], [evil], evil, evil),
                ],
            )
        ],
    )
    assert "<script" not in html and html.count("&lt;script&gt;") >= 18 and 'alt="<' not in html


def test_curves_skip_what_a_line_lacks_and_take_any_number_of_panels():
    history = [dict(step=i, a=i) for i in range(3)] + [dict(step=9, b=1.0)]
    for keys in (["a"], ["a", "b"], ["a", "b", "a "]):
        if "a " in keys:
            with pytest.raises(InputError, match="no 'a '"):
                curves(history, keys)
        else:
            assert curves(history, keys)[:4] == b"\x89PNG"
    assert (
        curves([dict(k1=1.0, k2=2.0, k3=3.0, k4=4.0, k5=5.0)], [f"k{i}" for i in range(1, 6)])[:4]
        == b"\x89PNG"
    )


def test_curves_do_not_touch_pyplot():
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    curves([dict(a=1)], ["a"])
    assert plt.get_fignums() == before


def test_table_keeps_rows_apart_and_aligns_numbers():
    html = table(
        [dict(a="x", b=1.5, c="text"), dict(a="y", d=float("nan")), dict(a="z", b=float("inf"))],
        "t",
    )
    cells = [re.findall("<t[hd][^>]*>([^<]*)<", row) for row in re.findall("<tr>.*?</tr>", html)]
    assert cells == [
        ["a", "b", "c", "d"],
        ["x", "1.500", "text", "–"],
        ["y", "–", "–", "nan"],
        ["z", "∞", "–", "–"],
    ]
    assert '<td class="n">1.500' in html and "<td>text" in html


@pytest.mark.parametrize(
    "call",
    [
        lambda: curves([], ["a"]),
        lambda: curves([dict(a=1)], []),
        lambda: table([], "t"),
        lambda: picture(b"", "c", "a"),
        lambda: clip_grid(clips(3), ["a"], ["b"], "c", "d"),
        lambda: clip_grid(clips(2)[:0], [], [], "c", "d"),
        lambda: swap_grid(clips(2), clips(2), clips(3), list("ab"), list("cd"), "c"),
        lambda: swap_grid(clips(2), clips(2), clips(4), list("a"), list("cd"), "c"),
    ],
)
def test_mistakes_are_one_line(call):
    with pytest.raises(InputError) as e:
        call()
    assert "\n" not in str(e.value)


def test_unwritable_report(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write the report"):
        write_report(tmp_path / "file" / "r.html", "t", [])
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot write the report"):
        write_report(tmp_path / "folder", "t", [])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
