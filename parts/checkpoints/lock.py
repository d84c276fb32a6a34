"""An exclusive lock on a folder. folder/lock names the process that has it. The lock depends on the file system:

- flock of the folder itself, which does not depend on a file that could be removed;
- flock of folder/lock, if folders cannot be locked (NFS);
- the file folder/lock, created exclusively, if there is no flock (some NFS, Lustre and FUSE mounts). It names machine
  and process, so that the next process can check whether the holder still runs.
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
except ImportError:  # not available on every system
    fcntl = None


class Lock:
    """This process's lock on a folder. Raises InputError, naming the holder, if another process has the lock."""

    def __init__(self, folder: Path):
        self.path, self.me = folder / "lock", describe_process()
        self.on_folder, self.handle = True, None
        try:
            self.handle = flock(folder, os.O_RDONLY, self.path)
        except OSError as e:
            self.on_folder = False
            if e.errno == errno.EBADF:  # NFS locks only files open for writing, and a folder cannot be
                with suppress(OSError):
                    self.handle = flock(self.path, os.O_RDWR | os.O_CREAT, self.path)
        if self.handle is None:
            print(f"{folder}: its file system has no flock, so the file {self.path} is the lock", file=sys.stderr)
            lock_file(self.path, self.me)
        else:
            self.path.write_text(self.me, encoding="utf-8")

    def check(self) -> None:
        """Raise WorkError if this process no longer has the lock."""
        if not self.on_folder and read_holder(self.path) != self.me:
            raise WorkError(
                f"{self.path} was removed or replaced: another process may be writing in {self.path.parent}. This "
                "process ends; its last saved state is kept"
            )

    def release(self) -> None:
        if read_holder(self.path) == self.me:
            self.path.unlink(missing_ok=True)
        if self.handle is not None:
            os.close(self.handle)


@contextmanager
def lock_folder(folder: Path) -> Iterator[Lock]:
    """A context manager that locks a folder. The folder is created if necessary, and removed at the end if empty. A
    killed process has no lock. Raises as `Lock` does."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = Lock(folder)
    try:
        yield lock
    finally:
        lock.release()
        with suppress(OSError):
            folder.rmdir()


def flock(path: Path, flags: int, said: Path) -> int:
    """An open file or folder, locked until the process ends. Raises InputError with the holder named in `said` if
    another process has the lock, and OSError if the file system has no such locks."""
    if fcntl is None:
        raise OSError(errno.ENOSYS, "no flock on this system")
    handle = os.open(path, flags, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not (path.exists() and os.path.samestat(os.fstat(handle), path.stat())):
            raise BlockingIOError  # removed by the process that has released it in the meantime
        return handle
    except BlockingIOError:  # only EWOULDBLOCK means another process
        os.close(handle)
        raise InputError(in_use_error(said.parent, read_holder(said))) from None
    except OSError:
        os.close(handle)
        raise


def lock_file(path: Path, me: str) -> None:
    """Create `path` with the content `me`, after removing the file of a process that has ended. Raises InputError if
    another process has the lock."""
    holder = read_holder(path)
    if holder == "":  # created but not written yet, by a running process or by one that was killed in between
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


def in_use_error(folder: Path, holder: str | None, advice: str = "wait for it, or stop it") -> str:
    who = holder.splitlines()[0] if holder else "another process"
    return f"{folder} is in use by {who}: {advice}"


def read_holder(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


# ---------------------------------------------------------------- check whether a process still runs


def describe_process() -> str:
    """Three lines: a description; the machine, its boot and its process namespace; the start time of the process."""
    line = f"process {os.getpid()} on {platform.node()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
    return "\n".join([line, machine_id(), process_start_time(os.getpid()) or "unknown"])


def machine_id() -> str:
    """Host, boot id and process namespace; empty if not known."""
    boot = namespace = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{platform.node()} {boot} {namespace}"


def process_start_time(pid: int) -> str:
    """The start time of a process, in ticks since boot: process ids are reused."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def process_has_ended(holder: str) -> bool:
    """Whether the process that wrote `holder` has certainly ended. This cannot be known for another machine."""
    if not holder:
        return True  # killed before it could write its name
    try:
        first, machine, ticks = holder.splitlines()
        pid, (host, boot, namespace) = int(first.split()[1]), machine.split(" ")
    except (IndexError, ValueError):
        return False  # not written by this program
    here_host, here_boot, here_namespace = machine_id().split(" ")
    if host != here_host:
        return False
    if boot != here_boot:
        return bool(boot and here_boot)  # the machine has been restarted since
    if namespace != here_namespace:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return ticks != "unknown" and process_start_time(pid) != ticks
