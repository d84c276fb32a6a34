"""A folder for one process alone. folder/lock says which; what locks depends on the file system:

flock of the folder itself, which does not depend on a file that somebody may remove
flock of folder/lock where a folder cannot be locked (NFS), or
folder/lock, made exclusively, where there is no flock at all (some NFS, Lustre and FUSE mounts): it names machine
and process, by which the next process judges whether the holder still runs.
"""

import errno
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from parts.cli import InputError, WorkError

try:
    import fcntl
except ImportError:  # not on every system
    fcntl = None


class Lock:
    """That this process holds a folder. Raises InputError, saying who has it, when another process does."""

    def __init__(self, folder: Path):
        self.path, self.me = folder / "lock", describe_process()
        self.on_folder, self.handle = True, None
        try:
            self.handle = flock(folder, os.O_RDONLY, self.path)
        except OSError as e:
            self.on_folder = False
            if e.errno == errno.EBADF:  # NFS locks what is open for writing, and no folder is
                with suppress(OSError):
                    self.handle = flock(self.path, os.O_RDWR | os.O_CREAT, self.path)
        if self.handle is None:
            print(f"{folder}: its file system has no flock, so the file {self.path} is the lock", file=sys.stderr)
            lock_file(self.path, self.me)
        else:
            self.path.write_text(self.me, encoding="utf-8")

    def check(self) -> None:
        """Raise WorkError when this process no longer holds the folder."""
        if not self.on_folder and read_holder(self.path) != self.me:
            raise WorkError(
                f"{self.path} was removed or replaced: another process may be writing in {self.path.parent}. This one "
                "ends, and what it saved last is kept"
            )

    def release(self) -> None:
        if read_holder(self.path) == self.me:
            self.path.unlink(missing_ok=True)
        if self.handle is not None:
            os.close(self.handle)


@contextmanager
def lock_folder(folder: Path) -> Iterator[Lock]:
    """Hold a folder, which is made if need be, and removed at the end if nothing is in it. Killed, a process holds
    nothing. Raises as `Lock` does."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = Lock(folder)
    try:
        yield lock
    finally:
        lock.release()
        with suppress(OSError):
            folder.rmdir()


def flock(path: Path, flags: int, said: Path) -> int:
    """An open file or folder, locked as long as the process lives. Raises InputError, with what the file `said` tells,
    when another process has it, and OSError where such locks do not exist."""
    if fcntl is None:
        raise OSError(errno.ENOSYS, "no flock on this system")
    handle = os.open(path, flags, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not (path.exists() and os.path.samestat(os.fstat(handle), path.stat())):
            raise BlockingIOError  # removed by the process that has just released it
        return handle
    except BlockingIOError:  # EWOULDBLOCK, and nothing else, is another process
        os.close(handle)
        raise InputError(in_use_error(said.parent, read_holder(said))) from None
    except OSError:
        os.close(handle)
        raise


def lock_file(path: Path, me: str) -> None:
    """Make `path` with the content `me`; that of a process which has ended is removed. Raises InputError when another
    process has it."""
    holder = read_holder(path)
    if holder == "":  # made, and not written yet: by now, or by a process that was killed in between
        time.sleep(1)
        holder = read_holder(path)
    if holder is not None and not process_has_ended(holder):
        raise InputError(in_use_error(path.parent, holder, f"if that process is known to have ended, remove {path}"))
    if holder is not None and read_holder(path) == holder:
        path.unlink(missing_ok=True)
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(me)
    except FileExistsError:
        raise InputError(in_use_error(path.parent, read_holder(path))) from None


def in_use_error(folder: Path, holder: str | None, advice: str = "wait for it, or end it") -> str:
    who = holder.splitlines()[0] if holder else "another process"
    return f"{folder} is in use by {who}: {advice}"


def read_holder(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


# ---------------------------------------------------------------- whether a process still runs


def describe_process() -> str:
    """Three lines: for people; the machine, its start and its numbering of processes; when the process began."""
    line = f"process {os.getpid()} on {platform.node()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
    return "\n".join([line, machine_id(), process_start_time(os.getpid()) or "unknown"])


def machine_id() -> str:
    """Host, start of its kernel, namespace of its processes; empty where not known."""
    boot = namespace = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{platform.node()} {boot} {namespace}"


def process_start_time(pid: int) -> str:
    """When a process began, in ticks since the start of its machine: a number may belong to another one by now."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def process_has_ended(holder: str) -> bool:
    """Whether the process that wrote `holder` certainly runs no more. Of another machine nobody knows from here."""
    if not holder:
        return True  # killed before it could write who it is
    try:
        first, place, ticks = holder.splitlines()
        pid, (host, boot, namespace) = int(first.split()[1]), place.split(" ")
    except (IndexError, ValueError):
        return False  # not written by this program
    here_host, here_boot, here_namespace = machine_id().split(" ")
    if host != here_host:
        return False
    if boot != here_boot:
        return bool(boot and here_boot)  # the machine has been started since
    if namespace != here_namespace:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return ticks != "unknown" and process_start_time(pid) != ticks
