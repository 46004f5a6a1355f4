"""A stand-in for the module of this name in vLLM."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str

    @property
    def path(self) -> str:
        return self.lora_path
