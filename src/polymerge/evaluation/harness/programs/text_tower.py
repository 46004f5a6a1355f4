"""lm-evaluation-harness with one model more, `text-tower`: `python text_tower.py OPTIONS OF LM-EVAL`."""

from __future__ import annotations

from typing import Any

import transformers
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from transformers.models.auto import modeling_auto


@register_model("text-tower")
class TextTower(HFLM):  # type: ignore[misc]
    """The harness's own `hf`, which also loads a vision-language model, and asks it without images.

    Without images such a model is its text tower and its head; nothing else of it is run.
    """

    def _get_backend(self, config: Any, *more: Any, **options: Any) -> None:
        if config.model_type in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            self.AUTO_MODEL_CLASS = transformers.AutoModelForImageTextToText
        super()._get_backend(config, *more, **options)


if __name__ == "__main__":
    cli_evaluate()
