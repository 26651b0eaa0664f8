"""What both routes share: from nothing to a finished stage, with nothing left to pay for."""

from __future__ import annotations

import abc

from pods import checks
from pods.settings import Settings
from pods.shell import ABSENT, CommandError, Shell
from qk_jax.base.errors import InputError

EVERY = 60  # seconds between two looks at a slice
SILENT = 10  # looks without an answer after which it is given up


class Failed(InputError):
    """The trainer ended in a way that starting it again would not mend."""


class Route(abc.ABC):
    """One way to a slice.

    Args:
      settings: of one run.
      shell: what its commands are run with.
    """

    def __init__(self, settings: Settings, shell: Shell):
        self.settings, self.shell = settings, shell

    @abc.abstractmethod
    def create(self) -> bool:
        """Makes what is not there, and says whether it made anything. When it fails, what it has
        made is deleted again."""

    @abc.abstractmethod
    def start(self) -> None:
        """Starts the trainer, which is not running."""

    @abc.abstractmethod
    def is_running(self) -> bool:
        """Whether the trainer was started and has not ended."""

    @abc.abstractmethod
    def watch(self) -> str:
        """Waits until the trainer has ended: 'done', 'restart' or, without its slice, 'lost'.

        Raises:
          Failed: it ended with an error.
        """

    @abc.abstractmethod
    def status(self) -> None:
        """Prints the state of slice, hosts and checkpoints."""

    @abc.abstractmethod
    def logs(self) -> None:
        """Follows the logs of all hosts until Ctrl-C."""

    @abc.abstractmethod
    def tail(self) -> None:
        """Prints the last lines of the logs."""

    @abc.abstractmethod
    def stop(self) -> None:
        """Ends the trainer, which saves; keeps the slice."""

    @abc.abstractmethod
    def delete(self) -> None:
        """Deletes all that is paid for by the hour, and makes sure that it is gone."""

    def check(self) -> None:
        """Finds what is missing before anything is made."""
        checks.check(self.settings, self.shell)

    def storage(self, *words: str) -> str:
        """What a command about objects prints; '' if there are none."""
        try:
            return self.shell.run("gcloud", "storage", *words)
        except CommandError as error:
            if "matched no objects" in error.text or ABSENT.search(error.text):
                return ""
            raise

    def newest(self) -> int:
        """The largest step of the checkpoints in the bucket; 0 without one."""
        out = self.storage("ls", f"{self.settings.checkpoints}/")
        steps = [line.rstrip("/").rpartition("/")[2] for line in out.split()]
        return max((int(step) for step in steps if step.isdigit()), default=0)

    def forget_starts(self) -> None:
        """A start by hand may be as fruitless as the ones before it."""
        self.storage("rm", self.settings.starts)

    def up(self, keep: bool = False) -> None:
        """All of it: check, create, start, start again where that helps, delete.

        Ctrl-C while it trains only ends the watching: the same command watches again. What was
        there before is left there when something fails that is not the trainer.

        Args:
          keep: leave the slice when the trainer has ended.
        """
        self.check()
        is_first, is_ours, outcome = True, False, ""
        try:
            while outcome != "done":
                is_ours |= self.create()
                if not self.is_running():
                    if is_first:
                        self.forget_starts()
                    self.start()
                is_first, is_ours = False, False  # from here on the training is worth more
                outcome = self.watch()
                if outcome != "done":
                    self.shell.say(f"{outcome}: goes on from step {self.newest()}")
                    self.stop() if outcome == "restart" else self.delete()
                    is_ours = True  # nothing trains on it
        except Failed:
            self.tail()
            if not keep:
                self.delete()
            raise
        except BaseException:
            if is_ours:
                self.delete()
            else:
                name = self.settings.name
                self.shell.say(f"{name} MAY GO ON AND BE PAID FOR: up watches it, delete ends it")
            raise
        self.shell.say(f"done: {self.settings.workdir}/{self.settings.stage}")
        if not keep:
            self.delete()
