"""Jobs of painting, and the queue in which one thread does them, each after the one before it."""

from __future__ import annotations

import collections
import dataclasses
import logging
import secrets
import threading
import time
from collections.abc import Callable

from qk_jax import painting
from qk_jax.app.models import Model
from qk_jax.base.errors import InputError

log = logging.getLogger(__name__)
QUEUED, LOADING, COMPILING, PAINTING = "queued", "loading", "compiling", "painting"
DONE, FAILED, CANCELLED = "done", "failed", "cancelled"
ENDED = (DONE, FAILED, CANCELLED)
KEPT_JOBS, KEPT_BYTES = 200, 256 * 2**20  # of jobs that ended, whose pictures can be fetched


class FullError(Exception):
    """No more jobs can wait; the message says when to come again."""


@dataclasses.dataclass(frozen=True, eq=False)
class Order:
    """What is to be painted.

    Attributes:
      model: to paint with.
      average: whether with the moving average of its weights.
      requests: for each picture, fitted to the model.
      settings: for all of them.
      preview: steps between two previews, 0 for none.
      source: what the source is called, None without one.
      references: what the references are called.
    """

    model: Model
    average: bool
    requests: tuple[painting.Request, ...]
    settings: painting.Settings
    preview: int
    source: str | None
    references: tuple[str, ...]


class Job:
    """An order on its way. The thread that paints changes it, all others read what `seen` gives."""

    def __init__(self, order: Order, notes: tuple[str, ...] = ()):
        self.id = secrets.token_urlsafe(12)
        self.order, self.notes = order, notes
        self._lock = threading.Lock()
        self._listeners: set[Callable[[], None]] = set()
        self._now = Seen(QUEUED)

    def seen(self) -> Seen:
        """How far it is, at one moment."""
        with self._lock:
            return self._now

    @property
    def is_over(self) -> bool:
        return self.seen().state in ENDED

    def change(self, **changes: object) -> None:
        """Changes fields of what is `seen`; nothing of a job that is over."""
        with self._lock:
            if self._now.state in ENDED:
                return
            if changes.get("state", self._now.state) != QUEUED and not self._now.started:
                changes["started"] = time.monotonic()
            if changes.get("state") in ENDED:
                changes |= {"ended": time.monotonic(), "preview": None}
            self._now = dataclasses.replace(self._now, **changes)  # type: ignore[arg-type]
        self.tell()

    def add_picture(self, index: int, png: bytes) -> None:
        """Adds a picture that is painted."""
        self.change(pictures=self.seen().pictures | {index: png})

    def listen(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Calls `listener` after every change, in any thread, until what is returned is called."""
        self._listeners.add(listener)
        return lambda: self._listeners.discard(listener)

    def tell(self) -> None:
        """Calls the listeners."""
        for listener in tuple(self._listeners):
            listener()


@dataclasses.dataclass(frozen=True, eq=False)
class Seen:
    """How far a job is.

    Attributes:
      state: QUEUED, then LOADING, COMPILING and PAINTING, then one of ENDED.
      step: sampler steps of the pictures that are being painted.
      pictures: PNG files of the painted ones by their number.
      preview: (number of the picture, its step, a WebP file), the last there was.
      error: why it failed.
      started, ended: on the monotonic clock, in seconds; 0 before.
    """

    state: str
    step: int = 0
    pictures: dict[int, bytes] = dataclasses.field(default_factory=dict)
    preview: tuple[int, int, bytes] | None = None
    error: str | None = None
    started: float = 0.0
    ended: float = 0.0

    @property
    def seconds(self) -> float:
        """For how long it has been at work."""
        return (self.ended or time.monotonic()) - self.started if self.started else 0.0


class Queue:
    """Does one job at a time; a bounded number waits."""

    def __init__(self, paint: Callable[[Job], None], most: int):
        """`paint` does a job, in the thread of the queue; at most `most` others wait for it."""
        self._paint, self.most = paint, most
        self._changed = threading.Condition()
        self._waiting: collections.deque[Job] = collections.deque()
        self._jobs: dict[str, Job] = {}
        self._is_closed = self._busy = False
        self._thread = threading.Thread(target=self._work, name="painting", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def close(self) -> None:
        """Cancels all jobs; returns when the one at work has ended its step."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        for job in self.jobs():
            job.change(state=CANCELLED)
        self._thread.join(timeout=5)

    def check_room(self) -> None:
        """Raises FullError where no more jobs can wait."""
        if len(self._waiting) >= self.most:
            raise FullError(f"{self.most} jobs are waiting already; try again when one is painted")

    def put(self, job: Job) -> None:
        """Lets a job wait. Raises FullError where it cannot."""
        with self._changed:
            self.check_room()
            self._waiting.append(job)
            self._jobs[job.id] = job
            self._changed.notify_all()

    def find(self, job_id: str) -> Job | None:
        """A job that waits, is at work, or ended not long ago."""
        return self._jobs.get(job_id)

    def jobs(self) -> list[Job]:
        """All that `find` finds, oldest first."""
        with self._changed:
            return list(self._jobs.values())

    def ahead(self, job: Job) -> int:
        """How many jobs have to end before it begins; 0 for one that is not waiting."""
        with self._changed:
            waiting = [other for other in self._waiting if not other.is_over]
            at_work = 1 if self._busy else 0
        return waiting.index(job) + at_work if job in waiting else 0

    def cancel(self, job: Job) -> None:
        """Ends a job, at once where it waits, else after the step that is being computed."""
        job.change(state=CANCELLED)
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
        self._tell_waiting()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if self._is_closed:
                    return
                job = self._waiting.popleft()
                self._busy = True
            self._tell_waiting()
            self._do(job)
            self._forget()

    def _do(self, job: Job) -> None:
        """Paints; whatever goes wrong ends the job alone."""
        try:
            self._paint(job)
        except InputError as error:
            job.change(state=FAILED, error=" ".join(str(error).split()))
        except Exception as error:
            log.exception("job %s failed", job.id)
            job.change(state=FAILED, error=_told(error))
        job.change(state=DONE)

    def _tell_waiting(self) -> None:
        """Others are ahead of the waiting jobs than before."""
        with self._changed:
            waiting = tuple(self._waiting)
        for job in waiting:
            job.tell()

    def _forget(self) -> None:
        """Drops the oldest jobs that ended, where there are too many."""
        with self._changed:
            ended = {name: job.seen() for name, job in self._jobs.items() if job.is_over}
            sizes = {name: sum(map(len, now.pictures.values())) for name, now in ended.items()}
            count, held = len(ended), sum(sizes.values())
            for name, size in sizes.items():
                if count <= KEPT_JOBS and held <= KEPT_BYTES or count == 1:
                    return
                del self._jobs[name]
                count, held = count - 1, held - size


def _told(error: Exception) -> str:
    """One line for an error that is nobody's input."""
    if "RESOURCE_EXHAUSTED" in str(error):
        return "the device has not enough memory for this; choose a smaller size or --batch"
    return f"painting failed ({type(error).__name__}); the terminal of the app says more"
