"""The program of one worker of `fuzz_pool`: reads tasks, judges their inputs, answers each task with a line."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

from fuzz_judge import judge, limit_this_process
from fuzz_kinds import KINDS
from fuzz_pool import random_of


def main() -> None:
    scratch = Path(sys.argv[1])
    logging.disable(logging.CRITICAL)
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a command prints is no answer
    os.chdir(scratch)
    now = os.open(scratch / "now", os.O_WRONLY)
    limit_this_process()
    for line in sys.stdin:
        name, seed, first, count = json.loads(line)
        kind = KINDS[name]
        accepted = refused = 0
        total = slowest = 0.0
        peak = 0
        failures: list[tuple[int, str]] = []
        for number in range(first, first + count):
            os.pwrite(now, b"%-20d" % number, 0)
            verdict = judge(kind, kind.make(random_of(name, seed, number)), scratch / "input", scratch)
            if verdict.failure:
                failures.append((number, verdict.failure))
            elif verdict.refused:
                refused += 1
            else:
                accepted += 1
            total += verdict.seconds
            slowest, peak = max(slowest, verdict.seconds), max(peak, verdict.peak)
        said = {"accepted": accepted, "refused": refused, "seconds": total, "slowest": slowest, "peak": peak}
        answers.write(json.dumps({**said, "failures": failures}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
