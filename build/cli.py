"""`zoo-compile`: checkpoints -> zoo. Only argparse is imported before the arguments are understood."""

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

from blockzoo.zoo.console import command

if TYPE_CHECKING:
    from blockzoo.build.progress import Progress
    from blockzoo.build.report import CompileReport

_EPILOG = """\
examples:
  zoo-compile llama=./Llama-3.2-1B support=./support-finetune -o my-zoo
  zoo-compile notes=./notes-lora@llama -o my-zoo      add a LoRA adapter of a model in the zoo
  zoo-compile -o my-zoo --remove support              drop a model and what only it used
"""


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 when done, 2 for a user's mistake (the zoo is unchanged), 1 for other failures."""
    arguments = _parser().parse_args(argv)
    only_tensorrt = {"--target": arguments.target, "--workspace": arguments.workspace}
    only_tensorrt["--bake-weights"] = arguments.bake_weights or None
    for name, value in only_tensorrt.items():
        if value is not None and arguments.backend != "tensorrt":
            _parser().error(f"{name} is a setting of --backend tensorrt")
    if arguments.max_kl is not None and arguments.weights is None and arguments.share != "delta":
        _parser().error("--max-kl is a bound of --weights and of --share delta")
    judged = arguments.weights or arguments.surrogate or arguments.share in ("equivalent", "delta")
    if arguments.probe is not None and not judged:
        _parser().error("--probe is text for --weights, --surrogate and --share equivalent or delta")
    if arguments.min_top1 is not None and arguments.weights != "auto":
        _parser().error("--min-top1 is a bound of --weights auto")
    if arguments.group_size is not None and arguments.weights not in ("int8", "int4"):
        _parser().error("--group-size is a setting of --weights int8 and int4")
    if not arguments.models and not arguments.remove and arguments.backend != "tensorrt":
        _parser().error("give at least one [NAME=]PATH to compile, or --remove NAME")
    from blockzoo.build.progress import ProgressPrinter
    from blockzoo.engines.base import EngineError
    from blockzoo.zoo.errors import ZooError

    progress = ProgressPrinter()
    try:
        report = _compile(arguments, progress)
    except ZooError as error:
        progress.close()
        print(f"zoo-compile: error: {error}", file=sys.stderr)
        return 2
    except (EngineError, OSError) as error:
        progress.close()
        print(f"zoo-compile: failed, the zoo is unchanged: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        progress.close()
        print("zoo-compile: interrupted, the zoo is unchanged; the next run continues", file=sys.stderr)
        return 130
    progress.close()
    if arguments.json:
        from blockzoo.zoo.strict_json import encode

        print(json.dumps(encode(report), indent=1))
    else:
        _print_report(report)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zoo-compile",
        description="Cut models into blocks, store each distinct block once, verify, and write the zoo.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "models",
        nargs="*",
        metavar="[NAME=]PATH[@BASE]",
        help="an HF checkpoint folder, a GGUF file, or a PEFT LoRA folder whose base is given too, is in the "
        "zoo, or is named by @BASE; NAME is that of the folder or file unless given",
    )
    parser.add_argument("-o", "--output", required=True, metavar="ZOO", help="the zoo to make or to extend")
    parser.add_argument(
        "--remove", action="append", default=[], metavar="NAME", help="drop a model (repeatable)"
    )
    parser.add_argument(
        "--replace", action="store_true", help="let a model of the same NAME take the old one's place"
    )
    parser.add_argument(
        "--dtype",
        choices=("bf16", "f16", "f32"),
        help="convert the weights; without it they are kept exactly",
    )
    parser.add_argument(
        "--share",
        choices=("exact", "adapter", "equivalent", "delta"),
        default="adapter",
        help="what full checkpoints share: equal blocks only; or also (the default) blocks into which a LoRA "
        "was merged, taken apart into the other block and an adapter, and verified; or besides blocks that "
        "can be replaced by those of models before them with little effect (lossy: see --threshold); or "
        "blocks near those of models before them, stored as differences of low rank (lossy: see --max-kl)",
    )
    parser.add_argument(
        "--threshold",
        type=_share,
        default=0.98,
        metavar="X",
        help="for --share equivalent: least mean cosine of the vocabulary probabilities with and without "
        "replaced blocks (default 0.98); what loses no more than bf16 alone does passes too",
    )
    parser.add_argument(
        "--weights",
        choices=("int8", "int4", "auto"),
        help="store the weights in 8 bits; in 4 (embedding and head in 8); or in what each block needs for "
        "the model to stay within --max-kl or --min-top1 (default: as given)",
    )
    parser.add_argument(
        "--group-size",
        type=_group_size,
        metavar="32|64|128|row",
        help="for --weights int8 and int4: columns that share a scale, where they divide a matrix, or all of "
        "a row (in 4 bits 128): more are faster on CPUs with VNNI, and lose more (default: int8 as many as "
        "the model bears, int4 32)",
    )
    parser.add_argument(
        "--max-kl",
        type=_positive_number,
        metavar="X",
        help="for --weights and --share delta: largest mean divergence (KL, in nats) from the weights as "
        "given, over the probe text; a model beyond it is refused, or keeps blocks of its own (default 0.02; "
        "int4: 0.5; delta: 1 %% of how far the base is)",
    )
    parser.add_argument(
        "--min-top1",
        type=_share,
        metavar="X",
        help="for --weights auto: least share of positions of the probe text with the same likeliest token "
        "as with the weights as given (default 0.95, or any with --max-kl)",
    )
    parser.add_argument(
        "--surrogate",
        metavar="auto|layers|int4|MODEL",
        help="look for what guesses cheaply what a model says next (zoo-serve --speculate auto): its own "
        "blocks without some; its blocks in 4 bits; another, smaller model of the zoo with the same "
        "tokenizer; or what of all gives most; kept where it is hoped to pay",
    )
    parser.add_argument(
        "--probe",
        metavar="FILE",
        help="for --share equivalent and delta, --weights and --surrogate: text like that models are used "
        "for",
    )
    parser.add_argument("--no-profile", action="store_true", help="do not time the blocks")
    parser.add_argument(
        "--no-verify",
        action="store_true",
        help="do not check the models end to end, nor how near those in int8 or int4 are (--max-kl), nor "
        "measure what KV in 8 bits loses",
    )
    parser.add_argument("--threads", type=_positive, metavar="N", help="threads of the engines")
    parser.add_argument(
        "--backend",
        choices=("openvino", "tensorrt"),
        default="openvino",
        help="tensorrt: build plans for NVIDIA GPUs too, for all models of the zoo (no PATH is needed then)",
    )
    parser.add_argument(
        "--target",
        action="append",
        metavar="SM",
        help="tensorrt: the GPU to build for, by compute capability: sm89, sm120, ... (needs no GPU), or "
        "native, the GPU of this machine; repeatable (default: native)",
    )
    parser.add_argument(
        "--workspace",
        type=_size,
        metavar="SIZE",
        help="tensorrt: bound on a plan's scratch memory (256M, 1G)",
    )
    parser.add_argument(
        "--bake-weights",
        action="store_true",
        help="tensorrt: weights as constants of the plans, one plan per block instead of one per shape "
        "(blocks with adapters keep theirs as inputs)",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be shared; write nothing")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('blockzoo')}")
    return parser


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and up to 1")
    return value


def _positive_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _group_size(text: str) -> int:
    from blockzoo.zoo.packing import GROUPS, WHOLE_ROW  # numpy

    sizes = {str(group): group for group in sorted(GROUPS)} | {"row": WHOLE_ROW}
    if text not in sizes:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(sizes)}")
    return sizes[text]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _size(text: str) -> int:
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1)
    if not number.isdecimal() or int(number) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; expected bytes, or 512K, 256M, 2G")
    return int(number) * unit


def _compile(arguments: argparse.Namespace, progress: "Progress") -> "CompileReport":
    from blockzoo.build.pipeline import CompileOptions, compile_models
    from blockzoo.build.sources import parse_models

    tensorrt = None
    if arguments.backend == "tensorrt":
        from blockzoo.build.tensorrt_plans import TensorRTOptions

        tensorrt = TensorRTOptions(
            targets=tuple(arguments.target or ["native"]),
            workspace_bytes=arguments.workspace,
            bake_weights=arguments.bake_weights,
        )
    options = CompileOptions(
        dtype=arguments.dtype,
        replace=arguments.replace,
        profile=not arguments.no_profile,
        verify=not arguments.no_verify,
        judge_kv=not arguments.no_verify,
        threads=arguments.threads,
        tensorrt=tensorrt,
        dry_run=arguments.dry_run,
        share=arguments.share,
        threshold=arguments.threshold,
        probe=arguments.probe,
        weights=arguments.weights,
        max_kl=arguments.max_kl,
        min_top1=arguments.min_top1,
        group_size=arguments.group_size,
        surrogate=arguments.surrogate,
    )
    models = parse_models(arguments.models)
    return compile_models(models, arguments.output, options, remove=arguments.remove, progress=progress)


def _print_report(report: "CompileReport") -> None:
    from blockzoo.zoo.summary import human_bytes, saved_text, verification_text

    width = max((len(model.name) for model in report.models), default=0)
    for model in report.models:
        adapter = f" (adapter of {model.base}, rank {model.rank})" if model.base else ""
        share = f"reused {model.num_reused} of {model.num_blocks} blocks"
        if model.num_recovered:
            share += f", {model.num_recovered} of them by taking out a merged LoRA of rank {model.rank}"
        print(
            f"{model.name:{width}}  {model.status}{adapter}: {share}, "
            f"{human_bytes(model.new_bytes)} new of {human_bytes(model.model_bytes)}"
        )
        for note in model.notes:
            print(f"{'':{width}}  {note}")
        if model.verification is not None:
            print(f"{'':{width}}  {verification_text(model.verification)}")
    for name in report.removed:
        print(f"{name}  removed, {human_bytes(report.freed_bytes)} freed")
    models = "model" if report.zoo_models == 1 else "models"
    would = "would hold" if report.dry_run else "holds"
    print(
        f"the zoo {would} {report.zoo_models} {models} in {report.zoo_blocks} distinct blocks: "
        f"{human_bytes(report.stored_bytes)} instead of {human_bytes(report.unshared_bytes)} "
        f"({saved_text(report.stored_bytes, report.unshared_bytes)})"
    )
    if report.plans is not None:
        would = "to build" if report.dry_run else "built"
        print(
            f"TensorRT plans: {report.plans.built} {would}, {report.plans.reused} reused"
            + ("" if report.dry_run else f"; {human_bytes(report.plans.num_bytes)}")
            + (f" ({packed} quantized blocks have none)" if (packed := report.plans.num_packed) else "")
        )
    if report.dry_run:
        print("dry run: nothing was written")


if __name__ == "__main__":
    sys.exit(main())
