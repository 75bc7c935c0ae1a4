"""Which file system a path is on, and what is to be known about those."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, NamedTuple

#: What the kernel says of this process's mounts, on Linux; see proc_pid_mountinfo(5).
MOUNTS: Final = Path("/proc/self/mountinfo")
_NETWORK = re.compile(
    r"nfs\d?|cifs|smb\w*|9p|virtiofs|afs|ceph|lustre|glusterfs|gfs2?|ocfs2|beegfs|gpfs|fuse|fuse\..+|fuseblk|vboxsf"
)
_LAYERED = re.compile(r"overlay\w*|aufs")
_IN_MEMORY = re.compile(r"tmpfs|ramfs")


class Mount(NamedTuple):
    """A mounted file system."""

    point: str
    type: str


def mount_of(path: Path, mountinfo: str) -> Mount | None:
    """Return the mount that a path is on: the longest that is a part of it, and of those at one point the last.

    Args:
        path: absolute, without symbolic links.
        mountinfo: the text of `MOUNTS`.
    """
    found: Mount | None = None
    for line in mountinfo.splitlines():
        place, separator, kind = line.partition(" - ")
        fields = place.split(" ")
        if not separator or len(fields) < 5:
            continue
        point = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), fields[4])
        if path.is_relative_to(point) and (found is None or len(point) >= len(found.point)):
            found = Mount(point, kind.split(" ")[0])
    return found


def trouble_with(file_system: str) -> tuple[str, str] | None:
    """Return what is to be feared of a type of file system, and what to do; None where it keeps its promises."""
    if _NETWORK.fullmatch(file_system):
        return (
            f"it is {file_system}: locks and fsync may not hold there, and two processes write what one has left",
            "name a directory on a disk of this machine: OTEL_ASTROCYTE_AUDIT_SPOOL_DIR",
        )
    if _LAYERED.fullmatch(file_system):
        return (
            f"it is {file_system}, a container's own layer: what waits in it goes with the container",
            "mount a volume, and name a directory on it: OTEL_ASTROCYTE_AUDIT_SPOOL_DIR",
        )
    if _IN_MEMORY.fullmatch(file_system):
        return (
            f"it is {file_system}, memory: what waits in it is lost when the machine restarts",
            "name a directory on a disk: OTEL_ASTROCYTE_AUDIT_SPOOL_DIR",
        )
    return None
