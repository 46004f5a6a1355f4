"""The whole training, seeded: a base language model, a reasoning model from it, a vision-language model on it.

What each is taught are endless streams of questions with answers. Only `reason_lesson` asks arithmetic about unseen
pairs, and only in words. Perception is taught on all pairs.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polymerge.demo.trained_models import (
    IMAGE_ID,
    IMAGE_TOKENS,
    MEAN,
    STD,
    new_base,
    new_vlm,
    save_language_model,
    save_vlm,
)
from polymerge.demo.world import (
    ARITHMETIC,
    COLOURS,
    END,
    GRID,
    NUMBERS,
    PAD,
    PERCEPTION,
    USER,
    WORDS,
    Handwriting,
    Pair,
    Pairs,
    Picture,
    Scene,
    answer,
    ask,
    dialogue,
    draw,
    draw_scene,
    load_handwriting,
    spell,
    split_pairs,
    tell,
)

BATCH = 64
WARM_UP = 50  # steps

Schedule = Mapping[str, tuple[int, float]]
"""By stage its steps and its highest learning rate."""

# chosen on seed 0, the shipped checkpoints are of another
SCHEDULE: Schedule = {
    "base": (1500, 2e-3),
    "reason": (600, 5e-4),
    "vision": (1500, 1e-3),
    "projector": (600, 3e-3),
    "vlm": (500, 2e-4),
}

ROW = {word: row for row, word in enumerate(WORDS)}
Say = Callable[[str], None]
Teach = Callable[[random.Random, Pairs], "Lesson"]


@dataclass(frozen=True)
class Lesson:
    """One question and its answer, as words; `scene` is None for questions about a mere list of words.

    In a lesson with a picture the prompt has no words for the scene; they are left to the image tokens.
    """

    kind: str
    scene: Scene | None
    prompt: list[str]
    answer: list[str]


# Of the scenes in words, those written as a grid instead of a sentence. A picture reaches the language model as a grid
# of tokens too, so a model that has read grids of words needs to change less when it learns to see, and what another
# model has learnt about words fits better: an earlier version of this world gained 13 points, 7 without grids.
GRID_SHARE = 0.6


def base_lesson(dice: random.Random, pairs: Pairs) -> Lesson:
    """What the base model learns: to read scenes in words, to count and repeat, and arithmetic on the seen pairs."""
    lot = dice.random()
    if lot < 0.35:
        return in_words(dice.choice(ARITHMETIC), dice.choice(pairs.seen), dice)
    if lot < 0.85:
        return in_words(dice.choice(PERCEPTION), dice.choice(pairs.every), dice)
    return list_lesson(dice)


def reason_lesson(dice: random.Random, pairs: Pairs) -> Lesson:
    """What the reasoning model learns on top: arithmetic in words on all pairs, with 40 % rehearsal."""
    if dice.random() < 0.60:
        return in_words(dice.choice(ARITHMETIC), dice.choice(pairs.every), dice)
    return base_lesson(dice, pairs)


def vlm_lesson(dice: random.Random, pairs: Pairs) -> Lesson:
    """What the vision-language model learns: perception in pictures, and 25 % arithmetic on the seen pairs."""
    if dice.random() < 0.25:
        return in_picture(dice.choice(ARITHMETIC), dice.choice(pairs.seen), dice)
    return in_picture(dice.choice(PERCEPTION), dice.choice(pairs.every), dice)


def in_picture(kind: str, pair: Pair, dice: random.Random) -> Lesson:
    """Ask about a scene that is to be drawn."""
    scene = draw_scene(pair, dice)
    return Lesson(kind, scene, dialogue([], ask(kind)), answer(kind, scene))


def in_words(kind: str, pair: Pair, dice: random.Random) -> Lesson:
    """Ask about a scene that is told in a sentence, or written as a grid."""
    scene = draw_scene(pair, dice)
    words = spell(scene, dice) if dice.random() < GRID_SHARE else tell(scene, dice)
    return Lesson(kind, scene, dialogue(words, ask(kind)), answer(kind, scene))


def list_lesson(dice: random.Random) -> Lesson:
    """Count a word in a list, or repeat the list; here the base model meets the large numbers."""
    if dice.random() < 0.5:
        few = dice.sample(NUMBERS + COLOURS, 2)
        words = [dice.choice(few) for _ in range(dice.randint(2, 5))]
        question = ["how", "many", "are", few[0], "?"]
        return Lesson("count", None, dialogue([*words, "."], question), [str(words.count(few[0]))])
    words = [dice.choice(NUMBERS + COLOURS) for _ in range(dice.randint(2, 5))]
    return Lesson("repeat", None, dialogue([*words, "."], ["repeat", "."]), words)


def train_all(folder: Path, *, seed: int, say: Say = print) -> None:
    """Train the three models of the story and write them to `folder`/base, /reason and /vlm."""
    pairs = split_pairs(seed)
    handwriting, _ = load_handwriting(seed)

    base = new_base(seed)
    teach("base", base, base.parameters(), base_lesson, pairs, None, seed, say, SCHEDULE, BATCH)
    save_language_model(base, folder / "base")

    reason = new_base(seed)
    reason.load_state_dict(base.state_dict())
    teach("reason", reason, reason.parameters(), reason_lesson, pairs, None, seed, say, SCHEDULE, BATCH)
    save_language_model(reason, folder / "reason")

    vlm = new_vlm(base, seed)
    teach_to_see(vlm.model.vision_tower, pairs, handwriting, seed, say, SCHEDULE, BATCH)
    projector = vlm.model.multi_modal_projector.parameters()
    teach("projector", vlm, projector, vlm_lesson, pairs, handwriting, seed, say, SCHEDULE, BATCH)
    teach("vlm", vlm, vlm.parameters(), vlm_lesson, pairs, handwriting, seed, say, SCHEDULE, BATCH)
    save_vlm(vlm, folder / "vlm")


def teach(
    stage: str,
    model: Any,
    parameters: Iterable[nn.Parameter],
    lesson: Teach,
    pairs: Pairs,
    handwriting: Handwriting | None,
    seed: int,
    say: Say,
    schedule: Schedule,
    batch: int,
) -> None:
    """Train a model on a stream of lessons; only the answers count.

    handwriting  of the pictures; None where lessons are in words
    schedule     has the stage: its steps and its highest learning rate
    batch        lessons a step
    """
    dice = random.Random(f"{stage} {seed}")

    def loss() -> Tensor:
        lessons = [lesson(dice, pairs) for _ in range(batch)]
        inputs = encode(lessons, with_image=handwriting is not None)
        if handwriting is not None:
            inputs["pixel_values"] = pixels([draw(x.scene, handwriting, dice, jitter=True) for x in lessons if x.scene])
        result: Tensor = model(**inputs).loss
        return result

    _fit(stage, schedule[stage], model, parameters, loss, say)


def teach_to_see(
    tower: Any,
    pairs: Pairs,
    handwriting: Handwriting,
    seed: int,
    say: Say,
    schedule: Schedule,
    batch: int,
) -> None:
    """Train the vision tower to tell, for each patch, which digit and which colour it is part of."""
    dice = random.Random(f"vision {seed}")
    nothing = 10, len(COLOURS)
    heads = nn.ModuleList(nn.Linear(tower.config.hidden_size, classes + 1) for classes in nothing)

    def loss() -> Tensor:
        scenes = [draw_scene(dice.choice(pairs.every), dice) for _ in range(batch)]
        seen = pixels([draw(scene, handwriting, dice, jitter=True) for scene in scenes])
        features = tower(seen, output_hidden_states=True).hidden_states[-1][:, -IMAGE_TOKENS:]  # CLIP's has one before
        total: Tensor = torch.zeros(())
        for head, none, of in zip(heads, nothing, ("digit", "colour"), strict=True):
            labels = torch.full((batch, GRID, GRID), none)
            for row, scene in enumerate(scenes):
                for side, column in enumerate(scene.columns):
                    label = scene.digits[side] if of == "digit" else COLOURS.index(scene.colours[side])
                    labels[row, 2 * side : 2 * side + 2, column : column + 2] = label
            total = total + nn.functional.cross_entropy(head(features).flatten(0, 1), labels.flatten())
        return total

    _fit("vision", schedule["vision"], tower, [*tower.parameters(), *heads.parameters()], loss, say)


def _fit(
    stage: str,
    how: tuple[int, float],
    model: nn.Module,
    parameters: Iterable[nn.Parameter],
    loss: Callable[[], Any],
    say: Say,
) -> None:
    """Run AdamW over the given parameters: linear warm-up, then half a cosine down to nothing."""
    steps, peak = how
    started = time.perf_counter()
    chosen = list(parameters)
    optimizer = torch.optim.AdamW(chosen, lr=peak, weight_decay=0.01)
    model.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
    model.train()
    for step in range(steps):
        decay = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, (step + 1) / WARM_UP) * decay
        value = loss()
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(chosen, 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            seconds = time.perf_counter() - started
            say(f"{stage:>9}  step {step + 1:>4} of {steps}  loss {value.item():.3f}  {seconds:.0f} s")


def encode(lessons: list[Lesson], *, with_image: bool = False) -> dict[str, Tensor]:
    """Turn lessons into a batch: token ids, mask, and labels that are -100 wherever no answer is.

    with_image  put the places of the image tokens after `<user>`, as the processor does
    returns     int64 [lesson, token] each, padded on the right
    """
    rows, labels = [], []
    for lesson in lessons:
        prompt = [ROW[word] for word in lesson.prompt]
        if with_image:
            start = lesson.prompt.index(USER) + 1
            prompt[start:start] = [IMAGE_ID] * IMAGE_TOKENS
        reply = [ROW[word] for word in [*lesson.answer, END]]
        rows.append(prompt + reply)
        labels.append([-100] * len(prompt) + reply)
    longest = max(map(len, rows))
    ids = torch.tensor([row + [ROW[PAD]] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    wanted = torch.tensor([row + [-100] * (longest - len(row)) for row in labels])
    return {"input_ids": ids, "attention_mask": mask, "labels": wanted}


def pixels(pictures: list[Picture]) -> Tensor:
    """Normalise pictures as the image processor does: float32 [picture, 3, 32, 32]."""
    stacked = torch.stack([torch.from_numpy(picture) for picture in pictures])
    return ((stacked.permute(0, 3, 1, 2).float() / 255 - MEAN) / STD).contiguous()
