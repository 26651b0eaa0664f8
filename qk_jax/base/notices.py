"""Google Cloud's notices that it takes this machine away, passed on as SIGTERM.

A spot VM that is preempted gets a signal of its own from the operating system, but late, and a host
that is shut down for maintenance gets it later still. The metadata server of the machine knows
before: `instance/preempted` and `instance/maintenance-event`
(cloud.google.com/compute/docs/metadata). On GKE the node's agent reads them and ends the pod.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import urllib.request
from collections.abc import Iterator

log = logging.getLogger(__name__)
POLL_S, TIMEOUT_S = 5.0, 2.0
TAKEN = {"preempted": "TRUE", "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}
_FLAVOR = {"Metadata-Flavor": "Google"}


def _read(key: str) -> str | None:
    """What the metadata server says of this machine; None where there is none."""
    host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")  # as google-auth
    url = f"http://{host}/computeMetadata/v1/instance/{key}"
    with contextlib.suppress(OSError):
        request = urllib.request.Request(url, headers=_FLAVOR)
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            if answer.headers.get("Metadata-Flavor") == "Google":  # and no captive portal
                return answer.read(1000).decode(errors="replace").strip()
    return None


@contextlib.contextmanager
def passed_on() -> Iterator[None]:
    """Within the block, this process gets SIGTERM when its machine is about to be taken."""
    ended = threading.Event()

    def watch() -> None:
        if _read("preempted") is None:
            return  # not on Google Cloud
        while not ended.is_set():
            found = {key: _read(key) for key in TAKEN}
            if taken := [key for key, value in found.items() if value == TAKEN[key]]:
                log.warning("Google Cloud takes this machine (%s: %s)", taken[0], found[taken[0]])
                os.kill(os.getpid(), signal.SIGTERM)
                return
            ended.wait(POLL_S)

    threading.Thread(target=watch, daemon=True, name="notices").start()
    try:
        yield
    finally:
        ended.set()
