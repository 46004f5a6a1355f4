"""Merges on a cluster of three machines, and what becomes of them when it is disturbed: a script for tests.

    python ray_merges.py FOLDER

Writes FOLDER/found.json, for Ray prints what it likes. FOLDER/methods.py has a method that waits while there is a file
`hold` beside it, once it was called as often as that file says; it leaves a file in `begun` for every call, with the
name of the machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

import adapters_made
import polymerge
import search_made
from polymerge.errors import PolymergeError
from polymerge.planning.folding import fold_recipe
from running import cli, leftovers, recipe_file
from tiny import build, perturbed

HOW = ("--batch-size", "2", "--torch-threads", "1")
COMMAND = [sys.executable, "-c", "from polymerge.cli import main; main()"]

METHODS = """
import errno, os, time
from pathlib import Path

import polymerge
from polymerge.methods.kernels import weighted_sum

HERE = Path(__file__).parent


def machine():
    import ray

    return ray.get_runtime_context().get_node_id()


def waiting(deltas, weight):
    hold = HERE / "hold"
    if hold.exists():
        mark = HERE / "begun" / f"{machine()}-{os.getpid()}-{time.monotonic_ns()}"
        mark.touch()
        end, free = time.monotonic() + 120, len(list(mark.parent.iterdir())) <= int(hold.read_text())
        while not free and hold.exists() and time.monotonic() < end:
            time.sleep(0.05)
    return weighted_sum(deltas, weight)


WAITING = polymerge.Method(
    "waiting", "the sum of deltas", "nowhere", on="deltas", function=waiting,
    parameters=(polymerge.Parameter("weight", "number", 0.5, each=True),),
)

FULL = HERE / "full"
if FULL.exists() and machine() == FULL.read_text():
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.posix_fallocate = full
"""


def files_of(folder: Path) -> dict[str, str]:
    """The sha256 of every file; of the record without the moment and the command by which it was made."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            if path.name == "polymerge.json":
                record = json.loads(content)
                for one in (record, *record.get("stages", ())):
                    del one["created"], one["command"]
                content = json.dumps(record).encode()
            found[path.relative_to(folder).as_posix()] = hashlib.sha256(content).hexdigest()
    return found


class Tries:
    """Recipes, carried out on one machine and on the cluster."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.folder, self.cluster = folder, cluster
        self.hold, self.begun = folder / "hold", folder / "begun"
        self.begun.mkdir()
        self.methods = folder / "methods.py"
        self.methods.write_text(METHODS, encoding="utf-8")
        base = build("llama", folder / "base", layers=3)
        self.tuned = [perturbed(base, folder / f"tuned{seed}", seed=seed) for seed in (1, 2)]
        self.base = base

    def recipe(self, method: str, **parameters: Any) -> dict[str, Any]:
        models = [{"model": str(one)} for one in self.tuned]
        return {"merge_method": method, "base_model": str(self.base), "models": models, "parameters": parameters}

    def merge(self, recipe: Any, out: Path, **more: Any) -> Any:
        out.parent.mkdir(exist_ok=True)
        how = {"check": False, "shard_size": "10KB", "methods": self.methods, "command": ["x"], "threads": 1}
        return polymerge.merge(recipe, out, **{**how, **more})

    def twice(self, name: str, recipe: Any, **more: Any) -> dict[str, Any]:
        """Merge on one machine and on the cluster."""
        one = self.merge(recipe, self.folder / "one" / name, **more)
        made = self.merge(recipe, self.folder / "many" / name, ray=self.cluster.address, **more)
        same = files_of(one.folder) == files_of(made.folder)
        return {"same": same, "machines": len({task.machine for task in made.worked}), "tasks": len(made.worked)}

    def held(self, free: int, until: Callable[[], bool], then: Callable[[], None]) -> threading.Thread:
        """Hold all calls of the method but some, wait for something, do something, and let go."""
        for mark in self.begun.iterdir():
            mark.unlink()
        self.hold.write_text(str(free))

        def watch() -> None:
            end = time.monotonic() + 120
            while not until() and time.monotonic() < end:
                time.sleep(0.02)
            then()
            self.hold.unlink()

        watching = threading.Thread(target=watch)
        watching.start()
        return watching

    def node_lost(self) -> dict[str, Any]:
        """A machine is killed while it is at a task."""
        victims = [node for node in self.cluster.list_all_nodes() if node is not self.cluster.head_node]
        waiting: dict[str, int] = {}

        def begun() -> bool:
            waiting.update((node, int(pid)) for node, pid, _ in (mark.name.split("-") for mark in self.begun.iterdir()))
            return any(node.node_id in waiting for node in victims)

        def kill() -> None:
            (victim, *_) = [node for node in victims if node.node_id in waiting]
            # with a machine all of its processes are lost; one that answers on ends the driver, by a check in Ray 2.60
            os.kill(waiting[victim.node_id], signal.SIGKILL)
            self.cluster.remove_node(victim, allow_graceful=False)
            end = time.monotonic() + 60
            while all(node["Alive"] for node in ray.nodes()) and time.monotonic() < end:
                time.sleep(0.1)

        watching = self.held(0, begun, kill)
        made = self.merge(self.recipe("waiting"), self.folder / "many" / "lost", ray=self.cluster.address)
        watching.join()
        one = self.merge(self.recipe("waiting"), self.folder / "one" / "lost")
        alive = sum(node["Alive"] for node in ray.nodes())
        return {"same": files_of(one.folder) == files_of(made.folder), "alive": alive}

    def driver_lost(self) -> dict[str, Any]:
        """The driver, a command line, is killed once a shard is noted; the next run goes on."""
        recipe, out = self.recipe("waiting"), self.folder / "many" / "driver"
        file = recipe_file(recipe, self.folder / "recipe.yaml")
        words = ["merge", file, "-o", out, "--no-verify", "--shard-size", "10KB", "--methods", self.methods]
        journal = out.with_name(".driver.polymerge-partial") / "finished"
        process: list[subprocess.Popen[bytes]] = []

        def noted() -> bool:
            there = journal.exists() and journal.stat().st_size > 0  # the file is made before its first line
            return bool(process) and (process[0].poll() is not None or there)

        # three machines have one shard each, of seven, six and five tensors: one of them can be completed, and not all
        watching = self.held(18, noted, lambda: process[0].send_signal(signal.SIGKILL))
        told = [*COMMAND, *map(str, words), "--ray", self.cluster.address, "--threads", "1"]
        process.append(subprocess.Popen(told))
        status = process[0].wait()
        watching.join()
        before = out.exists()
        again = cli(*words, "--ray", self.cluster.address, "--threads", "1")
        one = self.merge(recipe, self.folder / "one" / "driver")
        return {
            "status": status,
            "before": before,
            "again": again.out + again.err,
            "same": files_of(one.folder) == files_of(out),
            "left": leftovers(out.parent),
        }

    def loses_a_machine(self, name: str, result: str, words: Callable[[Path], Sequence[object]]) -> dict[str, Any]:
        """A machine is killed while models on the cluster's two are asked; the next run goes on without it.

        result  the name of the file that a run of the command writes last
        words   of the command, with its run in a folder
        """
        alone, many = self.folder / f"{name}-one", self.folder / f"{name}-many"
        (victim,) = [node for node in self.cluster.list_all_nodes() if node is not self.cluster.head_node]
        over = threading.Event()

        def kill() -> None:
            while not any(log.stat().st_size for log in many.rglob("answers*.jsonl")) and not over.is_set():
                time.sleep(0.005)
            self.cluster.remove_node(victim, allow_graceful=False)

        killing = threading.Thread(target=kill)
        killing.start()
        lost = cli(*words(many), *HOW, "--workers", "2", "--ray", self.cluster.address)
        over.set()
        killing.join()
        before = next(many.rglob(result), None)
        kept = sum(log.stat().st_size for log in many.rglob("answers*.jsonl"))
        again, done = cli(*words(many), *HOW), cli(*words(alone), *HOW)
        (mine,), (theirs,) = many.rglob(result), alone.rglob(result)
        return {
            "ends": [lost.status, again.status, done.status],
            "said": lost.err,
            "before": before,
            "kept": kept,
            "same": mine.read_bytes() == theirs.read_bytes(),
        }

    def disk_full(self) -> dict[str, Any]:
        """The disk of one machine is full."""
        (self.folder / "full").write_text(self.cluster.head_node.node_id)
        self.methods.write_text(f"{METHODS}# another text is run once more\n")
        out = self.folder / "many" / "full"
        try:
            self.merge(self.recipe("waiting"), out, ray=self.cluster.address)
        except PolymergeError as error:
            left = [*leftovers(out.parent), *out.parent.glob("full")]
            return {"said": str(error), "kind": type(error).__name__, "left": left}
        return {}


def main(folder: Path) -> None:
    began = time.monotonic()
    small = {"num_cpus": 1, "object_store_memory": 80 << 20}
    soon = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 2}
    # other tests run meanwhile, and by default they go before Ray's workers
    head = {**small, "include_dashboard": False, "_system_config": {**soon, "worker_niceness": 0}}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        cluster.add_node(wait=False, **small)
    tries = Tries(folder, cluster)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    adapters = [adapters_made.adapter(folder / f"adapter{seed}", seed=seed) for seed in (1, 2)]
    found: dict[str, Any] = {}

    def note(name: str, what: dict[str, Any]) -> None:
        found[name] = {**what, "seconds": round(time.monotonic() - began, 1)}

    note("ties", tries.twice("ties", tries.recipe("ties", density=0.3, trim="model", weight=1.0), block=100))
    note("gram", tries.twice("gram", tries.recipe("model_stock")))
    note("spectral", tries.twice("spectral", tries.recipe("iso_c")))
    note("adapters", tries.twice("adapters", adapters_made.recipe("ties", adapters, parameters={"density": 0.5})))
    adapters_made.llama().save_pretrained(folder / "of adapters")
    folded = fold_recipe(str(adapters[0]), str(folder / "of adapters"))
    note("fold", tries.twice("fold", folded, shard_size="1KB"))
    first = {**tries.recipe("task_arithmetic", weight=0.5), "name": "first"}
    last = {"merge_method": "linear", "models": ["first", str(tries.base)], "parameters": {"weight": 0.5}}
    note("stages", tries.twice("stages", {"stages": [first, last]}))
    note("driver lost", tries.driver_lost())
    note("node lost", tries.node_lost())
    note("disk full", tries.disk_full())
    prompts = search_made.prompts_file(folder, 12)

    def searched(run: Path) -> Sequence[object]:
        run.mkdir(exist_ok=True)
        return *search_made.words(run, prompts, "--scorer", "exact"), "--values", "0:1.5:0.1"

    note("search", tries.loses_a_machine("search", "search.json", searched))
    cluster.add_node(**small)
    (folder / "many prompts").mkdir()
    more = search_made.prompts_file(folder / "many prompts", 240)
    evaluated = ("evaluate", search_made.VLM, "--tasks", f"{more}:exact", "--max-new-tokens", "3")
    note("evaluate", tries.loses_a_machine("evaluate", "results.json", lambda run: (*evaluated, "-o", run)))
    (folder / "found.json").write_text(json.dumps(found, default=str), encoding="utf-8")
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "200")  # of a machine that is busy with other tests
    main(Path(sys.argv[1]))
