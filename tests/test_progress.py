"""Progress without a terminal: a line per half minute, with the time left."""

import re

import pytest
from conftest import go

import train
from parts import cli
from parts.checkpoints.run_log import duration


def lines_of(capsys, work) -> list[str]:
    work()
    return capsys.readouterr().err.splitlines()


def test_without_a_terminal_progress_is_a_line_now_and_then(capsys, monkeypatch):
    def count():
        with cli.progress(50, "ifd", "row") as bar:
            for _ in range(50):
                bar.update()

    assert lines_of(capsys, count) == []
    monkeypatch.setattr(cli, "LINE_SECONDS", 0)
    lines = lines_of(capsys, count)
    assert len(lines) > 10 and all(re.fullmatch(r"ifd: \d+/50 row \[\d\d:\d\d<\S+\]", line) for line in lines), lines


def impatient(argv):
    cli.LINE_SECONDS = 0
    return train.main(argv)


@pytest.mark.parametrize("more", [["--eval", "s2", "--eval-every", "3"], ["--select", "iterit", "--ratio", "0.5"]])
def test_training_shows_step_loss_speed_and_time_left(bench, tmp_path, more):
    done = go(bench, tmp_path / "o", *more, main=impatient)
    said = done.stderr.splitlines()
    steps = [line for line in said if line.startswith("stage")]
    pattern = r"stage\d: \d+/\d+ step \[\d\d:\d\d, loss \d+\.\d{3}, [\d,]+ tokens/s, [\d.]+ (s|min|h) left in all\]"
    matched = [line for line in steps if re.fullmatch(pattern, line)]
    assert matched[-1].startswith("stage3") and " 0 s left" in matched[-1]
    assert "" not in said and "\r" not in done.stderr
    other = "held-out loss, s2: " if "--eval" in more else "stage2 IFD: "
    assert any(line.startswith(other) for line in said)


def test_durations_are_readable():
    assert [duration(s) for s in (3, 99, 720, 12600)] == ["3 s", "99 s", "12 min", "3.5 h"]
