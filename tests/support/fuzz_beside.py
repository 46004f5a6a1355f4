"""Files beside weights that decide what an output takes over: chat templates, and the JSON that may hold one."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any, Final

from fuzz_judge import Files, Kind
from fuzz_mutations import ODD_TEXTS, changed, odd, odd_bytes, to_json
from fuzz_seeds import seeds
from polymerge.engine.merge import merge
from polymerge.planning import make_plan
from polymerge.planning.text import describe

__all__ = ["KINDS"]

_TEMPLATE: Final = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_HOSTILE: Final = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% for i in range(10**9) %}{{ i }}{% endfor %}",
    "{{ cycler.__init__.__globals__.os.system('true') }}", "{% include '/etc/passwd' %}", "{%", "{{ 1/0 }}", "", " ",
    "\x00", "{# " * 10_000,
)  # fmt: skip
_TOKENIZER: Final[dict[str, Any]] = {
    "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "chat_template": _TEMPLATE,
}  # fmt: skip
_PROCESSOR: Final[dict[str, Any]] = {
    "processor_class": "LlavaProcessor",
    "chat_template": _TEMPLATE,
    "image_processor": {},
}


def _template(random: Random) -> Any:
    """What stands where a chat template is expected: text, several by name, or anything else."""
    text = random.choice((_TEMPLATE, *_HOSTILE, *ODD_TEXTS))
    return random.choice(
        (
            text, text, [{"name": "default", "template": text}, {"name": "tool_use", "template": _TEMPLATE}],
            {"default": text}, [text], odd(random), None,
        )
    )  # fmt: skip


def _make(random: Random) -> Files:
    files: dict[str, bytes] = {}
    if random.random() < 0.5:
        written = str(_template(random)).encode("utf-8", "replace")
        files["chat_template.jinja"] = written if random.random() < 0.5 else odd_bytes(written, random)
    for name, value, often in (
        ("tokenizer_config.json", _TOKENIZER, 0.7),
        ("processor_config.json", _PROCESSOR, 0.4),
        ("chat_template.json", {"chat_template": _TEMPLATE}, 0.3),
    ):
        if random.random() < often:
            said = value | ({"chat_template": _template(random)} if random.random() < 0.7 else {})
            files[name] = to_json(said if random.random() < 0.5 else changed(said, random), random)
            if random.random() < 0.15:
                files[name] = odd_bytes(files[name], random)
    if random.random() < 0.5:  # with it, settings are of the adapter's own tokenizer
        files["tokenizer.json"] = (seeds() / "llama" / "tokenizer.json").read_bytes()
    if random.random() < 0.3:
        files["generation_config.json"] = to_json(odd(random), random)
    return {f"adapter/{name}": content for name, content in files.items()}


def _read(folder: Path) -> object:
    """What is merged of a base with these files in the folder of its adapter."""
    (folder / "adapter").mkdir(exist_ok=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / "adapter" / name).write_bytes((seeds() / "adapters" / "a" / name).read_bytes())
    plan = make_plan({"merge_method": "copy", "models": [f"{seeds()}/llama+{folder / 'adapter'}"]})
    describe(plan)
    json.dumps(plan.to_json())
    return merge(plan, folder / "out", check=False, threads=1)


KINDS = (Kind("chat template", _make, _read, 20),)
