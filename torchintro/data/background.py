"""An iterator that runs ahead in a thread: the next item is made while the caller uses the last one."""

from __future__ import annotations

import atexit
import contextlib
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

__all__ = ["ahead"]

T = TypeVar("T")

_END = object()


class _Worker(Generic[T]):
    """The thread, and the queue of the items that are ready."""

    def __init__(self, make: Callable[[], Iterator[T]], depth: int) -> None:
        self.items: queue.Queue[object] = queue.Queue(depth)
        self.error: BaseException | None = None
        self.stopped = threading.Event()
        # A daemon, because a thread that waits for its caller would otherwise keep the interpreter from ending;
        # `_stop_all` ends it before that could interrupt it.
        self.thread = threading.Thread(target=self._run, args=(make,), name="torchintro-reader", daemon=True)

    def _run(self, make: Callable[[], Iterator[T]]) -> None:
        iterator = None
        try:
            iterator = make()
            for item in iterator:
                self.items.put(item)
                del item  # else the last item handed over would live until the next one is made
                if self.stopped.is_set():
                    break
        except BaseException as error:
            self.error = error
        finally:
            try:
                close = getattr(iterator, "close", None)
                if close is not None:
                    close()  # here, not whenever the garbage is collected: files are closed in this thread
            except BaseException as error:
                self.error = self.error or error
            self.items.put(_END)

    def stop(self) -> None:
        """End the thread and wait for it."""
        self.stopped.set()
        while self.thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self.items.get_nowait()  # makes room for what the thread waits to put
            self.thread.join(0.01)


_workers: weakref.WeakSet[_Worker[Any]] = weakref.WeakSet()


def _stop_all() -> None:
    for worker in list(_workers):
        worker.stop()


atexit.register(_stop_all)


def ahead(make: Callable[[], Iterator[T]], depth: int = 1) -> Iterator[T]:
    """Yield the items of ``make()``, which a thread makes up to ``depth`` ahead.

    The thread starts with the first item asked for. It has ended, and the iterator is closed, when this one ends,
    raises or is closed. What the thread raises is raised here, after the items before it.
    """
    worker = _Worker(make, depth)
    _workers.add(worker)
    try:
        worker.thread.start()
        while True:
            item = worker.items.get()
            if item is _END:
                if worker.error is not None:
                    raise worker.error
                return
            yield item  # type: ignore[misc]
            del item  # else it would live on while the caller waits for the next one
    finally:
        worker.stop()
        worker.error = None  # its traceback refers to frames that hold pieces
