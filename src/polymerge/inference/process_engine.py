"""An engine in a process of its own: prompts, and the weights that are put into it, are made here."""

from __future__ import annotations

import hashlib
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from polymerge.checkpoints import open_checkpoint
from polymerge.checkpoints.loading import DTYPES, load_processor, tokenizer_of
from polymerge.dtypes import dtype_name
from polymerge.errors import CheckpointError
from polymerge.families.config import config_dtype
from polymerge.inference.answering import Answerer, EngineError, greedy_config
from polymerge.inference.engines import SEED, engine_file
from polymerge.inference.images import SquareImages
from polymerge.inference.job import AnswerSettings, Job
from polymerge.inference.merged_tensors import TORCH, MergedTensors, bytes_of, stored_tensor
from polymerge.inference.programs.program_process import ProgramFailedError, ProgramProcess, RequestRefusedError
from polymerge.planning import Plan, Step
from polymerge.planning.output_dtypes import output_config

__all__ = ["ProcessEngine"]

_AT_ONCE: Final = 1 << 28  # bytes of tensors in a message
_AGAIN: Final = "Answers are kept: run again to go on"
_READ_BACK: Final = 32  # tensors of a plan at least, if it has as many

Named = Mapping[str, Tensor]


class ProcessEngine:
    """A model that another program runs, such as vLLM, in whatever environment that is installed in.

    Prompts are written by the model's own chat template here, and images are opened here, so that they are those of
    every other engine. The weights of a plan are computed here and put into the running engine under the template's
    names: no checkpoint is written, and only tensors that differ from what the engine holds are sent.

    raises EngineError if the engine does not load the model, CheckpointError if it could not run what a plan makes.
    """

    def __init__(self, job: Job) -> None:
        self._name, self._merged, self._weights = job.engine, None, None
        if job.plan is not None:
            self._merged = MergedTensors(job.plan, threads=job.merge_threads)
            _refuse_other_config(self._merged, job.engine)
        merged = self._merged
        folder = Path(job.folder) if merged is None else merged.folder
        beside = folder if merged is None else merged.processor_folder
        self._processor = load_processor(beside, trust_remote_code=job.trust_remote_code)
        own = None if merged is None else merged.generation_config
        self._own = own or _generation_config(folder, job.trust_remote_code)
        settings = {
            "model": str(self._served(folder, beside)),
            "dtype": _dtype(folder, job.dtype) if merged is None else merged.dtype(job.dtype),
            "trust_remote_code": job.trust_remote_code,
            "seed": SEED,
            "options": dict(job.engine_options),
            "weights": merged is not None,
        }
        self._process = ProgramProcess(job.engine, job.environment, engine_file(job.engine))
        try:
            _call(self._process, "start", settings)
        except BaseException:
            self._process.close(0)
            raise
        if merged is not None:
            self._weights = _Weights(self._process, merged)
        self._read: set[int] = set()

    def set(self, plan: Plan) -> dict[str, Any]:
        """Set the weights to a plan's; returns how many tensors were put in, and how many of them were read back."""
        assert self._merged is not None
        assert self._weights is not None
        self._weights.begin()
        self._merged.compute(plan, _buffer, self._weights.take)
        return {"engine": self._name, **self._weights.end()}

    def answerer(self, settings: AnswerSettings) -> Answerer:
        """Answers prompts with the weights that are set."""
        config = greedy_config(self._own, tokenizer_of(self._processor), settings.max_new_tokens)
        ends = config.eos_token_id
        stop = ends if isinstance(ends, list) else [] if ends is None else [ends]
        processor = SquareImages(self._processor) if settings.square else self._processor
        generate = partial(self._generate, processor, settings.max_new_tokens, stop)
        return Answerer(None, processor, max_new_tokens=settings.max_new_tokens, generate=generate)

    def close(self) -> None:
        """End the engine."""
        self._process.close()
        if self._merged is not None:
            self._merged.close()

    def _generate(
        self,
        processor: Any,
        most: int,
        stop: list[int],
        texts: list[str],
        images: list[list[Any]],
        special: bool | None,
    ) -> list[list[int]]:
        """The tokens of the answers, without what they end with."""
        shown = [processor.pad(group) for group in images] if isinstance(processor, SquareImages) else images
        groups = shown or [[] for _ in texts]
        prompts = [
            {"text": text, "images": [image.size for image in group]} for text, group in zip(texts, groups, strict=True)
        ]
        message = {"prompts": prompts, "special": special, "max_tokens": most, "stop": stop}
        reply = _call(self._process, "answer", message, [image.tobytes() for group in groups for image in group])
        if len(groups[0]) not in self._read:
            self._compare(texts[0], groups[0], special, reply["prompts"][0])
            self._read.add(len(groups[0]))
        answers: list[list[int]] = reply["answers"]
        return answers

    def _compare(self, text: str, images: list[Any], special: bool | None, read: list[int]) -> None:
        """Refuse an engine that reads other tokens from a prompt than transformers does."""
        how = {} if special is None else {"add_special_tokens": special}
        if images:
            how["images"] = [images]  # type: ignore[assignment]
        ids = self._processor(text=[text], return_tensors="pt", **how)["input_ids"][0].tolist()
        if ids != read:
            first = next((n for n, pair in enumerate(zip(ids, read, strict=False)) if len({*pair}) > 1), len(read))
            raise EngineError(
                f"{self._name} reads {len(read)} tokens from a prompt with {len(images)} images, and transformers "
                f"{len(ids)}; from token {first} on they are {read[first : first + 3]} and {ids[first : first + 3]}: "
                "answers would be to another prompt. Are the transformers of the two environments the same?"
            )

    def _served(self, folder: Path, beside: Path) -> Path:
        """The folder that the engine reads: with the files that a plan has instead, links to the template's others."""
        if folder == beside:
            return folder
        made = tempfile.TemporaryDirectory(prefix="polymerge-")
        weakref.finalize(self, made.cleanup)
        for place in (beside, folder):
            for file in place.iterdir():
                if not (Path(made.name) / file.name).exists():
                    (Path(made.name) / file.name).symlink_to(file.absolute())
        return Path(made.name)


class _Weights:
    """Puts the tensors of one plan after another into an engine."""

    def __init__(self, process: ProgramProcess, merged: MergedTensors) -> None:
        self._process, self._merged, self._engine = process, merged, process.name
        self._held: dict[str, bytes] = {}
        self._lost: set[str] = set()

    def begin(self) -> None:
        """Begin with a plan."""
        self._pending: dict[str, Tensor] = {}
        self._size = self._seen = self._sent = 0

    def take(self, step: Step, tensor: Tensor) -> None:
        """Take a tensor of the plan."""
        self._pending[step.name] = tensor
        self._size += tensor.nbytes
        if self._size >= _AT_ONCE:
            self._flush()

    def end(self) -> dict[str, Any]:
        """Put in what is left, and have a sample read back."""
        self._flush()
        reply = self._call("check", {}, {})
        if differ := reply["differ"]:
            raise EngineError(
                f"{self._engine} does not hold what was put into it: {len(differ)} of {len(reply['read'])} tensors "
                f"that were read back differ, first {differ[0]}"
            )
        return {
            "tensors": self._seen,
            "put": self._sent,
            "read_back": len(reply["read"]),
            "not_located": sorted(self._lost),
        }

    def _flush(self) -> None:
        pending, self._pending, self._size = self._pending, {}, 0
        self._locate({name for name in pending if name not in self._held})
        digests = {name: _digest(tensor) for name, tensor in pending.items()}
        changed = {name: tensor for name, tensor in pending.items() if digests[name] != self._held[name]}
        every = max(1, self._merged.count // _READ_BACK)
        sample = [name for place, name in enumerate(changed, self._sent) if place % every == 0]
        self._seen += len(pending)
        self._sent += len(changed)
        if changed:
            self._held |= dict.fromkeys(changed, b"")
            self._call("put", {"there": False, "sample": sample}, changed)
            self._held |= {name: digests[name] for name in changed}

    def _locate(self, names: set[str]) -> None:
        """See where the engine puts tensors, by the template's own, which must be there."""
        if not names:
            return
        entries = self._merged.template.entries
        steps = [step for step in self._merged.first.steps if step.name in names]
        own = {step.name: stored_tensor(entries[step.name], step) for step in steps}
        reply = self._call("put", {"there": True, "sample": []}, own)
        if differ := reply["differ"]:
            raise EngineError(
                f"{self._engine} does not keep its weights as it loads them: {len(differ)} of {len(own)} tensors of "
                f"{self._merged.folder} are not found in it, first {differ[0]}. What is put in would not be what runs: "
                "merge into folders instead, and evaluate those"
            )
        self._lost |= set(reply["lost"])
        self._held |= {name: _digest(tensor) for name, tensor in own.items()}

    def _call(self, op: str, message: Mapping[str, Any], tensors: Named) -> dict[str, Any]:
        told = [
            {"name": name, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
            for name, tensor in tensors.items()
        ]
        blobs: Sequence[Any] = [bytes_of(tensor) for tensor in tensors.values()]
        try:
            return _call(self._process, op, {**message, "tensors": told}, blobs)
        except RequestRefusedError as error:
            raise EngineError(
                f"{self._engine} does not take the weights of this plan: {error}. Merge into folders instead, and "
                "evaluate those"
            ) from None


def _call(process: ProgramProcess, op: str, message: Mapping[str, Any], blobs: Sequence[Any] = ()) -> dict[str, Any]:
    """Call an engine; raises RequestRefusedError if it refuses, EngineError if it fails, or has ended."""
    try:
        return process.call(op, message, blobs)
    except ProgramFailedError as error:
        doing, then = ("does not load the model", "") if op == "start" else ("failed", f". {_AGAIN}")
        raise EngineError(f"{process.name} {doing}: {error}{then}") from None


def _buffer(step: Step) -> Tensor:
    from torch import empty

    return empty(step.shape, dtype=TORCH[step.dtype])


def _digest(tensor: Tensor) -> bytes:
    return hashlib.blake2b(bytes_of(tensor), digest_size=16, key=str(tensor.dtype).encode()).digest()


def _refuse_other_config(merged: MergedTensors, engine: str) -> None:
    """Refuse plans whose output is another model than the template is by its config, which the engine reads."""
    template = merged.template
    if merged.scales:
        why = "its weights are in fp8, and what is merged is not"
    elif output_config(merged.first, template) != template.config:
        why = "its vocabulary, or whether its head is tied, changes with the merge"
    else:
        return
    raise CheckpointError(f"{merged.folder}: {engine} cannot be given other weights: {why}. Merge into a folder")


def _generation_config(folder: Path, trust_remote_code: bool) -> Any:
    """The generation_config with which transformers loads a model."""
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(str(folder))
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=trust_remote_code)
    return GenerationConfig.from_model_config(config)


def _dtype(folder: Path, asked: str) -> str:
    """The dtype in which a folder is loaded: its config's, which transformers takes, and engines not always."""
    if asked != "auto":
        return asked
    checkpoint = open_checkpoint(str(folder), folder)
    code = config_dtype(checkpoint.config)
    if code is None:
        code = next((entry.dtype for entry in checkpoint.entries.values()), None)
    named = dtype_name(code) if code in TORCH else "auto"
    return named if named in DTYPES else "auto"
