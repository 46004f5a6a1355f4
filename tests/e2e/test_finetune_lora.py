"""The fine-tuning example: what it trains, what counts in its loss, what it saves and what it refuses."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from paths import ROOT

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")
pytest.importorskip("sklearn")

from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from polymerge.demo import trained_models as models  # noqa: E402
from polymerge.demo.train import in_picture  # noqa: E402
from polymerge.demo.world import ask, draw, load_handwriting, split_pairs  # noqa: E402  # noqa: E402

VLM = Path(models.__file__).parent / "checkpoints" / "vlm"
SCRIPT = ROOT / "examples" / "finetune_lora.py"

# PEFT 0.21 asks transformers 5.23 by a name that is to go
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def _script() -> Any:
    spec = spec_from_file_location("finetune_lora", SCRIPT)
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for it there
    spec.loader.exec_module(module)
    return module


script = _script()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 320 pictures, each with a question after the sum, and `data.json`."""
    folder, dice = tmp_path_factory.mktemp("sums"), random.Random(0)
    pairs, (handwriting, _) = split_pairs(1), load_handwriting(1)
    listed = []
    for number in range(320):
        lesson = in_picture("sum", dice.choice(pairs.every), dice)
        assert lesson.scene
        Image.fromarray(draw(lesson.scene, handwriting, dice)).save(folder / f"{number}.png")
        listed.append(example(" ".join(ask("sum")), " ".join(lesson.answer), image=f"{number}.png"))
    (folder / "data.json").write_text(json.dumps(listed), encoding="utf-8")
    return folder


def example(question: str, answer: str, *more: str, image: str | None = None) -> dict[str, Any]:
    """A conversation in LLaVA's format."""
    values = [f"<image>\n{question}" if image else question, answer, *more]
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    return {"id": "one", **({"image": image} if image else {}), "conversations": turns}


def command(data: Path, output: Path, *more: str) -> list[str]:
    words = ["--model", VLM, "--data", data / "data.json", "--images", data, "--output", output]
    return [*map(str, words), "--rank", "4", "--alpha", "8", "--batch-size", "16", "--learning-rate", "5e-3", *more]


def run(data: Path, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(SCRIPT), *command(data, output, *more)]
    return subprocess.run(words, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An adapter with a projector, and what the command printed."""
    output = tmp_path_factory.mktemp("trained") / "adapter"
    ran = run(data, output, "--train-projector", "--epochs", "2")
    assert ran.returncode == 0, ran.stderr
    return output, ran.stdout


def collator(images: Path = Path()) -> Any:
    return script.Collator(models.load_processor(VLM), images, frozenset({models.WORDS.index("</s>")}))


def written(ids: Any) -> str:
    text: str = models.load_processor(VLM).tokenizer.decode(ids)
    return text


def test_the_loss_falls(trained: tuple[Path, str]) -> None:
    lines = [line for line in trained[1].splitlines() if line.startswith("{'loss'")]
    losses = [float(json.loads(line.replace("'", '"'))["loss"]) for line in lines]
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.5


def test_only_the_text_tower_has_lora_and_the_projector_is_saved_whole(trained: tuple[Path, str]) -> None:
    tensors = load_file(trained[0] / "adapter_model.safetensors")
    layers = {name.partition(".lora_")[0] for name in tensors if ".lora_" in name}
    linear = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    tower = "base_model.model.model.language_model.layers"
    assert layers == {f"{tower}.{i}.{name}" for i in range(4) for name in linear}
    projector = "base_model.model.model.multi_modal_projector"
    others = {f"{projector}.linear_{i}.{name}" for i in (1, 2) for name in ("weight", "bias")}
    assert {name for name in tensors if ".lora_" not in name} == others
    before = models.load(script.AutoModelForImageTextToText, VLM).model.multi_modal_projector.linear_1.weight
    assert not torch.equal(tensors[f"{projector}.linear_1.weight"], before)


def test_the_config_says_what_was_trained(trained: tuple[Path, str]) -> None:
    config = json.loads((trained[0] / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(VLM)
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 8, False)
    assert config["modules_to_save"] == ["model.multi_modal_projector"]


def test_the_adapter_loads_and_changes_the_answers(trained: tuple[Path, str], data: Path) -> None:
    from peft import PeftModel

    examples = json.loads((data / "data.json").read_text(encoding="utf-8"))[:64]
    batch = collator(data)(examples)
    model = models.load(script.AutoModelForImageTextToText, VLM)
    with torch.inference_mode():
        plain = model(**batch)
        adapted = PeftModel.from_pretrained(model, trained[0]).eval()(**batch)
    assert adapted.loss < plain.loss - 0.5
    answers = [outcome.logits.argmax(-1)[:, :-1][batch["labels"][:, 1:] != -100] for outcome in (plain, adapted)]
    assert not torch.equal(*answers)


def test_without_the_projector_there_is_only_lora(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = json.loads((data / "data.json").read_text(encoding="utf-8"))[:32]
    (tmp_path / "data.json").write_text(json.dumps(few), encoding="utf-8")
    for name in ("first", "second"):
        words = command(data, tmp_path / name, "--rslora", "--data", str(tmp_path / "data.json"))
        script.main(words)
    assert "wrote" in capsys.readouterr().out
    first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second
    tensors = load_file(tmp_path / "first" / "adapter_model.safetensors")
    assert len(tensors) == 4 * 7 * 2
    assert all(".lora_" in name for name in tensors)
    config = json.loads((tmp_path / "first" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["use_rslora"] is True
    assert config["modules_to_save"] is None


def test_full_training_changes_all_parts_and_saves_a_model(data: Path, tmp_path: Path) -> None:
    few = json.loads((data / "data.json").read_text(encoding="utf-8"))[:32]
    (tmp_path / "data.json").write_text(json.dumps(few), encoding="utf-8")
    script.main(command(data, tmp_path / "tuned", "--full", "--data", str(tmp_path / "data.json")))
    before, after = (load_file(folder / "model.safetensors") for folder in (VLM, tmp_path / "tuned"))
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    for part in ("vision_tower", "multi_modal_projector", "language_model", "lm_head"):
        assert any(part in name for name in changed), part
    tuned = models.load(script.AutoModelForImageTextToText, tmp_path / "tuned")
    batch = script.Collator(models.load_processor(tmp_path / "tuned"), data, frozenset())(few[:4])
    with torch.inference_mode():
        assert torch.isfinite(tuned(**batch).loss)


def test_the_expression_matches_linear_layers_only() -> None:
    import re

    model = models.load(script.AutoModelForImageTextToText, VLM)
    matched = [(n, m) for n, m in model.named_modules() if re.fullmatch(script.text_layers(model), n)]
    assert len(matched) == 4 * 7
    assert all(isinstance(module, torch.nn.Linear) for _, module in matched)
    assert all(name.startswith("model.language_model.") for name, _ in matched)


def test_only_answers_count_in_the_loss(data: Path) -> None:
    batch = collator(data)([example("what is the sum ?", "1 2", image="0.png"), example("read .", "7")])
    rows = [row[row != -100] for row in batch["labels"]]
    assert [written(row) for row in rows] == ["1 2 </s>", "7 </s>"]
    assert batch["pixel_values"].shape == (1, 3, 32, 32)
    prompt = "<s> <user> " + "<image> " * 16 + "what is the sum ? <assistant>"
    assert written(batch["input_ids"][0][batch["labels"][0] == -100]) == prompt
    length = int(batch["attention_mask"][1].sum())
    assert written(batch["input_ids"][1, :length]) == "<s> <user> read . <assistant> 7 </s>"
    assert (batch["labels"][1, length:] == -100).all()
    assert (batch["input_ids"][1, length:] == models.WORDS.index("<pad>")).all()


def test_every_answer_of_a_conversation_counts(data: Path) -> None:
    turns = example("what is the sum ?", "1 2", "what colour is top ?", "red", image="0.png")
    batch = collator(data)([turns])
    assert written(batch["labels"][0][batch["labels"][0] != -100]) == "1 2 red </s>"


def test_the_prompt_is_what_the_model_will_be_asked_with(data: Path) -> None:
    processor = models.load_processor(VLM)
    content = [{"type": "image"}, {"type": "text", "text": "what is the sum ?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    asked = processor(images=[Image.open(data / "0.png")], text=[text], return_tensors="pt")["input_ids"]
    batch = collator(data)([example("what is the sum ?", "3", image="0.png")])
    assert torch.equal(batch["input_ids"][:, : asked.shape[1]], asked)
    assert (batch["labels"][:, : asked.shape[1]] == -100).all()
    assert (batch["labels"][:, asked.shape[1] :] != -100).all()


def test_all_that_is_wrong_with_the_data_is_said_at_once(data: Path, tmp_path: Path) -> None:
    wrong = [
        example("what ?", "3", image="absent.png"),
        {**example("what ?", "3"), "weight": 2, "video": "1.mp4"},
        {"id": "1", "conversations": [{"from": "gpt", "value": "3"}, {"from": "human", "value": "what ?"}]},
        {"id": "2", "conversations": [{"from": "human", "value": "what ?", "mask": 1}]},
        {"id": "3", "conversations": []},
        example("what ?", " "),
        example("<image> what ?", "3"),
        {**example("what ?", "3"), "image": "0.png"},
        example("what ?", "3"),
        "what ?",
    ]
    (tmp_path / "data.json").write_text(json.dumps(wrong), encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        script.main(command(data, tmp_path / "out", "--data", str(tmp_path / "data.json")))
    assert isinstance(end.value.code, str)  # printed, with exit status 1
    said = [line.removeprefix(f"{tmp_path / 'data.json'}: ") for line in end.value.code.splitlines()]
    order = "turns have to be human, gpt, human, gpt, ..., and are"
    once = "<image> has to stand once in the first turn if there is an image, and nowhere else"
    assert said == [
        f"[0]: no image 'absent.png' in {data}",
        "[1]: unknown field 'video'",
        "[1]: unknown field 'weight'",
        f"[2]: {order} gpt, human",
        "[3]: turn 0: unknown field 'mask'",
        f"[3]: {order} human",
        f"[4]: {order} none",
        "[5]: turn 1: no text in 'value'",
        f"[6]: {once}",
        f"[7]: {once}",
        "[9]: an object is wanted, not 'what ?'",
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "said"), [("[]", "at least one"), ("{}", "a list"), ("[", "Expecting value"), (None, "No such file")]
)
def test_data_that_is_none_is_refused(text: str | None, said: str, tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    with pytest.raises(script.DataError, match=f"data.json.*{said}"):
        script.read_examples(file, tmp_path)


def test_very_many_problems_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    file.write_text(json.dumps([example("what ?", "3", image="absent.png")] * 60), encoding="utf-8")
    with pytest.raises(script.DataError) as refused:
        script.read_examples(file, tmp_path)
    assert str(refused.value).splitlines()[50:] == ["... and 10 more"]


def test_a_model_without_a_text_tower_is_refused() -> None:
    with pytest.raises(SystemExit, match="Linear has no text tower by any of the names language_model, text_model"):
        script.text_layers(torch.nn.Linear(2, 2))
