"""Load a folder in vLLM and answer prompts greedily: `python ask_vllm.py REQUEST RESULT`.

Any Python with vLLM runs this file, which imports nothing of polymerge's.
"""

from __future__ import annotations

import json
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Answer every prompt of a request.

    folder, adapter  of the model; the adapter may be None
    rank             of the adapter, the largest
    outside          whether it has modules outside of the text tower
    prompts          each with `asked`, the text with the chat template applied; `special`, whether the tokenizer adds
                     its special tokens; `images`, files
    dtype, tokens, trust_remote_code
    """
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


if __name__ == "__main__":
    try:
        result = main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    except Exception as error:  # whatever a library raises is told to whoever asks
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}"}
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")
