"""Convert a folder to GGUF and answer prompts greedily with llama.cpp, run by `program_host.py`.

Any Python with what llama.cpp's converters need (torch, transformers, gguf, sentencepiece) runs this file, which
imports nothing of polymerge's.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_OUTTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "auto": "auto"}


def ask(request: dict[str, Any], _: object = ()) -> dict[str, Any]:
    """Answer every prompt of a request.

    home             llama.cpp's clone, with its converters
    server           its llama-server
    work             a folder for the GGUF files
    folder, adapter  of the model; the adapter may be None
    seen             what stands for an image in `asked`, as a regular expression
    prompts          each with `asked`, the text with the chat template applied; `special`, whether the tokenizer adds
                     its special tokens; `images`, files
    dtype, device, tokens
    """
    work, outtype = Path(request["work"]), _OUTTYPES[request["dtype"]]
    images = any(prompt["images"] for prompt in request["prompts"])
    _convert(request, "convert_hf_to_gguf.py", request["folder"], work / "text.gguf", outtype)
    # a cache of float16 and a fused attention would round more than transformers does
    exact = ("-ctk", "f32", "-ctv", "f32", "-fa", "off") if request["dtype"] == "float32" else ()
    options = ["-m", work / "text.gguf", "-c", "4096", "-np", "1", "-ngl", "0" if request["device"] == "cpu" else "99"]
    made, blind = "text", ""
    if images:
        try:
            _convert(request, "convert_hf_to_gguf.py", request["folder"], work / "mmproj.gguf", outtype, "--mmproj")
            options += ["--mmproj", work / "mmproj.gguf"]
            made = "text and projector"
        except ValueError as error:
            blind = f"the converter makes no projector (mmproj) of this folder, so it is served as text only: {error}"
    if request["adapter"] is not None:
        _convert(
            request, "convert_lora_to_gguf.py", request["adapter"], work / "adapter.gguf", outtype, "--base",
            request["folder"],
        )  # fmt: skip
        options += ["--lora", work / "adapter.gguf"]
        made += " and adapter"
    with _server(request["server"], [*options, *exact]) as ask:
        properties = ask("/props", None)
        answers = [_answer(ask, prompt, request, blind, properties) for prompt in request["prompts"]]
    version = properties.get("build_info") or "unknown"
    return {"versions": {"llama.cpp": version}, "answers": answers, "loaded": f"{made} as GGUF ({outtype})"}


def _answer(
    ask: Any, prompt: dict[str, Any], request: dict[str, Any], blind: str, properties: dict[str, Any]
) -> dict[str, Any]:
    settings = {
        "n_predict": request["tokens"], "temperature": 0.0, "samplers": ["temperature"], "return_tokens": True,
        "cache_prompt": False,
    }  # fmt: skip
    if not prompt["images"]:
        ids = ask("/tokenize", {"content": prompt["asked"], "add_special": prompt["special"], "parse_special": True})
        said = ask("/completion", {"prompt": ids["tokens"], **settings})
        return {"prompt": ids["tokens"], "tokens": said["tokens"], "text": said["content"]}
    if blind:
        return {"skipped": blind}
    marked, count = re.subn(request["seen"], lambda _: str(properties["media_marker"]), prompt["asked"])
    if count != len(prompt["images"]):
        return {"skipped": f"the places of its images are not found in {prompt['asked']!r}"}
    data = [base64.b64encode(Path(image).read_bytes()).decode() for image in prompt["images"]]
    said = ask("/completion", {"prompt": {"prompt_string": marked, "multimodal_data": data}, **settings})
    return {"tokens": said["tokens"], "text": said["content"]}  # what stands for the image are no tokens here


def _convert(request: dict[str, Any], script: str, source: str, target: Path, outtype: str, *more: str) -> None:
    """Run a converter; raises ValueError with the last line that it says."""
    command = [sys.executable, str(Path(request["home"]) / script), source, "--outfile", str(target)]
    done = subprocess.run(
        [*command, "--outtype", outtype, *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", check=False,
    )  # fmt: skip
    print(done.stdout, flush=True)
    if done.returncode != 0 or not target.is_file():
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        raise ValueError(f"{script} ended with {done.returncode}: {lines[-1] if lines else 'it said nothing'}")


@contextlib.contextmanager
def _server(program: str, options: list[Any]) -> Iterator[Any]:
    """A running llama-server; yields a function that asks it."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [program, *map(str, options), "--host", "127.0.0.1", "--port", str(port), "--no-warmup"]
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def ask(path: str, body: dict[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        wanted = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
        try:
            with opener.open(wanted) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise ValueError(f"llama-server: {path}: {error.read().decode(errors='replace')[:300]}") from None

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        while True:
            if server.poll() is not None:
                raise ValueError(f"llama-server ended with {server.returncode} and loads no such file")
            try:
                with opener.open(f"http://127.0.0.1:{port}/health"):
                    break
            except OSError:  # it does not listen yet, or still loads
                time.sleep(0.2)
        yield ask
    finally:
        server.terminate()
        server.wait()
