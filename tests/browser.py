"""Draws with the page of app.py in a real browser, headless, and looks at what comes.

    pip install playwright && apt-get install chromium          # or any Chromium, its path in the variable CHROMIUM
    python tests/browser.py runs/demo --screenshot docs/app.png

It ends with exit code 0 if all was as it should be. tests/test_app.py runs it where there are a browser and playwright.
"""

import argparse
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
WAIT = 60_000  # milliseconds, for what takes less than a second on a machine that does nothing else


def chromium():
    """The path of a browser, or None."""
    return os.environ.get("CHROMIUM") or shutil.which("chromium")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Screen:
    """The page as a person uses it."""

    def __init__(self, page: Page):
        self.page = page

    def choose_classes(self, count):
        """The last `count` of the list, by typing their names; gives the names."""
        box = self.page.locator("#classes input")
        self.page.locator("#classes .remove-all").click()
        box.click()
        names = [text.strip().lstrip("✓").strip() for text in self.page.locator("[role=option]").all_inner_texts()][
            -count:
        ]
        for name in names:
            box.fill(name)
            self.page.get_by_role("option", name=name, exact=True).click()
        self.page.keyboard.press("Escape")
        expect(self.page.locator("#classes .token")).to_have_count(count)
        return names

    def fill(self, **fields):
        for name, value in fields.items():
            self.page.locator(f"#{name} input").fill(str(value))
            self.page.locator(f"#{name} input").blur()

    def draw(self, **fields):
        """Click Draw, with another seed than before; gives the images as bytes, their captions, the record, the command."""
        self.fill(**fields)
        self.page.locator("#draw").click()
        command = self.page.locator("#command textarea")
        expect(command).to_have_value(re.compile(rf"--seed {fields['seed']} "), timeout=WAIT)
        expect(self.page.locator("#gallery img")).to_have_count(int(self.page.locator("#num input").input_value()))
        images = self.page.locator("#gallery img").all()
        content = [self.page.request.get(image.get_attribute("src")).body() for image in images]
        captions = [image.get_attribute("alt") for image in images]
        self.page.locator("#record button[aria-label*=Copy], #record button[title*=opy]").first.click()
        record = json.loads(self.page.evaluate("navigator.clipboard.readText()"))
        return content, captions, record, command.input_value()

    def mistake(self, **fields):
        """What the page says of fields that cannot be."""
        before = {name: self.page.locator(f"#{name} input").input_value() for name in fields}
        self.fill(**fields)
        self.page.locator("#draw").click()
        toast = self.page.locator(".toast-body")
        toast.wait_for(timeout=WAIT)
        text = toast.inner_text()
        assert "Traceback" not in self.page.content()
        self.page.locator(".toast-close").click()
        toast.wait_for(state="detached")
        self.fill(**before)
        return text


@contextlib.contextmanager
def running(command, **options):
    """A program that ends with the block, if not before."""
    program = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, **options)
    try:
        yield program
    finally:
        program.terminate()
        program.communicate(timeout=20)


def same_pixels(folder, images):
    """Whether the PNG files of a folder are the images of the page."""
    drawn = [np.asarray(Image.open(f)) for f in sorted(folder.glob("*.png"))]
    shown = [np.asarray(Image.open(io.BytesIO(content)).convert("RGB")) for content in images]
    return len(drawn) == len(shown) and all((a == b).all() for a, b in zip(drawn, shown, strict=True))


def use(screen: Screen, content):
    """Draw again, make mistakes, and watch the bar."""
    other, *_ = screen.draw(seed=4)
    assert not set(other) & set(content)
    again, *_ = screen.draw(seed=3)
    assert again == content

    assert "seed is -1; choose at least 0, below" in screen.mistake(seed=-1)
    assert "images is 0; choose 1 to" in screen.mistake(num=0)

    screen.fill(num=1, seed=5, steps=400)
    screen.page.locator("#draw").click()
    screen.page.locator("#gallery .progress-bar").wait_for(timeout=WAIT)
    expect(screen.page.locator("#gallery img")).to_have_count(1, timeout=WAIT)


def look(page: Page, address, screenshot, folder: Path | None):
    """Everything that is to be seen, in one visit; with a folder, the command that the page shows draws into it."""
    strangers, complaints = [], []
    page.on(
        "request", lambda r: strangers.append(r.url) if urlsplit(r.url).hostname not in ("127.0.0.1", None) else None
    )
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(address)
    screen = Screen(page)

    names = screen.choose_classes(2)
    content, captions, record, command = screen.draw(num=5, seed=3, steps=6, cfg=1.5)
    first, second = (name.split(" (")[0] for name in names)
    assert captions == [first, second, first, second, first]
    assert record["seed"] == 3
    assert record["cfg_scale"] == 1.5
    assert record["sampler"]["num_steps"] == 6 + (record["sampler"]["name"] == "ode")  # which counts points of time
    euler = (record["sampler"]["name"], record["sampler"].get("method")) == ("ode", "euler")
    assert record["nfe"] == 12 if euler else record["nfe"] > 5, record["nfe"]  # guided
    assert len(record["labels"]) == 5
    assert len(set(content)) == 5
    use(screen, content)
    if folder:
        _, script, *options, _ = shlex.split(command)
        with running([script, *options, str(folder)], stderr=subprocess.DEVNULL) as same:
            assert same.wait(WAIT / 1000) == 0, command
        assert same_pixels(folder, content), command

    page.reload()
    page.locator("#draw").wait_for()
    screen.draw(num=32, seed=0)
    cut = page.evaluate(
        "[...document.querySelectorAll('#gallery .caption-label')].filter(e => e.scrollWidth > e.clientWidth)"
    )
    assert not cut, f"{len(cut)} names of classes are cut"
    width = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert width[0] == width[1], f"the page is {width[0]} wide in a window of {width[1]}"
    if screenshot:
        page.mouse.move(0, 0)
        page.screenshot(path=screenshot)
    assert not strangers, strangers
    assert not complaints, complaints


def main():
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--screenshot", help="where to put a picture of the page")
    parser.add_argument("--quick", action="store_true", help="without the command that the page shows")
    args = parser.parse_args()
    port = free_port()
    with contextlib.ExitStack() as stack:
        app = stack.enter_context(running(["app.py", args.checkpoint, "--device", "cpu", "--port", str(port)]))
        playwright = stack.enter_context(sync_playwright())
        browser = stack.enter_context(playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"]))
        page = browser.new_page(
            viewport={"width": 1280, "height": 900}, permissions=["clipboard-read", "clipboard-write"]
        )
        address = next((line.split()[1] for line in app.stdout if line.startswith("open ")), None)
        assert address, f"the app ended with exit code {app.wait()}"
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        look(page, address, args.screenshot, None if args.quick else folder / "images")
    print("the page does what it should")


if __name__ == "__main__":
    main()
