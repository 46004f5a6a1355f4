"""`verify` passes what loads, and says clearly what is wrong with what does not."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import polymerge
from polymerge.errors import MissingExtraError
from running import Ran, checkpoint, cli, linear, merged, recipe_file, small_llama, two_llamas
from tiny import build, perturbed, related_llm

NAME = "language_model.model.norm.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    vlm = build("llava", folder / "vlm")
    return merged(linear(vlm, related_llm(vlm, folder / "llm", seed=1)), folder / "out")


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "copy")


def changed(folder: Path, name: str, value: Tensor | None) -> Path:
    """The folder with one tensor replaced, added or (None) taken out."""
    tensors = load_file(folder / "model.safetensors") | ({} if value is None else {name: value})
    if value is None:
        del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def findings(ran: Ran) -> dict[str, str]:
    """What `verify` printed, by check."""
    found = {}
    for line in ran.out.splitlines()[1:]:
        check, said = line.split(None, 1)
        found[check] = said
    return found


def test_a_good_folder_passes(good: Path) -> None:
    ran = cli("verify", good)
    assert ran.status == 0
    assert ran.out.splitlines()[0] == f"{good}: passed"
    assert list(findings(ran)) == ["files", "values", "parameters", "names", "ties", "loads", "dtypes", "processor"]
    assert all(said.startswith("ok: ") for said in findings(ran).values())
    assert "LlavaForConditionalGeneration: no key missing" in findings(ran)["loads"]
    assert findings(ran)["processor"] == "ok: LlavaProcessor"


@pytest.mark.parametrize(
    ("value", "check", "said"),
    [
        (None, "loads", "1 missing, first model.language_model.norm.weight"),
        (torch.ones(33).bfloat16(), "loads", "1 mismatched"),
        (torch.full((32,), float("nan")).bfloat16(), "values", f"NaN or infinity in 1 tensor(s), first {NAME}"),
        (torch.full((32,), float("-inf")).bfloat16(), "values", f"NaN or infinity in 1 tensor(s), first {NAME}"),
        (None, "parameters", "28336, the template has 28368"),
        (torch.ones(31).bfloat16(), "parameters", "28367, the template has 28368"),
    ],
)
def test_one_tensor_that_is_not_right(value: Tensor | None, check: str, said: str, copy: Path) -> None:
    ran = cli("verify", changed(copy, NAME, value))
    assert ran.status == 1
    assert ran.out.startswith(f"{copy}: FAILED\n")
    assert findings(ran)[check].startswith("FAILED: ")
    assert said in findings(ran)[check]


def test_a_tensor_too_many(copy: Path) -> None:
    ran = cli("verify", changed(copy, "language_model.model.layers.7.mlp.up_proj.weight", torch.ones(2, 2)))
    assert ran.status == 1
    assert "1 unexpected" in findings(ran)["loads"]


def test_an_infinity_at_the_very_end_of_a_large_float64_tensor(tmp_path: Path) -> None:
    tensors = small_llama(1) | {"lm_head.weight": torch.ones(1_100_000, 1, dtype=torch.float64)}
    folder = checkpoint(tmp_path / "model", tensors)
    assert "no NaN" in findings(cli("verify", folder))["values"]
    tensors["lm_head.weight"][-1] = float("inf")
    assert "first lm_head.weight" in findings(cli("verify", checkpoint(folder, tensors)))["values"]


def test_a_truncated_shard(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    ran = cli("verify", copy)
    assert ran.status == 1
    assert list(findings(ran)) == ["files"]
    assert str(file) in findings(ran)["files"]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    ran = cli("verify", tmp_path / "nowhere")
    assert ran.status == 1
    assert "has no 'nowhere'" in findings(ran)["files"]


@pytest.mark.parametrize("own", [False, True])
def test_a_head_that_is_stored_although_it_is_tied(own: bool, tmp_path: Path) -> None:
    folder = build("qwen2", tmp_path / "model", tie=True)
    head = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].clone()
    if own:
        head += 1
    ran = cli("verify", changed(folder, "lm_head.weight", head))
    said = findings(ran)["ties"]
    copies = "ok: model.embed_tokens.weight and lm_head.weight are stored twice with the same values"
    assert said.startswith("ok: lm_head.weight is a head of its own" if own else copies)
    assert ran.status == 0


def test_what_cannot_be_checked_is_said_and_is_no_failure(copy: Path) -> None:
    for file in copy.iterdir():
        if file.suffix != ".safetensors":
            file.unlink()
    ran = cli("verify", copy)
    assert ran.status == 0
    said = findings(ran)
    assert said["loads"].startswith("not checked: there is no config.json")
    assert said["processor"].startswith("not checked: ")
    assert said["parameters"] == "not checked: 28368; no polymerge.json to say how many the template has"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"output": null}'])
def test_a_broken_record_is_a_finding(text: str, copy: Path) -> None:
    (copy / "polymerge.json").write_text(text)
    ran = cli("verify", copy)
    assert ran.status == 1
    assert "polymerge.json cannot be read" in findings(ran)["parameters"]


@pytest.mark.parametrize("name", ["processor_config.json", "tokenizer.json"])
def test_a_processor_that_does_not_load(name: str, copy: Path) -> None:
    (copy / name).write_text("{")
    ran = cli("verify", copy)
    assert ran.status == 1
    assert findings(ran)["processor"].startswith("FAILED: AutoProcessor: ")


def test_a_config_that_no_class_can_make_anything_of(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["num_attention_heads"] = 0
    (copy / "config.json").write_text(json.dumps(config))
    ran = cli("verify", copy)
    assert ran.status == 1
    assert findings(ran)["loads"].startswith("FAILED: LlavaForConditionalGeneration: ")


def test_code_in_the_folder_is_not_run_unless_told(tmp_path: Path) -> None:
    folder = build("internvl_chat", tmp_path / "vlm")
    (folder / "configuration_internvl_chat.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    ran = cli("verify", folder)
    assert ran.status == 0
    assert "its model is code that lies in the folder; `--trust-remote-code` runs it" in findings(ran)["loads"]
    assert not (tmp_path / "ran").exists()
    assert cli("verify", folder, "--trust-remote-code").status == 1
    assert (tmp_path / "ran").exists()


def test_a_missing_package_of_the_processor_is_no_failure(tmp_path: Path) -> None:
    if find_spec("torchvision") is not None:
        pytest.skip("torchvision is installed")
    for family in ("internvl", "qwen2_vl"):
        ran = cli("verify", build(family, tmp_path / family))
        assert ran.status == 0
        assert "not checked: torchvision is missing: pip install 'polymerge[vision]'" in findings(ran)["processor"]


def test_as_json(good: Path, copy: Path) -> None:
    report = json.loads(cli("verify", good, "--json").out)
    assert report["folder"] == str(good)
    assert report["passed"] is True
    assert {found["check"]: found["passed"] for found in report["findings"]}["loads"] is True
    ran = cli("verify", changed(copy, NAME, None), "--json")
    assert ran.status == 1
    assert json.loads(ran.out)["passed"] is False


def test_the_library_says_the_same_and_leaves_the_log_as_it_was(good: Path) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    verification = polymerge.verify(good)
    assert verification.passed
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert str(verification) in cli("verify", good).out


def test_every_family_s_own_checkpoint_passes(tmp_path: Path) -> None:
    for family in ("llava_next", "idefics2", "qwen2_5_vl", "llava_onevision"):
        ran = cli("verify", build(family, tmp_path / family))
        assert ran.status == 0, ran.out


@pytest.mark.parametrize("package", ["transformers", "torch"])
def test_a_missing_package_is_said_before_any_work(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = two_llamas(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("polymerge.checkpoints.target.output_folder", lambda _: pytest.fail("began to write"))
    with pytest.raises(MissingExtraError, match=f"{package} needed to check"):
        polymerge.merge(linear(*models), tmp_path / "out")
    ran = cli("merge", recipe_file(linear(*models), tmp_path / "r.yaml"), "-o", tmp_path / "out")
    assert ran.status == 1
    assert f"{package} needed to check that the output loads: pip install 'polymerge[transformers]'" in ran.err
    assert "--no-verify" in ran.err


def test_verify_without_transformers_still_looks_at_the_rest(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == "transformers" or name.startswith("transformers.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    ran = cli("verify", good)
    assert ran.status == 0
    assert findings(ran)["loads"].startswith("not checked: transformers cannot be imported")
    assert findings(ran)["processor"].startswith("not checked: transformers cannot be imported")
    assert findings(ran)["values"] == "ok: no NaN, no infinity"


def test_a_merge_of_a_merge_is_checked_against_its_own_template(good: Path, tmp_path: Path) -> None:
    tuned = perturbed(good, tmp_path / "tuned", seed=3)
    out = merged(linear(good, tuned), tmp_path / "out")
    assert findings(cli("verify", out))["parameters"].startswith("ok: ")
    assert len(json.loads((out / "polymerge.json").read_text())["inputs"]) == 2


@pytest.mark.parametrize(
    ("family", "said"),
    [
        # transformers takes it for its own LLaVA, whose names are others
        ("llava_original", "transformers has no class LlavaQwenForCausalLM, and AutoModel"),
        ("mplug_owl2", "transformers has no class MPLUGOwl2LlamaForCausalLM, and no code lies in the folder"),
        ("cambrian", "transformers has no class"),
        ("deepseek_vl_original", "transformers has no class"),
        ("molmo", "its model is code that lies in the folder"),
    ],
)
def test_a_model_that_transformers_has_no_class_of_is_not_said_to_be_broken(
    family: str, said: str, tmp_path: Path
) -> None:
    ran = cli("verify", build(family, tmp_path / "model"))
    assert ran.status == 0, ran.err
    assert findings(ran)["loads"].startswith(f"not checked: {said}")


def test_a_class_with_a_name_of_its_own_is_loaded_by_its_model_type(good: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(good, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "architectures": ["OurLlava"]}))
    assert "no key missing" in findings(cli("verify", copy))["loads"]
