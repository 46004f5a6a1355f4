"""Time merges of a model in the shape of Llama-3.2-1B: polymerge beside cp of one checkpoint, and beside mergekit.

    python benchmarks/merge.py --size 0.1B
    python benchmarks/merge.py --mergekit ENVIRONMENT --markdown docs/benchmarks.md

See benchmarks/README.md for what is measured, and for how to make the environments.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from tqdm import tqdm

from contest import CASES, Floats, compare
from dataset import MODELS, SHAPES, make_models
from measure import Measured, RunError, machine
from report import Report
from tools import Bench


def main() -> None:
    options = _options()
    shape = SHAPES[options.size]
    print(f"{shape.parameters() / 1e9:.2f} billion parameters in {options.data / options.size}", file=sys.stderr)
    with tqdm(total=shape.parameters(), unit="param", unit_scale=True, disable=None, leave=False) as bar:
        models = make_models(options.size, options.data.resolve(), bar.update)
    scratch = options.data.resolve() / "scratch"
    scratch.mkdir(exist_ok=True)
    bench = Bench(models, scratch, options.mergekit)
    host = machine()
    report = Report(
        f"python {shlex.join(sys.argv)}",
        {
            "models": f"{shape.parameters() / 1e9:.2f} billion parameters in bfloat16, {len(MODELS)} of them, "
            f"{2 * shape.parameters() / 1e9:.2f} GB each",
            "machine": f"{host['processor']}, {host['cores']} cores, {host['memory']}, {host['system']}",
            "load before": host["load"],
            "versions": ", ".join(bench.versions()),
        },
    )
    short = [name for name in options.methods if not CASES[name].long]
    samples = _warm_up(bench, report, short)
    for number in range(options.runs):
        versus = options.mergekit is not None and number < options.mergekit_runs
        for name in short:
            turn = _turn(bench, name, versus, samples[name], report)
            report.turns.setdefault(name, []).append(turn | (_cold(bench, name) if number < options.cold_runs else {}))
            print(f"round {number + 1}: {name}: {_line(report.turns[name][-1])}", file=sys.stderr)
            _keep(report, options.json)
    for name in options.methods:
        if CASES[name].long:
            bench.read_inputs()
            report.long[name] = bench.run_polymerge(CASES[name])[0], bench.planned(CASES[name])
            print(f"{name}: {report.long[name][0].seconds:.0f} s", file=sys.stderr)
            _keep(report, options.json)
    if options.markdown:
        options.markdown.write_text(report.to_markdown(), encoding="utf-8")
    print(report.to_markdown())
    if unlike := [name for name, likeness in report.likeness.items() if not CASES[name].agrees(likeness)]:
        sys.exit(f"the two tools did not make the same of {', '.join(unlike)}: their times say nothing")


def _keep(report: Report, file: Path | None) -> None:
    if file is not None:
        file.write_text(report.to_json(), encoding="utf-8")


def _warm_up(bench: Bench, report: Report, names: list[str]) -> dict[str, list[Floats]]:
    """Run every method once, which compiles what is not compiled yet; samples of the outputs."""
    bench.forget_kernels()
    samples = {}
    for name in names:
        report.compiled[name], samples[name] = bench.run_polymerge(CASES[name])
        print(f"to warm up: {name}: {report.compiled[name].seconds:.2f} s", file=sys.stderr)
    report.imports += [bench.imports() for _ in range(3)]
    return samples


def _turn(bench: Bench, name: str, versus: bool, ours: list[Floats], report: Report) -> dict[str, Measured]:
    """One method's turn: what each contestant took."""
    case = CASES[name]
    bench.read_inputs()
    taken = {"cp": bench.cp()}
    bench.forget_digests()
    for who in ("first", "later"):
        taken[who], again = bench.run_polymerge(case)
        if any((one != other).any() for one, other in zip(ours, again, strict=True)):
            raise RunError(f"{name}: two runs of polymerge made different checkpoints")
    if versus and case.mergekit is not None:
        taken["mergekit"], theirs = bench.run_mergekit(case)
        report.likeness[name] = compare(bench.models, ours, theirs)
    return taken


def _cold(bench: Bench, name: str) -> dict[str, Measured]:
    """What it takes where nothing of the inputs is in the page cache: to read them, and to merge them."""
    bench.forget_inputs()
    taken = {"cat": bench.cat()}
    bench.forget_digests()
    bench.forget_inputs()
    taken["cold"], _ = bench.run_polymerge(CASES[name])
    return taken


def _line(turn: dict[str, Measured]) -> str:
    return ", ".join(f"{who} {run.seconds:.2f} s" for who, run in turn.items())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = Path(__file__).parent / "data"
    parser.add_argument("--size", choices=SHAPES, default="1.2B", help="parameters (default 1.2B)")
    short = [name for name, case in CASES.items() if not case.long]
    spectral = ", ".join(name for name in CASES if name not in short)
    told = f"{', '.join(short)} (default); or {spectral}, which decompose matrices, take minutes, and run once; or all"
    parser.add_argument("--methods", nargs="+", choices=[*CASES, "all"], default=short, metavar="NAME", help=told)
    parser.add_argument("--runs", type=int, default=5, help="rounds (default 5)")
    parser.add_argument(
        "--mergekit", type=Path, metavar="ENVIRONMENT", help="the virtual environment that mergekit is in"
    )
    parser.add_argument("--mergekit-runs", type=int, default=3, help="rounds that it takes part in (default 3)")
    cold = "rounds with inputs that are not in the page cache, too (default 1)"
    parser.add_argument("--cold-runs", type=int, default=1, help=cold)
    parser.add_argument(
        "--data", type=Path, default=data, help="folder for models and outputs (default benchmarks/data)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement here")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the page here")
    options = parser.parse_args()
    if "all" in options.methods:
        options.methods = list(CASES)
    return options


if __name__ == "__main__":
    try:
        main()
    except RunError as error:
        sys.exit(str(error))
