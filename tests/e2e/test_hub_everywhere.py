"""A hub id wherever a folder is taken: each command gives what it gives for folders, and fetches only what it needs."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, snapshot_download
from safetensors.torch import save_file

import polymerge
from hub_standin import Standin, empty_cache, environment
from mergebench_made import adapter, benchmark, results_of
from polymerge.checkpoints import hub as hub_module
from polymerge.demo.story import EXCLUDED
from polymerge.errors import RecipeError
from polymerge.inference.live import LiveModel
from polymerge.inference.worker_pool import WorkerPool
from polymerge.planning import Plan
from running import checkpoint, cli, linear, merged, raw, small_llama, weights
from search_made import BASE, REASON, VLM, prompts_file, recipe
from tiny import build, perturbed

FOLDERS = {"vlm": VLM, "base": BASE, "reason": REASON}
SHORT = ("--max-new-tokens", "2", "--samples", "2", "--torch-threads", "1")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By the name of its repository, the folder of each model; prompts and the files of tasks beside them."""
    folder = tmp_path_factory.mktemp("made")
    loras = {name: str(adapter(folder / name, seed)) for seed, name in enumerate(("lora", "lora2"), 1)}
    tuned = perturbed(Path(VLM), folder / "tuned", seed=5)
    return {**FOLDERS, **loras, "tuned": str(tuned)}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("asked")
    return {"prompts": str(prompts_file(folder / "prompts", 4)), "data": str(benchmark(folder / "tasks"))}


@pytest.fixture
def hub(made: Mapping[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Standin]:
    """The stand-in with all of them as a/NAME, an empty cache, and nobody logged in; processes find it too."""
    with empty_cache(monkeypatch, tmp_path) as server:
        places = environment(server, tmp_path)
        for name in places.keys() - os.environ.keys() | {"HF_HUB_CACHE", "HF_ENDPOINT"}:
            monkeypatch.setenv(name, places[name])
        for name, folder in made.items():
            server.publish(f"a/{name}", Path(folder))
        for name in ("vlm", "base"):
            server.publish(f"a/{name}", Path(made[name]), "v1")
        yield server


def whole(hub: Standin) -> list[str]:
    """The weight files that were fetched, and not only their headers: owner/name/file."""
    found = {
        request.path.removeprefix("/").replace(request.path.split("/")[4], "").replace("/resolve//", "/")
        for request in hub.of(".safetensors")
        if not request.range
    }
    return sorted(found)


# --- every command

Words = tuple[str, ...]

MERGE: Words = (
    "--template", "{vlm}", "--with", "{reason}", "--base", "{base}", "--method", "task_arithmetic", "--weight", "1,0.5",
    "--parts", "text", *(word for name in EXCLUDED for word in ("--exclude", name)),
)  # fmt: skip
REVISED: Words = tuple(word.replace("{vlm}", "{vlm@v1}").replace("{base}", "{base@v1}") for word in MERGE)
TWO_LORAS: Words = ("--template", "{lora}", "--with", "{lora2}", "--method", "linear", "--weight", "0.5,0.5")
WITH_LORA: Words = ("--template", "{vlm}+{lora}", "--with", "{tuned}", "--method", "linear", "--weight", "0.5,0.5")
ASK: Words = ("--prompts", "{prompts}", "--scorer", "exact", *SHORT)
EXAM: Words = ("--tasks", "OCR-VQA", "--data", "{data}", "--max-new-tokens", "2")

HEADERS: dict[str, Words] = {
    "inspect": ("inspect", "{vlm}", "{reason@main}", "--json"),
    "inspect with an adapter": ("inspect", "{vlm@v1}+{lora}", "--json"),
    "inspect an adapter": ("inspect", "{lora}", "{vlm}"),
    "plan": ("plan", *MERGE, "--json", "-"),
    "plan at revisions": ("plan", *REVISED, "--json", "-"),
    "plan with an adapter": ("plan", *WITH_LORA, "--json", "-"),
    "plan of adapters": ("plan", *TWO_LORAS, "--json", "-"),
    "merge --dry-run": ("merge", *MERGE, "--dry-run", "--json"),
    "fold --dry-run": ("fold", "{lora}", "--base", "{vlm@v1}", "--dry-run", "--json"),
}
"""What needs headers and configs alone."""

WHOLE: dict[str, tuple[Words, str]] = {
    "merge": (("merge", *MERGE, "-o", "{out}"), "folder"),
    "merge at revisions": (("merge", *REVISED, "-o", "{out}"), "folder"),
    "merge with an adapter": (("merge", *WITH_LORA, "-o", "{out}"), "folder"),
    "merge adapters": (("merge", *TWO_LORAS, "-o", "{out}"), "folder"),
    "fold": (("fold", "{lora}", "--base", "{vlm@v1}", "-o", "{out}"), "folder"),
    "verify": (("verify", "{vlm@v1}", "--json"), ""),
    "verify an adapter": (("verify", "{lora}", "--json"), ""),
    "inspect --against": (("inspect", "{lora}", "--against", "{lora2}", "--json"), ""),
    "overlap": (("overlap", *MERGE, "--json", "{out}"), "."),
    "overlap of adapters": (("overlap", *TWO_LORAS, "--json", "{out}"), "."),
    "evaluate": (("evaluate", "{vlm@v1}", *EXAM, "-o", "{out}"), "results.json"),
    "evaluate an adapter": (("evaluate", "{lora}", *EXAM, "-o", "{out}"), "results.json"),
    "evaluate with an adapter": (("evaluate", "{vlm}+{lora}", *EXAM, "-o", "{out}"), "results.json"),
    "search": (("search", *MERGE, *ASK, "--values", "0:1:0.5", "-o", "{out}"), "search.json"),
    "search by workers": (
        ("search", *MERGE, *ASK, "--values", "0:1:0.5", "--workers", "2", "-o", "{out}"), "search.json",
    ),
    "search of adapters": (("search", *TWO_LORAS, *ASK, "--values", "0.2,0.8,1", "-o", "{out}"), "search.json"),
    "knockout": (
        ("knockout", "{tuned}", "--against", "{vlm@v1}", "--replace", "from:{base}", "--layers", "0", "--modules",
         "mlp", *ASK, "-o", "{out}"), "knockout.json",
    ),
    "knockout with an adapter": (
        ("knockout", "{vlm}+{lora}", "--layers", "0", "--modules", "mlp", *ASK, "-o", "{out}"), "knockout.json",
    ),
    "ablate": (("ablate", *MERGE, "--layers", "0-1", "--ranges", "full", *ASK, "-o", "{out}"), "ablation.json"),
    "ablate adapters": (("ablate", *TWO_LORAS, "--ranges", "full", *ASK, "-o", "{out}"), "ablation.json"),
}  # fmt: skip
"""What needs weights; with each, where the outcome is: standard output, the folder itself, or a file in it."""


def spelled(words: Words, names: Mapping[str, str], remote: bool, more: Mapping[str, str]) -> list[str]:
    """The words with models by their hub ids, or by their folders."""
    said = []
    for word in words:
        for name, folder in names.items():
            for revision in ("", "@v1", "@main"):
                word = word.replace(f"{{{name}{revision}}}", f"a/{name}{revision}" if remote else folder)
        for name, value in more.items():
            word = word.replace(f"{{{name}}}", value)
        said.append(word)
    return said


def plain(text: str, names: Mapping[str, str], *outs: Path) -> str:
    """A text without what says where models and outputs lie, and at which revision."""
    text = re.sub(r'[^"\s]*/polymerge/views/\w+/(a/\w+)/[0-9a-f]{40}', r"\1", text)
    text = re.sub(r"@(v1|main)\b", "", text)
    # what lies beside the weights is told by a commit there, by its content here
    text = re.sub(r'"beside": \{\s*("[^"]+": "[0-9a-f]{64}",?\s*)*\}', '"beside": {}', text)
    for name, folder in names.items():
        text = re.sub(rf"{re.escape(folder)}(?![\w/])", f"a/{name}", text)
    for out in outs:
        text = text.replace(str(out), "OUT")
    return text


def outcome(out: Path, where: str, printed: str, names: Mapping[str, str]) -> Any:
    """What a command made, to be compared."""
    if where == "folder":
        skipped = ("polymerge.json", "README.md", "adapter_config.json")
        return raw(out), {file.name: file.read_bytes() for file in out.iterdir() if file.name not in skipped}
    text = printed if where == "" else (out if where == "." else out / where).read_text(encoding="utf-8")
    value = json.loads(plain(text, names, out))
    for kept in (value, value.get("model")):
        if isinstance(kept, dict):
            kept.pop("pinned", None)
    # of which files answers were given is told by a commit here, by their content there
    value.pop("settings", None)
    return value


@pytest.mark.parametrize("case", HEADERS)
def test_headers_are_enough(case: str, hub: Standin, made: Mapping[str, str]) -> None:
    here, there = (cli(*spelled(HEADERS[case], made, remote, {})) for remote in (False, True))
    assert (here.status, there.status) == (0, 0), there.err
    assert there.err == here.err
    assert whole(hub) == []
    assert {request.path.rpartition("/")[2] for request in hub.requests if "/resolve/" in request.path} <= {
        "config.json", "adapter_config.json", "model.safetensors", "adapter_model.safetensors",
        "tokenizer_config.json"}  # fmt: skip
    assert plain(there.out, made) == plain(here.out, made)


@pytest.mark.parametrize("case", WHOLE)
def test_a_command_gives_what_it_gives_for_folders(
    case: str, hub: Standin, made: Mapping[str, str], asked: Mapping[str, str], tmp_path: Path
) -> None:
    words, where = WHOLE[case]
    found = []
    for remote, out in ((False, tmp_path / "here"), (True, tmp_path / "there")):
        more = {**asked, "out": str(out)}
        own = words if remote else WHOLE[case.removesuffix(" by workers")][0]
        ran = cli(*spelled(own, made, remote, more))
        assert ran.status == 0, ran.err
        found.append(outcome(out, where, ran.out, made))
    assert found[1] == found[0]
    named = {name for name in made if any(f"{{{name}" in word for word in words)}
    # the adapters that are named alone have a folder as their base
    assert {file.split("/")[1] for file in whole(hub)} == named
    if not where.endswith(".json"):
        return
    # the same again goes on with what is there, though by now every file has arrived
    first, before = (tmp_path / "there" / where).read_bytes(), len(hub.of(".safetensors"))
    ran = cli(*spelled(words, made, True, more))
    assert ran.status == 0, ran.err
    assert (tmp_path / "there" / where).read_bytes() == first
    assert len(hub.of(".safetensors")) == before


# --- what cannot be had

REFUSED: dict[str, Words] = {
    "inspect": ("inspect", "BAD", "{vlm}"),
    "inspect with an adapter": ("inspect", "{vlm}+BAD"),
    "inspect --against": ("inspect", "{lora}", "--against", "BAD"),
    "plan": ("plan", "--template", "BAD", "--with", "{reason}", "--method", "linear", "--weight", "1,1"),
    "plan --base": (
        "plan", "--template", "{vlm}", "--with", "{reason}", "--base", "BAD", "--method", "task_arithmetic", "--weight",
        "1,1",
    ),
    "merge": (
        "merge", "--template", "{vlm}", "--with", "BAD", "--method", "linear", "--weight", "1,1", "-o", "{out}",
    ),
    "merge adapters": (
        "merge", "--template", "{lora}", "--with", "BAD", "--method", "linear", "--weight", "1,1", "-o", "{out}",
    ),
    "fold": ("fold", "BAD", "--base", "{vlm}", "-o", "{out}"),
    "fold --base": ("fold", "{lora}", "--base", "BAD", "-o", "{out}"),
    "verify": ("verify", "BAD"),
    "overlap": ("overlap", "--template", "{vlm}", "--with", "BAD", "--method", "linear", "--weight", "1,1"),
    "evaluate": ("evaluate", "BAD", *EXAM, "-o", "{out}"),
    "evaluate with a base": ("evaluate", "BAD+{lora}", *EXAM, "-o", "{out}"),
    "evaluate with lmms-eval": ("evaluate", "BAD", "--tasks", "mme", "--with", "lmms-eval", "-o", "{out}"),
    "search": ("search", "--template", "BAD", "--with", "{reason}", "--method", "linear", *ASK, "-o", "{out}"),
    "knockout": ("knockout", "BAD", *ASK, "-o", "{out}"),
    "knockout --against": ("knockout", "{vlm}", "--against", "BAD", *ASK, "-o", "{out}"),
    "knockout --replace": ("knockout", "{vlm}", "--replace", "from:BAD", *ASK, "-o", "{out}"),
    "ablate": (
        "ablate", "--template", "{vlm}", "--with", "BAD", "--method", "linear", "--weight", "1,1", *ASK, "-o", "{out}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("a/nowhere", "a/nowhere: there is no such folder, and no such repository on the hub"),
        ("a/vlm@v9", "a/vlm: has no revision 'v9' on the hub"),
        ("models/llava/7b", "models/llava/7b: there is no such f"),
        (
            "a/tuned",
            "a/tuned: there is no such folder here, and what is needed is not in the hub's cache, and HF_HUB_OFF",
        ),
    ],
    ids=["no repository", "no revision", "a path", "offline"],
)
def test_what_cannot_be_had_is_said(
    case: str, bad: str, said: str, hub: Standin, made: Mapping[str, str], asked: Mapping[str, str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", bad == "a/tuned")
    words = tuple(word.replace("BAD", bad) for word in REFUSED[case])
    ran = cli(*spelled(words, made, False, {**asked, "out": str(tmp_path / "out")}))
    assert (ran.status, ran.out) == (2, "")
    assert said in ran.err
    assert "Traceback" not in ran.err
    assert not (tmp_path / "out").exists()
    assert whole(hub) == []


def test_all_that_is_wrong_is_said_before_a_model_is_fetched(hub: Standin, tmp_path: Path) -> None:
    ran = cli("evaluate", "a/vlm", "--tasks", "OCR-VQX", "-o", tmp_path / "out")
    assert (ran.status, whole(hub)) == (2, [])
    assert "Did you mean 'OCR-VQA'" in ran.err
    with pytest.raises(RecipeError, match="a/nowhere: there is no such folder, and no such repository"):
        polymerge.verify("a/nowhere")


@pytest.mark.parametrize("by", ["polymerge", "another program"])
def test_what_is_here_is_loaded_offline(by: str, hub: Standin, monkeypatch: pytest.MonkeyPatch) -> None:
    if by == "polymerge":
        assert cli("verify", "a/vlm@v1").status == 0
    else:
        snapshot_download("a/vlm", revision="v1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub_module._seen.clear()
    hub.requests.clear()
    assert cli("verify", "a/vlm@v1").status == 0
    assert cli("inspect", "a/vlm@v1").status == 0
    assert hub.requests == []


# --- only what is needed


def test_an_overlap_leaves_out_what_is_not_merged(hub: Standin, tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "other")):
        hub.publish(f"b/{name}", a_file_for_each(small_llama(seed), tmp_path / name))
    words = ("--method", "linear", "--weight", "1,1", "--exclude", "text.embed_tokens.*", "--exclude", "text.lm_head.*")
    ran = cli("overlap", "--template", "b/one", "--with", "b/other", *words, "--json", "-")
    assert ran.status == 0, ran.err
    assert len(json.loads(ran.out)["tensors"]) == 3
    assert whole(hub) == [f"b/{name}/model-{place}.safetensors" for name in ("one", "other") for place in (1, 2, 3)]
    assert not hub.of("tokenizer.json")


def a_file_for_each(tensors: Mapping[str, torch.Tensor], folder: Path) -> Path:
    """A Llama with a file for each tensor, and a tokenizer."""
    checkpoint(folder, {})
    files = {name: f"model-{place}.safetensors" for place, name in enumerate(tensors)}
    for name, tensor in tensors.items():
        save_file({name: tensor}, folder / files[name])
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_a_model_to_be_loaded_is_fetched_without_its_other_copies(hub: Standin, tmp_path: Path) -> None:
    folder = shutil.copytree(VLM, tmp_path / "vlm")
    torch.save({"a": torch.ones(1)}, folder / "pytorch_model.bin")
    (folder / "consolidated.safetensors").write_bytes(b"another layout")
    torch.save({"voice": torch.ones(1)}, folder / "spk_dict.pt")
    hub.publish("b/vlm", folder)
    assert cli("verify", "b/vlm").status == 0
    assert whole(hub) == ["b/vlm/model.safetensors"]
    assert not hub.of("pytorch_model.bin")
    assert hub.of("spk_dict.pt")
    ran = cli("evaluate", "b/vlm", "--tasks", "mme", "--with", "lmms-eval", "--print-command", "-o", tmp_path / "run")
    assert ran.status == 0, ran.err
    found = re.search(r"pretrained=([^,\s]+)", ran.out)
    assert found is not None
    assert (Path(found[1]) / "model.safetensors").is_file()


# --- again


def test_the_record_pins_what_was_merged(hub: Standin, made: Mapping[str, str], tmp_path: Path) -> None:
    sources = ["a/vlm+a/lora", "a/tuned@main", made["vlm"]]
    first = merged(linear(*sources, parameters={"weight": 0.3}), tmp_path / "first", "--no-verify")
    record = json.loads((first / "polymerge.json").read_text())
    commits = {name: hub.repositories[f"a/{name}"].revisions["main"] for name in ("vlm", "lora", "tuned")}
    pins = [entry.get("pinned") for entry in record["inputs"]]
    joined = f"a/vlm@{commits['vlm']}+a/lora@{commits['lora']}"
    assert pins == [joined, f"a/tuned@{commits['tuned']}", None]
    for name in ("vlm", "tuned"):
        hub.publish(f"a/{name}", perturbed(Path(made[name]), tmp_path / name, seed=7))
    hub_module._seen.clear()
    again = [pin or entry["source"] for pin, entry in zip(pins, record["inputs"], strict=True)]
    assert weights(merged(linear(*again, parameters={"weight": 0.3}), tmp_path / "again", "--no-verify")) == weights(
        first
    )
    moved = merged(linear(*sources, parameters={"weight": 0.3}), tmp_path / "moved", "--no-verify")
    assert weights(moved) != weights(first)


def test_a_search_merges_what_it_has_searched(
    hub: Standin, made: Mapping[str, str], asked: Mapping[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = WorkerPool.submit

    def and_the_branch_moves(*given: Any) -> Any:
        done = submit(*given)
        if not (tmp_path / "reason").exists():
            hub.publish("a/reason", perturbed(Path(REASON), tmp_path / "reason", seed=7))
            hub_module._seen.clear()
        return done

    monkeypatch.setattr(WorkerPool, "submit", and_the_branch_moves)
    words = ("search", *MERGE, *ASK, "--values", "0.4,0.5,0.6", "--keep-template-weight", "-o", str(tmp_path / "run"))
    ran = cli(*spelled((*words, "--write", str(tmp_path / "out")), made, True, asked))
    assert ran.status == 0, ran.err
    chosen = json.loads((tmp_path / "run/search.json").read_text())["chosen"]
    literal = recipe()
    literal["models"][1]["parameters"]["weight"] = chosen
    assert weights(tmp_path / "out") == weights(merged(literal, tmp_path / "literal"))


def test_an_adapter_is_folded_into_the_revision_of_its_base_that_it_names(
    hub: Standin, made: Mapping[str, str], tmp_path: Path
) -> None:
    named = shutil.copytree(made["lora"], tmp_path / "named")
    config = json.loads((named / "adapter_config.json").read_text())
    (named / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "a/vlm", "revision": "v1"})
    )
    hub.publish("a/named", named)
    hub.publish("a/vlm", perturbed(Path(VLM), tmp_path / "newer", seed=7))
    out, local = tmp_path / "out", tmp_path / "local"
    for words in (("a/named", "-o", out), (made["lora"], "--base", VLM, "-o", local)):
        assert cli("fold", *words, "--no-verify").status == 0
    assert raw(out) == raw(local)
    adapters = merged(linear("a/named", "a/lora2", base_model="a/vlm@v1"), tmp_path / "both", "--no-verify")
    said = json.loads((adapters / "adapter_config.json").read_text())
    assert (said["base_model_name_or_path"], said["revision"]) == ("a/vlm", "v1")


def test_runs_of_models_of_the_hub_are_compared_and_reported(
    hub: Standin, asked: Mapping[str, str], made: Mapping[str, str], tmp_path: Path
) -> None:
    for name in ("vlm", "tuned"):
        ran = cli("evaluate", f"a/{name}@main", *spelled(EXAM, made, True, asked), "-o", tmp_path / name)
        assert ran.status == 0, ran.err
        commit = hub.repositories[f"a/{name}"].revisions["main"]
        model = {"name": name, "source": f"a/{name}@main", "plan": None, "pinned": f"a/{name}@{commit}"}
        assert results_of(tmp_path / name)["model"] == model
    ran = cli("compare", tmp_path / "vlm", tmp_path / "tuned", "--template", "vlm", "--parents", "vlm,tuned")
    assert ran.status == 0, ran.err
    merged(linear("a/vlm@main", "a/tuned@main"), tmp_path / "out", "--no-verify")
    ran = cli("report", tmp_path / "out", tmp_path / "vlm", tmp_path / "tuned", "-o", tmp_path / "report.html")
    assert ran.status == 0, ran.err
    scores = json.loads((tmp_path / "report.json").read_text())["scores"]
    assert (scores["template"], scores["assumed"], scores["parents"]) == ("vlm", False, ["vlm", "tuned"])


# --- a folder of links is a folder


def test_code_and_templates_come_along(hub: Standin, tmp_path: Path) -> None:
    folders = [with_code(tmp_path / name, seed) for seed, name in enumerate(("one", "other"))]
    for folder in folders:
        hub.publish(f"b/{folder.name}", folder)
    ran = cli("verify", "b/one", "--trust-remote-code", "--json")
    assert ran.status == 0, ran.out
    assert "AutoModelForCausalLM: no key missing" in ran.out
    plan = polymerge.plan(linear("b/one", "b/other"))
    assert isinstance(plan, Plan)
    live = LiveModel(plan, trust_remote_code=True)
    live.set(plan)
    assert type(live.model).__name__ == "OwnModel"
    live.close()
    out = merged(linear("b/one", "b/other"), tmp_path / "out", "--trust-remote-code")
    assert raw(out) == raw(merged(linear(*folders), tmp_path / "local", "--no-verify"))
    for name in (
        "modeling_own.py",
        "parts/sizes.py",
        "additional_chat_templates/tools.jinja",
        "generation_config.json",
    ):
        assert (out / name).read_bytes() == (folders[0] / name).read_bytes(), name
        assert not (out / name).is_symlink()


def with_code(folder: Path, seed: int) -> Path:
    """A language model whose classes lie in its folder."""
    build("llama", folder, seed=seed)
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    (folder / "config.json").write_text(
        json.dumps(config | {"model_type": "llama_of_its_own", "architectures": ["OwnModel"], "auto_map": classes})
    )
    (folder / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'llama_of_its_own'\n"
    )
    (folder / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n\nfrom .configuration_own import OwnConfig\n\n\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    for name, text in (("parts/sizes.py", "SIZE = 1\n"), ("additional_chat_templates/tools.jinja", "{{ tools }}")):
        (folder / name).parent.mkdir()
        (folder / name).write_text(text)
    return folder
