"""A miniature MM-MergeBench in both published layouts, about the demo's pictures, and an adapter of its VLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from safetensors.torch import save_file

from polymerge.demo.digit_questions import Question, draw_questions
from polymerge.demo.story import SHIPPED, SHIPPED_SEED
from polymerge.demo.world import load_handwriting, split_pairs
from polymerge.evaluation.mm_mergebench.tasks import TASKS, Task

VLM = str(SHIPPED / "vlm")
EACH = 5
_KINDS = {"ImageNet": "top colour", "ImageNet-R": "bottom colour", "VQAv2": "how many red"}
"""What some tasks ask; the others ask what the digits are."""


def benchmark(folder: Path, layout: Literal["hub", "scripts"] = "hub") -> Path:
    """All twelve tasks with EACH questions; in those that pad, one image is not square."""
    questions = draw_questions(split_pairs(SHIPPED_SEED), load_handwriting(SHIPPED_SEED)[1], SHIPPED_SEED, pictures=1)
    for number, task in enumerate(TASKS.values()):
        if layout == "hub":
            place = folder / ("Seen_data" if task.seen else "Unseen_data") / task.name
            images = folder / "images"
        else:
            place = folder / "instructions" / (task.folders[0] if task.folders else task.name)
            images = folder / "datasets"
        kind = _KINDS.get(task.name, "read")
        asked = [one for one in questions if one.kind == kind and one.group == "perception"]
        _task(task, asked[number * EACH :][:EACH], place, images)
    return folder


def _task(task: Task, asked: list[Question], place: Path, images: Path) -> None:
    place.mkdir(parents=True)
    (images / task.name).mkdir(parents=True)
    items: list[dict[str, Any]] = []
    for number, question in enumerate(asked):
        picture = Image.fromarray(question.picture)
        if task.image == "pad" and number == 1:
            picture = picture.crop((0, 4, 32, 28))
        picture.save(images / task.name / f"{number}.png")
        name = str(number) if task.kind == "letter" else number
        item: dict[str, Any] = {"question_id": name, "text": f"<image>\n{question.prompt}"}
        item |= {"image": f"{task.name}/{number}.png", "answer": question.answer}
        if task.kind == "box":
            item |= {"answer_bbox": "[0.1,0.2,0.5,0.6]", "size": [32, 32]}
        if task.form == "choices":
            item["text"] += "\nthis line is replaced"
        items.append(item)
    if task.kind == "letter":
        del items[2]["image"]
        items[2]["text"] = items[2]["text"].removeprefix("<image>\n")
    write(place / task.questions, items)
    if task.kind == "letter":
        problems = {
            item["question_id"]: {"answer": 0, "choices": ["x", "y"], "image": item.get("image")} for item in items
        }
        write(place / "problems.json", problems)
        write(place / "pid_splits.json", {"test": list(problems)})
    elif task.kind == "captions":
        coco = {
            "images": [{"id": 100 + number, "file_name": item["image"]} for number, item in enumerate(items)],
            "annotations": [
                {"id": number, "image_id": 100 + number, "caption": f"the digits {item['answer']} are here"}
                for number, item in enumerate(items)
            ],
        }
        write(place / task.truth[0], coco)


def write(file: Path, value: object) -> Path:
    file.write_text(json.dumps(value), encoding="utf-8")
    return file


def adapter(folder: Path, seed: int, size: float = 0.15) -> Path:
    """A LoRA adapter of the demo's VLM with random factors on the queries and values of its text tower."""
    folder.mkdir(parents=True)
    dice = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(4):
        for module in ("q_proj", "v_proj"):
            name = f"base_model.model.model.language_model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(4, 128, generator=dice) * size
            tensors[f"{name}.lora_B.weight"] = torch.randn(128, 4, generator=dice) * size
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": VLM, "r": 4, "lora_alpha": 4,
        "target_modules": ["q_proj", "v_proj"], "bias": "none", "lora_dropout": 0.0,
    }  # fmt: skip
    write(folder / "adapter_config.json", config)
    return folder


def results_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "results.json").read_text(encoding="utf-8"))
    return found
