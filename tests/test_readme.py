"""README, CONTRIBUTING and docs say what is true: files, sizes, defaults, what a run prints, what it needs."""

import ast
import re
import sys

from conftest import ROOT, run_forked

import train

README = (ROOT / "README.md").read_text(encoding="utf-8")
DESIGN = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
TRAINING = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def block(mark):
    return re.search(rf"<!-- {mark} -->\n```\w*\n(.*?)```", README, re.DOTALL)[1]


def test_every_file_named_is_there_and_every_part_is_named():
    for text in (README, CONTRIBUTING, DESIGN):
        for path in re.findall(r"`((?:parts|demo|tests)/[\w./]+\.\w+|\w+\.py)`", text):
            assert (ROOT / path).exists(), path
    tree = README[README.index("## Files") :]
    assert all(f"\n{path.name} " in tree for path in ROOT.glob("*.py"))
    for path in (ROOT / "parts").rglob("*.*"):
        assert f"`{path.relative_to(ROOT)}`" in DESIGN, path


def test_what_contributing_names_is_where_it_says():
    for row in re.findall(r"^\| [^|]+ \| ([^|]+) \|", CONTRIBUTING, re.MULTILINE):
        files = re.findall(r"`([\w/]+\.py)`", row)
        source = "".join((ROOT / file).read_text(encoding="utf-8") for file in files)
        for name in re.findall(r"`([\w.]+)`", row):
            assert name.endswith(".py") or not files or name.split(".")[-1] in source, (name, row)


def test_the_story_is_as_short_as_it_says():
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in ROOT.glob("*.py")}
    story = sum(lines[name] for name in ("model.py", "data.py", "train.py"))
    said = int(re.search(r"`train\.py` together have about\s+([\d,]+) lines", README)[1].replace(",", ""))
    assert abs(story - said) <= 0.05 * said, story
    assert max(lines.values()) <= 660, lines


def test_the_plan_that_it_prints_is_the_plan(tmp_path):
    printed = block("printed").splitlines()
    done = run_forked(train.main, "--dry-run", "--dtype", "bf16", "--out", tmp_path / "o", cwd=ROOT)
    assert done.stdout.splitlines()[:6] == printed[:6]


def test_the_defaults_in_the_table_of_flags_are_the_parsers():
    table = TRAINING[TRAINING.index("## Flags") : TRAINING.index("## What a run writes")]
    args, checked = train.parse_args([]), 0
    for flag, default in re.findall(r"^\| `--([a-z-]+)[^`]*` \| `?([^|`]*?)`? \|", table, re.MULTILINE):
        value = getattr(args, flag.replace("-", "_"))
        if default and not isinstance(value, list) and re.fullmatch(r"[\w.]+", default):
            assert str(value) == default or float(value) == float(default), flag
            checked += 1
    assert checked >= 6


def test_run_time_needs_only_the_packages_that_it_names():
    named = set(re.search(r"`(torch sentencepiece[\w\s]+)`", README)[1].split())
    listed = {re.split(r"[=>]", line)[0] for line in (ROOT / "requirements.txt").read_text().split()}
    own = {path.stem for path in ROOT.glob("*.py")} | {"parts"}
    found = set()
    for path in [*ROOT.glob("*.py"), *(ROOT / "parts").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            found |= {name.split(".")[0] for name in names}
    assert named == listed == found - own - set(sys.stdlib_module_names) - {"matplotlib"}
