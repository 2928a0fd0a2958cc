"""Where the study of :func:`torchintro.tune` is kept: a database, or a journal that outlives killed processes."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

import optuna
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

__all__ = ["open_storage"]

_JOURNALS = (".journal", ".log")
# How long to wait for another process to be done with a SQLite file: its own 5 seconds are few on a busy machine.
_LOCK_SECONDS = 60
# How often, and how long apart, to open a database of which another process makes the tables at the same time.
_OPENINGS = 20
_OPENING_SECONDS = 0.1


class _JournalLock(JournalFileOpenLock):
    """Locks a journal by the operating system, which takes the lock back from a process that is killed.

    Optuna's own locks are files of their own. A killed process leaves one behind, for which the others wait half a
    minute; and Ctrl-C in one that waits takes it away from the one that has it. Readers need no lock.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._path = path
        self._file = -1

    def acquire(self) -> bool:
        """Wait for the lock; take away the half of a line that a killed process may have left at the journal's end."""
        file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            size = os.fstat(file).st_size
            if size > 0 and os.pread(file, 1, size - 1) != b"\n":
                os.ftruncate(file, Path(self._path).read_bytes().rfind(b"\n") + 1)
        except BaseException:
            os.close(file)
            raise
        self._file = file
        return True

    def release(self) -> None:
        """Give the lock back."""
        os.close(self._file)


def open_storage(storage: object) -> BaseStorage:
    """Return the storage that is meant by an argument of ``tune``: a URL, the path of a journal, a storage or None."""
    if storage is None:
        return InMemoryStorage()
    if isinstance(storage, BaseStorage):
        return storage
    if not isinstance(storage, (str, os.PathLike)):
        raise TypeError(
            f"tune: storage must be a URL, the path of a journal or an Optuna storage, but got {type(storage).__name__}"
        )
    name = os.fspath(storage)
    try:
        if "://" not in name and name.endswith(_JOURNALS):
            return JournalStorage(JournalFileBackend(name, lock_obj=_JournalLock(name)))
        return _database(name)
    except Exception as error:  # whatever the storage's driver raises
        raise unusable(storage, error) from error


def unusable(storage: object, error: Exception) -> ValueError:
    """Return the error of a storage that cannot be used, in one sentence."""
    reason = str(error).splitlines()[0].split(". ")[0] if str(error) else type(error).__name__
    return ValueError(f"tune: storage {str(storage)!r} cannot be used: {reason}")


def _database(url: str) -> BaseStorage:
    if not url.startswith("sqlite"):
        return optuna.storages.get_storage(url)
    for attempt in range(1, _OPENINGS + 1):
        try:
            return RDBStorage(url, engine_kwargs={"connect_args": {"timeout": _LOCK_SECONDS}})
        except Exception as error:
            # Optuna asks whether the tables are there and then makes them, between which another process may have.
            raced = "already exists" in str(error) or "UNIQUE constraint" in str(error)
            if not raced or attempt == _OPENINGS:
                raise
            time.sleep(_OPENING_SECONDS)
    raise AssertionError
