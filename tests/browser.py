"""Open a page in headless Chromium and say what went wrong on it. Needs nothing but the browser: the DevTools
protocol runs over two pipes. `python tests/browser.py PAGE` prints the findings and exits 1 if there are any."""

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
]
PICTURES = """[...document.images].map(i => ({
    src: i.src.slice(0, 80), alt: i.alt, done: i.complete, width: i.naturalWidth
}))"""


def find_browser():
    "Path of a Chromium or Chrome, or None."
    return next(
        filter(
            None,
            map(
                shutil.which,
                ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"),
            ),
        ),
        None,
    )


class Browser:
    "A headless browser spoken to over pipes: call(method, **params), and the events heard meanwhile."

    def __init__(self, timeout=60):
        self.deadline, self.events, self.count, self.rest, self.session = (
            time.monotonic() + timeout,
            [],
            0,
            b"",
            None,
        )
        self.profile = tempfile.mkdtemp(prefix="browser-")
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        shell = (
            f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'  # the browser reads from 3 and writes to 4
        )
        self.process = subprocess.Popen(
            [
                "bash",
                "-c",
                shell,
                "browser",
                find_browser(),
                *FLAGS,
                f"--user-data-dir={self.profile}",
                "about:blank",
            ],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.reader, self.writer = ours_in, ours_out

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self.writer)
        os.close(self.reader)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self.profile, ignore_errors=True)

    def receive(self, wait):
        "The next message, or None when none comes in `wait` seconds."
        while b"\0" not in self.rest:
            if not select.select([self.reader], [], [], max(0, wait))[0]:
                return None
            chunk = os.read(self.reader, 1 << 20)
            if not chunk:
                raise RuntimeError("the browser ended")
            self.rest += chunk
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def call(self, method, **params):
        self.count += 1
        message = dict(id=self.count, method=method, params=params) | (
            {"sessionId": self.session} if self.session else {}
        )
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.writer, data) :]
        while True:
            answer = self.receive(self.deadline - time.monotonic())
            if answer is None:
                raise TimeoutError(f"the browser did not answer {method} in time")
            if answer.get("id") == self.count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self.events.append(answer)

    def listen(self, seconds):
        "Collect events for a while."
        end = time.monotonic() + seconds
        while (event := self.receive(end - time.monotonic())) is not None:
            self.events.append(event)

    def evaluate(self, expression):
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)[
            "result"
        ].get("value")

    def open(self, url, width, height, dark=False):
        "A new tab on the address, events on, waiting until the document is loaded."
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in "Page", "Runtime", "Log", "Network":
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        self.call(
            "Emulation.setEmulatedMedia",
            features=[dict(name="prefers-color-scheme", value="dark" if dark else "light")],
        )
        self.call("Page.navigate", url=url)
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            if time.monotonic() > self.deadline:
                raise TimeoutError(f"{url} did not load in time")
            self.listen(0.1)


def _complaint(event):
    "An error text, or None for an event that is no error."
    kind, p = event.get("method"), event.get("params", {})
    if kind == "Runtime.exceptionThrown":
        d = p["exceptionDetails"]
        return d.get("exception", {}).get("description") or d["text"]
    if kind == "Runtime.consoleAPICalled" and p["type"] in ("error", "assert"):
        return " ".join(str(a.get("value", a.get("description", ""))) for a in p["args"])
    if kind == "Log.entryAdded" and p["entry"]["level"] == "error":
        return f"{p['entry']['text']} {p['entry'].get('url', '')[:120]}".strip()
    return None


def check_page(path, timeout=60, width=1280, height=900, dark=False, screenshot=None):
    """Open a file or address, wait for every picture, listen for errors.

    Returns dict(images: how many, broken: their src,
    errors: console errors and uncaught exceptions, outside: addresses asked for outside the page's folder,
    overflow: pixels by which the page is wider than the window). `screenshot` writes the whole page as a PNG."""
    url = (
        path
        if str(path).startswith(("http:", "https:", "file:", "data:"))
        else Path(path).resolve(strict=True).as_uri()
    )
    with Browser(timeout) as browser:
        browser.open(url, width, height, dark)
        pictures = None
        while True:  # pictures may be lazy, and scripts may add or change some after the load event
            before, pictures = pictures, browser.evaluate(PICTURES)
            settled = pictures == before and all(picture["done"] for picture in pictures)
            if settled or time.monotonic() > browser.deadline - 5:
                break
            browser.listen(0.5)  # also for errors that come late
        overflow = browser.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        if screenshot:
            tall = browser.evaluate("document.documentElement.scrollHeight")
            shot = browser.call(
                "Page.captureScreenshot",
                captureBeyondViewport=True,
                clip=dict(x=0, y=0, width=width, height=tall, scale=1),
            )
            Path(screenshot).write_bytes(base64.b64decode(shot["data"]))

        def heard(method):
            return [e["params"] for e in browser.events if e.get("method") == method]

        refused = {
            p["requestId"]
            for p in heard("Network.loadingFailed")
            if p.get("blockedReason") == "csp"
        }  # by the page's own policy
        asked = [
            p["request"]["url"]
            for p in heard("Network.requestWillBeSent")
            if p["requestId"] not in refused
        ]
    home = url.rsplit("/", 1)[0]
    return dict(
        images=len(pictures),
        broken=[p["src"] for p in pictures if not (p["done"] and p["width"])],
        errors=list(dict.fromkeys(filter(None, map(_complaint, browser.events)))),
        outside=[a[:120] for a in asked if not a.startswith((home, "data:", "blob:"))],
        overflow=max(0, overflow),
    )


if __name__ == "__main__":
    found = check_page(sys.argv[1])
    print(json.dumps(found, indent=1))
    sys.exit(bool(found["broken"] or found["errors"] or found["outside"]))
