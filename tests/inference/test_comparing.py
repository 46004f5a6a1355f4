"""`verify --with`: what other programs say of an output is compared with transformers, and told plainly."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import served
from polymerge import PromptSource, verify_with
from polymerge.errors import MissingExtraError, RecipeError
from polymerge.inference.programs import comparing
from polymerge.inference.programs.program_table import PROGRAMS, Place
from programs_made import STANDINS, clone_of_standins, environment_of_standins
from running import cli
from warm_programs import in_this_process


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served.build("llava", tmp_path_factory.mktemp("served") / "vlm")


@pytest.fixture(scope="module")
def standin(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(environment_of_standins(tmp_path_factory.mktemp("standins") / "vllm"))


@pytest.fixture(autouse=True)
def right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POLYMERGE_STANDIN", raising=False)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Programs run in this process, which has loaded transformers already."""
    monkeypatch.syspath_prepend(STANDINS)
    monkeypatch.setattr(comparing, "ask", in_this_process)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        del sys.modules[name]


def findings(found: Any) -> dict[str, str]:
    return {one.check: str(one).split(None, 1)[1] for one in found.findings}


def test_a_folder_that_a_program_answers_alike(vlm: Path, standin: str) -> None:
    ran = cli("verify", vlm, "--with", "vllm", "--environment", standin, "--max-new-tokens", 5)
    assert ran.status == 0, ran.out + ran.err
    assert ran.out.startswith(f"{vlm}: passed\n")
    assert "  program     ok: vllm 0.32.0 (with torch " in ran.out
    assert "loads it: LlavaForConditionalGeneration\n" in ran.out
    assert "  tokens      ok: 4 prompts (1 with an image), 20 tokens, greedy: as transformers 5" in ran.out
    assert "vllm: loads it, and answers 4 prompts" in ran.err


@pytest.mark.usefixtures("quick")
def test_a_program_that_says_another_token(vlm: Path, standin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYMERGE_STANDIN", "token")
    ran = cli("verify", vlm, "--with", "vllm", "--environment", standin, "--max-new-tokens", 5)
    assert ran.status == 1
    assert ran.out.startswith(f"{vlm}: FAILED\n")
    wrong = "1 of 4 prompts (1 with an image) answered otherwise: prompt 4 (image), from token 4 on: transformers 5"
    assert f"tokens      FAILED: {wrong}" in ran.out


@pytest.mark.usefixtures("quick")
def test_a_program_that_reads_another_prompt(vlm: Path, standin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYMERGE_STANDIN", "prompt")
    said = findings(verify_with(vlm, "vllm", environment=standin, max_new_tokens=1))["tokens"]
    wrong = "4 of 4 prompts (1 with an image) answered otherwise: prompt 1 is read as other tokens"
    assert said.startswith(f"FAILED: {wrong}")


@pytest.mark.usefixtures("quick")
def test_a_program_that_does_not_load_it(vlm: Path, standin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYMERGE_STANDIN", "refuse")
    found = verify_with(vlm, "vllm", environment=standin, max_new_tokens=1)
    assert not found.passed
    told = "vllm does not load it: ValueError: There is no module or parameter named 'model.vision_tower'"
    assert told in findings(found)["program"]
    assert "names: published" in findings(found)["program"]


def test_a_program_that_ends_without_a_reply(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho the last words >&2\nexit 7\n", encoding="utf-8")
    python.chmod(0o755)
    said = comparing.ask(PROGRAMS["vllm"], Place(str(python)), {})["error"]
    told = re.fullmatch(r"it has ended \(exit status 7, last said: the last words\). All it said is in (.*)", said)
    assert told
    log = Path(told[1])
    assert log.read_text(encoding="utf-8") == "the last words\n"
    log.unlink()


@pytest.mark.usefixtures("quick")
def test_a_merged_adapter(tmp_path: Path, standin: str) -> None:
    adapter = served.merged_adapter("llava", tmp_path)
    found = verify_with(adapter, "vllm", environment=standin, max_new_tokens=3)
    assert found.passed, str(found)
    assert "4 prompts (1 with an image), 12 tokens" in findings(found)["tokens"]
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(RecipeError, match=r"has no config.json here: say where it is with `base`"):
        verify_with(adapter, "vllm", environment=standin, max_new_tokens=3)


def test_an_adapter_with_whole_weights_is_told_to_be_folded(tmp_path: Path, standin: str) -> None:
    adapter = served.merged_adapter("llava", tmp_path, projector=True)
    for program, place in (("vllm", standin), ("llama.cpp", str(clone_of_standins(tmp_path / "clone")))):
        found = verify_with(adapter, program, environment=place)
        assert not found.passed
        assert "loads no adapter with whole weights, and this has 2: " in findings(found)["program"]
        assert "Fold it into its base with `polymerge fold`" in findings(found)["program"]


def test_llama_cpp_takes_the_text_of_what_it_makes_no_projector_of(vlm: Path, tmp_path: Path) -> None:
    clone = clone_of_standins(tmp_path / "clone")
    found = verify_with(vlm, "llama.cpp", environment=str(clone), max_new_tokens=4)
    assert found.passed, str(found)
    assert findings(found)["program"] == "ok: llama.cpp b0-standin loads it: text as GGUF (f32)"
    assert findings(found)["tokens"].startswith("ok: 3 prompts, 12 tokens, greedy")
    assert "not checked: the converter makes no projector (mmproj) of this folder" in findings(found)["images"]
    assert "Unsupported model type: clip_vision_model" in findings(found)["images"]


def test_an_architecture_that_the_converter_does_not_know(tmp_path: Path) -> None:
    llm = served.build_llm("qwen3", tmp_path / "llm")
    found = verify_with(llm, "llama.cpp", environment=str(clone_of_standins(tmp_path / "clone")), max_new_tokens=1)
    assert not found.passed
    assert "Model Qwen3ForCausalLM is not supported" in findings(found)["program"]


@pytest.mark.usefixtures("quick")
def test_transformers_finds_what_is_under_names_of_memory(vlm: Path, tmp_path: Path) -> None:
    live = served.under_names_of_memory(Path(shutil.copytree(vlm, tmp_path / "live")))
    found = verify_with(live, "transformers", max_new_tokens=2)
    assert found.passed, str(found)
    assert "transformers 5" in findings(found)["program"]


@pytest.mark.usefixtures("quick")
def test_prompts_of_a_file(vlm: Path, standin: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"id": number, "text": "what is red ?"}) for number in range(12)), "utf-8")
    found = verify_with(vlm, "vllm", environment=standin, prompts=PromptSource(file, samples=2), max_new_tokens=2)
    assert findings(found)["tokens"].startswith("ok: 2 prompts, 4 tokens")


def test_what_fails_before_is_told_and_nothing_is_started(vlm: Path, standin: str, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(vlm, tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes(b"no weights")
    found = verify_with(broken, "vllm", environment=standin)
    assert not found.passed
    assert "not started: what failed above comes first" in findings(found)["program"]


def test_a_program_that_is_missing(vlm: Path, tmp_path: Path) -> None:
    ran = cli("verify", vlm, "--with", "vllm", "--environment", tmp_path / "nowhere")
    assert ran.status == 2
    assert "nowhere. Give the folder of a virtual environment" in ran.err.replace("\n", " ")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    ran = cli("verify", vlm, "--with", "vllm", "--environment", python)
    assert ran.status == 1
    assert f"vllm: {python} has no vllm: pip install vllm" in ran.err
    assert "name that with `--environment`" in ran.err
    with pytest.raises(MissingExtraError, match="its converters lie in its clone, which `environment` names"):
        verify_with(vlm, "llama.cpp")
    with pytest.raises(RecipeError, match=r"there is no convert_hf_to_gguf.py. Name the clone of llama.cpp"):
        verify_with(vlm, "llama.cpp", environment=str(tmp_path))


def test_options_that_say_nothing(vlm: Path) -> None:
    ran = cli("verify", vlm, "--environment", vlm)
    assert ran.status == 2
    assert "--environment is for another program: say which with --with" in ran.err
    with pytest.raises(RecipeError, match=r"program: 'vlm' is none of transformers, vllm, llama.cpp. Did you mean"):
        verify_with(vlm, "vlm")
    with pytest.raises(RecipeError, match="max_new_tokens: 0 is not between 1 and 1000"):
        verify_with(vlm, "vllm", max_new_tokens=0)


def test_the_command_line_knows_every_program() -> None:
    for name in PROGRAMS:
        assert name in cli("verify", "--help").out


# --- the comparison itself


def answer(tokens: list[int], likely: dict[int, float] | None = None, **more: Any) -> dict[str, Any]:
    best = [[[token, -0.1], *([other, value] for other, value in (likely or {}).items())] for token in [*tokens, 2]]
    return {"prompt": [1, 7], "tokens": tokens, "text": "x", "likely": best, **more}


def compared(expected: dict[str, Any], found: dict[str, Any], near: float = 1e-3) -> Any:
    put = [{"images": []}]
    return comparing._compared("vllm", "transformers 5.0", put, [expected], [found], [2], near)


def test_the_end_of_an_answer_is_no_difference() -> None:
    assert compared(answer([5, 6, 2]), answer([5, 6])).passed
    assert compared(answer([5, 6, 2]), answer([5, 6, 2, 0])).passed
    assert not compared(answer([5, 6, 9]), answer([5, 6])).passed


def test_a_near_tie_is_told_and_passes() -> None:
    near = compared(answer([5, 6, 9], {8: -0.1005}), answer([5, 8, 1]))
    assert near.passed
    assert "prompt 1 parts at token 2, which transformers 5.0 nearly holds for a tie (0.0005)" in near.detail
    far = compared(answer([5, 6, 9], {8: -0.2}), answer([5, 8, 1]))
    assert not far.passed
    assert "transformers 5.0 says 5 6 9 'x', vllm 5 8 1 'x'" in far.detail
    assert compared(answer([5, 6, 9], {8: -0.2}), answer([5, 8, 1]), near=0.25).passed
    assert not compared(answer([5, 6, 9]), answer([5, 8, 1]), near=0.25).passed


def test_no_words_are_no_comparison() -> None:
    assert compared(answer([2]), answer([2])).passed is None


def test_what_stands_for_an_image() -> None:
    qwen = "USER: <|vision_start|><|image_pad|><|vision_end|>what"
    assert re.sub(comparing._seen("<|image_pad|>"), "M", qwen) == "USER: Mwhat"
    assert re.sub(comparing._seen("<image>"), "M", "a <image>\nb") == "a M\nb"
    assert re.subn(comparing._seen(None), "M", "a <image>\nb")[1] == 0
