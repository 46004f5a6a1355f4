"""What is shown of a long command: bytes or answers, and whole matrices with the time left by their cost."""

from __future__ import annotations

import io
import sys

import pytest

from polymerge.cli import progress
from polymerge.cli.progress import progress_bar


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    return found


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_lines_of_bytes_come_every_ten_seconds(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("merging") as shown:
        for second in range(41):
            clock.now = 100.0 + second
            shown(100 * second, 4000)
    assert capsys.readouterr().err.splitlines() == [
        f"merging: {done} kB of 4.0 kB, 100 B/s, about {left} s left"
        for done, left in (("1.0", 30), ("2.0", 20), ("3.0", 10))
    ]


def test_the_time_left_of_matrices_follows_from_their_cost(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("merging") as shown:
        shown.matrices(0, 8, 0.0)
        clock.now += 11
        shown(200, 4000)
        clock.now += 9
        shown.matrices(1, 8, 0.25)
        clock.now += 11
        shown.matrices(2, 8, 0.001)
        clock.now += 11
        shown.matrices(8, 8, 1.0)
        shown(4000, 4000)
    assert capsys.readouterr().err.splitlines() == [
        "merging: 0 of 8 matrices, 200 B of 4.0 kB",
        "merging: 2 of 8 matrices, 200 B of 4.0 kB, about 8.6 h left",
        "merging: 8 of 8 matrices, 200 B of 4.0 kB",
    ]


def test_a_bar_of_matrices_grows_by_their_cost(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar("merging") as shown:
        shown(200, 4000)
        shown.matrices(0, 8, 0.0)
        assert shown._bar is not None
        for done, share in ((1, 0.05), (2, 0.5)):
            clock.now += 200
            shown.matrices(done, 8, share)
            shown(400, 4000)
        shown._bar.refresh()
        assert "merging:  50%|" in terminal.getvalue()
        assert "| 2 of 8 matrices, 400 B of 4.0 kB, about 6.7 min left" in terminal.getvalue()
        assert (shown._bar.n, shown._bar.total) == (0.5, 1.0)


def test_a_bar_of_answers_is_one_of_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar("answers", unit="") as shown:
        shown(30, 40)
        assert shown._bar is not None
        shown._bar.refresh()
    assert "30/40" in terminal.getvalue()
