"""What all programs share at the command line: errors and exit codes, files that appear whole, lists, tables,
progress."""

import argparse
import ctypes
import errno
import glob
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path

from tqdm import tqdm

# ---------------------------------------------------------------- errors and exit codes


class InputError(ValueError):
    """Arguments, rows, files or folders that cannot be used. The message says where, what is wrong, what to do."""


class WorkError(RuntimeError):
    """The work failed. The message says at which point and what is kept."""


class Interrupted(Exception):
    """A signal asked the program to stop. The message says what is kept."""


EXIT_CODES = "Exit codes: 0 done, 1 the work failed, 2 wrong arguments or input, 130 interrupted."


def run_program(name: str, work: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Do `work(args)` and return the exit code; one message on stderr says what went wrong, --debug shows the
    traceback.

    Of several ranks the first speaks for all; a failure of the work is told by whichever rank has it (with an empty
    message: by another). Under torchrun the message also goes where torchrun looks for it, to be shown last.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal may not know every letter
    try:
        work(args)
        return 0
    except (InputError, WorkError, OSError, Interrupted, KeyboardInterrupt) as e:
        if args.debug:
            raise
        code, message = 1, str(e)
        if isinstance(e, InputError):
            code = 2
        elif isinstance(e, Interrupted | KeyboardInterrupt):
            code, message = 130, f"interrupted: {e}" if str(e) else "interrupted; the same command goes on"
    message = f"{name}: {printable(message)}" if message else ""
    if message and (code == 1 or os.environ.get("RANK", "0") == "0"):
        print(message, file=sys.stderr)
    if message and "TORCHELASTIC_ERROR_FILE" in os.environ:
        about = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        write_file(Path(os.environ["TORCHELASTIC_ERROR_FILE"]), json.dumps({"message": about}))
    return code


def leave(code: int) -> None:
    """End the process. At once: while Python takes itself apart, threads of a process group may still abort it, and a
    run that ended well would count as failed."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stop:
    """Whether SIGTERM, SIGINT or SIGUSR1 asked this process to stop.

    The handler raises nothing, since an exception may come up inside a library that turns it into its own. Until
    `deferred` it ends the process at once: nothing has begun that could be lost. From then on it sets `asked`, which
    is looked at where the work can be saved; only a second SIGINT still ends the process at once.
    """

    asked = deferred = False

    def handle(self, number, frame) -> None:
        if self.deferred and not (self.asked and number == signal.SIGINT):
            self.asked = True
            return
        kept = "what was saved last is kept" if self.deferred else "nothing had been begun that could be lost"
        if os.environ.get("RANK", "0") == "0":
            os.write(2, f"interrupted: {kept}; the same command goes on\n".encode())
        with suppress(RuntimeError, OSError, ValueError):  # the signal may have come in the middle of a write
            sys.stdout.flush()
        os._exit(130)


def catch_signals() -> Stop:
    """Answer signals as `Stop` says, to the end of the process: restored before, a late signal would cost the exit
    code."""
    stop = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    if not isinstance(stop, Stop):
        stop = Stop()
        for number in SIGNALS:
            signal.signal(number, stop.handle)
    return stop


def die_with_parent(number: int) -> None:
    """Ask the kernel for this signal when the parent process ends, kill -9 included. On Linux only."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it ended before the kernel knew
            os.kill(os.getpid(), number)


def begin_process() -> Stop:
    """The first act of a program under torchrun, before torch's import takes seconds: answer signals, and take the
    death of torchrun for one."""
    stop = catch_signals()
    if "RANK" in os.environ:
        die_with_parent(signal.SIGTERM)
    return stop


def leave_signals_to_parent() -> None:
    """In a process that helps another: Ctrl-C is the other's to answer, SIGTERM just ends this one."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent(signal.SIGKILL)


# ---------------------------------------------------------------- arguments


def from_arguments(kind: type, args: argparse.Namespace):
    """A dataclass filled with the arguments of its fields' names: below the start, no function takes all of them."""
    return kind(**{f.name: getattr(args, f.name) for f in fields(kind)})


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str:
        silent = action.default in (None, False, math.inf) or action.default == []
        return action.help if silent else super()._get_help_string(action)


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, is {text}")
    return int(text)


def natural(text: str) -> int:
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, is {text}")
    return int(text)


def above_zero(text: str) -> float:
    if not float(text) > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, is {text}")
    return float(text)


def amount(text: str) -> float:
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number of at least 0, is {text}")
    return float(text)


def fraction(text: str) -> float:
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, is {text}")
    return float(text)


def share_or_count(text: str) -> float:
    """A share below 1, or from 1 on a whole number."""
    if not 0 < float(text) < math.inf or (float(text) > 1 and float(text) % 1):
        raise argparse.ArgumentTypeError(f"must be a share above 0 and below 1, or a whole number of rows, is {text}")
    return float(text)


# ---------------------------------------------------------------- files


def aside(path: Path) -> Path:
    """Where a file or folder is written before it takes its name."""
    return path.with_name(path.name + ".tmp")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path to write a file to. It becomes `path` when the block ends, and vanishes when it fails: whoever looks
    at `path` sees the old or the new, whole. An OSError names the file."""
    new = aside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(new)
        yield new
        os.replace(new, path)
    except BaseException as e:
        if isinstance(e, OSError) and e.filename is None:
            e.filename = str(path)
        with suppress(OSError):
            remove(new)
        raise


def replace_folder(path: Path) -> None:
    """Give aside(path), a folder on disk, the name `path`, which an older folder may have.

    Killed in between, either the old or the new folder is whole, under its name or as `path`.old: `recover_folder`.
    """
    old = path.with_name(path.name + ".old")
    if path.exists():
        os.replace(path, old)
    os.replace(aside(path), path)
    sync(path.parent)
    remove(old)


def recover_folder(path: Path) -> None:
    """Undo or finish what a killed `replace_folder` left."""
    old = path.with_name(path.name + ".old")
    if old.exists() and not path.exists():
        os.replace(old, path)
    remove(old)


def sync(path: Path, inside: bool = False) -> None:
    """Have a file, or the entries of a folder (`inside`: all that it holds, too), on disk when this returns. An OSError
    names the file."""
    for inner in path.rglob("*") if inside else ():
        sync(inner)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as e:
        if path.is_dir() and e.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return  # some file systems know no fsync of folders
        e.filename = str(path)
        raise
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file that appears whole or not at all; text as UTF-8, what is no character (of a file's name) as JSON
    escapes it."""
    with replacing(path) as new:
        new.write_bytes(content.encode(errors="backslashreplace") if isinstance(content, str) else content)


def write_lines(path: Path, rows: Iterable[dict]) -> None:
    """JSONL."""
    write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_text(path: Path) -> str:
    """The UTF-8 text of a file, without a byte order mark. Raises InputError."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        line = 1 + e.object[: e.start].count(b"\n")
        raise InputError(f"{path}:{line}: not UTF-8 text (byte {e.object[e.start]:#04x})") from None


def read_json_object(path: Path) -> dict:
    """A JSON object from a file; {} where there is no file. Raises InputError."""
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


def refuse_overwriting(outputs: list[Path], inputs: list[Path], folders: bool = False) -> None:
    """Raise InputError if writing one of `outputs` would harm one of `inputs`, or another output; if one is named like
    the work that another output still needs; or is a folder, unless `folders`. Beside an output lie the file it is
    written to first, and the store and the batch of paid work."""
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


# ---------------------------------------------------------------- what people see


def printable(text: str) -> str:
    """Without control characters, which could command a terminal, and without halves of characters."""
    return "".join(c for c in text if c in "\n\t" or c.isprintable() or c == "\u200d")


def whole(text: str) -> str:
    """With U+FFFD for halves of characters, which cannot be written as UTF-8."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def listed(title: str, lines: list[str], most: int = 30) -> str:
    """`title` and an indented line for each of `lines`, at `most` so many."""
    more = [f"… and {len(lines) - most:,} more"] if len(lines) > most else []
    return "\n  ".join([title, *lines[:most], *more])


def refuse(bad: list[str], what: str, advice: str = "") -> None:
    """Raise one InputError that lists all of `bad`, if there are any: "3 rows cannot be used: …"."""
    if bad:
        raise InputError(listed(f"{len(bad):,} {what}:", bad) + (f"\n{advice}" if advice else ""))


def print_listed(what: str, lines: list[str]) -> None:
    """The same for what is no error, on stdout."""
    if lines:
        print(printable(listed(f"{len(lines):,} {what}:", lines, most=10)))


def print_last_line(text: str, total: int, failed: dict[str, int]) -> None:
    """`text` and how many of `total` rows came to nothing, by what befell them. Raises WorkError where it is more than
    5 %, and where any has "failed": always an error of the server."""
    bad = ", ".join(f"{n:,} {what}" for what, n in failed.items() if n)
    print(text + (f"; {bad}" if bad else ""), flush=True)
    if failed.get("failed") or sum(failed.values()) > 0.05 * total:
        more = "more than 5 % of " if sum(failed.values()) > 0.05 * total else "of "
        raise WorkError(f"{more}{total:,} rows came to nothing: {bad} (--ask-refused asks them again)")


def print_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    for row in [header, *rows]:
        print("  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]))


LINE_SECONDS = 30  # between lines of progress, where stderr is no terminal


class ProgressLines(tqdm):
    """tqdm for a log file: lines below one another."""

    @staticmethod
    def status_printer(file):
        def print_line(text: str) -> None:
            if text.strip():
                file.write(text.strip() + "\n")
                file.flush()

        return print_line

    def close(self) -> None:
        self.disable = True  # nothing to clear
        super().close()

    def moveto(self, n: int) -> None:
        """Lines of several bars stand below one another by themselves."""


def progress(total: int, what: str, unit: str, initial: int = 0, shown: bool = True, left: bool = True) -> tqdm:
    """A bar on stderr, or a line each half minute where that is no terminal. `left`: with the time left."""
    terminal = sys.stderr.isatty()
    counts, times = (
        "{desc}: {n_fmt}/{total_fmt} {unit}",
        "[{elapsed}<{remaining}{postfix}]" if left else "[{elapsed}{postfix}]",
    )
    settings = {"total": total, "initial": initial, "desc": what, "unit": unit, "disable": not shown}
    if terminal:
        bar = None if left else "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} " + times
        return tqdm(**settings, bar_format=bar)
    lines = {"mininterval": LINE_SECONDS, "delay": LINE_SECONDS, "miniters": 1, "leave": False}
    return ProgressLines(**settings, **lines, bar_format=f"{counts} {times}")
