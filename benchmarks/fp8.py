"""Time merges of a model in fp8 beside the same model in bfloat16: what reading numbers times their scales costs.

    python benchmarks/fp8.py --size 0.1B
    python benchmarks/fp8.py --markdown docs/fp8.md

The models are those of benchmarks/merge.py, and the same with the weights of their layers in fp8 with a scale for each
block of 128 x 128, as DeepSeek and Qwen publish theirs. It needs torch, which makes them.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from contest import CASES
from dataset import MODELS, SHAPES, Shape, make_models, open_tensor
from measure import Measured, RunError, machine
from tools import Bench

MIB = 1 << 20
BLOCK = 128
LARGEST = 448.0
"""The largest number of E4M3."""

_BUSY = " (busy with other work: the seconds from start to end say little, those of processors more)"

QUANTIZED = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}

INTRODUCTION = """
# Merging models in fp8

What a merge of checkpoints in fp8 costs beside one of the same models in bfloat16. The page is what this command has
printed:

    {command}

The models have the shape of Llama-3.2-1B ({parameters:.2f} billion parameters, {there} of them, {plain:.2f} GB each in
bfloat16 and {small:.2f} GB in fp8). In fp8 the weights of the layers are E4M3 with a scale for each block of 128 x 128,
and the embedding is bfloat16. The output is bfloat16 either way. Times are of whole processes, from start to end: the
median of {runs}, with the least and the most in brackets; of the inputs of a first merge nothing is remembered.
Anonymous memory is the most that there was at any one time; interpreter and imports alone have {imports:.0f} MiB.

{host}
"""


def main() -> None:
    options = _options()
    shape = SHAPES[options.size]
    plain = make_models(options.size, options.data.resolve())
    small = _in_fp8(plain, shape)
    scratch = options.data.resolve() / "scratch"
    scratch.mkdir(exist_ok=True)
    host = machine()
    benches = {"bfloat16": Bench(plain, scratch), "fp8": Bench(small, scratch)}
    for name in options.methods:  # compiles
        for bench in benches.values():
            bench.run_polymerge(CASES[name])
    imports = max(benches["fp8"].imports().anonymous for _ in range(3))
    taken: dict[tuple[str, str, str], list[Measured]] = {}
    for number in range(options.runs):
        for name in options.methods:
            for kind, bench in benches.items():
                bench.read_inputs()
                bench.forget_digests()
                for when in ("first", "later"):
                    run, _ = bench.run_polymerge(CASES[name])
                    taken.setdefault((name, kind, when), []).append(run)
                    print(f"round {number + 1}: {name}, {kind}, {when}: {run.seconds:.2f} s", file=sys.stderr)
    page = INTRODUCTION.lstrip().format(
        command=f"python {shlex.join(sys.argv)}",
        parameters=shape.parameters() / 1e9,
        there=len(MODELS),
        plain=_size(plain / "a") / 1e9,
        small=_size(small / "a") / 1e9,
        runs=options.runs,
        imports=imports / MIB,
        host=f"{host['processor']}, {host['cores']} cores, {host['memory']}, {host['system']}, load before "
        f"{host['load']}{_BUSY if float(host['load']) > float(host['cores']) else ''}; "
        f"{', '.join(benches['fp8'].versions())}.",
    )
    page += "\n" + "\n".join(_table(options.methods, taken)) + "\n"
    if options.markdown:
        options.markdown.write_text(page, encoding="utf-8")
    print(page)


def _table(methods: Iterable[str], taken: dict[tuple[str, str, str], list[Measured]]) -> Iterable[str]:
    yield "| method | inputs | merge, s | first merge, s | processors, s | anonymous, MiB | resident, MiB |"
    yield "|---|---|---|---|---|---|---|"
    for name in methods:
        for kind in ("bfloat16", "fp8"):
            first, later = taken[name, kind, "first"], taken[name, kind, "later"]
            cells = [_spread([run.seconds for run in later]), _spread([run.seconds for run in first])]
            cells.append(_spread([run.cpu for run in later]))
            cells.append(f"{max(run.anonymous for run in (*first, *later)) / MIB:.0f}")
            cells.append(f"{max(run.resident for run in (*first, *later)) / MIB:.0f}")
            yield f"| {name} | {kind} | {' | '.join(cells)} |"


def _spread(values: list[float]) -> str:
    return f"**{median(values):.2f}** ({min(values):.2f}–{max(values):.2f})"


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _in_fp8(plain: Path, shape: Shape) -> Path:
    """The models with the weights of their layers in fp8, made unless they are there already."""
    folder = plain.with_name(f"{plain.name}-fp8")
    stamp = (plain / "stamp.json").read_text(encoding="utf-8")
    if (folder / "stamp.json").is_file() and (folder / "stamp.json").read_text(encoding="utf-8") == stamp:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    for model in MODELS:
        made = folder / model
        made.mkdir(parents=True)
        config = json.dumps(shape.config() | {"quantization_config": QUANTIZED}, indent=2)
        (made / "config.json").write_text(config + "\n", encoding="utf-8")
        weight_map = json.loads((plain / model / "model.safetensors.index.json").read_text(encoding="utf-8"))
        found: dict[str, str] = {}
        for file in sorted(set(weight_map["weight_map"].values())):
            held: dict[str, torch.Tensor] = {}
            for name in [name for name, place in weight_map["weight_map"].items() if place == file]:
                held |= _tensor(name, open_tensor(plain / model, name), shape.tensors()[name])
            save_file(held, made / file, metadata={"format": "pt"})
            found |= dict.fromkeys(held, file)
        index = json.dumps({"metadata": {}, "weight_map": found}, indent=2)
        (made / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    (folder / "stamp.json").write_text(stamp, encoding="utf-8")
    return folder


def _tensor(name: str, bits: NDArray[np.uint16], shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """A tensor as it is, or in fp8 with its scales if it is a layer's weight."""
    values = torch.from_numpy(np.array(bits)).view(torch.bfloat16).reshape(shape)
    if "_proj" not in name:
        return {name: values}
    rows, columns = (size // BLOCK for size in shape)
    blocks = values.float().reshape(rows, BLOCK, columns, BLOCK)
    scales = blocks.abs().amax((1, 3)) / LARGEST
    codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn).reshape(shape)
    return {name: codes, f"{name}_scale_inv": scales}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = Path(__file__).parent / "data"
    parser.add_argument("--size", choices=SHAPES, default="1.2B", help="parameters (default 1.2B)")
    parser.add_argument(
        "--methods", nargs="+", choices=CASES, default=["linear", "task_arithmetic", "ties"], metavar="NAME"
    )
    parser.add_argument("--runs", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--data", type=Path, default=data, help="folder for models and outputs")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the page here")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except RunError as error:
        sys.exit(str(error))
