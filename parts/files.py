"""Files: written atomically, replaced, synced to disk, read as text or JSON."""

import errno
import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from parts.cli import InputError


def temporary_path(path: Path) -> Path:
    """The temporary path of a file or folder before it is renamed to `path`."""
    return path.with_name(path.name + ".tmp")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A context manager for an atomic write: yields a temporary path, which is renamed to `path` when the block ends
    and removed when it fails. Readers of `path` see the complete old or new file. An OSError names the file."""
    new = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_path(new)
        yield new
        os.replace(new, path)
    except BaseException as e:
        if isinstance(e, OSError) and e.filename is None:
            e.filename = str(path)
        with suppress(OSError):
            remove_path(new)
        raise


def replace_folder(path: Path) -> None:
    """Rename the complete folder at `tmp_path(path)` to `path`, replacing an older folder.

    After a kill, either the old or the new folder is complete, as `path` or as `path`.old; see `recover_folder`.
    """
    old = path.with_name(path.name + ".old")
    if path.exists():
        os.replace(path, old)
    os.replace(temporary_path(path), path)
    fsync_path(path.parent)
    remove_path(old)


def recover_folder(path: Path) -> None:
    """Undo or finish an interrupted `replace_folder`."""
    old = path.with_name(path.name + ".old")
    if old.exists() and not path.exists():
        os.replace(old, path)
    remove_path(old)


def fsync_path(path: Path, inside: bool = False) -> None:
    """Sync a file or a folder's entries to disk (`inside`: also everything in the folder). An OSError names the
    file."""
    for inner in path.rglob("*") if inside else ():
        fsync_path(inner)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as e:
        if path.is_dir() and e.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return  # some file systems do not support fsync of folders
        e.filename = str(path)
        raise
    finally:
        os.close(handle)


def remove_path(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write a file atomically. Text is written as UTF-8; unpaired surrogates (from file names) as JSON escapes them."""
    with atomic_path(path) as new:
        new.write_bytes(content.encode(errors="backslashreplace") if isinstance(content, str) else content)


def write_lines(path: Path, rows: Iterable[dict]) -> None:
    """JSONL."""
    atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_text(path: Path, errors: str = "strict") -> str:
    """The UTF-8 text of a file, without a byte order mark. Raises InputError; with errors="surrogateescape" other bytes
    become unpaired surrogates instead."""
    try:
        return path.read_bytes().decode("utf-8-sig", errors)
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        line = 1 + e.object[: e.start].count(b"\n")
        raise InputError(f"{path}:{line}: not UTF-8 text (byte {e.object[e.start]:#04x})") from None


def stage_advice(folder: Path) -> str:
    """Which folder was meant, if `folder` is not a model but the output of train.py; else ""."""
    stages = ", ".join(sorted(f"{path.parent}" for path in folder.glob("stage*/config.json")))
    return f". The models of this run are {stages}" if stages else ""


def read_json_object(path: Path) -> dict:
    """A JSON object from a file; {} if there is no file. Raises InputError."""
    if not path.exists():
        return {}
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: cannot be read as JSON: {e}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: is not a JSON object")
    return value


PAID_WORK = re.compile(r".+\.(partial(\.\d+)?\.jsonl|batch\.json)")


def check_output_paths(outputs: list[Path], inputs: list[Path], folders: bool = False) -> None:
    """Raise InputError if writing one of `outputs` would overwrite one of `inputs` or another output, if its name is
    that of a partial file of another output, or if it is a folder (unless `folders`). An output's folder also
    contains its temporary file and its partial work (store and batch)."""
    known: dict[Path, str] = {}
    for path in inputs:
        known.setdefault(path.resolve(), f"{path}, which is read")
    for out in outputs:
        if out.is_dir() and not folders:
            raise InputError(f"{out} is a folder: give the name of a file")
        if PAID_WORK.fullmatch(out.name):
            raise InputError(
                f"writing {out} could overwrite unfinished work of another output: choose another name for it"
            )
        beside = [out.with_name(out.name + end) for end in (".tmp", ".partial.jsonl", ".batch.json")]
        beside += out.parent.glob(f"{glob.escape(out.name)}.partial.*.jsonl")  # of the ranks of generate.py
        for path in (out, *beside):
            same = (was for was in known if path.exists() and was.exists() and path.samefile(was))  # a link to it
            harmed = known.get(path.resolve()) or known.get(next(same, None))
            if harmed:
                raise InputError(f"writing {out} would overwrite {harmed}: choose another name for it")
        known |= {path.resolve(): f"{out}, which is written too" for path in (out, *beside)}


def sha256(path: Path) -> str:
    """Raises InputError where the file cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as f:
            while block := f.read(2**20):
                digest.update(block)
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}") from None
    return digest.hexdigest()


def json_values(text: str) -> Iterator[tuple[int, object]]:
    """(line, value) of each row of a JSONL text, or of one JSON array; the value is an InputError for a row that is not
    JSON."""
    if not text.lstrip().startswith("["):
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError) as e:
                    yield number, InputError(f"not JSON: {e}")
        return
    decoder, white = json.JSONDecoder(), re.compile(r"[ \t\r\n]*")
    at, line = text.index("[") + 1, 1 + text.count("\n", 0, text.index("["))
    try:
        while True:
            start = white.match(text, at).end()
            line += text.count("\n", at, start)
            if text[start : start + 1] == "]":
                behind = white.match(text, start + 1).end()
                if behind < len(text):
                    line += text.count("\n", start, behind)
                    yield line, InputError("text after the JSON array: a file is one array, or has one row per line")
                return
            value, end = decoder.raw_decode(text, start)
            yield line, value
            at = white.match(text, end).end()
            line += text.count("\n", start, at)
            if text[at : at + 1] not in (",", "]"):
                raise ValueError(
                    "a comma or the closing ] is missing" if at < len(text) else "the file ends in the array"
                )
            at += text[at] == ","
    except (ValueError, RecursionError) as e:
        yield line, InputError(f"not JSON, and the rest of the array cannot be read: {e}")
