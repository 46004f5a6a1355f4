"""Standard streams that are closed, full or unread, and the signals that end a command."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import polymerge
from polymerge.cli.streams import paint_for
from running import leftovers, linear, raw, recipe_file, two_llamas

RUN = "import sys; from polymerge.cli import main; main()"

SLOW = """
import os, sys, time
from polymerge.cli import main
write, count = os.pwrite, 0
def slow(*arguments):
    global count
    count += 1
    if count == 3:
        print("half way", flush=True)
        time.sleep(2)
    return write(*arguments)
os.pwrite = slow
main()
"""


def command(*words: object, code: str = RUN) -> list[str]:
    return [sys.executable, "-c", code, *map(str, words)]


def closing(*numbers: int) -> Callable[[], None]:
    def close() -> None:
        for number in numbers:
            os.close(number)

    return close


@pytest.mark.parametrize("numbers", [(1,), (2,), (0, 1, 2), (0,)])
def test_a_merge_with_closed_streams_is_a_merge(numbers: tuple[int, ...], tmp_path: Path) -> None:
    recipe = recipe_file(linear(*two_llamas(tmp_path)), tmp_path / "r.yaml")
    words = command("merge", recipe, "-o", tmp_path / "out", "--no-verify")
    done = subprocess.run(words, preexec_fn=closing(*numbers), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert raw(tmp_path / "out") == raw(polymerge.merge(recipe, tmp_path / "again", check=False).folder)


@pytest.mark.parametrize("numbers", [(1,), (2,), (1, 2)])
def test_a_refusal_with_closed_streams_keeps_its_status(numbers: tuple[int, ...]) -> None:
    words = command("plan", "no such file")
    done = subprocess.run(words, preexec_fn=closing(*numbers), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert ("no such recipe" in done.stderr) == (2 not in numbers)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no full device")
@pytest.mark.parametrize("words", [["methods"], ["--help"], ["families", "--json"]])
def test_standard_output_that_is_full(words: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command(*words), stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "polymerge: standard output: No space left on device. Make room, or name a place on another disk\n"
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no full device")
def test_standard_error_that_is_full_stops_nothing(tmp_path: Path) -> None:
    base, one = two_llamas(tmp_path)
    recipe = recipe_file({**linear(base, one), "base_model": str(base)}, tmp_path / "r.yaml")  # it is noted on stderr
    with Path("/dev/full").open("w") as full:
        words = command("merge", recipe, "-o", tmp_path / "out", "--no-verify")
        done = subprocess.run(words, stderr=full, stdout=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 0
        assert subprocess.run(command("merg"), stderr=full, check=False).returncode == 2
    assert done.stdout.startswith(f"{tmp_path / 'out'}: 5 tensors merged")


@pytest.mark.parametrize("words", [["methods"], ["families", "--json"], ["--help"]])
def test_output_that_nobody_reads(words: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command(*words), stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def slowly(folder: Path, ignored: tuple[signal.Signals, ...]) -> subprocess.Popen[str]:
    """A merge that is half way, started by a parent that ignores some signals."""

    def prepare() -> None:
        for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(one, signal.SIG_IGN if one in ignored else signal.SIG_DFL)

    recipe = recipe_file(linear(*two_llamas(folder)), folder / "r.yaml")
    words = command("merge", recipe, "-o", folder / "out", "--no-verify", "--threads", 1, code=SLOW)
    started = subprocess.Popen(
        words, preexec_fn=prepare, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    assert started.stdout is not None
    assert started.stdout.readline() == "half way\n"
    return started


@pytest.mark.parametrize("one", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_merge_in_order(one: signal.Signals, tmp_path: Path) -> None:
    with slowly(tmp_path, ()) as started:
        started.send_signal(one)
        started.send_signal(one)  # again, as who is in a hurry does: the first is enough
        _, said = started.communicate(timeout=60)
    assert started.returncode == 1
    assert said.strip() == "polymerge: interrupted; no half-written output stands under its name"
    assert not (tmp_path / "out").exists()
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("one", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_the_parent_ignores_is_ignored(one: signal.Signals, tmp_path: Path) -> None:
    with slowly(tmp_path, (one,)) as started:
        started.send_signal(one)
        _, said = started.communicate(timeout=60)
    assert (started.returncode, said) == (0, "")
    assert (tmp_path / "out").is_dir()


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "said", "coloured"),
    [
        (_Terminal(), {"TERM": "xterm"}, True),
        (_Terminal(), {"TERM": "xterm", "NO_COLOR": "1"}, False),
        (_Terminal(), {"TERM": "xterm", "NO_COLOR": ""}, True),  # no-color.org: when present and not an empty string
        (_Terminal(), {"TERM": "dumb"}, False),
        (io.StringIO(), {"TERM": "xterm"}, False),
    ],
)
def test_colours_are_for_terminals_that_have_them(
    stream: io.StringIO, said: dict[str, str], coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    paint = paint_for(stream)
    assert paint("error", "text") == ("\x1b[31m\x1b[1mtext\x1b[0m" if coloured else "text")
    assert paint("merged", "text") == ("\x1b[32mtext\x1b[0m" if coloured else "text")
