"""Ctrl-C and SIGTERM: one line, no traceback, and the run goes on when started again."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from tests.models import make_model, perturbed, save, write_prompts


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_so_and_goes_on(tmp_path, stop) -> None:
    base = make_model("llama-tied")
    save(base, tmp_path / "base")
    save(perturbed(base), tmp_path / "expert")
    prompts = write_prompts(tmp_path / "p.jsonl", 5)
    out = tmp_path / "s.safetensors"
    command = [
        *(sys.executable, "-m", "mergekit_wp.cli", "score"),
        *(str(tmp_path / "base"), str(tmp_path / "expert"), "--prompts", str(prompts)),
        *("--batch-size", "1", "--estimand", "share,gain,knockout", "--out", str(out)),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    partial = tmp_path / "s.safetensors.partial"
    while len(list(partial.glob("*.safetensors"))) < 3 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(stop)
    _, stderr = process.communicate()
    assert process.returncode == 128 + stop
    assert "Traceback" not in stderr
    assert stderr.strip().splitlines()[-1].startswith("mergekit-wp: interrupted; ")
    assert not out.exists() and partial.exists()
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "continuing the run in" in again.stderr
    assert out.exists() and not partial.exists()
