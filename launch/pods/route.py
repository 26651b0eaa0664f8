"""What both routes share: from nothing to a finished stage, with nothing left to pay for."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import TypeVar

from pods import checks
from pods.settings import Settings
from pods.shell import ABSENT, CommandError, Shell
from qk_jax.base.errors import InputError

EVERY = 60  # seconds between two looks at a slice
SILENT = 10  # looks without an answer after which it is given up


Answer = TypeVar("Answer")


class Failed(InputError):
    """The trainer ended in a way that starting it again would not mend; `who` is the host."""

    def __init__(self, message: str, who: str = ""):
        super().__init__(message)
        self.who = who


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
          InputError: somebody stopped or deleted it.
        """

    @abc.abstractmethod
    def status(self) -> None:
        """Prints the state of slice, hosts and checkpoints."""

    @abc.abstractmethod
    def logs(self) -> None:
        """Follows the logs of all hosts until Ctrl-C."""

    @abc.abstractmethod
    def tail(self, who: str) -> str:
        """The last lines of the log of a host."""

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

    def newest(self) -> str:
        """The newest checkpoint in the bucket, in words."""
        try:
            out = self.storage("ls", f"{self.settings.checkpoints}/")
        except CommandError:
            return "the newest checkpoint is not known"
        names = [line.rstrip("/").rpartition("/")[2] for line in out.split()]
        step = max((int(name) for name in names if name.isdigit()), default=0)
        return f"checkpoint {step}" if step else "no checkpoint yet"

    def patiently(self, ask: Callable[[], Answer]) -> Answer:
        """What `ask` returns. A cloud that does not answer is asked again for some minutes: the
        machine that asks may be offline, while what it asks for goes on."""
        for attempt in range(SILENT):
            try:
                return ask()
            except CommandError:
                if attempt == SILENT - 1:
                    raise
                self.shell.wait(EVERY)
        raise AssertionError

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
                    self.shell.say(f"{outcome}: goes on, {self.newest()}")
                    self.stop() if outcome == "restart" else self.delete()
                    is_ours = True  # nothing trains on it
        except Failed as error:
            try:
                print(self.tail(error.who))
            except CommandError as silence:  # it must not hide why the trainer ended
                self.shell.say(str(silence))
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
