"""What a local store asks of its file system: sqlite's locks, and one of our own."""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from a3_engine.errors import StoreError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# sqlite's write-ahead log needs memory shared between all its users, which these do not give.
NETWORK = {
    "nfs", "nfs4", "cifs", "smb2", "smb3", "smbfs", "afs", "ceph", "lustre", "gpfs", "beegfs",
    "ncpfs", "webdav", "fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.s3fs", "fuse.gcsfuse",
    "fuse.rclone", "fuse.mount-s3", "fuse.juicefs",
}  # fmt: skip
MOUNTS = Path("/proc/self/mountinfo")


def file_system(path: Path, mounts: Path = MOUNTS) -> str | None:
    """Type of the file system that holds a path; None where the system does not tell."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    resolved, best, kind = path.resolve(), -1, None
    for line in lines:
        left, _, right = line.partition(" - ")
        point = Path(left.split()[4].encode().decode("unicode_escape"))
        if resolved.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), right.split()[0]
    return kind


def refuse_network_share(path: Path, mounts: Path = MOUNTS) -> None:
    """Raises `StoreError` where sqlite would lose or damage its index."""
    kind = file_system(path, mounts)
    if kind in NETWORK:
        raise StoreError(
            f"{path} is on a network share ({kind}), where sqlite cannot keep a chunk store. Give "
            f"a local folder as cache_dir, and share chunks by store='file://{path}'."
        )


class TurnLock:
    """A lock file that one holds at a time, thread or process; a killed holder lets go of it.

    sqlite's own waiting is unfair: who has waited longest asks least often, and starves in a crowd.
    """

    def __init__(self, path: Path, timeout: float) -> None:
        self._path, self._timeout = path, timeout
        self._threads = threading.Lock()  # a process sends one of its threads into the crowd

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for it and hold it. Raises `TimeoutError`."""
        deadline = time.monotonic() + self._timeout
        late = TimeoutError(f"others have been writing for {self._timeout:g} seconds")
        if not self._threads.acquire(timeout=self._timeout):
            raise late
        try:
            with self._opened() as handle:
                while fcntl is not None and not self._taken(handle):
                    if time.monotonic() > deadline:
                        raise late
                    time.sleep(random.uniform(0.0005, 0.003))
                yield
        finally:
            self._threads.release()

    @contextlib.contextmanager
    def at_once(self) -> Iterator[bool]:
        """Hold it where it is free; yields whether it was."""
        free = self._threads.acquire(blocking=False)
        try:
            with self._opened() as handle:
                yield free and fcntl is not None and self._taken(handle)
        finally:
            if free:
                self._threads.release()

    @staticmethod
    def _taken(handle: int) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        handle = os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            yield handle
        finally:
            os.close(handle)
