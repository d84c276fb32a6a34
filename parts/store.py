"""Work that must not be lost: a JSONL file to which each record is appended the moment it exists."""

import json
import sys
from pathlib import Path

from parts.program import InputError


def hold(path: Path):
    """Open a file to read and append, unbuffered, with a lock that goes with the process. Raises InputError when
    another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "ab+", buffering=0)  # noqa: SIM115 (the caller's to close)
    try:
        import fcntl  # not on every system

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except OSError:
        file.close()
        raise InputError(f"{path} is in use: another process is writing it") from None
    file.seek(0)
    return file


class Store:
    """Records (JSON objects with a "key") of one JSONL file. Survives kill -9: a line torn by one is cut off.

    Only one process may hold the file; the lock goes with the process. `read_only` reads what is there, held or not,
    and makes nothing. Raises InputError when another process holds it.
    """

    def __init__(self, path: Path, read_only: bool = False):
        self.path = path
        self.by_key: dict[str, list[dict]] = {}
        if read_only:
            content = path.read_bytes() if path.exists() else b""
        else:
            self.file = hold(path)
            content = self.file.read()
        *lines, torn = content.split(b"\n")
        if torn and not read_only:
            print(f"{path}: the last line was torn by a kill and is left out", file=sys.stderr)
            self.file.truncate(len(content) - len(torn))
        damaged = 0
        for line in lines:
            try:
                record = json.loads(line)
                self.by_key.setdefault(record["key"], []).append(record)
            except (ValueError, TypeError, KeyError, RecursionError):
                damaged += 1
        if damaged:
            print(f"{path}: {damaged} damaged lines are left out", file=sys.stderr)

    def add(self, record: dict) -> None:
        """Append a record; it is on its way to the disk when this returns."""
        line = memoryview((json.dumps(record, ensure_ascii=True) + "\n").encode())
        while line:
            line = line[self.file.write(line) :]
        self.by_key.setdefault(record["key"], []).append(record)

    def of(self, key: str) -> list[dict]:
        """All records of a key, oldest first."""
        return self.by_key.get(key, [])

    def close(self) -> None:
        self.file.close()
