"""A web page to paint with, on this machine.

    python -m qk_jax.app
    python -m qk_jax.app --checkpoint W/stage3 --checkpoint OTHER/stage3

Open the address that it prints; /docs there describes the REST interface. Without --checkpoint it
paints with the model that is shipped. It is reached from this machine alone; with --host from
others too, and then only with a token.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import sys
from collections.abc import Sequence

from qk_jax.base import cli
from qk_jax.base.errors import InputError, exits

LEAST_TOKEN = 8  # characters


def parser() -> cli.Parser:
    """The command line."""
    out = cli.Parser(prog="python -m qk_jax.app", description=__doc__)
    add = out.add_argument
    add("--checkpoint", metavar="DIR", action="append", default=[],
        help="a trained stage, such as W/stage3, or an export; may be repeated")  # fmt: skip
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=int, default=7860, help="0 for any that is free (default: %(default)s)")
    add("--token", help="that every request needs (default: one is made where --host needs it)")
    add("--queue", type=int, default=16, metavar="N", help="jobs that may wait (default: 16)")
    add("--keep", type=int, default=2, metavar="N", help="models held in memory (default: 2)")
    add("--batch", type=int, default=1, metavar="N", help="pictures painted at once (default: 1)")
    return out


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises InputError where it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
        found.listen(128)  # who connects before the server runs waits for it
    except (OSError, OverflowError) as error:
        found.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"the app cannot listen on {host} port {port}: {reason}; choose another --port or "
            "another --host"
        ) from None
    return found


def address(host: str, port: int, token: str | None) -> str:
    """What to open in a browser."""
    name = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}.get(host, host)
    name = f"[{name}]" if ":" in name else name
    return f"http://{name}:{port}/" + (f"?token={token}" if token else "")


@exits
def main(argv: Sequence[str]) -> None:
    """The command; see the module's docstring."""
    args = parser().parse_args(argv)
    for name in ("queue", "keep", "batch"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} is {getattr(args, name)}; give at least 1")
    try:
        import uvicorn

        from qk_jax.app import guard, models, server
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn"):
            raise
        raise InputError(f"{error.name} is not installed; pip install 'qk_jax[app]'") from None
    from qk_jax.base import runtime

    token = args.token
    if token is None and not guard.is_local(args.host):
        token = secrets.token_urlsafe(18)
    if token is not None and len(token) < LEAST_TOKEN:
        raise InputError(f"--token has {len(token)} characters; give at least {LEAST_TOKEN}")
    listener = listen(args.host, args.port)
    runtime.start_logging()
    runtime.skip_absent_tpu()
    runtime.keep_programs()
    known = models.Models(args.checkpoint, batch=args.batch, keep=args.keep)
    port = listener.getsockname()[1]
    app = server.create_app(known, token=token, most_waiting=args.queue, port=port)
    print(address(args.host, port, token), flush=True)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, limit_concurrency=128,
        timeout_graceful_shutdown=2,
    )  # fmt: skip
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])


def run() -> None:
    """Entry point of the console script."""
    main(sys.argv[1:])


if __name__ == "__main__":
    run()
