"""The twelve tasks of MM-MergeBench as data: files, scorer, and the prompt format of the published scripts.

Zeng et al. 2025, arXiv:2502.17159: eight tasks that adapters were trained for (seen) and four without (unseen).
All use greedy decoding and the vicuna_v1 conversation with the image before the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from polymerge.errors import RecipeError, did_you_mean

__all__ = ["BENCHMARK", "TASKS", "Task", "task_named"]

_LETTER = "Answer with the option's letter from the given choices directly."
_SHORT = "Answer the question using a single word or phrase."
_CAPTION = "What is happening in the image? Generate a brief caption for the image."


@dataclass(frozen=True)
class Task:
    """A row of the table.

    questions       the question file: a JSON list of question_id, text, image and answer
    truth           the files beside it with the truth, if the question file lacks it
    scorer          a name in SCORERS
    script          the published scorer; its deviations are in `published`
    kind            the kind of truth: an answer, a box, an option's letter, captions
    instruction     the end of the question's text, or all of it; already in the question file
    image           raw: resized and centre-cropped by the image processor; pad: padded to a square with the mean colour
    max_new_tokens  the maximum answer length
    form            how the text is changed: `text` not at all, `optional-image` without the tag if there is no
                    image, `choices` its first line followed by the names of all classes
    folders         other names of its folder in the published layouts
    """

    name: str
    seen: bool
    questions: str
    scorer: str
    script: str
    instruction: str
    image: Literal["raw", "pad"]
    max_new_tokens: int
    kind: Literal["answer", "box", "letter", "captions"] = "answer"
    truth: tuple[str, ...] = ()
    form: Literal["text", "optional-image", "choices"] = "text"
    folders: tuple[str, ...] = ()

    @property
    def group(self) -> Literal["seen", "unseen"]:
        """The benchmark average that it belongs to."""
        return "seen" if self.seen else "unseen"

    @property
    def files(self) -> tuple[str, ...]:
        """The files that scoring reads."""
        return self.truth if self.kind == "letter" else (self.questions, *self.truth)


_ROWS = (
    Task(
        "ScienceQA", True, "test.json", "letter", "eval_science_qa.py", _LETTER, "raw", 1024,
        kind="letter", truth=("problems.json", "pid_splits.json"), form="optional-image",
    ),
    Task(
        "ImageNet", True, "test.json", "containment", "eval_ImagetNet.py", _SHORT, "raw", 1024, form="choices",
    ),
    Task("VQAv2", True, "val.json", "exact", "eval_vqav2.py", _SHORT, "raw", 1024),
    Task(
        "REC", True, "test.json", "box_iou", "eval_grounding.py",
        "Please provide the bounding box coordinate of the region this sentence describes: {description}.",
        "raw", 1024, kind="box", folders=("Grounding",),
    ),
    Task("OCR-VQA", True, "test.json", "exact_lower", "eval_ocrvqa.py", _SHORT, "pad", 128, folders=("OCRVQA",)),
    Task(
        "VizWiz", True, "val.json", "captions", "eval_vizwiz_caption.py", _CAPTION, "pad", 128,
        kind="captions", truth=("val_coco_type.json",), folders=("VizWiz-caption",),
    ),
    Task(
        "Flickr30k", True, "val_brief.json", "captions", "eval_flickr30k.py", _CAPTION, "pad", 128,
        kind="captions", truth=("val_coco_type.json",), folders=("flickr30k-caption",),
    ),
    Task("IconQA", True, "val.json", "exact", "eval_iconqa.py", _SHORT, "pad", 128),
    Task("AOKVQA", False, "val.json", "exact", "eval_aokvqa.py", _LETTER, "raw", 1024, folders=("A-OKVQA",)),
    Task(
        "ImageNet-R", False, "test.json", "containment", "eval_ImagetNet.py", "What is the object in the image?",
        "pad", 1024,
    ),
    Task(
        "Screen2words", False, "test.json", "captions", "eval_caption.py",
        "You are given a phone UI screen. Describe the screen in one sentence.", "pad", 128,
        kind="captions", truth=("test_coco_type.json",), folders=("Screen2Words",),
    ),
    Task("TabMWP", False, "test.json", "exact", "eval_iconqa.py", _SHORT, "pad", 128),
)  # fmt: skip

TASKS: Mapping[str, Task] = {task.name: task for task in _ROWS}

BENCHMARK: Mapping[str, tuple[str, ...]] = {
    "mm-mergebench": tuple(TASKS),
    "mm-mergebench-seen": tuple(name for name, task in TASKS.items() if task.seen),
    "mm-mergebench-unseen": tuple(name for name, task in TASKS.items() if not task.seen),
}
"""Names for several tasks."""


def task_named(name: str) -> Task:
    """Look up a task by its name or by its folder's, ignoring case.

    raises RecipeError, with the nearest name, if there is none.
    """
    for task in TASKS.values():
        if name.lower() in (known.lower() for known in (task.name, *task.folders)):
            return task
    raise RecipeError(f"there is no task '{name}'.{did_you_mean(name, (*TASKS, *BENCHMARK))}")
