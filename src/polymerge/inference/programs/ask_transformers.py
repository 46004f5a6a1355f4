"""Load a folder with transformers and answer prompts greedily, run by `program_host.py`.

Any Python with transformers 4.57 or later runs this file, which imports nothing of polymerge's.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

_LIKELY = 8
"""Tokens of each place whose log probabilities are told."""


def ask(request: dict[str, Any], _: object = ()) -> dict[str, Any]:
    """Answer every prompt of a request; what cannot be answered says why.

    folder, adapter  of the model; the adapter may be None
    prompts          each with `question`, or `asked` where the chat template has been applied; `images`, files
    must_see         whether to stop where the processor cannot be loaded for want of a package
    dtype, device, tokens, trust_remote_code
    """
    import torch

    transformers: Any = import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    folder, trust = request["folder"], {"trust_remote_code": request["trust_remote_code"], "local_files_only": True}
    processor, blind = _processor(folder, trust)
    if blind and request.get("must_see"):
        return {"blind": blind}
    tokenizer = getattr(processor, "tokenizer", processor)
    model = _model(folder, request["adapter"], request["dtype"], trust).to(request["device"]).eval()
    inner = model.get_base_model() if request["adapter"] else model
    ends = inner.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    ends = [one for one in (ends if isinstance(ends, list) else [ends]) if one is not None]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
    inner.generation_config = transformers.GenerationConfig(
        bos_token_id=inner.generation_config.bos_token_id, eos_token_id=ends or None, pad_token_id=pad, do_sample=False,
        max_new_tokens=request["tokens"], return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    answers = []
    for prompt in request["prompts"]:
        if prompt["images"] and processor is tokenizer:
            answers.append({"skipped": blind or "the model reads text only"})
            continue
        with torch.inference_mode():
            answers.append(_answer(model, inner, processor, tokenizer, prompt))
    packages = ("transformers", "torch", "peft") if request["adapter"] else ("transformers", "torch")
    versions = {package: importlib.metadata.version(package) for package in packages}
    told = {"ends": ends, "blind": blind, "image_token": getattr(processor, "image_token", None)}
    return {"versions": versions, "answers": answers, "loaded": type(inner).__name__, **told}


def _answer(model: Any, inner: Any, processor: Any, tokenizer: Any, prompt: dict[str, Any]) -> dict[str, Any]:
    import torch

    sees = processor is not tokenizer
    asked, special = prompt.get("asked"), prompt.get("special", True)
    if asked is None:
        template = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
        if template is None and prompt["images"]:
            return {"skipped": "there is no chat template, so nobody knows where an image is to stand"}
        asked = prompt["question"] if template is None else _templated(processor, sees, prompt)
        begins = tokenizer.bos_token is not None and asked.startswith(tokenizer.bos_token)
        special = template is None or (sees and not begins)
    how: dict[str, Any] = {"return_tensors": "pt", "add_special_tokens": special}
    if prompt["images"]:
        from PIL import Image

        how["images"] = [Image.open(image).convert("RGB") for image in prompt["images"]]
    inputs = dict(processor(text=[asked], **how))
    if "token_type_ids" not in inspect.signature(inner.forward).parameters:
        inputs.pop("token_type_ids", None)
    dtype = next(model.parameters()).dtype
    moved = {
        name: value.to(model.device, dtype if value.is_floating_point() else value.dtype)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in inputs.items()
    }
    made = model.generate(**moved)
    ids = inputs["input_ids"][0].tolist()
    tokens = made.sequences[0, len(ids) :].tolist()
    best = [torch.log_softmax(logits[0].float(), -1).topk(_LIKELY) for logits in made.logits]
    likely = [list(zip(one.indices.tolist(), one.values.tolist(), strict=True)) for one in best]
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return {"asked": asked, "special": special, "prompt": ids, "tokens": tokens, "text": text, "likely": likely}


def _templated(processor: Any, sees: bool, prompt: dict[str, Any]) -> str:
    text = {"type": "text", "text": prompt["question"]}
    parts = [*({"type": "image"} for _ in prompt["images"]), text]
    content = parts if sees else prompt["question"]
    asked: str = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return asked


def _processor(folder: str, trust: dict[str, bool]) -> tuple[Any, str]:
    """The processor, or the tokenizer of a model without one; and why it sees nothing, where a package is missing."""
    transformers: Any = import_module("transformers")

    files = {file.name for file in Path(folder).iterdir()}
    if not files & {"processor_config.json", "preprocessor_config.json"}:
        return transformers.AutoTokenizer.from_pretrained(folder, **trust), ""
    try:
        return transformers.AutoProcessor.from_pretrained(folder, **trust), ""
    except (ImportError, ValueError) as error:
        # transformers says with either that a package is missing
        said = " ".join(str(error).split())
        if isinstance(error, ValueError) and "to be installed" not in said:
            raise
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **trust)
        return tokenizer, f"the processor needs a package that is not installed in {sys.prefix}: {said[:200]}"


def _model(folder: str, adapter: str | None, dtype: str, trust: dict[str, bool]) -> Any:
    """The model, with every stored tensor in its place; raises ValueError where one has none."""
    import torch
    import transformers

    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    named = [getattr(transformers, name) for name in config.get("architectures") or () if hasattr(transformers, name)]
    if named:
        kind = named[0]
    elif "vision_config" in config or "auto_map" in config:
        kind = transformers.AutoModelForImageTextToText
    else:
        kind = transformers.AutoModelForCausalLM
    model, info = kind.from_pretrained(
        folder, dtype=dtype if dtype == "auto" else getattr(torch, dtype), output_loading_info=True, **trust
    )
    wrong = {kind: sorted(map(str, info[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")}
    if any(wrong.values()):
        told = "; ".join(f"{len(keys)} {kind}, first {keys[0]}" for kind, keys in wrong.items() if keys)
        raise ValueError(f"{type(model).__name__} does not find its tensors: {told}")
    if adapter is None:
        return model
    import peft

    with_adapter = peft.PeftModel.from_pretrained(model, adapter)
    lost = with_adapter.load_adapter(
        adapter, "default", key_mapping=getattr(model, "_checkpoint_conversion_mapping", None)
    ).unexpected_keys
    if lost:
        raise ValueError(f"PEFT finds no module for {len(lost)} tensors of the adapter, first {sorted(lost)[0]}")
    return with_adapter
