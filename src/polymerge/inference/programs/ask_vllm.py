"""Load a folder in vLLM and answer prompts greedily, run by `program_host.py`.

Any Python with vLLM runs this file, which imports nothing of polymerge's.
"""

from __future__ import annotations

import gc
import os
from importlib import import_module
from typing import Any

# in one process, so that what goes wrong is raised here and not told by another one's log
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# read on a CPU only: the room for its cache in GB, and no processor chosen for a thread
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def ask(request: dict[str, Any], _: object = ()) -> dict[str, Any]:
    """Answer every prompt of a request.

    folder, adapter  of the model; the adapter may be None
    rank             of the adapter, the largest
    outside          whether it has modules outside of the text tower
    prompts          each with `asked`, the text with the chat template applied; `special`, whether the tokenizer adds
                     its special tokens; `images`, files
    dtype, tokens, trust_remote_code
    """
    gc.collect()  # the model of a request before
    vllm, requests = import_module("vllm"), import_module("vllm.lora.request")

    lora, more = None, {}
    if request["adapter"] is not None:
        rank = next((one for one in _RANKS if one >= request["rank"]), request["rank"])
        more = {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}
        more |= {"enable_tower_connector_lora": True} if request["outside"] else {}
        lora = requests.LoRARequest("adapter", 1, request["adapter"])
    images = max(len(prompt["images"]) for prompt in request["prompts"])
    model = vllm.LLM(
        model=request["folder"], dtype=request["dtype"], trust_remote_code=request["trust_remote_code"],
        max_model_len=-1, max_num_seqs=1, enforce_eager=True, skip_mm_profiling=True,
        **({"limit_mm_per_prompt": {"image": images, "video": 0}} if images else {}), **more,
    )  # fmt: skip
    settings = vllm.SamplingParams(temperature=0.0, max_tokens=request["tokens"])
    answers = []
    for prompt in request["prompts"]:
        asked: dict[str, Any] = {"prompt": prompt["asked"]}
        if prompt["images"]:
            from PIL import Image

            asked["multi_modal_data"] = {"image": [Image.open(image).convert("RGB") for image in prompt["images"]]}
        said = model.generate(
            asked, settings, lora_request=lora, use_tqdm=False,
            tokenization_kwargs={"add_special_tokens": prompt["special"]},
        )[0]  # fmt: skip
        answers.append(
            {"prompt": [*said.prompt_token_ids], "tokens": [*said.outputs[0].token_ids], "text": said.outputs[0].text}
        )
    import torch

    kind = ", ".join(model.llm_engine.model_config.architectures)
    return {"versions": {"vllm": vllm.__version__, "torch": torch.__version__}, "answers": answers, "loaded": kind}
