"""Fine-tune copies of the demo's vision-language model, one operation on two handwritten digits each."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from measure import measure
from polymerge.demo import trained_models
from polymerge.demo.train import in_picture
from polymerge.demo.world import ask, draw, load_handwriting, split_pairs

__all__ = ["PICTURES", "SEED", "VLM", "teach"]

VLM = Path(trained_models.__file__).parent / "checkpoints" / "vlm"
SEED = 1  # that the shipped model was trained with: its held-out scans are those of this seed
SCRIPT = Path(__file__).parents[1] / "examples" / "finetune_lora.py"
PICTURES = 8000  # that each copy is taught with


def teach(
    folder: Path, tasks: Sequence[str], training: Sequence[str], *, pictures: int = PICTURES, seed: int = SEED
) -> dict[str, Path]:
    """Teach a copy each task, as many at a time as there are cores, or take those of an earlier run.

    training  options of examples/finetune_lora.py
    seed      of the pictures, all of them of scans that belong to the training
    """

    def one(task: str) -> None:
        data = _write_lessons(task, folder, pictures, seed)
        command = [sys.executable, str(SCRIPT), "--model", str(VLM), "--data", str(data), "--images", str(folder)]
        out = folder / f"{task}.new"
        shutil.rmtree(out, ignore_errors=True)
        taken = measure([*command, "--output", str(out), *training], {"OMP_NUM_THREADS": "1"})
        (out / "trained.txt").write_text(shlex.join(training), encoding="utf-8")
        shutil.rmtree(folder / task, ignore_errors=True)
        out.rename(folder / task)
        shutil.rmtree(folder / "images" / task)
        print(f"taught {task}: {taken.seconds:.0f} s", file=sys.stderr)

    lacking = [task for task in tasks if _text(folder / task / "trained.txt") != shlex.join(training)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, lacking))
    return {task: folder / task for task in tasks}


def _write_lessons(task: str, folder: Path, pictures: int, seed: int) -> Path:
    """Draw pictures of training scans and ask about each, in LLaVA's format."""
    dice = random.Random(f"adapter {task} {seed}")
    pairs, (handwriting, _) = split_pairs(SEED), load_handwriting(SEED)
    (folder / "images" / task).mkdir(parents=True, exist_ok=True)
    listed = []
    for number in range(pictures):
        lesson = in_picture(task, dice.choice(pairs.every), dice)
        assert lesson.scene
        name = f"images/{task}/{number}.png"
        Image.fromarray(draw(lesson.scene, handwriting, dice, jitter=True)).save(folder / name, compress_level=1)
        said = {"human": "<image>\n" + " ".join(ask(task)), "gpt": " ".join(lesson.answer)}
        turns = [{"from": speaker, "value": value} for speaker, value in said.items()]
        listed.append({"id": f"{task} {number}", "image": name, "conversations": turns})
    data = folder / f"{task}.json"
    data.write_text(json.dumps(listed), encoding="utf-8")
    return data


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""
