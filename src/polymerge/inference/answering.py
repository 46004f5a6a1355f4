"""Generate answers greedily, in batches, with the model's own chat template; a failing prompt affects no other."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import Any

from polymerge.checkpoints.loading import tokenizer_of
from polymerge.errors import MissingExtraError, PolymergeError, RecipeError
from polymerge.inference.images import open_image
from polymerge.inference.prompt_records import Prompt

__all__ = ["AnswerError", "Answerer", "Attempt", "EngineError", "Generate", "attempt", "batches", "greedy_config"]

_TOKENS = ("bos_token_id", "eos_token_id", "decoder_start_token_id")


Attempt = tuple[str | None, str]
"""An answer and an empty text, or None and the reason why there is none."""


Generate = Callable[[list[str], list[list[Any]], bool | None], Sequence[Sequence[int]]]
"""Generates the tokens of answers from prompts as the chat template wrote them, the images of each (or none at all),
and whether the tokenizer adds its special tokens; None for its own choice.
"""


class EngineError(PolymergeError):
    """An engine in a process of its own does not start, has ended, or does not hold what was put into it."""


class AnswerError(PolymergeError):
    """The model gave no answer; `ids` are those of the prompts asked, or of those with a broken image."""

    def __init__(self, message: str, ids: Sequence[int | str]) -> None:
        super().__init__(message)
        self.ids = tuple(ids)

    def __reduce__(self) -> tuple[type[AnswerError], tuple[str, tuple[int | str, ...]]]:
        return AnswerError, (str(self), self.ids)  # so that it comes whole out of another process


def batches(prompts: Sequence[Prompt], size: int) -> list[tuple[Prompt, ...]]:
    """Split prompts into batches of at most `size`, independent of the order of the prompts.

    They are sorted by number of images, length of text and id; all prompts of a batch have equally many images.
    """
    if size < 1:
        raise RecipeError(f"batch size: {size} is not at least 1")
    # the last key tells 7 from "7"
    ordered = sorted(prompts, key=lambda p: (len(p.images), len(p.text), str(p.id), isinstance(p.id, str)))
    cut = []
    for _, group in groupby(ordered, key=lambda prompt: len(prompt.images)):
        alike = tuple(group)
        cut += [alike[start : start + size] for start in range(0, len(alike), size)]
    return cut


class Answerer:
    """Answers prompts with a model; decoding is greedy, so the same batch gets the same answers.

    Only the token ids of the model's generation_config are used: its settings for sampling, penalties and lengths
    would make two models' answers hard to compare.

    model           from `polymerge.checkpoints.loading.load_model`; its weights may change between batches
    processor       from `load_processor` in the same module; with a tokenizer, prompts are text only
    max_new_tokens  the longest answer, at least 1
    chat_template   a Jinja template that replaces the processor's, for a model without one
    generate        generates the tokens in place of `model`, where another engine runs it

    raises RecipeError without a chat template: a model prompted in a format that it was not trained on answers badly,
    without any visible reason.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        max_new_tokens: int = 16,
        chat_template: str | None = None,
        generate: Generate | None = None,
    ) -> None:
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise RecipeError(f"max_new_tokens: {max_new_tokens!r} is not a whole number of at least 1")
        self._processor, self._tokenizer = processor, tokenizer_of(processor)
        self._sees = processor is not self._tokenizer
        self._template = chat_template  # None for the processor's own, else there must be one inside it
        if chat_template is None and not getattr(processor, "chat_template", None):
            self._template = getattr(self._tokenizer, "chat_template", None)
        if not (self._template or getattr(processor, "chat_template", None)):
            raise RecipeError(
                f"{type(processor).__name__} has no chat template, so nobody knows how the model is to be asked. Copy "
                "chat_template.jinja from the model that it was made from into its folder, or give one with "
                "chat_template."
            )
        if generate is None:
            config = greedy_config(model.generation_config, self._tokenizer, max_new_tokens)
            generate = partial(_generated, model, processor, config)
        self._generated = generate

    def answer(self, batch: Sequence[Prompt]) -> list[str]:
        """Answer prompts; returns the answers in order, without surrounding whitespace.

        Prompts with the same number of images form one batch, as in `batches`; other groups follow one after another.

        raises AnswerError, naming the prompts, if an image is broken or the model fails.
        """
        opened, answers = _opened(batch), dict[int, str]()
        for count in sorted({len(prompt.images) for prompt in batch}):
            places = [place for place, prompt in enumerate(batch) if len(prompt.images) == count]
            said = self._answer(
                [batch[place] for place in places], [opened[place] for place in places] if count else []
            )
            answers.update(zip(places, said, strict=True))
        return [answers[place] for place in range(len(batch))]

    def _answer(self, alike: list[Prompt], images: list[list[Any]]) -> list[str]:
        ids = [prompt.id for prompt in alike]
        if images and not self._sees:
            raise AnswerError(f"{_named(ids)}: the model reads text only, it has no processor for images", ids)
        try:
            return self._generate(alike, images)
        except EngineError:
            raise
        except Exception as error:  # whatever a model's own code raises: these prompts have no answer
            told = next(iter(str(error).strip().splitlines()), "")
            raise AnswerError(f"{_named(ids)}: no answer: {type(error).__name__}: {told}", ids) from error

    def _generate(self, alike: list[Prompt], images: list[list[Any]]) -> list[str]:
        texts = [self._asked(prompt) for prompt in alike]
        # as transformers does it: a template that writes the special tokens itself gets no second ones
        begin = self._tokenizer.bos_token
        plain = not self._sees or (begin is not None and texts[0].startswith(begin))
        tokens = self._generated(texts, images, False if plain else None)
        said = self._tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in said]

    def _asked(self, prompt: Prompt) -> str:
        """Apply the chat template to a prompt: images first, in the processor's form."""
        content: Any = prompt.text
        if self._sees:
            content = [*({"type": "image"} for _ in prompt.images), {"type": "text", "text": prompt.text}]
        written: str = self._processor.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=self._template,
            tokenize=False,
            add_generation_prompt=True,
        )
        return written


def attempt(answerer: Answerer, batch: Sequence[Prompt]) -> list[Attempt]:
    """Answer a batch; if something in it fails, isolate the failing prompts.

    If images are broken, the other prompts are run together without them; if the model fails, each prompt is run
    alone. The grouping depends only on the batch, and so do the answers.

    returns  an attempt for each prompt, in their order
    """
    try:
        return [(answer, "") for answer in answerer.answer(batch)]
    except AnswerError as error:
        if len(batch) == 1:
            return [(None, str(error))]
        broken = set(error.ids)
    others = [prompt for prompt in batch if prompt.id not in broken]
    found = dict(zip((prompt.id for prompt in others), attempt(answerer, others), strict=True)) if others else {}
    return [found[prompt.id] if prompt.id in found else attempt(answerer, [prompt])[0] for prompt in batch]


def _generated(
    model: Any, processor: Any, config: Any, texts: list[str], images: list[list[Any]], special: bool | None
) -> Any:
    """The tokens of a model's answers, by transformers: int64 [prompt, token]."""
    import torch

    how: dict[str, Any] = {"padding": True, "return_tensors": "pt"}
    if special is not None:
        how["add_special_tokens"] = special
    if images:
        how["images"] = images
    inputs = dict(processor(text=texts, **how))
    if "token_type_ids" not in inspect.signature(model.forward).parameters:
        inputs.pop("token_type_ids", None)  # tokenizers give them to models that have no use for them
    if not inputs["attention_mask"][:, -1].all():
        raise ValueError(f"{type(processor).__name__} pads on the right, and answers must follow the prompts")
    moved = {
        name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in inputs.items()
    }
    with torch.inference_mode(), _in_place_of(model, config):
        output = model.generate(**moved)
    return output[:, inputs["input_ids"].shape[1] :]


def greedy_config(own: Any, tokenizer: Any, max_new_tokens: int) -> Any:
    """A generation_config for greedy decoding that takes only token ids from the model's own."""
    import transformers

    make: Any = transformers.GenerationConfig  # transformers leaves its constructors untyped
    ids = {name: getattr(own, name, None) for name in _TOKENS}
    if ids["eos_token_id"] is None:
        ids["eos_token_id"] = tokenizer.eos_token_id
    return make(**ids, pad_token_id=tokenizer.pad_token_id, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens)


@contextmanager
def _in_place_of(model: Any, config: Any) -> Iterator[None]:
    """Temporarily replace a model's generation_config; if passed to `generate`, it would be completed from the
    model's own.
    """
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


def _opened(batch: Sequence[Prompt]) -> list[list[Any]]:
    """Open the images of some prompts, one list per prompt."""
    opened, broken = [], {}
    for prompt in batch:
        try:
            opened.append([open_image(image) for image in prompt.images])
        except MissingExtraError:
            raise
        except Exception as error:  # PIL's formats raise whatever they like
            broken[prompt.id] = error
    if broken:
        told = "; ".join(f"{name!r}: {error}" for name, error in broken.items())
        raise AnswerError(f"images that cannot be read, of prompt {told}", list(broken))
    return opened


def _named(ids: Sequence[int | str]) -> str:
    shown = ", ".join(repr(name) for name in ids[:5])
    return f"prompt{'s' if len(ids) > 1 else ''} {shown}{f' and {len(ids) - 5} more' if len(ids) > 5 else ''}"
