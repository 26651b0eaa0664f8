"""The app as it runs: a server on a port of its own, over nano models."""

from __future__ import annotations

import base64
import contextlib
import io
import threading
import time
from collections.abc import Iterator

import numpy as np
import painters
from PIL import Image

from tests import needs

FAST = {"steps": 2}
LONG = {"settings": {"steps": 1000}, "num": 16}  # minutes: it is cancelled
WAITING = 8


def folders(tmp_path_factory):
    """Two checkpoints, which paint differently; the first with a moving average."""
    one = painters.save(tmp_path_factory.mktemp("one"), average=True)
    return [str(one), str(painters.save(tmp_path_factory.mktemp("other"), scale=0.7))]


@contextlib.contextmanager
def serve(paths, token=None) -> Iterator[str]:
    """The address of a server that runs within the block."""
    uvicorn = needs.module("uvicorn")
    needs.module("fastapi")
    from qk_jax.app import __main__ as main
    from qk_jax.app import models, server

    listener = main.listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    app = server.create_app(models.Models(paths), token=token, most_waiting=WAITING, port=port)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not running.started:
            assert thread.is_alive()
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        running.should_exit = True
        thread.join()


def png(pixels) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def upload(data, name="hat.png"):
    """A picture as a form has it."""
    data = png(data) if isinstance(data, np.ndarray) else data
    return {"name": name, "data": base64.b64encode(data).decode()}
