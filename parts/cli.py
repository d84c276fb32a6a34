"""Command-line code shared by all programs: errors, exit codes, signals, argument types, lists, tables, progress."""

import argparse
import ctypes
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

from tqdm import tqdm

# ---------------------------------------------------------------- errors and exit codes


class InputError(ValueError):
    """Unusable arguments, rows, files or folders. The message says where, what is wrong and what to do."""


class WorkError(RuntimeError):
    """The work failed. The message says at which point and what is kept."""


class Interrupted(Exception):
    """A signal asked the program to stop. The message says what is kept."""


EXIT_CODES = "Exit codes: 0 done, 1 the work failed, 2 wrong arguments or input, 130 interrupted."


def run_program(name: str, work: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Run `work(args)` and return the exit code. Errors are printed as one message on stderr; --debug shows the
    traceback.

    Errors that all ranks share are printed by rank 0; a WorkError is printed by the rank that raises it (an empty
    message is not printed: another rank prints the reason). Under torchrun the message is also written to torchrun's
    error file, which torchrun prints last.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # the terminal's encoding may lack characters
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
            code, message = 130, f"interrupted: {e}" if str(e) else "interrupted; run the same command again to resume"
    message = f"{name}: {strip_control_chars(message)}" if message else ""
    if message and (code == 1 or os.environ.get("RANK", "0") == "0"):
        print(message, file=sys.stderr)
    if message and "TORCHELASTIC_ERROR_FILE" in os.environ:
        report = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps({"message": report}))
    return code


def exit_process(code: int) -> None:
    """End the process immediately. During Python's shutdown, threads of a process group may abort it, and a successful
    run would count as failed."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Whether SIGTERM, SIGINT or SIGUSR1 asked this process to stop.

    The handler raises no exception, because a library may catch it and raise its own. Until `deferred` is set, it ends
    the process immediately: there is no work to save. Afterwards it sets `asked`, which the program checks at points
    where it can save; only a second SIGINT ends the process immediately.
    """

    asked = deferred = False

    def handle(self, number, frame) -> None:
        if self.deferred and not (self.asked and number == signal.SIGINT):
            self.asked = True
            return
        kept = "the last saved state is kept" if self.deferred else "there was nothing to save yet"
        if os.environ.get("RANK", "0") == "0":
            os.write(2, f"interrupted: {kept}; run the same command again to resume\n".encode())
        with suppress(RuntimeError, OSError, ValueError):  # the signal may have interrupted a write
            sys.stdout.flush()
        os._exit(130)


def set_parent_death_signal(number: int) -> None:
    """Ask the kernel to send this signal when the parent process ends, also by kill -9. On Linux only."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it ended before the call
            os.kill(os.getpid(), number)


def handle_signals_and_parent() -> StopRequest:
    """Install the signal handlers, and treat the death of torchrun as SIGTERM. Call it before importing torch, which
    takes seconds, and again for the same StopRequest. The handlers stay until the process ends: otherwise a late signal
    would change the exit code."""
    stop = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    if not isinstance(stop, StopRequest):
        stop = StopRequest()
        for number in SIGNALS:
            signal.signal(number, stop.handle)
    if "RANK" in os.environ:
        set_parent_death_signal(signal.SIGTERM)
    return stop


def ignore_terminal_signals() -> None:
    """For worker processes: the parent handles Ctrl-C, and SIGTERM ends only this process."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    set_parent_death_signal(signal.SIGKILL)


# ---------------------------------------------------------------- arguments


def dataclass_from_args(kind: type, args: argparse.Namespace):
    """A dataclass of type `kind` with each field taken from the argument of the same name."""
    return kind(**{f.name: getattr(args, f.name) for f in fields(kind)})


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except those that carry no information."""

    def _get_help_string(self, action: argparse.Action) -> str:
        silent = action.default in (None, False, math.inf) or action.default == []
        return action.help if silent else super()._get_help_string(action)


def positive_int(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, is {text}")
    return int(text)


def nonneg_int(text: str) -> int:
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, is {text}")
    return int(text)


def positive_float(text: str) -> float:
    if not float(text) > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, is {text}")
    return float(text)


def nonneg_float(text: str) -> float:
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number of at least 0, is {text}")
    return float(text)


def fraction(text: str) -> float:
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, is {text}")
    return float(text)


def fraction_or_count(text: str) -> float:
    """A fraction below 1, or a whole number from 1 on."""
    if not 0 < float(text) < math.inf or (float(text) > 1 and float(text) % 1):
        raise argparse.ArgumentTypeError(
            f"must be a fraction above 0 and below 1, or a whole number of rows, is {text}"
        )
    return float(text)


# ---------------------------------------------------------------- output


def strip_control_chars(text: str) -> str:
    """Remove control characters, which a terminal could interpret, and unpaired surrogates."""
    return "".join(c for c in text if c in "\n\t" or c.isprintable() or c == "\u200d")


def valid_unicode(text: str) -> str:
    """Replace unpaired surrogates, which cannot be written as UTF-8, by U+FFFD."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def format_list(title: str, lines: list[str], most: int = 30) -> str:
    """`title` and one indented line for each of `lines`, at most `most` of them."""
    more = [f"… and {len(lines) - most:,} more"] if len(lines) > most else []
    return "\n  ".join([title, *lines[:most], *more])


def raise_if_any(bad: list[str], what: str, advice: str = "") -> None:
    """Raise one InputError that lists all of `bad`, if there are any: "3 rows cannot be used: …"."""
    if bad:
        raise InputError(format_list(f"{len(bad):,} {what}:", bad) + (f"\n{advice}" if advice else ""))


def print_list(what: str, lines: list[str]) -> None:
    """Print such a list on stdout, as information."""
    if lines:
        print(strip_control_chars(format_list(f"{len(lines):,} {what}:", lines, most=10)))


def print_summary(text: str, total: int, failed: dict[str, int]) -> None:
    """Print `text` and how many of `total` rows have no result, by state. Raises WorkError if more than 5 % have none,
    or if any "failed"."""
    bad = ", ".join(f"{n:,} {what}" for what, n in failed.items() if n)
    print(text + (f"; {bad}" if bad else ""), flush=True)
    if failed.get("failed") or sum(failed.values()) > 0.05 * total:
        more = "more than 5 % of " if sum(failed.values()) > 0.05 * total else "of "
        raise WorkError(f"{more}{total:,} rows have no result: {bad} (--ask-refused asks them again)")


def print_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    for row in [header, *rows]:
        print("  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]))


LINE_SECONDS = 30  # between lines of progress, if stderr is not a terminal


class ProgressLines(tqdm):
    """tqdm for a log file: one line per update."""

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
        """Several bars need no cursor movement in a log file."""


def progress(total: int, what: str, unit: str, initial: int = 0, shown: bool = True, left: bool = True) -> tqdm:
    """A progress bar on stderr, or one line per half minute if stderr is not a terminal. `left`: show the time left."""
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
