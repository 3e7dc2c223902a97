"""The page in a real browser, as wide as a phone."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from mergekit_wp.report.page import html
from tests.circuit import NEURON, write_world
from tests.test_trace import scored, traced

torch.set_num_threads(1)
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
PHONE = 390  # Chromium opens no narrower window than 500, so the page is held to it


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt install chromium")
def test_nothing_is_wider_than_a_phone(tmp_path: Path) -> None:
    root = write_world(tmp_path, NEURON)
    file = scored(root, "share", "gain", "activation_gain")
    page = html(file, traced(root, criterion="kl"))
    measure = (
        f"<style>html {{ width: {PHONE}px; }}</style><script>"
        "document.querySelectorAll('details').forEach(x => x.open = true);"
        "const wide = [...document.querySelectorAll('body *')].filter("
        f"x => x.getBoundingClientRect().right > {PHONE} && !x.closest('.scroll'));"
        "document.title = 'too wide: ' + wide.map(x => x.tagName).join()</script></body>"
    )
    (root / "page.html").write_text(page.replace("</body>", measure))
    assert BROWSER is not None
    done = subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--dump-dom", (root / "page.html").as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    title = re.search(r"<title>too wide: ([^<]*)</title>", done.stdout)
    assert title is not None, done.stderr
    assert title[1] == "", "only tables and code may scroll sideways"
