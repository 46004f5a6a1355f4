"""A run's folder is taken up again wherever a kill has stopped the run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from polymerge.errors import OutputError
from polymerge.inference.run_folder import alone_in, open_run


def test_a_run_that_was_killed_before_it_had_its_settings_begins_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    child = os.fork()
    if child == 0:
        Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment, method-assign]
        open_run(folder, {})
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [path.suffix for path in folder.iterdir()] == [".polymerge-new"]
    with alone_in(open_run(folder, {})):
        assert [path.name for path in folder.iterdir()] == ["run.json"]


def test_files_that_a_killed_run_did_not_finish_are_removed_by_the_one_that_has_the_lock(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", {})
    unfinished = run.part("weight-0.3") / ".0123456789abcdef.polymerge-new"
    unfinished.write_text("half")
    with alone_in(run):
        assert not unfinished.exists()
        unfinished.write_text("half of what is written now")
        with pytest.raises(OutputError, match="another process is at work"), alone_in(run):
            pass
        assert unfinished.exists()
    assert (run.folder / "run.json").is_file()
