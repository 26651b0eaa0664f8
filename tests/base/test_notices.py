"""Notices of Google Cloud, from a metadata server on this machine."""

import http.server
import signal
import threading
import time

import pytest

from qk_jax.base import notices


@pytest.fixture
def server(monkeypatch):
    """Answers of a metadata server by key; it can be changed while it runs."""
    answers = {"preempted": "FALSE", "maintenance-event": "NONE"}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200)
            self.send_header("Metadata-Flavor", "Google")
            self.end_headers()
            key = self.path.removeprefix("/computeMetadata/v1/instance/")
            self.wfile.write(answers[key].encode())

        def log_message(self, *args):
            pass

    serving = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{serving.server_port}")
    monkeypatch.setattr(notices, "POLL_S", 0.05)
    yield answers
    serving.shutdown()


@pytest.fixture
def told(monkeypatch):
    """Signals that this process got."""
    found = []
    old = signal.signal(signal.SIGTERM, lambda number, frame: found.append(number))
    yield found
    signal.signal(signal.SIGTERM, old)


@pytest.mark.parametrize("key", list(notices.TAKEN))
def test_a_machine_that_is_taken_gets_sigterm_once(server, told, key, caplog):
    with notices.passed_on():
        time.sleep(0.3)
        assert not told
        server[key] = notices.TAKEN[key]
        end = time.monotonic() + 10
        while not told and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(0.3)
        assert told == [signal.SIGTERM]
    assert f"Google Cloud takes this machine ({key}: {notices.TAKEN[key]})" in caplog.text


def test_a_live_migration_is_none_and_what_comes_after_the_block_neither(server, told):
    with notices.passed_on():
        server["maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"
        time.sleep(0.3)
    server["preempted"] = "TRUE"
    time.sleep(0.3)
    assert not told


def test_elsewhere_nothing_is_asked_again(told, monkeypatch):
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:1")
    monkeypatch.setattr(notices, "POLL_S", 0.05)
    with notices.passed_on():
        time.sleep(0.5)
        assert not [x for x in threading.enumerate() if x.name == "notices"]
    assert not told
