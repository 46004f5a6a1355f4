"""Let `cuda` mean the CPU: VLMEvalKit's classes ask for a GPU by name. Put this folder into PYTHONPATH."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def _on_cpu(value: Any) -> Any:
    return "cpu" if isinstance(value, str | torch.device) and str(value).startswith("cuda") else value


def _moved(to: Callable[..., Any]) -> Callable[..., Any]:
    def moved(self: Any, *args: Any, **options: Any) -> Any:
        return to(self, *map(_on_cpu, args), **{name: _on_cpu(value) for name, value in options.items()})

    return moved


for kind in (torch.Tensor, torch.nn.Module):
    setattr(kind, "to", _moved(kind.to))  # noqa: B010 (a type checker knows that it is a method)
    setattr(kind, "cuda", lambda self, *_args, **_options: self)  # noqa: B010
