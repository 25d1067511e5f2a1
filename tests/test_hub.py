"""The Hub: asked once, for a few seconds at the most, and not at all where it is switched off."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import huggingface_hub
import pytest

from depthprune import hub


class Refusing(BaseHTTPRequestHandler):
    """Says no to everybody, and counts them."""

    asked = 0

    def do_HEAD(self) -> None:
        type(self).asked += 1
        self.send_error(403)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    hub.answers.cache_clear()
    Refusing.asked = 0
    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
    hub.answers.cache_clear()


def test_a_refusal_is_an_answer_and_it_is_asked_once(address: str) -> None:
    assert hub.answers(address) and hub.answers(address)
    assert Refusing.asked == 1


def test_nobody_there() -> None:
    assert not hub.answers("http://127.0.0.1:9")
    assert not hub.answers("http://no-such-host.invalid")


def test_why_it_cannot_be_asked(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: True)
    assert hub.away() == "HF_HUB_OFFLINE is set" and Refusing.asked == 0
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    assert hub.away() == "" and Refusing.asked == 1
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert hub.away() == "http://127.0.0.1:9 cannot be reached"
