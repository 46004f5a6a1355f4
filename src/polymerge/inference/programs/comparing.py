"""Check an output in another program: it loads the folder, and says what transformers says, token for token."""

from __future__ import annotations

import re
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from polymerge.checkpoints.adapter import Adapter, is_adapter, open_adapter
from polymerge.checkpoints.files import read_config
from polymerge.checkpoints.loading import DTYPES
from polymerge.engine.device import open_device
from polymerge.engine.findings import Finding, Verification
from polymerge.engine.verify import verify
from polymerge.engine.verify_adapter import base_folder
from polymerge.errors import MissingExtraError, RecipeError, did_you_mean, shown
from polymerge.inference.programs.program_process import (
    ProgramFailedError,
    ProgramProcess,
    program_file,
    versions_in,
)
from polymerge.inference.programs.program_table import TRANSFORMERS, Place, Program, program_named
from polymerge.inference.prompts import Prompt, PromptSource, draw_prompts, materialise

__all__ = ["verify_with"]

_QUESTIONS: Final = ("What is the capital of France?", "Count from one to ten.", "Name a colour and a number.")
_OF_IMAGE: Final = "What is in this image?"

_NEAR: Final = {"float32": 1e-3, "float16": 0.03, "bfloat16": 0.25, "auto": 0.25}
"""Differences of log probabilities within which a dtype's rounding decides: two steps of it at logits of 16 to 32, and
what sums in another order leave in float32.
"""

_MOST: Final = 1_000  # tokens
_TOWERS: Final = re.compile(r"vis(ion|ual)|projector|connector|merger|resampler|abstractor|perceiver|mlp1")


def verify_with(
    folder: str | Path,
    program: str,
    *,
    environment: str | None = None,
    base: str | None = None,
    prompts: PromptSource | None = None,
    max_new_tokens: int = 16,
    device: str = "cpu",
    dtype: str = "float32",
    trust_remote_code: bool = False,
    show: Callable[[str], None] | None = None,
) -> Verification:
    """Check a checkpoint or adapter as `verify` does, then load it in a program and compare what it says.

    Decoding is greedy. Each prompt's tokens must be those that transformers reads, and each answer's those that
    transformers says, where this runs; a program's own environment lends its transformers where the processor needs a
    package that is missing here. Where answers part at two tokens that transformers holds for equally probable, up to
    the dtype's rounding, they count as equal, and the finding says so.

    program         one of `PROGRAMS`: transformers, vllm, llama.cpp
    environment     a virtual environment or its Python, by default the one that runs this; for llama.cpp its clone
    base            for an adapter: its base, if not the one that its config names
    prompts         by default three questions, and one about an image where the model takes images
    max_new_tokens  the longest answer compared
    dtype           one of `DTYPES`; with less than float32, near ties are likelier
    show            is told what is being done

    raises RecipeError for a name, setting or environment that is not there, MissingExtraError if the program is not
    installed. What the program refuses, or says otherwise, is a finding.
    """
    row, tell = program_named(program), show or (lambda _: None)
    if not 1 <= max_new_tokens <= _MOST:
        raise RecipeError(f"max_new_tokens: {max_new_tokens} is not between 1 and {_MOST}")
    if dtype not in DTYPES:
        raise RecipeError(f"dtype: '{dtype}'.{did_you_mean(dtype, DTYPES)}")
    open_device(device)
    place = row.find(environment)
    _check_installed(row, place)
    asked = _questions(prompts)
    checked = verify(folder, base=base, trust_remote_code=trust_remote_code)
    if not checked.passed:
        first = Finding("program", None, f"{row.name} is not started: what failed above comes first")
        return Verification(checked.folder, (*checked.findings, first))
    adapter = open_adapter(str(folder), checked.folder) if is_adapter(checked.folder) else None
    if adapter is not None and (why := row.refuses(adapter)):
        return Verification(checked.folder, (*checked.findings, Finding("program", False, why)))
    request = {
        **_model(checked.folder, adapter, base), "dtype": dtype, "device": device, "tokens": max_new_tokens,
        "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="polymerge-verify-") as work:
        run = _Run(row, place, request, Path(work), tell)
        return Verification(checked.folder, (*checked.findings, *run.findings(asked, dtype)))


@dataclass(frozen=True)
class _Run:
    """One check in one program; `work` is a folder for images and converted files."""

    row: Program
    place: Place
    request: dict[str, Any]
    work: Path
    tell: Callable[[str], None]

    def findings(self, asked: Sequence[Prompt] | None, dtype: str) -> list[Finding]:
        """Ask transformers, then the program; what was found."""
        prompts = self._prompts(asked)
        reference = self._reference(prompts)
        if "error" in reference:
            return [Finding("program", False, f"transformers cannot be asked: {shown(reference['error'], 300)}")]
        told = [answer for answer in reference["answers"] if "asked" in answer]
        put = [
            {"asked": answer["asked"], "special": answer["special"], "images": prompt["images"]}
            for prompt, answer in zip(prompts, reference["answers"], strict=True)
            if "asked" in answer
        ]
        skipped = [answer["skipped"] for answer in reference["answers"] if "skipped" in answer]
        if not told:
            return [Finding("program", False, f"nothing can be asked: {shown(skipped[0], 300)}")]
        self.tell(f"{self.row.name}: loads it, and answers {len(put)} prompts")
        more = {"prompts": put, "seen": _seen(reference.get("image_token")), "work": str(self.work)}
        result = ask(self.row, self.place, {**self.request, **self.place.settings, **more})
        if "error" in result:
            error = result["error"]
            advice = self.row.advice(error)
            return [Finding("program", False, f"{self.row.name} does not load it: {shown(error, 400)}.{advice}")]
        own, *others = (f"{package} {version}" for package, version in result["versions"].items())
        beside = f" (with {', '.join(others)})" if others else ""
        found = [Finding("program", True, f"{own}{beside} loads it: {result['loaded']}")]
        words = f"transformers {reference['versions']['transformers']}"
        found.append(_compared(self.row.name, words, put, told, result["answers"], reference["ends"], _NEAR[dtype]))
        skipped += [answer["skipped"] for answer in result["answers"] if "skipped" in answer]
        if skipped and (asked is not None or self._sees):
            found.append(Finding("images", None, shown(skipped[0], 300)))
        return found

    @property
    def _sees(self) -> bool:
        return "vision_config" in read_config(Path(self.request["folder"]) / "config.json")

    def _prompts(self, asked: Sequence[Prompt] | None) -> list[dict[str, Any]]:
        """The prompts of a request: those given, or the usual ones."""
        if asked is not None:
            placed = materialise(asked, self.work / "images")
            return [{"question": prompt.text, "images": [*map(str, prompt.images)]} for prompt in placed]
        usual: list[dict[str, Any]] = [{"question": question, "images": []} for question in _QUESTIONS]
        if self._sees:
            picture = self.work / "picture.png"
            picture.write_bytes(_picture())
            usual.append({"question": _OF_IMAGE, "images": [str(picture)]})
        return usual

    def _reference(self, prompts: list[dict[str, Any]]) -> dict[str, Any]:
        """What transformers says here, or in the program's environment if nothing can be shown to the model here."""
        here = Place(sys.executable)
        _check_installed(TRANSFORMERS, here)
        self.tell(f"transformers: loads it, and answers {len(prompts)} prompts")
        request = {**self.request, "prompts": prompts}
        another = self.place.python != sys.executable and self.row != TRANSFORMERS
        sees = {"must_see": another and any(prompt["images"] for prompt in prompts)}
        result = ask(TRANSFORMERS, here, request | sees)
        if "answers" in result or "error" in result:
            return result
        self.tell(f"transformers: {shown(result['blind'], 300)}. The one of {self.row.name} is asked")
        other = ask(TRANSFORMERS, self.place, request | sees)
        return other if "answers" in other else ask(TRANSFORMERS, here, request)


def ask(program: Program, place: Place, request: dict[str, Any]) -> dict[str, Any]:
    """Run the file of a program on a request; its reply, or `error` with what went wrong."""
    process = ProgramProcess(program.name, place.python, program_file(program.file))
    try:
        reply = process.call("ask", request)
    except ProgramFailedError as error:
        reply = {"error": str(error)}
    except BaseException:
        process.close(0)
        raise
    process.close()
    return reply


def _check_installed(program: Program, place: Place) -> None:
    """Check that a program's Python has the module it needs; raises MissingExtraError if not."""
    if program.needs not in versions_in(place.python, (program.needs,)):
        raise MissingExtraError(
            f"{program.name}: {place.python} has no {program.needs}: {program.install}, and name that with "
            "`environment`"
        )


def _questions(prompts: PromptSource | None) -> list[Prompt] | None:
    return None if prompts is None else draw_prompts(prompts)


def _model(folder: Path, adapter: Adapter | None, base: str | None) -> dict[str, Any]:
    """What a program loads: the folder of a checkpoint, or that of an adapter and its base's.

    raises RecipeError if the weights of the base are not on this disk.
    """
    if adapter is None:
        return {"folder": str(folder.absolute()), "adapter": None}
    found, why = base_folder(base or adapter.config.get("base_model_name_or_path"), adapter.config.get("revision"))
    if found is None or not [*found.glob("*.safetensors"), *found.glob("*.bin")]:
        raise RecipeError(f"{folder}: {why or f'its base {found} has no weights here'}: say where it is with `base`")
    rank = max((pair.rank for pair in adapter.pairs.values()), default=0)
    outside = any(_TOWERS.search(module) for module in adapter.pairs)
    return {"folder": str(found.absolute()), "adapter": str(folder.absolute()), "rank": rank, "outside": outside}


def _compared(
    name: str,
    words: str,
    put: Sequence[dict[str, Any]],
    told: Sequence[dict[str, Any]],
    answers: Sequence[dict[str, Any]],
    ends: Sequence[int],
    near: float,
) -> Finding:
    """Compare answers with those of transformers, token for token."""
    wrong, ties, tokens, images, count = [], [], 0, 0, 0
    for number, (prompt, expected, answer) in enumerate(zip(put, told, answers, strict=True), 1):
        if "skipped" in answer:
            continue
        which = f"prompt {number}{' (image)' if prompt['images'] else ''}"
        count, images = count + 1, images + bool(prompt["images"])
        if "prompt" in answer and answer["prompt"] != expected["prompt"]:
            place = _parting(expected["prompt"], answer["prompt"])
            wrong.append(
                f"{which} is read as other tokens from {place + 1} on: {words} reads "
                f"{_some(expected['prompt'], place)}, {name} {_some(answer['prompt'], place)}"
            )
            continue
        said, found = _cut(expected["tokens"], ends), _cut(answer["tokens"], ends)
        tokens += len(said)
        if said == found:
            continue
        place = _parting(said, found)
        margin = _margin(expected["likely"][place], found[place] if place < len(found) else None, ends)
        if margin <= near:
            ties.append(f"{which} parts at token {place + 1}, which {words} nearly holds for a tie ({margin:.1g})")
            continue
        wrong.append(
            f"{which}, from token {place + 1} on: {words} says {_some(said, place)} {shown(expected['text'], 60)!r}, "
            f"{name} {_some(found, place)} {shown(answer['text'], 60)!r}"
        )
    of = f"{count} prompts{f' ({images} with an image)' if images else ''}"
    if wrong:
        return Finding("tokens", False, f"{len(wrong)} of {of} answered otherwise: {'; '.join(wrong[:4])}")
    if not tokens:
        return Finding("tokens", None, f"{words} says nothing to {of}, so there is nothing to compare")
    tied = f"; {'; '.join(ties)}" if ties else ""
    return Finding("tokens", True, f"{of}, {tokens} tokens, greedy: as {words} says them{tied}")


def _cut(tokens: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Tokens before the first that ends an answer; some programs tell it, and some do not."""
    return [*tokens[: next((place for place, token in enumerate(tokens) if token in ends), len(tokens))]]


def _parting(one: Sequence[int], other: Sequence[int]) -> int:
    """The first place where two sequences differ."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (left, right) in pairs if left != right), min(len(one), len(other)))


def _margin(likely: Sequence[Sequence[float]], token: int | None, ends: Sequence[int]) -> float:
    """How much less probable than the first a token is, in natural logarithms; infinite if it is not among the first.

    token  None for the end of the answer
    """
    said = [value for found, value in likely if found == token or (token is None and found in ends)]
    return float(likely[0][1]) - said[0] if said else float("inf")


def _some(tokens: Sequence[int], place: int) -> str:
    """A few tokens around a place."""
    start = max(0, place - 2)
    found = " ".join(map(str, tokens[start : place + 4]))
    return f"{'... ' if start else ''}{found or 'nothing'}"


def _seen(token: str | None) -> str:
    """What stands for an image in a prompt, with the ends that a program writes itself, as a regular expression."""
    around = [rf"(?:<\|vision_{end}\|>)?" for end in ("start", "end")]
    return f"{around[0]}{re.escape(token)}{around[1]}" if token else "(?!)"


def _picture(side: int = 224) -> bytes:
    """A PNG of colours that run into each other; no processor with patches of 14 or 16 has to resize it."""
    rows = bytearray()
    for y in range(side):
        rows.append(0)  # this row is stored as it is
        for x in range(side):
            rows += bytes((255 * x // side, 255 * y // side, 255 * (x * y % 97) // 97))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
