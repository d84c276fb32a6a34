"""docs/tour.md runs: its python blocks in order, each printing the text block that follows it.

python tests/test_tour.py        writes the present output into the page
"""

import contextlib
import io
import json
import os
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_forked

PAGE = ROOT / "docs" / "tour.md"
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.DOTALL)
TIMED = re.compile(r"[\d,.]+ (?:s|tokens/s)\b")  # what the machine decides
NUMBER = re.compile(r"(-?\d+\.\d+)")


def run_tour(argv):
    """Run the blocks of a page (argv[0]) in one namespace; writes what each prints to a JSON file (argv[1])."""
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (progress bars)
    space, printed = {"__name__": "tour"}, []
    for code, _ in BLOCK.findall(Path(argv[0]).read_text(encoding="utf-8")):
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            try:
                exec(compile(code, argv[0], "exec"), space)
            except Exception as e:
                print(f"{type(e).__name__}: {e}")
        printed.append(shown.getvalue())
    Path(argv[1]).write_text(json.dumps(printed))
    return 0


def outputs(folder, page=PAGE):
    """What each block prints, run in a folder from which `demo` is visible and into which `out` is written."""
    (folder / "demo").symlink_to(ROOT / "demo")
    run_forked(run_tour, page, folder / "printed.json", cwd=folder)
    return json.loads((folder / "printed.json").read_text())


def with_output(code, shown):
    return f"```python\n{code}```\n" + (f"\n```text\n{shown}```\n" if shown else "")


def differing_line(shown, expected):
    """The first line where the two differ: text must be equal but for white space, times and speeds; numbers with a
    decimal point nearly: within 5 % or two units of the last digit."""
    ours, theirs = (
        [" ".join(TIMED.sub("", line).split()) for line in text.strip().splitlines()] for text in (shown, expected)
    )
    for a, b in zip(ours + [""] * len(theirs), theirs + [""] * (len(ours) - len(theirs))):
        words, wanted = NUMBER.split(a), NUMBER.split(b)
        near = len(words) == len(wanted) and all(
            float(x) == pytest.approx(float(y), rel=0.05, abs=2 * 10.0 ** -len(y.split(".")[1]))
            for x, y in zip(words[1::2], wanted[1::2])
        )
        if words[::2] != wanted[::2] or not near:
            return f"{a!r} is printed, the page says {b!r}"
    return None


def test_the_tour_prints_what_it_says(tmp_path):
    blocks = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    printed = outputs(tmp_path)
    errors = [(code, differing_line(ours, text)) for (code, text), ours in zip(blocks, printed, strict=True)]
    assert len(blocks) >= 15
    assert not [w for w in errors if w[1]]


@pytest.mark.parametrize(
    ("shown", "expected", "same"),
    [
        ("loss 2.31, 4.7 s", "loss 2.30, 9.9 s", True),
        ("loss 2.31", "loss 2.51", False),
        ("17 rows", "18 rows", False),
        ("a\nb", "a", False),
        ("", "a", False),
        ("a", "", False),
    ],
)
def test_the_comparison_sees_what_differs(shown, expected, same):
    assert (differing_line(shown, expected) is None) == same


def test_an_error_in_a_block_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1)\n```\n\n```text\n1\n```\n\n```python\n1 / 0\n```\n")
    assert outputs(tmp_path, page) == ["1\n", "ZeroDivisionError: division by zero\n"]


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        made = iter(outputs(Path(folder)))
    PAGE.write_text(BLOCK.sub(lambda m: with_output(m[1], next(made)), PAGE.read_text(encoding="utf-8")), "utf-8")
