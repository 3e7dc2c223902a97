"""A merge is pushed to the Hub, or one sentence says why not."""

from __future__ import annotations

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import HfApi

from mergekit_wp.card.push import push
from mergekit_wp.errors import UserError


class Hub:
    """Stands in for `huggingface_hub.HfApi`."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, repository: str, **options: Any) -> None:
        self.asked.append((repository, options))

    def upload_folder(self, **options: Any) -> None:
        self.asked.append(("upload", options))


@pytest.fixture
def merge(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors").write_bytes(b"")
    card = "---\nbase_model: [a/b, a/c]\nbase_model_relation: merge\nlicense: mit\n---\n# m\n"
    (tmp_path / "m" / "README.md").write_text(card)
    yield tmp_path / "m"


def test_push(merge: Path) -> None:
    hub = Hub()
    assert push(merge, "me/m", api=hub) == "https://huggingface.co/me/m"  # type: ignore[arg-type]
    (name, made), (_, sent) = hub.asked
    assert (name, made) == ("me/m", {"private": True, "exist_ok": True})
    assert (sent["repo_id"], sent["folder_path"]) == ("me/m", merge)


@pytest.mark.parametrize(
    ("was", "is_", "message"),
    [
        ("base_model: [a/b, a/c]\n", "", "has no 'base_model'; mend the front matter"),
        ("a/b", "/home/me/b", "base_model '/home/me/b' is no Hub id"),
        ("base_model_relation: merge\n", "", "does not say 'base_model_relation: merge'"),
        ("license: mit\n", "", "has no 'license'; mend the front matter"),
    ],
)
def test_push_checks_the_card_first(merge: Path, was: str, is_: str, message: str) -> None:
    readme, hub = merge / "README.md", Hub()
    readme.write_text(readme.read_text().replace(was, is_))
    with pytest.raises(UserError, match="README.md") as error:
        push(merge, "me/m", api=hub)  # type: ignore[arg-type]
    assert message in str(error.value) and not hub.asked


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "you are not logged in: log in with 'hf auth login', or set HF_TOKEN"),
        (403, "your token may not do this: make one that may write"),
    ],
)
def test_push_without_a_login_is_one_sentence(
    merge: Path, monkeypatch: pytest.MonkeyPatch, status: int, message: str
) -> None:
    """Against a Hub that stands in for the real one, on this machine."""

    class Refuses(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            api = HfApi(endpoint=f"http://127.0.0.1:{server.server_port}", token=False)
            with pytest.raises(UserError) as error:
                push(merge, "me/m", api=api)
        finally:
            server.shutdown()
            thread.join()
    assert str(error.value).startswith(f"me/m cannot be written: {message}")
    assert "\n" not in str(error.value)


def test_push_of_no_model_or_nowhere(merge: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="write owner/name"):
        push(merge, "m", api=Hub())  # type: ignore[arg-type]
    with pytest.raises(UserError, match="holds no model"):
        push(tmp_path, "me/m", api=Hub())  # type: ignore[arg-type]
