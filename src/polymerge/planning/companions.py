"""The files beside the weights of a base with an adapter: which of the two supplies tokenizer, chat template and
processor.

An adapter's folder often holds the files used in training, a base's the published ones. A tokenizer's files belong
together, and so do those of a chat template: they are the adapter's or the base's, never some of each.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Final

from polymerge.checkpoints import Checkpoint
from polymerge.checkpoints.adapter import Adapter
from polymerge.checkpoints.beside import companion_files, unfit
from polymerge.checkpoints.bounds import TOKENIZER_BYTES, read_bounded
from polymerge.checkpoints.discovery import CONFIG
from polymerge.checkpoints.files import check_file, class_names, read_config, reading
from polymerge.checkpoints.hub import missing_remote
from polymerge.checkpoints.json_objects import read_text
from polymerge.checkpoints.prefetch import fetched
from polymerge.checkpoints.tensor_info import listed
from polymerge.errors import PolymergeError, refuse
from polymerge.planning.inputs import Models
from polymerge.planning.model import Model
from polymerge.planning.plan import Companions
from polymerge.recipe.recipe import Recipe

__all__ = [
    "adapter_companions",
    "chat_template_of",
    "files_beside",
    "files_left_out",
    "files_taken",
    "has_tokenizer",
    "of_tuned",
    "tokenizer_companions",
    "tokenizer_folder",
    "told_beside",
]

_VOCABULARY: Final = (
    "tokenizer.json", "tokenizer.model*", "vocab.json", "vocab.txt", "*.tiktoken", "tekken.json", "spiece.model",
    "sentencepiece*.model", "*.spm",
)  # fmt: skip
"""Files that mark a complete tokenizer."""

_TOKENIZER: Final = (
    *_VOCABULARY, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt",
)  # fmt: skip
_TEMPLATE: Final = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
_CHAT_TEMPLATE: Final = _TEMPLATE[:2]
_MAY_HOLD_CHAT_TEMPLATE: Final = ("tokenizer_config.json", "processor_config.json")
_PROCESSOR: Final = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
_NESTED: Final = {"image_processor": "preprocessor_config.json", "video_processor": "video_preprocessor_config.json"}
"""Configs that processor_config.json may contain, which transformers then prefers to the separate file."""
_GENERATION: Final = ("generation_config.json",)


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder has a complete tokenizer rather than only its settings."""
    return bool(_matching(_names(folder), _VOCABULARY))


def tokenizer_folder(checkpoint: Checkpoint) -> Path:
    """The folder of the tokenizer that belongs to a checkpoint's weights: its adapter's, if that has a complete one."""
    beside = checkpoint.adapter
    return beside.folder if beside is not None and has_tokenizer(beside.folder) else checkpoint.folder


def adapter_companions(checkpoint: Checkpoint) -> tuple[tuple[Companions, ...], tuple[str, ...]]:
    """Files that the output takes from the folder of the template's adapter, with notes for the user.

    The adapter's config, its README and training files are never taken. Both are empty without an adapter.

    Refuses, as `files_taken` does, what cannot be copied; raises CheckpointError where a config that decides it cannot
    be read.
    """
    if checkpoint.adapter is None:
        files_taken(checkpoint, ())
        return (), ()
    own, base = checkpoint.adapter.folder, checkpoint.folder
    here, there = _names(own), _names(base)
    taken: list[Companions] = []
    notes: list[str] = []

    def take(kind: str, files: Sequence[str], instead: Collection[str], why: str) -> None:
        dropped = tuple(sorted(set(instead) - set(files)))
        taken.append(Companions(kind, str(own), tuple(files), dropped, why))
        left = f"; the base's {listed(dropped, 5)} stays behind" if dropped else ""
        notes.append(f"{kind}: {listed(files, 5)} of the adapter '{own.name}', {why}{left}")

    settings = _matching(here, _TOKENIZER)
    if has_tokenizer(own):
        take("tokenizer", settings, _matching(there, _TOKENIZER), "whose folder has a whole tokenizer")
    elif settings:
        notes.append(
            f"tokenizer: the base's; {listed(settings, 5)} of the adapter '{own.name}' is left out, for its folder has "
            "no vocabulary, and a tokenizer's files belong together"
        )
    template, chosen = _matching(here, _TEMPLATE), chat_template_folder(checkpoint)
    if template:
        take("chat template", template, _matching(there, _TEMPLATE), "whose folder has one")
    elif chosen == own:
        take("chat template", (), _matching(there, _TEMPLATE), "which its tokenizer_config.json holds")
    elif chosen is None and chat_template_in(base):
        notes.append(
            f"chat template: none, for the tokenizer of the adapter '{own.name}' has none, and the base's is part of "
            "its tokenizer_config.json. Put a chat_template.jinja into the adapter's folder if there is to be one"
        )
    if processor := _matching(here, _PROCESSOR):
        nested = _object(own / "processor_config.json")
        held = [file for key, file in _NESTED.items() if key in nested and file in there and file not in here]
        take("processor", processor, held, "whose folder has it")
        notes += _covered(base, own, here)
    if generation := _matching(here, _GENERATION):
        take("generation config", generation, (), "whose folder has one")
    files_taken(checkpoint, taken)
    return tuple(taken), tuple(notes)


def files_taken(template: Checkpoint, companions: Sequence[Companions]) -> dict[str, Path]:
    """The files beside the weights of an output, by their paths there: the template's, with what its adapter replaces.

    Refuses what `unfit` finds a reason against. Empty for a template without a config.
    """
    if not template.config:
        return {}
    # with adapter_config.json in it, transformers would look for an adapter in the output
    replaced = {CONFIG, *(name for taken in companions for name in (*taken.dropped, *taken.files))}
    elsewhere = {name: Path(taken.folder) for taken in companions for name in taken.files}
    if template.brought and template.adapter is not None:
        elsewhere["config.json"] = template.adapter.folder
    for name, folder in elsewhere.items():
        with reading(folder / name):
            if (error := unfit(folder / name, folder)) is not None:
                raise error
            if missing_remote(folder / name) is None:
                check_file(folder / name)
    taken_from = {name: folder / name for name, folder in elsewhere.items()}
    return {**companion_files(template.folder, {*replaced, *taken_from}), **taken_from}


def tokenizer_companions(template: Model, keeper: Model, taken: Sequence[Companions]) -> tuple[Companions, ...]:
    """The files of another model's tokenizer, and its chat template unless the template is multimodal and it is not.

    taken   files of the template's adapter, of which its tokenizer is left out

    Refuses, as `files_taken` does, what cannot be copied.
    """
    own, folder, why = template.checkpoint, tokenizer_folder(keeper.checkpoint), "chosen by tokenizer_source"
    there, here = _names(own.folder), _names(folder)
    kinds: list[tuple[str, tuple[str, ...]]] = [("tokenizer", _TOKENIZER)]
    if keeper.multimodal or not template.multimodal:
        kinds.append(("chat template", _TEMPLATE))
    found = [one for one in taken if one.kind not in [kind for kind, _ in kinds]]
    for kind, patterns in kinds:
        files = _matching(here, patterns)
        dropped = tuple(sorted(set(_matching(there, patterns)) - set(files)))
        found.append(Companions(kind, str(folder), files, dropped, why))
    files_taken(own, found)
    return tuple(found)


def of_tuned(tuned: Model, base: Model) -> dict[str, Path]:
    """The files of a fine-tune that go with its adapter, by their names: tokenizer, chat template and the like, each
    as a set where the base's has other bytes. Empty where the two are models of different classes.

    Refuses what cannot be copied.
    """
    if base.family.name != tuned.family.name or class_names(base.checkpoint.config) != class_names(
        tuned.checkpoint.config
    ):
        return {}
    beside = tuned.checkpoint.adapter
    own = beside.folder if beside is not None else tuned.checkpoint.folder
    here, there = _names(own), _names(base.checkpoint.folder)
    found: dict[str, Path] = {}
    for patterns in (_TOKENIZER, _TEMPLATE, _PROCESSOR, _GENERATION):
        files = _matching(here, patterns)
        if patterns == _TOKENIZER and not has_tokenizer(own):
            continue
        if files != _matching(there, patterns) or any(
            _content(own / name) != _content(base.checkpoint.folder / name) for name in files
        ):
            found |= {name: own / name for name in files}
    refuse(*filter(None, (unfit(path, own) for path in found.values())))
    return found


def told_beside(
    recipe: Recipe, models: Models, keeper: Model, chat_template: str | None
) -> tuple[dict[str, str | None], list[str]]:
    """The sources of the output's config, tokenizer and chat template, and a warning if models would lose a chat
    template.

    keeper         the model whose tokenizer the output has
    chat_template  whose the chat template is that the recipe chooses; None if it chooses none
    """
    template = models.template
    if recipe.template is not None:
        why = "template"
    elif {*models.merged, models.base or template} == {template}:
        why = "the only model"
    elif template is models.base:
        why = "base_model, as the recipe names no template"
    else:
        kind = "multimodal model" if template.multimodal else "model"
        why = f"first {kind}, as the recipe names no template"
    if not template.checkpoint.config:
        return {"config": None, "tokenizer": None, "chat_template": None, "why": f"{why}: a file without a config"}, []
    try:
        beside = files_beside(template.checkpoint.folder, template.label, why)
        if (adapter := template.checkpoint.adapter) is not None:
            folders = {
                "tokenizer": tokenizer_folder(template.checkpoint),
                "chat_template": chat_template_folder(template.checkpoint),
            }
            beside |= {kind: adapter.folder.name for kind, folder in folders.items() if folder == adapter.folder}
            beside |= {kind: None for kind, folder in folders.items() if folder is None}
        if keeper is not template:
            beside["tokenizer"] = keeper.label
            if keeper.multimodal or not template.multimodal:
                beside["chat_template"] = keeper.label if chat_template_folder(keeper.checkpoint) else None
        beside["chat_template"] = chat_template or beside["chat_template"]
        alike = [model for model in dict.fromkeys(models.merged) if model.multimodal == template.multimodal]
        silenced = [] if beside["chat_template"] else [one for one in alike if chat_template_folder(one.checkpoint)]
    except PolymergeError as error:
        refuse(error)
        return {}, []
    if not silenced:
        return beside, []
    labels = ", ".join(f"'{model.label}'" for model in silenced)
    return beside, [
        f"'{template.label}' has no chat template, so the output will have none; there is one in {labels}. Say "
        f"`template: {silenced[0].checkpoint.source}` for the config, tokenizer and chat template of that"
    ]


def files_beside(folder: Path, label: str, why: str, config: str = "config.json") -> dict[str, str | None]:
    """The label of a folder for each of config, tokenizer and chat template that it has, None for those it lacks.

    why   the reason, recorded with them
    """
    return {
        "config": label if _listed(folder / config) else None,
        "tokenizer": label if has_tokenizer(folder) else None,
        "chat_template": label if chat_template_in(folder) else None,
        "why": why,
    }


def chat_template_folder(checkpoint: Checkpoint) -> Path | None:
    """The folder of a checkpoint's chat template: its adapter's or its own; None without one.

    raises as `chat_template_in` does.
    """
    if checkpoint.adapter is None:
        return checkpoint.folder if chat_template_in(checkpoint.folder) else None
    own = checkpoint.adapter.folder
    whole, here = has_tokenizer(own), _names(own)
    if _matching(here, _TEMPLATE) or (whole and _object(own / "tokenizer_config.json").get("chat_template")):
        return own
    replaced = {*(_TOKENIZER if whole else ()), *_matching(here, _PROCESSOR)}
    staying = [name for name in _MAY_HOLD_CHAT_TEMPLATE if name not in replaced]
    taken = [name for name in _MAY_HOLD_CHAT_TEMPLATE if name in replaced]
    in_order = ((checkpoint.folder, staying), (own, taken))
    return next((folder for folder, others in in_order if chat_template_in(folder, others)), None)


def chat_template_in(folder: Path, others: Sequence[str] = _MAY_HOLD_CHAT_TEMPLATE) -> bool:
    """Return whether a folder has a chat template: in its own file, or in one of the JSON files `others`.

    raises CheckpointError if such JSON cannot be read or cannot be downloaded.
    """
    if any(_listed(folder / name) for name in _CHAT_TEMPLATE):
        return True
    return any(_object(folder / name).get("chat_template") for name in others)


def chat_template_of(checkpoint: Checkpoint) -> str | None:
    """A checkpoint's chat template, of several the one called default; None without one.

    raises CheckpointError if it cannot be read or cannot be downloaded.
    """
    folder = chat_template_folder(checkpoint)
    if folder is None:
        return None
    if _listed(file := folder / _CHAT_TEMPLATE[0]):
        fetched(file)
        return read_text(file)
    for name in (_CHAT_TEMPLATE[1], *_MAY_HOLD_CHAT_TEMPLATE):
        held = _object(folder / name).get("chat_template")
        if isinstance(held, list):
            named = {one.get("name"): one.get("template") for one in held if isinstance(one, Mapping)}
            held = named.get("default")
        if isinstance(held, str) and held:
            return held
    return None


def _listed(file: Path) -> bool:
    """Return whether a folder lists a file, even if it is still a link to the hub."""
    return file.is_file() or file.is_symlink()


def files_left_out(label: str, folder: Path, adapter: Adapter | None) -> Iterator[str]:
    """Sentences on weight files in an input's folders that are not read.

    folder   of the checkpoint, in which an adapter may have been left
    adapter  the one that is folded into it, or the input itself
    """
    left_out = adapter.left_out if adapter is not None else {}
    for why in dict.fromkeys(left_out.values()):
        names = [name for name, reason in left_out.items() if reason == why]
        yield f"'{label}': {listed(names, 5)} in the adapter's folder is left out: {why}"
    beside = [name for name in _names(folder) if name.startswith("adapter_model") or name == CONFIG]
    if (adapter is None or adapter.folder != folder) and CONFIG in beside:
        yield (
            f"'{label}': {listed(beside)} in its folder is an adapter beside a whole model, and is left out. If it is "
            "not in the model yet, move it to a folder of its own and write BASE+ADAPTER"
        )


def _covered(base: Path, own: Path, here: Collection[str]) -> Iterator[str]:
    """Name the adapter's files that are ignored because the base's processor_config.json has its own values."""
    nested = {} if "processor_config.json" in here else _object(base / "processor_config.json")
    for key, file in _NESTED.items():
        if key in nested and file in here:
            yield (
                f"processor: the base's processor_config.json holds {key}, which transformers reads before {file} of "
                f"the adapter '{own.name}'. Put the adapter's processor_config.json beside it"
            )


def _names(folder: Path) -> list[str]:
    """The names of a folder's files, including chat templates one level down."""
    found = [*folder.iterdir(), *(folder / "additional_chat_templates").glob("*")] if folder.is_dir() else []
    return sorted(file.relative_to(folder).as_posix() for file in found if not file.is_dir())


def _matching(names: Collection[str], patterns: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in names if any(fnmatch(name, pattern) for pattern in patterns))


def _content(file: Path) -> bytes:
    """The bytes of a file, which is downloaded if it is on the hub."""
    if file.is_symlink():
        fetched(file)
    return read_bounded(file, TOKENIZER_BYTES)


def _object(file: Path) -> Mapping[str, Any]:
    """Read a JSON file, downloading it if it is on the hub; {} if there is none."""
    if file.is_symlink():
        fetched(file)
    return read_config(file)
