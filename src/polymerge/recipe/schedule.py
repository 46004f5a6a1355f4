"""The settings of one method whose numbers change by depth, one for each kind of place in the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from polymerge.errors import RecipeError, collecting, refuse
from polymerge.methods.method import Method, Parameter
from polymerge.recipe.depth import Position, changes, filters_in, first_value, is_by_model, leaves, unfit, values_at
from polymerge.recipe.parameters import Layer, Setting, check_value

__all__ = ["Schedule", "schedule_of"]

_SPLITS: Final = "density"
"""The parameter that a threshold over a whole model follows from, which cannot change within the model then."""


@dataclass(frozen=True)
class Schedule:
    """The parameters of one method as a recipe sets them, resolved anew wherever their values differ.

    resolving  from parameters without lists to a setting
    row        of the method
    layers     (location, parameters): the recipe's own, then an override's if there is one
    per_model  each model's own
    span       the first and the last layer of the override, which its own lists extend over; others are over all layers
    filters    every filter in them
    graded     whether any value changes from layer to layer, and not by the name alone
    sound      whether its values are all of the right kind; else they are not resolved where they would be between
    """

    resolving: Callable[..., Setting]
    row: Method
    layers: Sequence[Layer]
    per_model: Sequence[Mapping[str, Any]]
    span: tuple[int, int] | None
    filters: tuple[str, ...]
    graded: bool
    sound: bool
    known: dict[tuple[object, ...], Setting] = field(default_factory=dict, compare=False, repr=False)
    """The settings found so far, by what they depend on."""

    def _of_all(self, setting: Setting) -> Setting:
        """The setting, measured over the whole schedule where it measures whole models."""
        whole = self.row.span == "model" or setting.parameters.get("trim") == "model"
        return replace(setting, schedule=self.layers[-1][0]) if whole else setting

    def outside(self) -> Setting:
        """The setting with the first value of everything, which shows what is wrong with the parameters as such."""
        each = self._each

        def first(name: str, value: Any) -> Any:
            return [first_value(one) for one in value] if is_by_model(value) and each(name) else first_value(value)

        general, *own = self.layers
        layers = [(general[0], {name: first_value(value) for name, value in general[1].items()})]
        layers += [(where, {name: first(name, value) for name, value in given.items()}) for where, given in own]
        return self._of_all(
            self.resolving(
                layers, [{name: first_value(value) for name, value in given.items()} for given in self.per_model]
            )
        )

    def at(self, layer: int | None, name: str, depth: int) -> Setting:
        """The setting of a tensor in a layer of the text tower, or in none, with its name in the template.

        refuses what cannot be resolved there, once
        """
        if not self.sound:
            return self.outside()
        held = tuple(part in name for part in self.filters)
        key = (layer, held, depth)
        if key not in self.known:
            with collecting() as found:
                self.known[key] = self._resolved(layer, name, depth)
            if found:  # what is wrong in one layer is mostly wrong in all others
                self.known.update(dict.fromkeys([(one, held, depth) for one in (None, *range(depth))], self.outside()))
        return self.known[key]

    def _resolved(self, layer: int | None, name: str, depth: int) -> Setting:
        whole = Position.of(layer, (0, depth - 1), name)
        near = Position.of(layer, self.span, name) if self.span else whole
        told = "" if layer is None else f" (layer {layer})"
        (where, general), *own = self.layers
        return self._of_all(
            self.resolving(
                [
                    (where + told, values_at(general, whole, _never)),
                    *((where + told, values_at(given, near, self._each)) for where, given in own),
                ],
                [values_at(given, whole, _never) for given in self.per_model],
            )
        )

    def _each(self, name: str) -> bool:
        return _is_each(self.row, name)


def schedule_of(
    resolving: Callable[..., Setting],
    row: Method,
    layers: Sequence[Layer],
    per_model: Sequence[Mapping[str, Any]],
    span: tuple[int, int] | None,
    labels: Sequence[str],
) -> Schedule | None:
    """The schedule of parameters, or None if none of them changes by depth; see `Schedule` for the arguments.

    labels  [model] names of the models for messages

    refuses values that the method cannot take, wherever they count
    """
    own = layers[1:]
    said = [(where, name, value) for where, given in [layers[0]] for name, value in given.items()]
    for place, (label, given) in enumerate(zip(labels, per_model, strict=True)):
        said += [(f"models[{place}] '{label}'", name, value) for name, value in given.items()]
    changing = [one for one in said if changes(one[2])]
    for where, given in own:
        for name, value in given.items():
            parts = value if is_by_model(value) and _is_each(row, name) else [value]
            changing += [(where, name, part) for part in parts if changes(part)]
    if not changing:
        return None
    parameters = {one.name: one for one in row.parameters}
    with collecting() as found:
        for where, name, value in changing:
            _check(row, parameters.get(name), where, name, value)
        trims = [given.get("trim") for _, given in reversed(layers) if "trim" in given]
        if trims[:1] == ["model"] and (where := next((where for where, name, _ in changing if name == _SPLITS), "")):
            refuse(RecipeError(f"{where}: {_SPLITS}: trim: model takes one threshold over a whole model, within which "
                               f"the {_SPLITS} cannot change. Leave trim out, or give one number"))  # fmt: skip
    filters = tuple(dict.fromkeys(part for _, _, value in changing for part in filters_in(value)))
    return Schedule(
        resolving, row, layers, per_model, span, filters, any(_graded(value) for _, _, value in changing), not found
    )


def _check(row: Method, parameter: Parameter | None, where: str, name: str, value: list[Any]) -> None:
    """Refuse a value that changes by depth and that a method cannot take."""
    if why := unfit(value):
        refuse(RecipeError(f"{where}: {name}: {why}"))
        return
    if parameter is None:
        return  # which the method does not have: said of the setting
    if _graded(value) and parameter.kind != "number":
        kind = {"flag": "true or false", "count": "a whole number", "choice": "a word"}[parameter.kind]
        refuse(RecipeError(f"{where}: {name}: is {kind}, which cannot change gradually from layer to layer. Use "
                           "conditions with a filter, or overrides"))  # fmt: skip
        return
    for leaf in leaves(value):
        check_value(row, parameter, (where, leaf))


def _graded(value: list[Any]) -> bool:
    return any(not isinstance(one, Mapping) or changes(one["value"]) for one in value)


def _is_each(row: Method, name: str) -> bool:
    parameter = row.parameter(name)
    return (parameter is not None and parameter.each) or (row.interpolates and name == "weight")


def _never(_: str) -> bool:
    return False
