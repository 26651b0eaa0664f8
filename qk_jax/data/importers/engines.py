"""Where pieces are worked on: in this process, in processes of this machine, or by Ray."""

from __future__ import annotations

import concurrent.futures
import importlib
import multiprocessing
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from qk_jax.base.errors import BadRecord, Failure, InputError
from qk_jax.base.workers import end_with_parent

REACH_S = 20.0
Task = Callable[[int, Any], None]


def run(task: Task, items: Mapping[int, Any], workers: int, ray: str = "") -> Iterator[int]:
    """Calls `task` with each number and its item; yields the numbers as they are done.

    Args:
      task: pickles; what it has done survives the process.
      items: to be called with.
      workers: processes; 1 is this one.
      ray: address of a cluster, or 'auto'; '' is none.

    Raises:
      Failure: a process was ended from outside.
      InputError: the first of a task; or there is no Ray.
    """
    if ray:
        return _by_ray(task, items, ray)
    if workers == 1 or len(items) < 2:
        return _here(task, items)
    return _by_processes(task, items, min(workers, len(items)))


def _here(task: Task, items: Mapping[int, Any]) -> Iterator[int]:
    for number, item in items.items():
        task(number, item)
        yield number


def _by_processes(task: Task, items: Mapping[int, Any], workers: int) -> Iterator[int]:
    context = multiprocessing.get_context("spawn")  # threads and open files do not fork
    with concurrent.futures.ProcessPoolExecutor(workers, context, initializer=_begin) as pool:
        waiting = {pool.submit(task, *item): item[0] for item in items.items()}
        try:
            for done in concurrent.futures.as_completed(waiting):
                done.result()
                yield waiting[done]
        except BrokenProcessPool:
            raise Failure(
                "a worker process was ended from outside, as the system does when memory is "
                "short; the same command with --resume goes on, with fewer --workers"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """Of a worker: ends with the command, and silently when the user interrupts both."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    end_with_parent()


def _call(task: Task, number: int, item: Any) -> None:
    task(number, item)


def _reach(address: str) -> None:
    """Raises OSError where nothing listens at HOST:PORT, for which Ray itself asks for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()


def _by_ray(task: Task, items: Mapping[int, Any], address: str) -> Iterator[int]:
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError:
        raise InputError("--ray needs Ray; pip install 'qk_jax[ray]'") from None
    try:
        _reach(address)
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # of many classes
        raise InputError(
            f"--ray {address}: no cluster answers ({error}); start one first"
        ) from None
    try:
        # A lost node or worker is no error of the task: Ray gives it to another.
        remote, shared = ray.remote(num_cpus=1, max_retries=-1)(_call), ray.put(task)
        waiting = {remote.remote(shared, *item): item[0] for item in items.items()}
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            try:
                ray.get(done)
            except ray.exceptions.RayTaskError as error:
                cause = error.cause
                if isinstance(cause, InputError | Failure) and not isinstance(cause, BadRecord):
                    raise cause from None
                raise
            yield waiting.pop(done)
    finally:
        ray.shutdown()
