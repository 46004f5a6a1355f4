"""Make an output with a fault at each call to the system in turn, and say what became of it: a script for tests.

    python faulty_output.py FOLDER HOW

HOW  killed (the process ends at the call), refused (the call fails, not done), lost (it fails, done), interrupted (a
     KeyboardInterrupt before it), late (one after it)

With and without an earlier output, which is to be replaced; on systems that can exchange two names, and on others; for
a run that keeps no journal, and for one that the next run goes on with.
Prints one line per case that breaks a promise, and the number of cases.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, Final

from polymerge import durable
from polymerge.checkpoints.output import journal_of, output_folder
from polymerge.errors import OutputError

CALLS: Final = (
    (os, "open"), (os, "mkdir"), (os, "rmdir"), (os, "unlink"), (os, "rename"), (os, "fsync"), (os, "close"),
    (fcntl, "flock"), (durable, "_renamed"),
)  # fmt: skip
FILES: Final = ("a", "b", "inside/c")
OUT: Final = "out"


class Fault:
    """Counts calls; at number `at` the fault happens, once."""

    def __init__(self, how: str, at: int) -> None:
        self.how, self.at, self.calls = how, at, 0

    def wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls != self.at:
                return call(*arguments, **options)
            if self.how == "killed":
                os._exit(9)
            if self.how in ("lost", "late"):
                call(*arguments, **options)
            if self.how in ("refused", "lost"):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            raise KeyboardInterrupt

        return wrapped


def write(folder: Path, text: str) -> None:
    (folder / "inside").mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (folder / name).write_text(text, encoding="utf-8")


def found(folder: Path) -> str | None:
    """The text in all files of an output, None if there is none; anything else is a broken one."""
    if not os.path.lexists(folder):
        return None
    present = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    texts = {(folder / name).read_text(encoding="utf-8") for name in present}
    return texts.pop() if present == sorted(FILES) and len(texts) == 1 else f"broken: {present} {sorted(texts)}"


def in_a_process_of_its_own(action: Callable[[], int]) -> int:
    """The exit status of an action in a child."""
    child = os.fork()
    if child == 0:
        os._exit(action())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def merged(out: Path, text: str, force: bool, run: str) -> str:
    """Make an output, with a journal if it is of a run that can be gone on with; returns why it was refused."""
    try:
        with output_folder(out, force=force, run=run) as folder:
            if run:
                journal_of(folder).write_text(text, encoding="utf-8")
            write(folder, text)
    except OutputError as error:
        return str(error)
    return ""


def disturbed(out: Path, fault: Fault, earlier: bool, told: Path, run: str) -> int:
    for room, name in CALLS:
        setattr(room, name, fault.wrap(getattr(room, name)))
    try:
        said = merged(out, "new", earlier, run)
    except KeyboardInterrupt:
        said = "interrupted"
    except BaseException as error:
        said = f"foreign {type(error).__name__}: {error}"
    told.write_text(f"{fault.calls} {said}", encoding="utf-8")
    return 0


def next_run(out: Path, force: bool, told: Path, run: str) -> int:
    told.write_text(merged(out, "next", force, run), encoding="utf-8")
    return 0


def broken_promises(
    folder: Path, how: str, at: int, earlier: bool, exchange: bool, force: bool, run: str
) -> tuple[bool, str]:
    """One case: whether the fault happened, and the promise that was broken."""
    folder.mkdir()
    out, told = folder / OUT, folder.with_suffix(".told")
    if earlier:
        write(out, "earlier")
    status = in_a_process_of_its_own(lambda: disturbed(out, Fault(how, at), earlier, told, run))
    happened = status == 9 or int(told.read_text().partition(" ")[0]) >= at
    said = "" if status == 9 else told.read_text().partition(" ")[2]
    now, work = found(out), folder / f".{OUT}.polymerge-partial"
    hidden = sorted(path.name for path in work.iterdir() if path.name != "lock") if work.exists() else []
    elsewhere = found(folder / f"{OUT}-1")
    if status not in (0, 9) or said.startswith("foreign"):
        return happened, f"status {status}: {said}"
    allowed = ["earlier", "new"] if earlier else [None, "new"]
    if how == "killed" and not exchange:
        allowed.append(None)
    if now not in allowed:
        return happened, f"under the name: {now}; {said}"
    if not said and how != "killed" and now != "new":
        return happened, f"told of success: {now}"
    if elsewhere not in (None, "new") or (elsewhere and f"{OUT}-1" not in said):
        return happened, f"kept and not told: {elsewhere}; {said}"
    if hidden and how in ("refused", "lost") and said and ".polymerge-partial" not in said:
        return happened, f"left and not told: {hidden}; {said}"
    in_a_process_of_its_own(lambda: next_run(out, force, told, run))
    again, then = told.read_text(), found(out)
    if force or (now is None and not earlier):
        if again or then != "next":
            return happened, f"next run: {then}, {again}"
    elif "exists already" not in again or then != (now or "earlier"):
        return happened, f"next run: {then} instead of {now or 'earlier'}, {again}"
    left = sorted(path.name for path in folder.iterdir() if path.name.startswith("."))
    return happened, f"next run left {left}" if left else ""


def main(folder: Path, how: str) -> None:
    os.fsync = lambda _: None  # nobody cuts the power here
    cases, can_exchange = 0, durable._renamed
    for exchange, earlier, force, run in product(
        (True, False), (True, False), (False, True) if how == "killed" else (False,), ("", "a run")
    ):
        durable._renamed = can_exchange if exchange else lambda *_: False
        at, happened = 0, True
        while happened:
            at += 1
            at_once = folder / f"{at}-{earlier}-{exchange}-{force}-{bool(run)}"
            happened, broken = broken_promises(at_once, how, at, earlier, exchange, force, run)
            if broken:
                print(f"{how}, call {at}, earlier {earlier}, exchange {exchange}, next force {force}, {run}: {broken}")
        cases += at - 1
    print(cases)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
