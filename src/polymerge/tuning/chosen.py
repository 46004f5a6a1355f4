"""Merge with a value that was chosen from answers that existed already."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polymerge.checkpoints.writer import check_target
from polymerge.engine.merge import merge
from polymerge.errors import PolymergeError, RecipeError
from polymerge.inference.run_folder import read_settings
from polymerge.recipe.recipe import Recipe, parse_recipe
from polymerge.tuning.candidates import Space, read_space, without_effect

__all__ = ["Chosen"]

Source = str | os.PathLike[str] | Mapping[str, Any]


@dataclass(frozen=True)
class Chosen:
    """A recipe and the knob of it whose value was chosen."""

    recipe: Recipe
    space: Space

    @classmethod
    def of(
        cls,
        source: Source,
        directory: Path,
        vary: Sequence[str],
        keep_template: bool,
        out: Path,
        force: bool,
        problems: list[PolymergeError],
    ) -> Chosen:
        """Read them, and see that the merge can be made whatever is chosen; what is wrong goes to `problems`.

        directory  of the answers: where it is a run of a search, that says what was varied
        """
        searched = read_settings(directory)
        if searched is not None:
            said = tuple(searched["vary"])
            if vary and tuple(vary) != said:
                problems.append(RecipeError(f"--vary {', '.join(vary)}: {directory} varied {', '.join(said)}"))
            vary, keep_template = said, searched["keep_template_weight"]
        found = len(problems)
        recipe = parse_recipe(source, problems)
        space = read_space(recipe, vary, "0,1", problems, keep_template=keep_template)
        try:
            check_target(out, (), force)
            if len(problems) == found:
                problems += without_effect(recipe, space)
        except PolymergeError as error:
            problems.append(error)
        return cls(recipe, space)

    def merge(self, value: float, out: Path, force: bool) -> None:
        """Merge with the chosen value."""
        merge(self.space.turned(self.recipe, (value,)), out, force=force)
