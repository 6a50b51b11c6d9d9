"""What is run or believed comes only from where nobody else can write."""

from __future__ import annotations

import os
from pathlib import Path


def why_not_ours_alone(path: Path, *, roots_too: bool = False) -> str | None:
    """Why others may have written a file or folder; None where nobody can.

    Parameters
    ----------
    roots_too : bool
        What belongs to root is as good as one's own: a folder that came with a container's image.
    """
    found = path.lstat()
    if path.is_symlink():
        return f"{path} is a link"
    if not hasattr(os, "getuid"):
        return None
    owners = {os.getuid(), 0} if roots_too else {os.getuid()}
    if found.st_uid not in owners or found.st_mode & 0o022:
        return f"{path} can be written by others; remove it, or make it yours alone"
    return None
