"""Load a model and its processor for inference, refusing models that do not load completely."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from polymerge.checkpoints.files import class_names
from polymerge.checkpoints.needed_packages import needed_package
from polymerge.errors import CheckpointError, MissingExtraError, RecipeError, did_you_mean

__all__ = [
    "DTYPES",
    "PROCESSOR_FILES",
    "load_model",
    "load_processor",
    "load_told",
    "model_class",
    "named_class",
    "needs_code",
    "plain_loading",
    "quiet",
    "tokenizer_of",
]

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""The precisions for inference; `auto` is that of the weights."""

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
"""Files that mark a processor; a folder without one is used with text only."""

_AUTO = ("AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModel")


def model_class(config: Mapping[str, Any]) -> Any:
    """The class to load a model with: the architecture named in its config, else an Auto class.

    config   the content of config.json
    returns  among the Auto classes, one that `auto_map` has code for, else the one that fits the config

    raises ImportError without transformers.
    """
    import transformers

    if (named := named_class(config)) is not None:
        return named
    code = config.get("auto_map")
    if isinstance(code, Mapping):
        for name in _AUTO:
            if name in code:
                return getattr(transformers, name)
    multimodal = any(key in config for key in ("vision_config", "audio_config", "auto_map"))
    return transformers.AutoModelForImageTextToText if multimodal else transformers.AutoModelForCausalLM


def named_class(config: Mapping[str, Any]) -> Any:
    """The first architecture in a config that transformers knows, or None."""
    import transformers

    return next((getattr(transformers, name) for name in class_names(config) if hasattr(transformers, name)), None)


def needs_code(config: Mapping[str, Any]) -> bool:
    """Return whether a model needs Python files beside its config, because transformers has no class for it."""
    import transformers

    return "auto_map" in config and config.get("model_type") not in transformers.CONFIG_MAPPING


def load_model(
    folder: str | Path,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    ignored: Collection[str] = (),
    plainly: bool = False,
) -> Any:
    """Load a model for inference, in evaluation mode; every stored tensor must be used.

    folder             a folder, which is read without the network, or the id of a hub repository
    device             a torch device: `cpu`, `cuda`, `cuda:1`
    dtype              one of `DTYPES`
    trust_remote_code  run Python files from the folder if the model needs them
    ignored            stored names that may be unused
    plainly            whether to load its tensors as they are where its config says that they are quantized

    raises RecipeError for a dtype or device that is not there, CheckpointError where the model does not load or a key
    is missing, unexpected or mismatched, MissingExtraError without transformers.
    """
    if dtype not in DTYPES:
        raise RecipeError(f"dtype: '{dtype}' is not a dtype that a model can run in.{did_you_mean(str(dtype), DTYPES)}")
    if (Path(folder) / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder}: an adapter (adapter_config.json) lies beside the model, and transformers would load both. Move "
            "it to a folder of its own."
        )
    torch, transformers = _import("torch"), _import("transformers")
    _check_device(torch, device)
    local: dict[str, Any] = {"local_files_only": Path(folder).is_dir(), "trust_remote_code": trust_remote_code}
    name = "config.json"
    try:
        with quiet():
            config, _ = transformers.PreTrainedConfig.get_config_dict(str(folder), **local)
            loader = model_class(config)
            if plainly:
                local["config"] = _unquantized(transformers.AutoConfig.from_pretrained(str(folder), **local))
            name = loader.__name__
            model, wrong = load_told(
                loader,
                str(folder),
                ignored,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                device_map=None if device == "cpu" else device,
                **local,
            )
    except Exception as error:  # whatever a model's class raises means that it does not load
        if said := needed_package(error):
            raise MissingExtraError(f"{folder}: its model cannot be loaded: {said}") from None
        raise CheckpointError(
            f"{folder}: {name} cannot load it: {type(error).__name__}: {_first(error)}{_remote(trust_remote_code)}"
        ) from error
    if wrong:
        raise CheckpointError(f"{folder}: {name} cannot load it completely: {wrong}. `polymerge verify` shows details.")
    return model.eval()


def _unquantized(config: Any) -> Any:
    """A config of transformers, changed so that neither it nor one in it asks for quantized weights."""
    for part in (config, *(getattr(config, name) for name in getattr(config, "sub_configs", ()))):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


def load_told(loader: Any, folder: str, ignored: Collection[str] = (), **options: Any) -> tuple[Any, str]:
    """Call `from_pretrained`; return the model and a summary of missing, unexpected or mismatched keys.

    loader   a class of a model, or an Auto class; one that has a `from_pretrained` of its own, such as Qwen2.5-Omni's,
             which loads voices too, does not hand on what is asked for here, so that it loads twice
    ignored  keys that may be unexpected
    """
    plain = plain_loading(loader)
    more = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # they are listed, not raised one by one
    model, info = plain(folder, **options, **more)
    if plain != loader.from_pretrained:
        model = loader.from_pretrained(folder, **options)
    wrong = {kind: sorted(map(str, info[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")}
    wrong["unexpected"] = [key for key in wrong["unexpected"] if key not in ignored]
    return model, "; ".join(f"{len(keys)} {kind}, first {keys[0]}" for kind, keys in wrong.items() if keys)


def plain_loading(loader: Any) -> Any:
    """transformers' generic `from_pretrained`, bypassing a class's override."""
    import transformers

    if not issubclass(loader, transformers.PreTrainedModel):
        return loader.from_pretrained
    return transformers.PreTrainedModel.from_pretrained.__func__.__get__(loader)  # type: ignore[attr-defined]


def load_processor(folder: str | Path, trust_remote_code: bool = False) -> Any:
    """Load the processor that turns prompts into a model's input, or the tokenizer of a text-only model.

    Its tokenizer pads on the left, as batched generation needs, with the end-of-sequence token if it has no padding
    token.

    raises CheckpointError if it does not load or has no tokenizer, MissingExtraError if a package is missing.
    """
    transformers = _import("transformers")
    path = Path(folder)
    text_only = path.is_dir() and not any((path / name).is_file() for name in PROCESSOR_FILES)
    # of a hub repository the files are not known here; AutoProcessor looks, and has the same way back to the tokenizer
    name = "AutoTokenizer" if text_only else "AutoProcessor"
    try:
        loader = getattr(transformers, name)
        with quiet():
            processor = loader.from_pretrained(
                str(folder), local_files_only=path.is_dir(), trust_remote_code=trust_remote_code
            )
    except Exception as error:  # whatever a processor's class raises means that it does not load
        if said := needed_package(error):
            raise MissingExtraError(f"{folder}: its processor cannot be loaded: {said}") from None
        raise CheckpointError(
            f"{folder}: {name} cannot load it: {type(error).__name__}: {_first(error)}{_remote(trust_remote_code)}"
        ) from error
    tokenizer = tokenizer_of(processor)
    if not hasattr(tokenizer, "pad_token"):
        raise CheckpointError(f"{folder}: {type(processor).__name__} has no tokenizer. Copy the tokenizer files there.")
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise CheckpointError(
                f"{folder}: its tokenizer has neither pad_token nor eos_token. Name one in tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor; a tokenizer is returned itself."""
    return getattr(processor, "tokenizer", processor)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars, load reports and warnings; errors are still raised."""
    try:
        logging: Any = import_module("transformers.utils.logging")
    except ImportError:
        yield
        return
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _import(package: str) -> Any:
    try:
        return import_module(package)
    except ImportError:
        raise MissingExtraError(f"running a model needs {package}: pip install 'polymerge[transformers]'") from None


def _check_device(torch: Any, name: str) -> None:
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise RecipeError(f"device: '{name}' is none: {_first(error)}. Say cpu, cuda or cuda:1.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RecipeError(f"device: there is no '{name}': torch sees {torch.cuda.device_count()} GPU(s). Say cpu.")


def _first(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _remote(trusted: bool) -> str:
    return "" if trusted else " (code that lies in a folder runs only with `trust_remote_code=True`)"
