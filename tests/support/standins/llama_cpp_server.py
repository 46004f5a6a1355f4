"""A stand-in for llama-server: its options and the paths that polymerge asks, over transformers; text only."""

from __future__ import annotations

import argparse
import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import torch
import transformers

parser = argparse.ArgumentParser()
for name in ("-m", "-c", "-np", "-ngl", "-ctk", "-ctv", "-fa", "--host", "--lora"):
    parser.add_argument(name)
parser.add_argument("--port", type=int)
parser.add_argument("--no-warmup", action="store_true")
asked = parser.parse_args()
assert (asked.ctk, asked.ctv, asked.fa) == ("f32", "f32", "off")
folder = Path(asked.m).read_text(encoding="utf-8")
config = transformers.AutoConfig.from_pretrained(folder)
auto = (
    transformers.AutoModelForImageTextToText if hasattr(config, "vision_config") else transformers.AutoModelForCausalLM
)
model = auto.from_pretrained(folder, dtype=torch.float32).eval()
if asked.lora:
    import peft

    model = peft.PeftModel.from_pretrained(model, Path(asked.lora).read_text(encoding="utf-8"))
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)


def answer(path: str, body: dict[str, Any]) -> dict[str, Any]:
    if path == "/tokenize":
        assert body["parse_special"]
        return {"tokens": tokenizer(body["content"], add_special_tokens=body["add_special"])["input_ids"]}
    if path == "/completion":
        assert (body["temperature"], body["return_tokens"], body["cache_prompt"]) == (0.0, True, False)
        ids = torch.tensor([body["prompt"]])
        said = model.generate(input_ids=ids, max_new_tokens=body["n_predict"], do_sample=False)[
            0, ids.shape[1] :
        ].tolist()
        said = said[: said.index(2)] if 2 in said else said  # the end is not among them
        return {"tokens": said, "content": tokenizer.decode(said)}
    return {"build_info": "b0-standin", "media_marker": "<__media__>"}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.reply({})

    def do_POST(self) -> None:
        self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def reply(self, body: dict[str, Any]) -> None:
        told = json.dumps(answer(self.path, body)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(told)))
        self.end_headers()
        self.wfile.write(told)


HTTPServer((asked.host, asked.port), Handler).serve_forever()
