"""The memory plan: for how many ranks it speaks, and what it says against what is measured."""

import pytest
from conftest import go


def totals(plan: str) -> dict[str, float]:
    """{heading, as "16 ranks": GiB together} of a printed plan."""
    lines = plan.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("GiB per rank"))
    headings = [part.strip() for part in lines[start].split("  ") if part.strip()][1:]
    together = next(line for line in lines[start:] if line.startswith("together"))
    return dict(zip(headings, map(float, together.replace(",", "").split()[1:]), strict=True))


# ---------------------------------------------------------------- for how many ranks


def test_replicas_are_planned_for_more_ranks_than_this_machine_starts(bench, tmp_path):
    dry = ["--dry-run", "--plan-gpu", "80", "--plan-world-size", "16"]
    assert totals(go(bench, tmp_path / "o", *dry).stdout).keys() == {"1 rank", "16 ranks"}
    assert totals(go(bench, tmp_path / "o", *dry, "--replicas", "2").stdout).keys() == {"16 ranks"}
    done = go(bench, tmp_path / "o", "--dry-run", "--replicas", "2", code=2)
    assert "does not divide 1 rank: --plan-world-size N plans for N ranks" in done.stderr
    assert "does not divide 15 ranks" in go(bench, tmp_path / "o", *dry[:-1], "15", "--replicas", "2", code=2).stderr


@pytest.mark.parametrize("flags", [["--plan-gpu", "80"], ["--plan-gpu", "0"], ["--plan-world-size", "2"]])
def test_planning_without_a_dry_run_is_refused(flags, bench, tmp_path):
    assert "need --dry-run" in go(bench, tmp_path / "o", *flags, code=2).stderr
    assert not (tmp_path / "o").exists()
