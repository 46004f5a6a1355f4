"""Models on the hub: what is fetched and when, how it resumes, and what is said where it cannot be had."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import polymerge
from headers_only import llm, vlm
from hub_standin import NAMES, Standin, empty_cache, environment, shard, sharded
from polymerge.checkpoints import hub as hub_module
from polymerge.checkpoints.hub import locate
from polymerge.engine.opening import fetch
from polymerge.errors import CheckpointError, PolymergeError, RecipeError
from polymerge.inference.live import LiveModel
from polymerge.planning import Plan
from running import checkpoint, cli, leftovers, linear, merged, raw, small_llama, weights
from tiny import build, generate, related_llm


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Standin]:
    """The stand-in, an empty cache, and nobody logged in."""
    with empty_cache(monkeypatch, tmp_path) as server:
        yield server


@pytest.fixture
def pair(hub: Standin, tmp_path: Path) -> tuple[Path, Path]:
    """Two models on the hub, `a/one` and `a/other`, and the folders they are served from."""
    folders = sharded(tmp_path / "one", 1), sharded(tmp_path / "other", 2)
    for name, folder in zip(("a/one", "a/other"), folders, strict=True):
        hub.publish(name, folder)
    return folders


def problems(call: Any, *arguments: Any) -> str:
    with pytest.raises(PolymergeError) as caught:
        call(*arguments)
    return str(caught.value)


# --- plan and inspect


def test_a_plan_of_eight_billion_parameters_moves_little(hub: Standin, tmp_path: Path) -> None:
    size: Any = {"layers": 32, "width": 4096, "inner": 14336, "keys": 1024, "vocab": 128256, "shards": 4}
    folders = vlm(tmp_path / "vlm", **size), llm(tmp_path / "llm", **size)
    for folder in folders:
        for name in ("tokenizer.json", "merges.txt"):
            with (folder / name).open("wb") as file:
                file.truncate(9_000_000)
        hub.publish(f"big/{folder.name}", folder)
    plan = polymerge.plan(linear("big/vlm", "big/llm"))
    assert sum(entry.size for entry in plan.inputs) > 32e9
    assert hub.sent < 1_000_000  # the promise is 5 MB
    assert len(hub.of(".safetensors")) == 8
    assert all(request.range for request in hub.of(".safetensors"))
    fetched = {request.path.rpartition("/")[2] for request in hub.requests if "/resolve/" in request.path}
    assert {name for name in fetched if not name.endswith(".safetensors")} == {
        "config.json",
        "model.safetensors.index.json",
    }
    assert plan.hash == polymerge.plan(linear(*folders)).hash
    first = len(hub.requests)
    hub_module._seen.clear()
    assert polymerge.plan(linear("big/vlm", "big/llm")) == plan
    assert len(hub.requests) == first + 2  # is the branch still that commit?


@pytest.mark.usefixtures("pair")
def test_inspect_reads_headers_only(hub: Standin) -> None:
    ran = cli("inspect", "a/one", "a/other")
    assert ran.status == 0, ran.err
    assert ran.err == ""
    assert "a/one" in ran.out or "one: family llama" in ran.out
    assert all(request.range for request in hub.of(".safetensors"))
    assert not hub.of("tokenizer.json")


def test_a_header_longer_than_what_is_asked_for_first_takes_two_requests(hub: Standin, tmp_path: Path) -> None:
    tensors = {f"model.layers.{layer}.mlp.{'x' * 60}.weight": torch.ones(2, 2) for layer in range(900)}
    hub.publish("a/long", checkpoint(tmp_path / "long", tensors, {"model_type": "none"}))
    plan = polymerge.plan(linear("a/long", str(tmp_path / "long")))
    assert plan.inputs[0].headers == plan.inputs[1].headers
    assert len(hub.of(".safetensors")) == 2


def test_a_hub_that_sends_whole_files_only_is_understood(hub: Standin, pair: tuple[Path, Path]) -> None:
    hub.ranges = False
    assert polymerge.plan(linear("a/one", "a/other")).hash == polymerge.plan(linear(*pair)).hash


def test_tokens_are_fetched_where_they_are_joined(hub: Standin, tmp_path: Path) -> None:
    folders = sharded(tmp_path / "one", 1, rows=7), sharded(tmp_path / "other", 2, rows=9)
    for folder in folders:
        hub.publish(f"a/{folder.name}", folder)
    plan = polymerge.plan(linear("a/one", "a/other", template="a/one", vocab="by-token"))
    assert len(hub.of("tokenizer.json")) == 2
    assert not hub.of("code.py")
    assert plan.hash == polymerge.plan(linear(*folders, template=folders[0], vocab="by-token")).hash


def test_tokenizers_come_where_their_rows_are_merged_by_number_and_they_differ(hub: Standin, tmp_path: Path) -> None:
    for name, tokens in (("one", "abcdefg"), ("same", "abcdefg"), ("two", "abcdefx")):
        folder = sharded(tmp_path / name, 1, rows=7)
        words = {token: place for place, token in enumerate(tokens)}
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words}}), encoding="utf-8")
        hub.publish(f"a/{name}", folder)
    assert polymerge.plan(linear("a/one", "a/same")).warnings == ()
    kept = ["text.lm_head.weight", "text.embed_tokens.weight"]
    assert polymerge.plan(linear("a/one", "a/two", exclude=kept)).warnings == ()
    assert not hub.of("tokenizer.json")
    (warning,) = polymerge.plan(linear("a/one", "a/two")).warnings
    assert "1 of 7 rows" in warning
    assert "(6: 'g'/'x')" in warning
    assert len(hub.of("tokenizer.json")) == 2


def test_a_local_path_asks_nobody(hub: Standin, pair: tuple[Path, Path], tmp_path: Path) -> None:
    merged(linear(*pair), tmp_path / "out", "--no-verify")
    assert hub.requests == []


# --- merge


def test_a_merge_is_the_same_as_that_of_the_folders(hub: Standin, pair: tuple[Path, Path], tmp_path: Path) -> None:
    local = merged(linear(*pair), tmp_path / "local", "--no-verify")
    out = merged(linear("a/one", "a/other@main"), tmp_path / "out", "--no-verify")
    assert weights(out) == weights(local)
    kept = ("config.json", "tokenizer.json", "chat_template.jinja", "code.py")
    assert all((out / name).read_bytes() == (pair[0] / name).read_bytes() for name in kept)
    assert not any(file.is_symlink() for file in out.rglob("*"))
    assert {file.name for file in out.iterdir()} == {file.name for file in local.iterdir()}
    for name in ("tokenizer.json", "code.py"):
        assert [request.path.split("/")[2] for request in hub.of(name)] == ["one"], "those of the template only"
    record = json.loads((out / "polymerge.json").read_text())
    assert [entry["source"] for entry in record["inputs"]] == ["a/one", "a/other@main"]
    assert all(len(entry["sha256"]) == len(NAMES) for entry in record["inputs"])


@pytest.mark.usefixtures("pair")
def test_only_what_the_plan_reads_is_fetched(hub: Standin, tmp_path: Path) -> None:
    merged(linear("a/one", "a/other", exclude=["text.lm_head.*"]), tmp_path / "out", "--no-verify")
    whole = [request.path.split("/")[2] for request in hub.of(shard("lm_head.weight")) if not request.range]
    assert whole == ["one"]


def test_progress_counts_what_is_fetched_and_what_is_written(pair: tuple[Path, Path], tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    plan = polymerge.plan(linear("a/one", "a/other"))
    polymerge.merge(plan, tmp_path / "out", check=False, progress=lambda done, total: told.append((done, total)))
    fetched = sum(file.stat().st_size for folder in pair for file in folder.glob("*.safetensors"))
    fetched += sum((pair[0] / name).stat().st_size for name in ("tokenizer.json", "chat_template.jinja", "code.py"))
    assert told[-1] == (plan.size + fetched, plan.size + fetched)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_a_broken_connection_is_taken_up_where_it_broke(
    hub: Standin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)  # what is not written when it breaks is sent again
    tensors = {"model.embed_tokens.weight": torch.arange(60_000, dtype=torch.float32).reshape(-1, 10)}
    folders = [checkpoint(tmp_path / name, tensors) for name in ("one", "other")]
    hub.publish("a/one", folders[0])
    plan = polymerge.plan(linear("a/one", folders[1]))
    hub.requests.clear()
    hub.cut["model.safetensors"] = 150_000
    polymerge.merge(plan, tmp_path / "out", check=False)
    first, second = hub.of("model.safetensors")
    assert (first.sent, second.range) == (150_000, "bytes=150000-")
    assert first.sent + second.sent == (folders[0] / "model.safetensors").stat().st_size
    assert raw(tmp_path / "out") == raw(merged(linear(*folders), tmp_path / "local", "--no-verify"))


def test_a_connection_that_is_reset_is_tried_again(hub: Standin, pair: tuple[Path, Path], tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    plan = polymerge.plan(linear("a/one", pair[1]))
    hub.reset |= {shard("lm_head.weight"), "code.py"}
    polymerge.merge(plan, tmp_path / "out", check=False, progress=lambda done, total: told.append((done, total)))
    assert hub.reset == set()
    assert weights(tmp_path / "out") == weights(merged(linear(*pair), tmp_path / "local", "--no-verify"))
    assert told[-1][0] == told[-1][1]


def test_a_merge_that_failed_fetches_only_what_it_had_not(
    hub: Standin, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    last = shard("lm_head.weight")
    polymerge.plan(linear("a/one", "a/other"))
    hub.served[last] = (pair[0] / last).read_bytes()[:-2]
    said = problems(polymerge.merge, linear("a/one", "a/other"), tmp_path / "out")
    assert last in said
    assert not (tmp_path / "out").exists()
    assert leftovers(tmp_path) == []
    folders = {name: locate(f"a/{name}") for name in ("one", "other")}
    there = [file for folder in folders.values() for file in folder.glob("*.safetensors") if file.exists()]
    here = {f"/a/{file.parents[1].name}/resolve/{file.parent.name}/{file.name}" for file in there}
    assert here
    hub.requests.clear()
    hub.served.clear()
    out = merged(linear("a/one", "a/other"), tmp_path / "out", "--no-verify")
    assert not here & {request.path for request in hub.requests}
    assert weights(out) == weights(merged(linear(*pair), tmp_path / "local", "--no-verify"))


def test_a_merge_begins_before_the_last_shard_is_here(hub: Standin, pair: tuple[Path, Path], tmp_path: Path) -> None:
    written: list[bool] = []

    def wait_for_output() -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until and not any(map(has_data, tmp_path.glob(".out.*/new/model*.safetensors"))):
            time.sleep(0.01)
        written.append(time.monotonic() < until)

    hub.before[shard("lm_head.weight")] = wait_for_output
    out = merged(linear("a/one", "a/other"), tmp_path / "out", "--no-verify", "--threads", 2)
    assert written == [True, True]
    assert weights(out) == weights(merged(linear(*pair), tmp_path / "local", "--no-verify"))


def has_data(file: Path) -> bool:
    data = file.read_bytes()
    return len(data) > 8 and any(data[8 + int.from_bytes(data[:8], "little") :])


def test_a_merge_uses_the_commit_that_was_planned_with(hub: Standin, pair: tuple[Path, Path], tmp_path: Path) -> None:
    plan = polymerge.plan(linear("a/one", "a/other"))
    assert isinstance(plan, Plan)
    hub.publish("a/one", sharded(tmp_path / "newer", 3))
    hub_module._seen.clear()
    again = polymerge.plan(json.loads(json.dumps(plan.to_json())))
    polymerge.merge(again, tmp_path / "out", check=False)
    assert weights(tmp_path / "out") == weights(merged(linear(*pair), tmp_path / "local", "--no-verify"))
    newer = merged(linear("a/one", "a/other"), tmp_path / "moved", "--no-verify")
    assert weights(newer) != weights(tmp_path / "out")


@pytest.mark.usefixtures("pair")
def test_a_revision_is_a_tag_a_branch_or_a_commit(hub: Standin, tmp_path: Path) -> None:
    commit = hub.publish("a/one", sharded(tmp_path / "older", 3), "v1")
    for source in ("a/one@v1", f"a/one@{commit}"):
        assert locate(source).name == commit
    assert locate("a/one").name == hub.repositories["a/one"].revisions["main"] != commit


def test_a_terminal_shows_what_is_fetched(hub: Standin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = []
    for kind in (Terminal, io.StringIO):
        hub.publish(f"a/{kind.__name__}", sharded(tmp_path / kind.__name__, 1))
        monkeypatch.setattr(sys, "stderr", kind())
        fetch(polymerge.plan(linear(f"a/{kind.__name__}", f"a/{kind.__name__}")))
        shown.append(sys.stderr.getvalue())
    assert "fetching:   0%" in shown[0]
    assert shown[1] == ""


def test_an_id_without_an_owner_is_told_what_an_id_is() -> None:
    with pytest.raises(RecipeError, match="A model of the hub is owner/name"):
        locate("gpt2")


def test_a_branch_stays_what_it_was_as_long_as_a_run_takes(
    hub: Standin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(hub_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    first = hub.publish("a/one", sharded(tmp_path / "first", 1))
    with hub_module.one_commit():
        assert locate("a/one").name == first
        second = hub.publish("a/one", sharded(tmp_path / "second", 2))
        now[0] += 3600
        assert locate("a/one").name == first
    assert locate("a/one").name == second != first


@pytest.mark.parametrize("lost", ["cache", "hf"])
def test_a_plan_outlives_the_caches(pair: tuple[Path, Path], tmp_path: Path, lost: str) -> None:
    plan = polymerge.plan(linear("a/one", "a/other"))
    (tmp_path / lost).rename(tmp_path / "gone")
    polymerge.merge(plan, tmp_path / "out", check=False)
    assert weights(tmp_path / "out") == weights(merged(linear(*pair), tmp_path / "local", "--no-verify"))


def test_what_was_fetched_for_a_plan_is_a_whole_folder(hub: Standin, pair: tuple[Path, Path]) -> None:
    plan = polymerge.plan(linear("a/one", "a/other"))
    folder = Path(plan.inputs[0].path)
    assert not (folder / "code.py").exists()
    told: list[tuple[int, int]] = []
    fetch(plan, lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1]
    wanted = {file.name for file in pair[0].iterdir()} - {"README.md"}
    assert {file.name for file in folder.iterdir() if file.is_file()} == wanted
    assert all((folder / name).read_bytes() == (pair[0] / name).read_bytes() for name in wanted)
    count = len(hub.requests)
    fetch(plan)
    assert len(hub.requests) == count


def test_a_fetched_template_loads_and_runs(hub: Standin, tmp_path: Path) -> None:
    template = build("llava", tmp_path / "vlm")
    for name, folder in (("a/vlm", template), ("a/llm", related_llm(template, tmp_path / "llm", seed=1))):
        hub.publish(name, folder)
    plan = polymerge.plan(linear("a/vlm", "a/llm"))
    assert isinstance(plan, Plan)
    fetch(plan)
    live = LiveModel(plan)
    live.set(plan)
    generate(live.folder, tokens=1)
    out = merged(linear("a/vlm", "a/llm"), tmp_path / "out")
    assert raw(out) == raw(merged(linear(template, tmp_path / "llm"), tmp_path / "local"))


def test_torch_files_come_whole_and_it_is_said(hub: Standin, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    torch.save(small_llama(1), folder / "pytorch_model.bin")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    hub.publish("a/old", folder)
    other = checkpoint(tmp_path / "other", small_llama(2))
    plan = polymerge.plan(linear("a/old", other))
    assert "a/old: 'pytorch_model.bin' is not a safetensors file, so it has to be downloaded in full" in caplog.text
    assert plan.hash == polymerge.plan(linear(folder, other)).hash


def test_adapters_come_from_the_hub_too(hub: Standin, tmp_path: Path) -> None:
    rank, module = 2, "base_model.model.model.layers.0.mlp.up_proj"
    base = checkpoint(tmp_path / "base", small_llama(1))
    names = []
    for seed in (3, 4):
        folder = tmp_path / f"lora{seed}"
        folder.mkdir()
        generator = torch.Generator().manual_seed(seed)
        factors = {
            f"{module}.lora_A.weight": torch.randn((rank, 6), generator=generator),
            f"{module}.lora_B.weight": torch.randn((9, rank), generator=generator),
        }
        save_file(factors, folder / "adapter_model.safetensors")
        said = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": ["up_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(said | {"base_model_name_or_path": "a/base"}))
        save_file({"lm_head.weight": torch.full((7, 6), float(seed))}, folder / "trainable_params.safetensors")
        (folder / "tokenizer.json").write_text("{}")
        (folder / "tokenizer_config.json").write_text('{"chat_template": "inline"}')
        hub.publish(f"a/{folder.name}", folder)
        names.append(folder.name)
    hub.publish("a/base", base)
    assert cli("inspect", "a/lora3").out.startswith("a/lora3: LoRA adapter")
    assert all(request.range for request in hub.of(".safetensors"))
    for place, prefix in ((tmp_path / "remote", "a/"), (tmp_path / "local", f"{tmp_path}/")):
        place.mkdir()
        merged(linear(*(f"{prefix}{name}" for name in names)), place / "merged", "--no-verify")
        ran = cli("fold", f"{prefix}{names[0]}", "-o", place / "folded", "--no-verify")
        assert ran.status == 0, ran.err
    for name in ("merged", "folded"):
        assert raw(tmp_path / "remote" / name) == raw(tmp_path / "local" / name)
    assert (tmp_path / "remote/merged/tokenizer.json").is_file()
    assert (load_file(tmp_path / "remote/folded/model.safetensors")["lm_head.weight"] == 3).all()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "remote/folded" / name).read_text() == (tmp_path / "lora3" / name).read_text()


# --- offline


def test_what_is_in_the_cache_is_used_offline(
    hub: Standin, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = merged(linear("a/one", "a/other"), tmp_path / "online", "--no-verify")
    polymerge.plan(linear("a/one", pair[1]))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub_module._seen.clear()
    hub.requests.clear()
    out = merged(linear("a/one", "a/other"), tmp_path / "out", "--no-verify")
    assert weights(out) == weights(online)
    assert hub.requests == []


def test_what_is_not_in_the_cache_is_said_offline(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    polymerge.plan(linear("a/one", pair[1]))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub_module._seen.clear()
    said = problems(polymerge.plan, linear("a/other", pair[1]))
    assert "a/other: there is no such folder here, and what is needed is not in the hub's cache" in said
    assert "HF_HUB_OFFLINE is set" in said
    plan = polymerge.plan(linear("a/one", pair[1]))  # its headers are known
    said = problems(polymerge.merge, plan, tmp_path / "out")
    assert "a/one: " in said
    assert "more files are not in the hub's cache, and HF_HUB_OFFLINE is set" in said
    assert not (tmp_path / "out").exists()


def test_a_snapshot_that_another_program_has_fetched_is_used_offline(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import snapshot_download

    for name in ("a/one", "a/other"):
        snapshot_download(name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    out = merged(linear("a/one", "a/other"), tmp_path / "out", "--no-verify")
    assert weights(out) == weights(merged(linear(*pair), tmp_path / "local", "--no-verify"))


@pytest.mark.usefixtures("pair")
def test_the_variables_of_the_hub_hold(hub: Standin, tmp_path: Path) -> None:
    words = ["merge", "--template", "a/one", "--with", "a/other", "--method", "linear", "--weight", "0.5,0.5"]
    command = [sys.executable, "-c", "from polymerge.cli import main; main()", *words, "--no-verify", "-o"]
    places = environment(hub, tmp_path / "fresh")
    for out, more in (("first", {}), ("second", {"HF_HUB_OFFLINE": "1"})):
        done = subprocess.run([*command, str(tmp_path / out)], env=places | more, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert weights(tmp_path / "first") == weights(tmp_path / "second")
    places["HF_HUB_CACHE"] = str(tmp_path / "empty")
    done = subprocess.run(
        [*command, str(tmp_path / "third")], env=places | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "HF_HUB_OFFLINE is set" in done.stderr
    assert "Traceback" not in done.stderr


# --- refusals


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (401, "RepoNotFound", "a/it: there is no such folder, and no such repository on the hub (or it is private"),
        (401, "", "a/it: the hub does not let you read it (Client error '401"),
        (404, "RepoNotFound", "a/it: there is no such folder, and no such repository on the hub"),
        (403, "GatedRepo", "a/it: is gated on the hub. Accept its terms"),
        (500, "", "the hub cannot be reached (Server error '500"),
    ],
)
def test_what_the_hub_refuses_is_said(hub: Standin, pair: tuple[Path, Path], status: int, code: str, said: str) -> None:
    hub.refuse("a/it", status, code)
    found = problems(polymerge.plan, linear("a/it", "a/nowhere", pair[1]))
    assert said in found
    assert "a/nowhere: there is no such folder, and no such repository" in found, "all problems at once"


@pytest.mark.usefixtures("pair")
def test_a_revision_that_is_not_there() -> None:
    ran = cli("plan", "--template", "a/one@v9", "--with", "a/other", "--method", "linear", "--weight", "1,1")
    assert ran.status == 2
    assert "a/one: has no revision 'v9' on the hub" in ran.err


@pytest.mark.parametrize("source", ["a--b/c", "a/b..c", "a/b."])
def test_a_name_that_no_repository_has(hub: Standin, source: str) -> None:
    with pytest.raises(RecipeError, match="no hub repository can have that name"):
        locate(source)
    assert hub.requests == []


@pytest.mark.usefixtures("pair")
def test_a_hub_that_is_not_there(hub: Standin) -> None:
    hub.shutdown()
    hub.server_close()
    with pytest.raises(RecipeError, match=r"not in the hub's cache, and the hub cannot be reached \(.*Connection ref"):
        locate("a/one")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: struct.pack("<Q", 1 << 40) + text[8:], "its header should be 1099511627776 bytes long"),
        (lambda text: text[:8] + b"x" + text[9:], "its header begins with b'x'"),
        (lambda text: text.replace(b"BF16", b"F128"), "dtype 'F128'"),
        (lambda text: text + b"\0\0", "the last 2 bytes belong to none"),
        (lambda text: text[:-2], "is truncated"),
        (lambda _: b"", "is 0 bytes long"),
    ],
    ids=["long", "no-json", "dtype", "more", "less", "empty"],
)
def test_headers_on_the_hub_are_checked_as_those_here(pair: tuple[Path, Path], change: Any, said: str) -> None:
    file = pair[0] / shard("model.norm.weight")
    file.write_bytes(change(file.read_bytes()))
    found = problems(polymerge.plan, linear("a/one", pair[1]))
    assert f"{file.name}: " in found
    assert said in found
    assert said in problems(polymerge.plan, linear(*pair))


def test_a_size_that_is_not_the_listed_one(hub: Standin, pair: tuple[Path, Path]) -> None:
    name = shard("model.norm.weight")
    size = (pair[0] / name).stat().st_size
    hub.served[name] = (pair[0] / name).read_bytes() + b"\0\0"
    found = problems(polymerge.plan, linear("a/one", pair[1]))
    assert f"'{name}' is {size} bytes long by the hub's list, {size + 2} by what it serves" in found


def test_another_file_than_was_planned_with(hub: Standin, pair: tuple[Path, Path], tmp_path: Path) -> None:
    plan = polymerge.plan(linear("a/one", pair[1]))
    name = shard("model.norm.weight")
    hub.served[name] = (pair[0] / name).read_bytes().replace(b"model.norm", b"model.morn")
    with pytest.raises(CheckpointError, match="as delivered is not what the hub lists"):
        polymerge.merge(plan, tmp_path / "out", check=False)
    assert not (tmp_path / "out").exists()


def test_an_index_that_names_a_file_the_repository_lacks(pair: tuple[Path, Path]) -> None:
    name = shard("model.norm.weight")
    (pair[0] / name).unlink()
    found = problems(polymerge.plan, linear("a/one", pair[1]))
    assert f"{name}: a/one has no such file on the hub" in found


def test_a_failing_merge_does_not_wait_for_what_it_no_longer_needs(
    hub: Standin, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    broken = small_llama(1)
    broken["model.embed_tokens.weight"][0, 0] = float("nan")
    name = shard("model.embed_tokens.weight")
    save_file({"model.embed_tokens.weight": broken["model.embed_tokens.weight"]}, pair[0] / name)
    late, held = threading.Event(), list[bool]()
    hub.before[shard("lm_head.weight")] = lambda: held.append(late.wait(20))
    merge = partial(polymerge.merge, threads=8)  # so that one of them waits for what does not come
    assert "NaN" in problems(merge, linear("a/one", pair[1]), tmp_path / "out")
    assert held == []
    assert leftovers(tmp_path) == []
    late.set()
    for thread in threading.enumerate():
        if thread.name.startswith("polymerge-fetch"):
            thread.join()
