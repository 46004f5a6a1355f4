"""A stand-in for llama.cpp's converters: their arguments and refusals; the file that it writes names the folder."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

TEXT = ("LlavaForConditionalGeneration", "Qwen2VLForConditionalGeneration", "LlamaForCausalLM")
SEES = ("Qwen2VLForConditionalGeneration", "Idefics3ForConditionalGeneration")

parser = argparse.ArgumentParser()
parser.add_argument("folder")
parser.add_argument("--outfile", required=True)
parser.add_argument("--outtype", choices=["f32", "f16", "bf16", "auto"])
parser.add_argument("--mmproj", action="store_true")
parser.add_argument("--base")
asked = parser.parse_args()
print("INFO:hf-to-gguf:Loading model")
architecture = json.loads((Path(asked.base or asked.folder) / "config.json").read_text(encoding="utf-8"))[
    "architectures"
][0]
if asked.mmproj and architecture == "LlavaForConditionalGeneration":
    raise ValueError("Unsupported model type: clip_vision_model")
if architecture not in (SEES if asked.mmproj else TEXT):
    print(f"ERROR:hf-to-gguf:Model {architecture} is not supported")
    sys.exit(1)
Path(asked.outfile).write_text(asked.folder, encoding="utf-8")
