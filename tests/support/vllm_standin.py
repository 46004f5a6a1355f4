"""A stand-in for vLLM where there is none: the part of its interface that polymerge uses, over transformers.

    environment = installed(tmp_path / "env")   # a folder that PYTHONPATH can name, with `vllm` in it

Like vLLM it keeps queries, keys and values in one parameter, and gates with what they gate, so that weights arrive by
copies into parts of parameters. What goes wrong in the real one, an argument of `LLM` makes go wrong here: `refuses`
(the model is not loaded), `dies_after` (answers), `packs` (weights are kept in another form), `forgets` (of what is put
in, nothing stays), `reads` (other tokens from a prompt).
"""

from __future__ import annotations

import os
import shutil
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

VERSION = "0.0.1"

_FUSED = {"qkv": ("q_proj", "k_proj", "v_proj"), "gate_up": ("gate_proj", "up_proj")}
_LIVE = {"language_model.lm_head.": "lm_head.", "language_model.model.": "model.language_model.",
         "vision_tower.vision_model.": "model.vision_tower.", "vision_tower.": "model.vision_tower.",
         "multi_modal_projector.": "model.multi_modal_projector."}  # fmt: skip
"""Prefixes of published names and of those that transformers has in memory."""


def installed(folder: Path) -> Path:
    """Write the stand-in to a folder as an installed package of its own version."""
    package, about = folder / "vllm", folder / f"vllm-{VERSION}.dist-info"
    package.mkdir(parents=True)
    about.mkdir()
    shutil.copy(__file__, package / "__init__.py")
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}\n", encoding="utf-8")
    (about / "top_level.txt").write_text("vllm\n", encoding="utf-8")
    # what the real one needs, and an environment for tests may lack
    (folder / "cloudpickle.py").write_text("def register_pickle_by_value(module): pass\n", encoding="utf-8")
    return folder


class SamplingParams:
    """What to generate."""

    def __init__(
        self, *, temperature: float, max_tokens: int, stop_token_ids: list[int], ignore_eos: bool, detokenize: bool
    ) -> None:
        assert not temperature
        assert ignore_eos
        assert not detokenize
        self.max_tokens, self.ends = max_tokens, stop_token_ids


class LLM:
    """A model that answers prompts one after another."""

    def __init__(
        self,
        *,
        model: str,
        dtype: str,
        seed: int,
        trust_remote_code: bool,
        enable_prefix_caching: bool,
        refuses: str = "",
        dies_after: int = -1,
        packs: bool = False,
        forgets: bool = False,
        reads: bool = False,
        **_: Any,
    ) -> None:
        import torch
        import transformers

        if refuses:
            raise RuntimeError(refuses)
        print("this goes to standard output, where it would be in the way of messages")
        how: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        auto = transformers.AutoModelForImageTextToText
        loaded: Any = auto.from_pretrained(model, dtype=getattr(torch, dtype), **how)
        self.model = loaded.eval()
        self.processor: Any = transformers.AutoProcessor.from_pretrained(model, **how)
        self.left, self.forgets, self.reads = dies_after, forgets, reads
        self.cached, self.seed = enable_prefix_caching, seed
        self.loading = _Loading(loaded, packs)
        self.llm_engine = SimpleNamespace(reset_encoder_cache=lambda: None, has_unfinished_requests=lambda: False)

    def generate(
        self, prompts: list[dict[str, Any]], how: SamplingParams, use_tqdm: bool, tokenization_kwargs: dict[str, Any]
    ) -> list[Any]:
        """Answer prompts greedily."""
        del use_tqdm
        return [self._answer(one, how, tokenization_kwargs) for one in prompts]

    def _answer(self, prompt: dict[str, Any], how: SamplingParams, more: dict[str, Any]) -> Any:
        import torch

        if self.left == 0:
            os._exit(7)
        self.left -= 1
        if "impossible" in prompt["prompt"]:
            raise ValueError("The decoder prompt is longer than the maximum model length")
        images = prompt.get("multi_modal_data", {}).get("image")
        shown = {} if images is None else {"images": [images]}
        inputs = dict(self.processor(text=[prompt["prompt"]], return_tensors="pt", **shown, **more))
        inputs.pop("token_type_ids", None)
        inputs = {
            name: value.to(self.model.dtype) if value.is_floating_point() else value for name, value in inputs.items()
        }
        with torch.inference_mode():
            ids = self.model.generate(
                **inputs, do_sample=False, max_new_tokens=how.max_tokens, eos_token_id=how.ends or None
            )
        read = inputs["input_ids"][0].tolist()
        said = ids[0, len(read) :].tolist()
        return SimpleNamespace(
            prompt_token_ids=[*read, 1] if self.reads else read, outputs=[SimpleNamespace(token_ids=said)]
        )

    def collective_rpc(self, function: Any, args: tuple[Any, ...] = ()) -> list[Any]:
        """Call a function with the one worker there is."""
        worker = self.loading
        done = [function(worker, *args)]
        if self.forgets and args and not args[1]:
            worker.zero()
        return done

    def reset_prefix_cache(self) -> None:
        """There is none."""

    def reset_mm_cache(self) -> None:
        """There is none."""


class _Loading:
    """The worker: fuses parameters, and loads weights into them by their published names."""

    vllm_config = None

    def __init__(self, model: Any, packs: bool) -> None:
        import torch

        self.model = model
        self.places: dict[str, Any] = dict(model.named_parameters())
        self.fused = []
        for module in model.modules():
            for names in _FUSED.values():
                parts = [getattr(module, name, None) for name in names]
                if all(hasattr(part, "weight") for part in parts):
                    whole = torch.nn.Parameter(torch.cat([part.weight.data for part in parts]), requires_grad=False)
                    self.fused.append(whole)
                    for part, rows in zip(parts, whole.data.split([len(part.weight) for part in parts]), strict=True):
                        part.weight.data = rows
        if packs:
            for one in self.fused:
                one.data.copy_(one.data.flip(0))

    def get_model(self) -> _Loading:
        """The model, which is this one."""
        return self

    def parameters(self) -> list[Any]:
        """All parameters, whose memory is that of the fused ones."""
        return [*self.places.values(), *self.fused]

    def buffers(self) -> list[Any]:
        """None that matters."""
        return []

    def load_weights(self, tensors: Any) -> None:
        """Load tensors by their names in a checkpoint."""
        for name, tensor in tensors:
            live = name
            if name not in self.places:
                old, new = next(((old, new) for old, new in _LIVE.items() if name.startswith(old)), ("", ""))
                live = new + name.removeprefix(old)
            if live not in self.places:
                raise ValueError(f"There is no module or parameter named '{name}'")
            self.places[live].data.copy_(tensor)

    def zero(self) -> None:
        """Forget all."""
        for one in self.parameters():
            one.data.zero_()


class _Nothing:
    def __init__(self, _: object) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def _modules() -> None:
    """The modules of vLLM that polymerge asks."""
    platforms: Any = types.ModuleType("vllm.platforms")
    platforms.current_platform = SimpleNamespace(is_cpu=lambda: False, device_name="stand-in")
    config: Any = types.ModuleType("vllm.config")
    config.set_current_vllm_config = _Nothing
    sys.modules |= {"vllm.platforms": platforms, "vllm.config": config}


if __name__ == "vllm":
    _modules()
