"""What a local store asks of its file system: sqlite's locks, one of our own, owners and modes."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from a3_engine.chunks.patience import waiting
from a3_engine.errors import StoreError
from a3_engine.processes import Lock, make_anew_in_child

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# sqlite's write-ahead log needs memory shared between all its users, which these do not give.
NETWORK = {
    "nfs", "nfs4", "cifs", "smb2", "smb3", "smbfs", "afs", "ceph", "lustre", "gpfs", "beegfs",
    "ncpfs", "webdav", "fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.ceph-fuse", "fuse.s3fs",
    "fuse.gcsfuse", "fuse.rclone", "fuse.mount-s3", "fuse.mountpoint-s3", "fuse.juicefs",
}  # fmt: skip
# Where it does. Others may be a network's, seen through a driver: 9p, virtiofs, fuse.
LOCAL = {
    "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "reiserfs", "jfs", "tmpfs",
    "ramfs", "overlay", "aufs", "vfat", "exfat", "ntfs", "ntfs3", "fuseblk", "apfs", "hfsplus",
    "ufs", "erofs", "squashfs", "ecryptfs", "fuse.fuse-overlayfs", "fuse.gocryptfs",
}  # fmt: skip
MOUNTS = Path("/proc/self/mountinfo")


def file_system(path: Path, mounts: Path = MOUNTS) -> str | None:
    """Type of the file system that holds a path; None where the system does not tell."""
    try:
        lines = mounts.read_bytes().splitlines()
    except OSError:
        return None
    resolved, best, kind = path.resolve(), -1, None
    for line in lines:
        left, _, right = line.partition(b" - ")
        if len(left.split()) < 5 or not right:
            continue
        # Blanks stand as octal numbers; other bytes, of whatever encoding, as they are.
        name = re.sub(
            rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8) & 255]), left.split()[4]
        )
        point = Path(os.fsdecode(name))
        if resolved.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), os.fsdecode(right.split()[0])
    return kind


def refuse_network_share(path: Path, mounts: Path = MOUNTS) -> None:
    """Raises `StoreError` where sqlite would lose or damage its index."""
    kind = file_system(path, mounts)
    if kind in NETWORK:
        raise StoreError(
            f"{path} is on a network share ({kind}), where sqlite cannot keep a chunk store. Give "
            f"a local folder as cache_dir, and share chunks by store='file://{path}'."
        )


def shares_memory(path: Path, mounts: Path = MOUNTS) -> bool:
    """Whether sqlite's log can be used there; where the system does not tell, it is."""
    kind = file_system(path, mounts)
    return kind is None or kind in LOCAL


def give_to_owner(folder: str | Path, *made: str | Path) -> None:
    """What root makes in another user's folder belongs to that user."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return
    owner = os.stat(folder)
    if owner.st_uid != 0:
        for path in made:
            os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def make_private(path: Path, mode: int) -> None:
    """Give a file or folder of ours a mode that lets nobody else in."""
    found = path.stat()
    mine = not hasattr(os, "geteuid") or os.geteuid() in (0, found.st_uid)
    if mine and stat.S_IMODE(found.st_mode) != mode:
        path.chmod(mode)
    if not path.is_dir():
        give_to_owner(path.parent, path)


def set_aside_name(path: Path) -> Path:
    """What a damaged file is kept as."""
    return path.with_name(path.name + ".damaged")


def set_aside(path: Path) -> Path:
    """Keep a damaged index under another name, in place of one that was kept before."""
    kept = set_aside_name(path)
    remove(kept)
    path.replace(kept)
    for log in _logs(path):
        remove(log)
    return kept


def no_file(index: Path) -> Path | None:
    """The index, or a log of it, that is there and is a folder, a pipe or the like."""
    return next((p for p in (index, *_logs(index)) if p.exists() and not p.is_file()), None)


def _logs(index: Path) -> list[Path]:
    """What sqlite keeps beside it."""
    return [index.with_name(index.name + end) for end in ("-wal", "-shm")]


def remove(path: Path) -> None:
    """A file, a link, or a folder with all that is in it; none is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class TurnLock:
    """A lock file that one holds at a time, thread or process; a killed holder lets go of it.

    sqlite's own waiting is unfair: who has waited longest asks least often, and starves in a crowd.
    """

    def __init__(self, path: Path, timeout: float) -> None:
        self._path, self._timeout = path, timeout
        self._threads = Lock()  # a process sends one of its threads into the crowd
        self._handles: set[int] = set()
        make_anew_in_child(self._let_go)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for it and hold it. Raises `TimeoutError`."""
        with contextlib.ExitStack() as held:
            with waiting(self, self._timeout) as seconds:
                deadline = time.monotonic() + seconds
                late = TimeoutError(f"others have been writing for {seconds:.3g} seconds")
                if not self._threads.acquire(timeout=seconds):
                    raise late
                held.callback(self._threads.release)
                handle = held.enter_context(self._opened())
                while fcntl is not None and not self._taken(handle):
                    if time.monotonic() > deadline:
                        raise late
                    time.sleep(random.uniform(0.0005, 0.003))
            yield

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

    def _let_go(self) -> None:
        """A child would hold what a thread of its parent held, for as long as it lives."""
        for handle in self._handles:
            os.close(handle)
        self._handles = set()

    @staticmethod
    def _taken(handle: int) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        flags = os.O_CREAT | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0)
        try:
            handle = os.open(self._path, flags, 0o600)
        except (PermissionError, IsADirectoryError):  # another user's, or no file at all
            remove(self._path)
            handle = os.open(self._path, flags, 0o600)
        self._handles.add(handle)
        try:
            give_to_owner(self._path.parent, self._path)
            yield handle
        finally:
            self._handles.discard(handle)
            if fcntl is not None:  # also for a child that was forked before the handle was noted
                fcntl.flock(handle, fcntl.LOCK_UN)
            os.close(handle)
