"""vLLM as an engine, in the environment in which it is installed; run by `program_host.py`.

The engine is one `vllm.LLM` in this process. Weights are put into it by the model's own `load_weights`, as it loads a
checkpoint. Where each tensor comes to lie is not computed but seen: while `load_weights` runs, every copy into the
model's parameters is noted, with the rows of the tensor that it copies (`_Copies`). That is what two things rest on:

- before a tensor is put in for the first time, the template's own is, and it must be found where it is to be copied,
  bit by bit. A parameter that vLLM keeps in another form than it loads it in (packed, shuffled, quantized) is found out
  by this;
- after all is put in, the parameters are read back there, and compared with what was sent.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine's core is in this process
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is a folder
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

vllm: Any = import_module("vllm")

_CACHE = 4 << 30  # bytes for keys and values on CPUs

_COPY = torch.ops.aten.copy_.default
_CASTS = (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default)


def start(settings: dict[str, Any], _: object = ()) -> Engine:
    """Start vLLM with a model.

    settings  model, dtype, trust_remote_code, seed, options (further arguments of `vllm.LLM`), and `weights`: whether
              any will be put in
    """
    return Engine(settings)


class Engine:
    """A running `vllm.LLM`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        current_platform = import_module("vllm.platforms").current_platform
        on_cpu = current_platform.is_cpu()
        if settings["weights"] and on_cpu:
            _keep_weights_on_cpus()
        # an answer does not depend on what was asked before; a context as long as there is room for
        options: dict[str, Any] = {"enable_prefix_caching": False, "max_model_len": -1}
        if on_cpu:  # where it takes most of the memory otherwise, and minutes for compiling
            options |= {"enforce_eager": True, "kv_cache_memory_bytes": _CACHE}
        options |= settings["options"]
        self._llm = vllm.LLM(
            model=settings["model"],
            dtype=settings["dtype"],
            seed=settings["seed"],
            trust_remote_code=settings["trust_remote_code"],
            **options,
        )
        self._device = current_platform.device_name

    def about(self) -> dict[str, Any]:
        """What runs here."""
        return {"device": self._device}

    def answer(self, message: dict[str, Any], blobs: Sequence[bytearray]) -> dict[str, Any]:
        """Answer prompts greedily: the tokens of each prompt as read, and those of its answer.

        message  prompts (text, and the sizes of its images), special (whether the tokenizer adds its special tokens;
                 None for its own choice), max_tokens, stop (ids)
        blobs    the images in RGB, one after another
        """
        if self._llm.llm_engine.has_unfinished_requests():
            raise RuntimeError("requests of an earlier call are unfinished")
        waiting = iter(blobs)
        prompts: list[dict[str, Any]] = []
        for one in message["prompts"]:
            images = [Image.frombytes("RGB", tuple(size), bytes(next(waiting))) for size in one["images"]]
            prompts.append({"prompt": one["text"], **({"multi_modal_data": {"image": images}} if images else {})})
        # the ids at which transformers ends, and no others
        how = vllm.SamplingParams(
            temperature=0.0, max_tokens=message["max_tokens"], stop_token_ids=message["stop"], ignore_eos=True,
            detokenize=False,
        )  # fmt: skip
        more = {} if message["special"] is None else {"add_special_tokens": message["special"]}
        said = self._llm.generate(prompts, how, use_tqdm=False, tokenization_kwargs=more)
        return {
            "prompts": [list(one.prompt_token_ids) for one in said],
            "answers": [list(one.outputs[0].token_ids) for one in said],
        }

    def put(self, message: dict[str, Any], blobs: Sequence[bytearray]) -> dict[str, Any]:
        """Put tensors in by `load_weights`, or with `there`, look whether they are there already.

        message  tensors (name, dtype, shape), there, sample (names that `check` will read back)
        returns  the names that were not copied whole into the model, and of those copied, the ones that differed there
        """
        tensors = [
            (one["name"], torch.frombuffer(blob, dtype=getattr(torch, one["dtype"])).reshape(one["shape"]))
            for one, blob in zip(message["tensors"], blobs, strict=True)
        ]
        return _joined(self._llm.collective_rpc(_put, args=(tensors, message["there"], message["sample"])), tensors)

    def check(self, message: dict[str, Any], blobs: Sequence[bytearray]) -> dict[str, Any]:
        """Read back what was put in, and empty the caches of what was computed with other weights.

        returns  the names that were read back, and those that differ from what was sent
        """
        del message, blobs
        self._llm.reset_prefix_cache()
        self._llm.reset_mm_cache()
        self._llm.llm_engine.reset_encoder_cache()
        read, differ = zip(*self._llm.collective_rpc(_check), strict=True)
        return {"read": sorted(set().union(*read)), "differ": sorted(set().union(*differ))}


class _Copies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every copy from one of some tensors into a model's parameters, which another mode would have to guess.

    there   whether to note where a copy changes anything
    copied  by name: parts of the model, and of the tensor, that are copied
    """

    def __init__(self, tensors: Sequence[tuple[str, Tensor]], model: Any, there: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = {_storage(tensor): name for name, tensor in tensors}
        self.own = {_storage(one) for one in (*model.parameters(), *model.buffers())}
        self.there, self.differ = there, set[str]()
        self.copied: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name, _ in tensors}
        self._casts: list[Tensor] = []  # kept, so that no other tensor gets their storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _COPY and (name := self.names.get(_storage(args[1]))) and _storage(args[0]) in self.own:
            if self.there and not _equal(args[0], args[1]):
                self.differ.add(name)
            self.copied[name].append((args[0], args[1]))
        made = func(*args, **(kwargs or {}))
        if func in _CASTS and (name := self.names.get(_storage(args[0]))):
            self.names[_storage(made)] = name
            self._casts.append(made)
        return made


def _put(worker: Any, tensors: Sequence[tuple[str, Tensor]], there: bool, sample: Sequence[str]) -> tuple[Any, Any]:
    """In each process of the engine: load tensors; how many elements of each were copied, and which differed."""
    set_current_vllm_config = import_module("vllm.config").set_current_vllm_config
    model = worker.get_model()
    with torch.no_grad(), set_current_vllm_config(worker.vllm_config), _Copies(tensors, model, there) as seen:
        model.load_weights(tensors)
    kept = getattr(worker, "polymerge_kept", [])
    kept += [(name, *pair) for name in sample for pair in seen.copied.get(name, ())]
    worker.polymerge_kept = kept
    return {name: sum(own.numel() for own, _ in pairs) for name, pairs in seen.copied.items()}, seen.differ


def _check(worker: Any) -> tuple[set[str], set[str]]:
    """In each process of the engine: the tensors that are read back, and those that are not what was sent."""
    kept, worker.polymerge_kept = getattr(worker, "polymerge_kept", []), []
    return {name for name, _, _ in kept}, {name for name, own, sent in kept if not _equal(own, sent)}


def _joined(replies: Sequence[tuple[Any, Any]], tensors: Sequence[tuple[str, Tensor]]) -> dict[str, Any]:
    counts, differ = zip(*replies, strict=True)
    lost = [name for name, tensor in tensors if sum(one[name] for one in counts) < tensor.numel()]
    return {"lost": lost, "differ": sorted(set().union(*differ))}


def _equal(own: Tensor, sent: Tensor) -> bool:
    return torch.equal(own.detach(), sent.detach().to(own.device, own.dtype).expand_as(own))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _keep_weights_on_cpus() -> None:
    """Let linear layers keep their weights on CPUs, where vLLM packs them and drops what `load_weights` writes to."""
    utils: Any = import_module("vllm.model_executor.layers.utils")

    def plain(layer: Any, remove_weight: bool) -> None:
        del remove_weight
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = plain


# the engine's other processes get this file's functions by value: they could not import them
import_module("cloudpickle").register_pickle_by_value(sys.modules[__name__])
