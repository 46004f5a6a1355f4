"""Answers are the model's own, whatever the batch; what cannot be answered is named."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers.utils import logging

from polymerge.checkpoints.loading import load_model, load_processor, model_class
from polymerge.demo import __file__ as demo
from polymerge.demo.digit_questions import Question, draw_questions, score_language_model, score_vlm
from polymerge.demo.world import load_handwriting, split_pairs
from polymerge.errors import CheckpointError, RecipeError
from polymerge.inference.answering import Answerer, AnswerError, batches
from polymerge.inference.prompts import Prompt
from tiny import build

CHECKPOINTS = Path(demo).parent / "checkpoints"

TEMPLATE = (
    "<s> {% for message in messages %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<image> {% else %}{{ item['text'] }}{% endif %}{% endfor %}{% endfor %} ="
)
"""For the tiny families, whose own template is for text only."""


@pytest.fixture(scope="module")
def exam() -> list[Question]:
    _, held_out = load_handwriting(0)
    questions = draw_questions(split_pairs(0), held_out, 3, pictures=1)
    return random.Random(4).sample(questions, 40)


@pytest.fixture(scope="module")
def asked(exam: list[Question], tmp_path_factory: pytest.TempPathFactory) -> list[Prompt]:
    folder = tmp_path_factory.mktemp("pictures")
    prompts = []
    for number, question in enumerate(exam):
        Image.fromarray(question.picture).save(folder / f"{number}.png")
        prompts.append(Prompt(number, question.prompt, (str(folder / f"{number}.png"),), question.answer))
    return prompts


@pytest.fixture(scope="module")
def demo_vlm() -> tuple[Any, Any]:
    return load_model(CHECKPOINTS / "vlm", dtype="float32"), load_processor(CHECKPOINTS / "vlm")


def in_batches(answerer: Answerer, prompts: list[Prompt], size: int) -> dict[int | str, str]:
    found = {}
    for batch in batches(prompts, size):
        found.update(zip([prompt.id for prompt in batch], answerer.answer(batch), strict=True))
    return found


def test_the_demo_marks_and_the_answers_agree(
    demo_vlm: tuple[Any, Any], exam: list[Question], asked: list[Prompt]
) -> None:
    model, processor = demo_vlm
    answerer = Answerer(model, processor, max_new_tokens=3)
    # one batch of all lengths in the order of the draw: wrong padding would change most of it
    assert len({len(question.prompt.split()) for question in exam}) > 1
    together = answerer.answer(asked)
    marks = score_vlm(model, processor, exam)
    assert [said.split() == q.answer.split() for said, q in zip(together, exam, strict=True)] == marks
    assert sum(marks) > 20
    alone = [answerer.answer([prompt])[0] for prompt in asked]
    assert together == alone
    assert answerer.answer(asked) == together
    for size in (8, 7):
        assert in_batches(answerer, asked, size) == dict(enumerate(alone))


def test_the_demo_language_model_answers_as_it_does_there(exam: list[Question]) -> None:
    folder = CHECKPOINTS / "reason"
    model, tokenizer = load_model(folder, dtype="float32"), load_processor(folder)
    prompts = [Prompt(n, " ".join((*question.sentence, question.prompt))) for n, question in enumerate(exam)]
    answers = Answerer(model, tokenizer, max_new_tokens=3).answer(prompts)
    marks = score_language_model(model, tokenizer, exam)
    assert [said.split() == q.answer.split() for said, q in zip(answers, exam, strict=True)] == marks
    assert sum(marks) > 20


def test_prompts_with_and_without_images_can_be_mixed(demo_vlm: tuple[Any, Any], asked: list[Prompt]) -> None:
    answerer = Answerer(*demo_vlm, max_new_tokens=3)
    blind = [Prompt(f"{p.id} blind", p.text) for p in asked[:5]]
    mixed = [prompt for pair in zip(asked, blind, strict=False) for prompt in pair]
    assert answerer.answer(mixed) == [answerer.answer([prompt])[0] for prompt in mixed]
    assert answerer.answer([]) == []


@pytest.mark.parametrize("family", ["llava", "llava_next", "idefics2"])
def test_the_families_answer_the_same_alone_and_together(family: str, tmp_path: Path) -> None:
    folder = build(family, tmp_path / family, seed=5, dtype="float32")
    model, processor = load_model(folder), load_processor(folder)
    answerer = Answerer(model, processor, max_new_tokens=4, chat_template=TEMPLATE)
    paths = []
    for number, size in enumerate([(16, 16), (16, 32), (32, 16), (40, 20)]):
        path = tmp_path / f"{number}.png"
        Image.linear_gradient("L").rotate(90 * number).resize(size).save(path)
        paths.append(str(path))
    words = ["what is 2 + 3 ?", "red ?", "is the sum of 1 + 1 one ?", "blue"]
    prompts = [Prompt(number, words[number], (paths[number],)) for number in range(4)]
    prompts += [Prompt(4, "red", (paths[0], paths[1])), Prompt(5, "what is blue", (paths[2], paths[3]))]
    together = answerer.answer(prompts)
    assert together == [answerer.answer([prompt])[0] for prompt in prompts]
    # random weights: what matters is that the answers come from the picture and the text
    assert len(set(together)) > 1
    expected = literal(model, processor, prompts[1])
    assert together[1] == expected


def literal(model: Any, processor: Any, prompt: Prompt) -> str:
    """The same asked by hand, alone."""
    image = Image.open(prompt.images[0]).convert("RGB")
    inputs = processor(
        text=f"<s> <image> {prompt.text} =", images=[image], return_tensors="pt", add_special_tokens=False
    )
    said = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return str(processor.tokenizer.decode(said, skip_special_tokens=True)).strip()


def test_what_the_model_says_about_sampling_does_not_matter(
    demo_vlm: tuple[Any, Any], asked: list[Prompt], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(CHECKPOINTS / "vlm", tmp_path / "vlm")
    file = folder / "generation_config.json"
    wild = {"do_sample": True, "temperature": 5.0, "top_p": 0.1, "top_k": 1, "repetition_penalty": 9.0, "max_length": 2}
    wild |= {"no_repeat_ngram_size": 1, "min_new_tokens": 3}
    file.write_text(json.dumps(json.loads(file.read_text()) | wild))
    model = load_model(folder, dtype="float32")
    assert model.generation_config.repetition_penalty == 9.0
    logging.set_verbosity_warning()
    logging.get_logger("transformers").addHandler(caplog.handler)
    try:
        answers = Answerer(model, load_processor(folder), max_new_tokens=3).answer(asked)
    finally:
        logging.get_logger("transformers").removeHandler(caplog.handler)
        logging.set_verbosity_error()
    assert answers == Answerer(*demo_vlm, max_new_tokens=3).answer(asked)
    assert model.generation_config.temperature == 5.0  # the model has its own back
    assert not caplog.records


def test_an_answer_is_as_long_as_it_may_be(demo_vlm: tuple[Any, Any], asked: list[Prompt]) -> None:
    one = Answerer(*demo_vlm, max_new_tokens=1).answer(asked)
    two = Answerer(*demo_vlm, max_new_tokens=2).answer(asked)
    assert max(len(text.split()) for text in one) == 1
    assert max(len(text.split()) for text in two) == 2
    for bad in (0, True, 1.5):
        with pytest.raises(RecipeError, match="max_new_tokens"):
            Answerer(*demo_vlm, max_new_tokens=bad)


def test_a_turned_photo_is_turned_back(demo_vlm: tuple[Any, Any], asked: list[Prompt], tmp_path: Path) -> None:
    turned = []
    for prompt in asked:
        path = tmp_path / f"{prompt.id}.png"
        exif = Image.Exif()
        exif[0x0112] = 3  # stored upside down
        Image.open(prompt.images[0]).rotate(180).save(path, exif=exif)
        turned.append(Prompt(prompt.id, prompt.text, (str(path),)))
    answerer = Answerer(*demo_vlm, max_new_tokens=3)
    assert answerer.answer(turned) == answerer.answer(asked)


def test_broken_images_are_named_and_no_others(demo_vlm: tuple[Any, Any], asked: list[Prompt], tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    data = Path(asked[0].images[0]).read_bytes()
    (tmp_path / "torn.png").write_bytes(data[: len(data) // 2])
    bad = [Prompt(name, "read", (str(tmp_path / f"{name}.png"),)) for name in ("text", "torn", "gone")]
    with pytest.raises(AnswerError, match=r"'text': .*'torn': .*'gone': ") as raised:
        Answerer(*demo_vlm).answer([asked[0], *bad, Prompt("blind", "read"), asked[1]])
    assert raised.value.ids == ("text", "torn", "gone")


def test_a_batch_that_fails_names_its_prompts(demo_vlm: tuple[Any, Any], asked: list[Prompt]) -> None:
    model, processor = demo_vlm
    blind = Answerer(model, processor, chat_template="{{ messages[0]['content'][-1]['text'] }}")
    with pytest.raises(AnswerError, match=r"prompts 0, 1: no answer: ValueError: ") as raised:
        blind.answer(asked[:2])
    assert raised.value.ids == (0, 1)
    assert raised.value.__cause__ is not None


def test_a_language_model_is_shown_no_image(asked: list[Prompt]) -> None:
    folder = CHECKPOINTS / "base"
    with pytest.raises(AnswerError, match="prompt 0: the model reads text only"):
        Answerer(load_model(folder), load_processor(folder)).answer(asked[:1])


def test_without_a_chat_template_the_way_out_is_said(tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "llama")
    (folder / "chat_template.jinja").unlink()
    model, tokenizer = load_model(folder), load_processor(folder)
    with pytest.raises(RecipeError, match=r"no chat template.*Copy chat_template.jinja"):
        Answerer(model, tokenizer)
    assert Answerer(model, tokenizer, chat_template="{{ messages[0].content }}").answer([Prompt(0, "red")])


def test_a_processor_without_a_template_takes_that_of_its_tokenizer(
    demo_vlm: tuple[Any, Any], asked: list[Prompt]
) -> None:
    model, _ = demo_vlm
    processor = load_processor(CHECKPOINTS / "vlm")
    expected = Answerer(model, processor).answer(asked)
    processor.tokenizer.chat_template, processor.chat_template = processor.chat_template, None
    assert Answerer(model, processor).answer(asked) == expected


def test_a_template_that_begins_a_text_gets_no_second_beginning(
    demo_vlm: tuple[Any, Any], exam: list[Question], asked: list[Prompt]
) -> None:
    told = [Prompt(n, " ".join((*question.sentence, question.prompt))) for n, question in enumerate(exam)]
    base = load_model(CHECKPOINTS / "reason", dtype="float32")
    for model, folder, prompts in ((demo_vlm[0], "vlm", asked), (base, "reason", told)):
        processor = load_processor(CHECKPOINTS / folder)
        expected = Answerer(model, processor).answer(prompts)
        tokenizer = getattr(processor, "tokenizer", processor)
        begins = TemplateProcessing("<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
        tokenizer.backend_tokenizer.post_processor = begins
        assert tokenizer("red")["input_ids"][0] == tokenizer.bos_token_id
        assert Answerer(model, processor).answer(prompts) == expected


def test_a_processor_that_pads_on_the_right_is_refused(demo_vlm: tuple[Any, Any], asked: list[Prompt]) -> None:
    model, _ = demo_vlm
    processor = load_processor(CHECKPOINTS / "vlm")
    processor.tokenizer.padding_side = "right"
    with pytest.raises(AnswerError, match="LlavaProcessor pads on the right"):
        Answerer(model, processor).answer(asked)


def test_batches_do_not_depend_on_the_order() -> None:
    dice = random.Random(0)
    prompts = [Prompt(n, "x" * dice.randrange(4), ("image",) * dice.randrange(3)) for n in range(50)]
    prompts += [Prompt(str(n), "x", ("image",)) for n in range(10)]
    cut = batches(prompts, 4)
    for _ in range(5):
        dice.shuffle(prompts)
        assert batches(prompts, 4) == cut
    assert sorted(str(p.id) for batch in cut for p in batch) == sorted(str(p.id) for p in prompts)
    assert max(map(len, cut)) == 4
    assert all(len({len(prompt.images) for prompt in batch}) == 1 for batch in cut)
    keys = [(len(p.images), len(p.text), str(p.id)) for batch in cut for p in batch]
    assert keys == sorted(keys)
    assert batches([], 4) == []
    with pytest.raises(RecipeError, match="batch size: 0"):
        batches(prompts, 0)


# --- loading


def test_a_processor_pads_on_the_left_with_some_token(tmp_path: Path) -> None:
    for family in ("llava", "idefics2", "llama"):
        folder = build(family, tmp_path / family)
        file = folder / "tokenizer_config.json"
        settings = json.loads(file.read_text())
        del settings["pad_token"]
        file.write_text(json.dumps(settings | {"padding_side": "right"}))
        processor = load_processor(folder)
        tokenizer = getattr(processor, "tokenizer", processor)
        assert (tokenizer.padding_side, tokenizer.pad_token) == ("left", "</s>")
    del settings["eos_token"]
    file.write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="neither pad_token nor eos_token"):
        load_processor(folder)


def test_a_processor_that_does_not_load(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="AutoTokenizer cannot load it"):
        load_processor(tmp_path)


@pytest.mark.parametrize(("dtype", "loaded"), [("auto", "float16"), ("float32", "float32"), ("bfloat16", "bfloat16")])
def test_a_model_is_loaded_in_the_precision_asked_for(dtype: str, loaded: str) -> None:
    model = load_model(CHECKPOINTS / "vlm", dtype=dtype)
    assert (model.dtype, model.training) == (getattr(torch, loaded), False)
    assert type(model).__name__ == "LlavaForConditionalGeneration"


def test_a_config_that_names_no_class_gets_an_auto_class(tmp_path: Path) -> None:
    for family, named in (("llava", "LlavaForConditionalGeneration"), ("llama", "LlamaForCausalLM")):
        folder = build(family, tmp_path / family)
        config = json.loads((folder / "config.json").read_text())
        assert config.pop("architectures") == [named]
        (folder / "config.json").write_text(json.dumps(config))
        assert type(load_model(folder)).__name__ == named


def test_code_in_the_folder_is_loaded_by_the_class_that_it_is_for() -> None:
    config = {"architectures": ["CogVLMForCausalLM"], "vision_config": {}, "auto_map": {"AutoConfig": "a.B"}}
    assert model_class(config).__name__ == "AutoModelForImageTextToText"
    for name in ("AutoModel", "AutoModelForCausalLM"):  # the second is the better one
        config["auto_map"][name] = "a.C"
        assert model_class(config).__name__ == name


def test_a_model_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    folder = build("llava", tmp_path / "llava")
    tensors = load_file(folder / "model.safetensors")
    name = "language_model.model.norm.weight"
    lacking = {key: tensor for key, tensor in tensors.items() if key != name}
    for changed, said in (
        (lacking, "1 missing, first model.language_model.norm.weight"),
        (tensors | {"surplus": torch.ones(2)}, "1 unexpected, first surplus"),
        (tensors | {name: torch.ones(33)}, "1 mismatched"),
    ):
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=f"LlavaForConditionalGeneration cannot load it completely: {said}"):
            load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"llava: config.json cannot load it: "):
        load_model(folder)


def test_words_that_are_none() -> None:
    with pytest.raises(RecipeError, match=r"dtype: 'bfloat61' .* Did you mean 'bfloat16'"):
        load_model(CHECKPOINTS / "vlm", dtype="bfloat61")
    with pytest.raises(RecipeError, match="device: 'gpu' is none"):
        load_model(CHECKPOINTS / "vlm", device="gpu")
    with pytest.raises(RecipeError, match="device: there is no 'cuda:99'"):
        load_model(CHECKPOINTS / "vlm", device="cuda:99")
