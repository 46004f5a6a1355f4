"""A stand-in for vLLM 0.32: the classes and arguments that polymerge uses of it, over transformers.

POLYMERGE_STANDIN says what it does wrong: `token` (says another one), `prompt` (reads another one), `refuse`, `crash`.
"""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import peft
import torch
import transformers

__version__ = "0.32.0"


class SamplingParams:
    def __init__(self, *, temperature: float, max_tokens: int) -> None:
        assert temperature == 0.0
        self.max_tokens = max_tokens


class LLM:
    def __init__(
        self,
        *,
        model: str,
        dtype: str,
        trust_remote_code: bool,
        max_model_len: int,
        max_num_seqs: int,
        enforce_eager: bool,
        skip_mm_profiling: bool,
        limit_mm_per_prompt: dict[str, int] | None = None,
        enable_lora: bool = False,
        max_loras: int = 0,
        max_lora_rank: int = 16,
        enable_tower_connector_lora: bool = False,
    ) -> None:
        wrong = os.environ.get("POLYMERGE_STANDIN")
        if wrong == "refuse":
            raise ValueError(f"There is no module or parameter named 'model.vision_tower' in {model}.")
        if wrong == "crash":
            print("the last words", file=sys.stderr, flush=True)
            os._exit(7)
        assert (max_model_len, max_num_seqs, enforce_eager, skip_mm_profiling) == (-1, 1, True, True)
        assert not trust_remote_code
        assert not enable_tower_connector_lora
        assert max_loras == int(enable_lora)
        config = transformers.AutoConfig.from_pretrained(model)
        sees = hasattr(config, "vision_config")
        auto = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
        reader = transformers.AutoProcessor if sees else transformers.AutoTokenizer
        self._model = auto.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        self._processor, self._lora, self._wrong = reader.from_pretrained(model), enable_lora, wrong
        architectures = config.architectures
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(architectures=architectures))
        self._images, self._rank = (limit_mm_per_prompt or {}).get("image", 0), max_lora_rank

    def generate(
        self,
        prompts: dict[str, Any],
        sampling_params: SamplingParams,
        *,
        lora_request: Any,
        use_tqdm: bool,
        tokenization_kwargs: dict[str, Any],
    ) -> list[Any]:
        assert not use_tqdm
        model, more = self._model, {}
        if lora_request is not None:
            assert self._lora
            assert self._rank in (8, 16, 32, 64, 128, 256, 320, 512)
            model = peft.PeftModel.from_pretrained(model, lora_request.path)
        if images := prompts.get("multi_modal_data", {}).get("image"):
            assert len(images) <= self._images
            more["images"] = images
        inputs = self._processor(text=[prompts["prompt"]], return_tensors="pt", **more, **tokenization_kwargs)
        said = model.generate(**inputs, max_new_tokens=sampling_params.max_tokens, do_sample=False)[0].tolist()
        read, said = said[: inputs["input_ids"].shape[1]], said[inputs["input_ids"].shape[1] :]
        if self._wrong == "token" and images:
            said[3] = (said[3] + 1) % 400
        if self._wrong == "prompt":
            read = [*read[:-1], read[-1] + 1]
        tokenizer = getattr(self._processor, "tokenizer", self._processor)
        answer = SimpleNamespace(token_ids=said, text=tokenizer.decode(said))
        return [SimpleNamespace(prompt_token_ids=read, outputs=[answer])]
