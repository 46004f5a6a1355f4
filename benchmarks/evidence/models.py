"""The models of a seed, trained from nothing, each stage into folders of its own."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

from course import Course, Teach
from finetune_lora import add_lora
from finetunes import TASKS
from polymerge.demo.story import write_control
from polymerge.demo.train import teach, teach_to_see
from polymerge.demo.trained_models import (
    IMAGE_ID,
    Shape,
    grow_from,
    llama_config,
    load,
    new_base,
    new_vlm,
    save_language_model,
    save_vlm,
    save_weights,
    tokenizer,
)
from polymerge.demo.world import ARITHMETIC, PATCH, SIZE, WORDS, load_handwriting
from sizes import Size

__all__ = ["RANK", "STAGES", "adapters_of", "finetunes_of"]

RANK = 8
STARTS = ("common", "own")


def language(course: Course, size: Size, folder: Path) -> None:
    """Base and reasoning model, and what stands in for either as a control.

    random    as far from the base as the reasoning model, tensor by tensor, in random directions
    sibling   the base after some more training on other tasks: nearly the right base of the reasoning model's delta
    ancestor  the base before all training: a wrong one
    """
    seed, taught = course.seed, partial(_taught, course, size)
    base = new_base(seed, size.shape)
    save_language_model(base, folder / "ancestor")
    taught("base", "base", base, course.base)
    save_language_model(base, folder / "base")
    for name, lesson in (("reason", course.reason), ("sibling", course.lists)):
        model = new_base(seed, size.shape)
        model.load_state_dict(base.state_dict())
        taught(name, name, model, lesson)
        save_language_model(model, folder / name)
    write_control(folder / "base", folder / "reason", folder / "random", seed)


def llava(course: Course, size: Size, folder: Path) -> None:
    """The vision-language model that others are merged into: LLaVA with a CLIP tower, grown from the base."""
    vlm: Any = new_vlm(load(LlamaForCausalLM, folder / "base"), course.seed, size.shape)
    _taught_to_see(course, size, vlm, vlm.model.vision_tower, vlm.model.multi_modal_projector, course.see, "llava")
    save_vlm(vlm, folder / "vlm")


def deepseek(course: Course, size: Size, folder: Path) -> None:
    """A vision-language model of another architecture: DeepSeek-VL with a SigLIP tower, grown from the same base."""
    vlm = _new_deepseek(load(LlamaForCausalLM, folder / "base"), course.seed, size.shape)
    tower, projector = vlm.model.vision_model, vlm.model.aligner
    _taught_to_see(course, size, vlm, tower, projector, course.see_and_reason, "deepseek")
    save_weights(vlm, folder / "other")
    tokenizer(with_image=True).save_pretrained(folder / "other")


def adapters(start: str, course: Course, size: Size, folder: Path) -> None:
    """A LoRA adapter of the vision-language model for each kind of arithmetic.

    start  common: all begin with the same factors; own: each with its own
    """
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # PEFT's concern
    for place, task in enumerate(ARITHMETIC):
        torch.manual_seed(course.seed if start == "common" else 100 * course.seed + place)
        model = add_lora(load(LlavaForConditionalGeneration, folder / "vlm"), rank=RANK, alpha=2 * RANK)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        _taught(course, size, "adapter", f"adapter {task}", model, course.only(task), trained)
        model.save_pretrained(adapters_of(folder, start)[task], save_embedding_layers=False)


def finetunes(course: Course, size: Size, folder: Path) -> None:
    """A copy of the vision-language model for each of three kinds of arithmetic, all of its weights trained."""
    for task, place in finetunes_of(folder).items():
        model = load(LlavaForConditionalGeneration, folder / "vlm")
        _taught(course, size, "finetune", f"finetune {task}", model, course.only(task))
        save_vlm(model, place)


STAGES: Mapping[str, tuple[Callable[[Course, Size, Path], None], tuple[str, ...]]] = {
    "language": (language, ()),
    "llava": (llava, ("language",)),
    "deepseek": (deepseek, ("language",)),
    "adapters, common start": (partial(adapters, "common"), ("llava",)),
    "adapters, own starts": (partial(adapters, "own"), ("llava",)),
    "full fine-tunes": (finetunes, ("llava",)),
}
"""What is trained, by name, each after others."""


def adapters_of(folder: Path, start: str) -> dict[str, Path]:
    """Where the adapters lie, by task."""
    return {task: folder / f"adapters-{start}" / task for task in ARITHMETIC}


def finetunes_of(folder: Path) -> dict[str, Path]:
    """Where the fine-tunes lie, by task."""
    return {task: folder / "finetunes" / task for task in TASKS}


def _taught(
    course: Course, size: Size, stage: str, name: str, model: Any, lesson: Teach, parameters: Any = None
) -> None:
    """Train a model on lessons; those about pictures are of the vision-language models, which have a tower."""
    sees = hasattr(model.config, "vision_config")
    scans = load_handwriting(course.seed)[0] if sees else None
    chosen = list(model.parameters()) if parameters is None else list(parameters)
    schedule = {name: size.schedule[stage]}
    teach(name, model, chosen, lesson, course.pairs, scans, course.seed, _say, schedule, size.batch)


def _taught_to_see(course: Course, size: Size, vlm: Any, tower: Any, projector: Any, lesson: Teach, name: str) -> None:
    """First the tower alone, then the projector, then all."""
    scans = load_handwriting(course.seed)[0]
    teach_to_see(tower, course.pairs, scans, course.seed, _say, size.schedule, size.batch)
    _taught(course, size, "projector", f"projector {name}", vlm, lesson, projector.parameters())
    _taught(course, size, "vlm", name, vlm, lesson)


def _new_deepseek(base: LlamaForCausalLM, seed: int, shape: Shape) -> Any:
    torch.manual_seed(seed + 1)
    vision = SiglipVisionConfig(
        hidden_size=shape.vision_width,
        intermediate_size=shape.vision_inner,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    text = llama_config(len(WORDS) + 1, shape)
    config = DeepseekVLConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE_ID, tie_word_embeddings=False
    )
    vlm = DeepseekVLForConditionalGeneration(config)
    grow_from(base, vlm)
    return vlm


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
