"""Several workers, or one that is killed, come to the same search.json."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from operator import attrgetter
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from polymerge.errors import RecipeError, Refused
from polymerge.inference.answering import AnswerError
from polymerge.inference.job import Job
from polymerge.inference.worker import Worker
from polymerge.inference.worker_pool import Call, WorkerError, WorkerPool, _done, own_device
from running import cli, killed_in_the_middle, recipe_file
from search_made import VLM, prompts_file, recipe, words

COMMAND = [sys.executable, "-c", "from polymerge.cli import main; main()"]
HOW = ("--values", "0:1.5:0.5", "--scorer", "exact", "--batch-size", "4", "--torch-threads", "1")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prompts_file(tmp_path_factory.mktemp("prompts"), 16)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, prompts: Path) -> bytes:
    """The search.json of one process that is left in peace."""
    folder = tmp_path_factory.mktemp("alone")
    ran = cli(*words(folder, prompts, *HOW))
    assert ran.status == 0, ran.err
    return (folder / "run" / "search.json").read_bytes()


@pytest.mark.parametrize(
    ("device", "gpus", "given"),
    [("cuda", 2, ["cuda:0", "cuda:1", "cuda:0"]), ("cuda:1", 2, ["cuda:1"] * 3), ("cpu", 0, ["cpu"] * 3)],
)
def test_each_worker_has_the_next_gpu(
    device: str, gpus: int, given: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert [own_device(device, number) for number in range(3)] == given


def test_two_processes(prompts: Path, alone: bytes, tmp_path: Path) -> None:
    ran = cli(*words(tmp_path, prompts, *HOW, "--workers", "2"))
    assert ran.status == 0, ran.err
    assert (tmp_path / "run" / "search.json").read_bytes() == alone


def test_a_local_ray_cluster_with_two_workers(prompts: Path, alone: bytes, tmp_path: Path) -> None:
    # in a process of its own: Ray's warnings are not ours, and it leaves threads behind
    told = [*map(str, words(tmp_path, prompts, *HOW, "--workers", "2")), "--ray"]
    done = subprocess.run([*COMMAND, *told], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "search.json").read_bytes() == alone


def test_killed_in_the_middle_and_resumed(prompts: Path, alone: bytes, tmp_path: Path) -> None:
    told = list(map(str, words(tmp_path, prompts, *HOW)))
    logs = tmp_path / "run" / "candidates"
    killed_in_the_middle([*COMMAND, *told], lambda: len(list(logs.glob("*/answers.jsonl"))) >= 2)
    assert not (tmp_path / "run" / "search.json").exists()
    kept = {file: file.read_bytes() for file in logs.glob("*/answers.jsonl")}
    ran = cli(*words(tmp_path, prompts, *HOW))
    assert ran.status == 0, ran.err
    assert (tmp_path / "run" / "search.json").read_bytes() == alone
    assert all(file.read_bytes().startswith(data[: data.rfind(b"\n") + 1]) for file, data in kept.items())


def test_workers_end_with_a_parent_that_is_killed(prompts: Path, tmp_path: Path) -> None:
    told = list(map(str, words(tmp_path, prompts, *HOW, "--workers", "2")))
    started = subprocess.Popen(
        [*COMMAND, *told], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 240
    logs = tmp_path / "run" / "candidates"
    while not list(logs.glob("*/answers.jsonl")) and started.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    started.kill()
    started.wait()
    while _of_session(started.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _of_session(started.pid)


def _of_session(leader: int) -> list[int]:
    """The processes that still belong to a session."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[3]) == leader and fields[0] != "Z":
                found.append(int(folder.name))
    return found


def test_an_error_in_a_worker_is_told_as_if_there_were_none(prompts: Path, tmp_path: Path) -> None:
    vlm = tmp_path / "vlm"
    shutil.copytree(VLM, vlm)
    tensors = load_file(vlm / "model.safetensors")
    del tensors["multi_modal_projector.linear_1.bias"]
    save_file(tensors, vlm / "model.safetensors", metadata={"format": "pt"})
    made = recipe(template=str(vlm))
    made["models"][0]["model"] = str(vlm)
    recipe_file(made, tmp_path / "recipe.yaml")
    ends = {count: cli(*words(tmp_path, prompts, *HOW, "--workers", count, run=f"run{count}")) for count in (1, 2)}
    assert ends[1].status == ends[2].status == 1
    assert "1 missing" in ends[1].err
    assert ends[1].err == ends[2].err


def test_a_cluster_that_is_not_there(prompts: Path, tmp_path: Path) -> None:
    told = [*map(str, words(tmp_path, prompts, *HOW)), "--ray", "nonsense://"]
    done = subprocess.run([*COMMAND, *told], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2, done.stderr
    assert "--ray nonsense://: no cluster can be reached there" in done.stderr


def test_no_workers_are_none() -> None:
    with pytest.raises(RecipeError, match="0 are none"):
        WorkerPool(Job(None), 0)


def test_several_problems_come_whole_out_of_another_process() -> None:
    import pickle

    problems = Refused([RecipeError("one"), RecipeError("two")])
    again = pickle.loads(pickle.dumps(problems))
    assert str(again) == str(problems)
    assert again.exit_status == 2
    failed = pickle.loads(pickle.dumps(AnswerError("no answer", [3, "4"])))
    assert (str(failed), failed.ids) == ("no answer", (3, "4"))


def test_a_worker_that_is_gone_is_said_in_a_line() -> None:
    def gone(*_: object) -> Future[object]:
        future: Future[object] = Future()
        future.set_exception(BrokenProcessPool("terminated abruptly"))
        return future

    pool = WorkerPool(Job(None))
    pool._submit = gone
    with pytest.raises(WorkerError, match="run again to go on"):
        pool.submit(0, partial(Worker.take, plan=None)).result()


def test_each_stream_is_carried_out_in_order_by_one_worker() -> None:
    made: list[tuple[int, str]] = []

    def submit(worker: int, call: Call) -> Future[object]:
        future: Future[object] = Future()
        made.append((worker, call(None)))  # type: ignore[arg-type]
        future.set_result(made[-1])
        return future

    pool = WorkerPool(Job(None), 2)
    pool._submit = submit
    streams = [[(name, lambda _, text=f"{name}{place}": text) for place in range(2)] for name in "abc"]
    found = list(pool.run(map(iter, streams)))
    assert sorted(text for _, (_, text) in found) == ["a0", "a1", "b0", "b1", "c0", "c1"]
    assert all(text.startswith(name) for name, (_, text) in found)
    for name in "abc":
        own = [(worker, text) for worker, text in made if text.startswith(name)]
        assert own == [(own[0][0], f"{name}0"), (own[0][0], f"{name}1")]


def test_an_error_of_one_call_ends_the_run() -> None:
    pool = WorkerPool(Job(None))
    pool._submit = lambda _, call: _done(lambda: call(None))  # type: ignore[arg-type]
    calls = iter([("first", lambda _: 1), ("second", lambda _: 1 / 0), ("third", lambda _: 1)])
    run = pool.run([calls])
    assert next(run) == ("first", 1)
    with pytest.raises(ZeroDivisionError):
        next(run)
    assert [purpose for purpose, _ in calls] == ["third"]


def test_workers_find_no_modules_where_the_user_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pickle", "socket", "signal", "multiprocessing"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    before = os.environ.copy()
    with WorkerPool(Job(None, "a"), 2) as pool:
        assert pool.submit(0, attrgetter("_job.folder")).result() == "a"
    assert not (tmp_path / "ran").exists()
    assert os.environ == before
    assert Path.cwd() == tmp_path


RESTING = """
import sys, time
from pathlib import Path
from polymerge.cli.streams import heed_signals
from polymerge.inference.job import Job
from polymerge.inference.worker_pool import WorkerPool

def rest(worker):
    Path(sys.argv[1], worker._job.folder + str(time.monotonic_ns())).touch()
    time.sleep(600)

if __name__ == "__main__":
    heed_signals()
    try:
        with WorkerPool(Job(None, "at-rest"), 2) as pool:
            print("begun", flush=True)
            list(pool.run([iter([(0, rest)]), iter([(1, rest)])]))
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


@pytest.mark.parametrize("one", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("when", ["starting", "busy"])
def test_an_interrupt_of_all_processes_ends_without_tracebacks(one: signal.Signals, when: str, tmp_path: Path) -> None:
    script = tmp_path / "resting.py"
    script.write_text(RESTING, encoding="utf-8")

    def as_from_a_terminal() -> None:
        for own in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(own, signal.SIG_DFL)

    with subprocess.Popen(
        [sys.executable, script, tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=as_from_a_terminal,
    ) as started:  # fmt: skip
        assert started.stdout is not None
        assert started.stdout.readline() == "begun\n"
        while when == "busy" and len(list(tmp_path.glob("at-rest*"))) < 2 and started.poll() is None:
            time.sleep(0.05)
        os.killpg(started.pid, one)
        out, said = started.communicate(timeout=120)
    assert (started.returncode, out, said) == (0, "interrupted\n", "")
    # multiprocessing's own tracker ends once it notices that its parent has
    end = time.monotonic() + 30
    while _of_session(started.pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not _of_session(started.pid)
