"""A stage on a TPU slice, from an empty project to the finished checkpoint.

    bash launch/pod.sh VERB SETTINGS.toml [--dry-run]

check    asks whether project, quota, zone, runtime, bucket and config will do; makes nothing
create   makes the slice and waits for it
start    installs this checkout and starts the trainer, which resumes where it stopped
logs     follows the logs of all hosts
status   the state of slice, hosts and checkpoints
stop     ends the trainer, which saves; keeps the slice
delete   deletes the slice and makes sure that it is gone
up       check, create, start, start again after preemptions, delete at the end

--dry-run prints every command instead. The settings are explained in docs/pods.md.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence

from pods import settings as settings_lib
from pods.gke import Gke
from pods.shell import Shell
from pods.tpu_vm import TpuVm

from qk_jax.base import cli
from qk_jax.base.errors import InputError, exits

ROUTES = {"tpu_vm": TpuVm, "gke": Gke}
VERBS = ("check", "create", "start", "logs", "status", "stop", "delete", "up")


@exits
def main(argv: Sequence[str]) -> None:
    """The command; see the module's docstring."""
    options = cli.Parser(prog="bash launch/pod.sh", description=__doc__)
    options.add_argument("verb", choices=VERBS)
    options.add_argument("settings", type=pathlib.Path)
    options.add_argument("--dry-run", action="store_true", help="print the commands")
    options.add_argument("--keep", action="store_true", help="up: do not delete at the end")
    args = options.parse_args(argv)
    settings = settings_lib.read(args.settings)
    route = ROUTES[settings.route](settings, Shell(args.dry_run))
    try:
        if args.verb == "up":
            route.up(args.keep)
        elif args.verb == "create":
            route.check()
            route.create()
        elif args.verb == "start":
            if route.is_running():
                raise InputError(f"{settings.name} trains already; stop ends it")
            route.forget_starts()
            route.start()
        else:
            getattr(route, args.verb)()
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main(sys.argv[1:])
