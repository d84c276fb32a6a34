"""A JSONL file to which each record is appended immediately, so that paid work survives a kill."""

import json
import sys
from contextlib import suppress
from pathlib import Path

from parts.cli import InputError


def open_locked(path: Path):
    """Open a file to read and append, unbuffered and locked until the process ends. Raises InputError when another
    process holds the lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "ab+", buffering=0)  # noqa: SIM115 (the caller closes it)
    try:
        import fcntl  # not on every system

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except BlockingIOError:
        file.close()
        raise InputError(f"{path} is in use: another process is writing it") from None
    except OSError as e:  # some NFS, Lustre and FUSE file systems have no locks
        print(f"{path} cannot be locked ({e.strerror}): do not start a second program on it", file=sys.stderr)
    file.seek(0)
    return file


class Store:
    """Records (JSON objects with a "key") of one JSONL file. Survives kill -9: an incomplete last line is removed.

    Raises InputError if another process has opened the file. `read_only` reads it without the lock and creates nothing.
    """

    def __init__(self, path: Path, read_only: bool = False):
        self.path = path
        self.by_key: dict[str, list[dict]] = {}
        self.unwritten: list[bytes] = []  # lines that did not fit on the disk
        if read_only:
            self.file, content = None, path.read_bytes() if path.exists() else b""
        else:
            self.file = open_locked(path)
            content = self.file.read()
        *lines, torn = content.split(b"\n")
        if torn and not read_only:
            print(f"{path}: the last line was torn by a kill and is skipped", file=sys.stderr)
            self.file.truncate(len(content) - len(torn))
        self.size = len(content) - len(torn)  # of complete lines, in bytes
        damaged = 0
        for line in lines:
            try:
                record = json.loads(line)
                self.by_key.setdefault(record["key"], []).append(record)
            except (ValueError, TypeError, KeyError, RecursionError):
                damaged += 1
        if damaged:
            print(f"{path}: {damaged} damaged lines are skipped", file=sys.stderr)

    def add(self, record: dict) -> None:
        """Append a record; when this returns, the operating system has it. Raises OSError, naming the file, on a full
        disk; the record is then written with the next one or at the end."""
        self.by_key.setdefault(record["key"], []).append(record)
        self.unwritten.append((json.dumps(record, ensure_ascii=True) + "\n").encode())
        self.flush()

    def flush(self) -> None:
        """Write the lines that are not written yet. Raises OSError, naming the file, if some cannot be written."""
        lines, self.unwritten, error = self.unwritten, [], None
        for line in lines:
            rest = memoryview(line)
            try:
                while rest:
                    rest = rest[self.file.write(rest) :]
                self.size += len(line)
            except OSError as e:
                error, e.filename = e, str(self.path)
                self.file.truncate(self.size)  # an incomplete line would damage the next one
                self.unwritten.append(line)
        if error:
            raise error

    def records(self, key: str) -> list[dict]:
        """All records of a key, oldest first."""
        return self.by_key.get(key, [])

    def close(self) -> None:
        if self.file:
            with suppress(OSError):  # add() has already raised it
                self.flush()
            self.file.close()
