r"""Fine-tune a vision-language model with LoRA on instructions in LLaVA's format, and save a PEFT adapter.

    python examples/finetune_lora.py --model llava-hf/llava-1.5-7b-hf --data vqa.json --images DIR --output OUT --bf16

LoRA goes on all linear layers of the text tower and nowhere else, as RobustMerge has it; the projector is trained too
if asked for. `--full` trains all weights instead, and saves a whole model. The data is a JSON list of

    {"id": "1", "image": "1.jpg", "conversations": [{"from": "human", "value": "<image>\nHow many?"},
                                                    {"from": "gpt", "value": "Two."}]}

with `image` relative to the images' folder, or left out together with its `<image>`. Only answers count in the loss.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments, set_seed

TEXT_TOWERS = ("language_model", "text_model")
PROJECTORS = ("multi_modal_projector", "mm_projector", "projector", "connector", "merger")
MARK = "<image>"
SPEAKERS = ("human", "gpt")
IGNORED = -100  # a label that does not count in the loss
SHOWN = 50  # of the problems with the data

Example = dict[str, Any]


class DataError(Exception):
    """The data cannot be trained on; the text has all that is wrong with it, a line each."""


def read_examples(data: Path, images: Path) -> list[Example]:
    """Read the data and make sure that all of it can be trained on, before a model is loaded."""
    try:
        examples = json.loads(data.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{data}: {error}") from None
    if not isinstance(examples, list) or not examples:
        raise DataError(f"{data}: a list of conversations is wanted, and at least one")
    problems = [f"{data}: [{i}]: {problem}" for i, one in enumerate(examples) for problem in _problems(one, images)]
    if problems:
        more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise DataError("\n".join(problems[:SHOWN] + more))
    return examples


def _problems(example: object, images: Path) -> list[str]:
    """Say what is wrong with one entry of the list."""
    if not isinstance(example, dict):
        return [f"an object is wanted, not {example!r}"]
    found = [f"unknown field {name!r}" for name in sorted(example.keys() - {"id", "image", "conversations"})]
    image, turns = example.get("image"), example.get("conversations")
    if image is not None and not (isinstance(image, str) and (images / image).is_file()):
        found.append(f"no image {image!r} in {images}")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return [*found, "no list of turns in 'conversations'"]
    found += [
        f"turn {i}: unknown field {name!r}"
        for i, turn in enumerate(turns)
        for name in sorted(turn.keys() - {"from", "value"})
    ]
    speakers = [turn.get("from") for turn in turns]
    if not turns or len(turns) % 2 or any(speaker != SPEAKERS[i % 2] for i, speaker in enumerate(speakers)):
        found.append(f"turns have to be human, gpt, human, gpt, ..., and are {', '.join(map(str, speakers)) or 'none'}")
    values = [turn.get("value") for turn in turns]
    has_text = [isinstance(value, str) and bool(value.replace(MARK, "").strip()) for value in values]
    found += [f"turn {i}: no text in 'value'" for i, has in enumerate(has_text) if not has]
    marks = [value.count(MARK) if isinstance(value, str) else 0 for value in values]
    if turns and (marks[0] != int(image is not None) or any(marks[1:])):
        found.append(f"{MARK} has to stand once in the first turn if there is an image, and nowhere else")
    return found


@dataclass
class Collator:
    """Makes a batch of examples, by the model's own processor and chat template."""

    processor: Any
    images: Path
    ends: frozenset[int]  # the tokens at which the model stops

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Tokenise and pad on the right; `labels` are IGNORED wherever no answer is."""
        texts, answers = zip(*(self._write(example["conversations"]) for example in examples), strict=True)
        pictures = [[self._open(example["image"])] if example.get("image") else [] for example in examples]
        shown = {"images": pictures} if any(pictures) else {}
        self.processor.tokenizer.padding_side = "right"
        special = self._special(texts[0])
        batch = self.processor(text=list(texts), padding=True, return_tensors="pt", add_special_tokens=special, **shown)
        labels = torch.full_like(batch["input_ids"], IGNORED)
        for row, (length, spans) in enumerate(answers):
            grown = int(batch["attention_mask"][row].sum()) - length  # by the image's tokens, which precede all answers
            for start, end in spans:
                labels[row, start + grown : end + grown] = batch["input_ids"][row, start + grown : end + grown]
        return {**batch, "labels": labels}

    def _write(self, turns: list[dict[str, str]]) -> tuple[str, tuple[int, list[tuple[int, int]]]]:
        """Put a conversation into text; its length in tokens and where the answers are in them, the image being one."""
        messages = [_message(turn) for turn in turns]
        text = self.processor.apply_chat_template(messages)
        tokens = self._tokens(text)
        spans = []
        for i in range(1, len(messages), 2):
            asked = self.processor.apply_chat_template(messages[:i], add_generation_prompt=True)
            said = self.processor.apply_chat_template(messages[: i + 1])
            start, end = (_shared(tokens, self._tokens(part)) for part in (asked, said))
            spans.append((start, end))
        if self.ends.isdisjoint(tokens[spans[-1][0] :]):  # the template leaves it to the trainer
            text += self.processor.tokenizer.eos_token
            tokens = self._tokens(text)
            spans[-1] = (spans[-1][0], len(tokens))
        return text, (len(tokens), spans)

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self.processor.tokenizer(text, add_special_tokens=self._special(text))["input_ids"]
        return ids

    def _special(self, text: str) -> bool:
        """Whether the tokenizer has to begin the text, because the template has not."""
        begin = self.processor.tokenizer.bos_token
        return begin is None or not text.startswith(begin)

    def _open(self, name: str) -> Image.Image:
        with Image.open(self.images / name) as image:
            return image.convert("RGB")


def _shared(some: Sequence[int], others: Sequence[int]) -> int:
    """Count the tokens that two texts have in common at their start."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(some, others, strict=False)))


def _message(turn: dict[str, str]) -> dict[str, Any]:
    """Turn LLaVA's form of a turn into transformers'."""
    before, mark, after = turn["value"].partition(MARK)
    content = [{"type": "text", "text": before.strip()}, {"type": "image"}, {"type": "text", "text": after.strip()}]
    if not mark:
        content = content[:1]
    role = "user" if turn["from"] == "human" else "assistant"
    return {"role": role, "content": [item for item in content if item.get("text") != ""]}


def text_layers(model: Any) -> str:
    """Match the linear layers of the text tower, without the head, by an expression such as PEFT takes.

    Their own names alone would not do: `q_proj` is found in the vision tower as well.
    """
    tower = _find(model, TEXT_TOWERS, "text tower")
    modules = model.get_submodule(tower).named_modules()
    layers = [name for name, module in modules if isinstance(module, nn.Linear)]
    names = sorted({name.rpartition(".")[2] for name in layers} - {"lm_head"})
    return rf"{re.escape(tower)}\..*\.({'|'.join(names)})"


def add_lora(model: Any, *, rank: int = 16, alpha: int = 32, rslora: bool = False, projector: bool = False) -> Any:
    """Freeze the model and put LoRA on its text tower; what is trained is kept in float32."""
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        use_rslora=rslora,
        target_modules=text_layers(model),
        modules_to_save=[_find(model, PROJECTORS, "projector")] if projector else None,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def _find(model: Any, names: Sequence[str], what: str) -> str:
    """Find the outermost module that has one of the names."""
    found: str | None = next((name for name, _ in model.named_modules() if name.rpartition(".")[2] in names), None)
    if found is None:
        raise SystemExit(f"{type(model).__name__} has no {what} by any of the names {', '.join(names)}")
    return found


def main(words: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = _options(words)
    try:
        examples = read_examples(options.data, options.images)
    except DataError as error:
        sys.exit(str(error))
    set_seed(options.seed)
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype=dtype)
    processor: Any = AutoProcessor.from_pretrained(options.model)  # type: ignore[no-untyped-call]
    if options.full:
        trained, saved = model.float(), {}
    else:
        projector = options.train_projector
        trained = add_lora(model, rank=options.rank, alpha=options.alpha, rslora=options.rslora, projector=projector)
        trained.print_trainable_parameters()
        saved = {"save_embedding_layers": False}
    arguments = TrainingArguments(
        output_dir=str(options.output),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,  # a share of all
        bf16=options.bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=options.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,  # the collator needs them
        label_names=["labels"],
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        disable_tqdm=not sys.stderr.isatty(),
    )
    ends = model.generation_config.eos_token_id
    ends = {processor.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    collator = Collator(processor, options.images, frozenset(ends - {None}))
    Trainer(model=trained, args=arguments, train_dataset=examples, data_collator=collator).train()
    trained.save_pretrained(options.output, **saved)
    if options.full:
        processor.save_pretrained(options.output)
    print(f"wrote {options.output}")


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder, or name on the hub")
    parser.add_argument("--data", type=Path, required=True, metavar="JSON", help="conversations")
    parser.add_argument("--images", type=Path, default=Path(), metavar="DIR", help="folder that images are relative to")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the adapter or model")
    parser.add_argument("--full", action="store_true", help="train all weights, without LoRA, and save the model")
    parser.add_argument("--rank", type=int, default=16, help="of LoRA (default 16)")
    parser.add_argument(
        "--alpha", type=int, default=32, help="of LoRA, whose update is times alpha / rank (default 32)"
    )
    parser.add_argument("--rslora", action="store_true", help="times alpha / sqrt(rank) instead")
    parser.add_argument("--train-projector", action="store_true", help="train the projector too, and save it whole")
    parser.add_argument("--epochs", type=float, default=1, help="(default 1)")
    parser.add_argument("--batch-size", type=int, default=8, help="examples at a time on one device (default 8)")
    parser.add_argument("--accumulate", type=int, default=1, help="batches to a step (default 1)")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="at its highest (default 2e-4)")
    parser.add_argument("--bf16", action="store_true", help="load and compute in bfloat16")
    parser.add_argument("--seed", type=int, default=0, help="of LoRA's start and of the order (default 0)")
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
