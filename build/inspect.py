"""`zoo-inspect`: which models share which blocks, what that saves, and whether the zoo is sound."""

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockzoo.zoo.console import command

if TYPE_CHECKING:
    from blockzoo.build.progress import ProgressPrinter
    from blockzoo.zoo.sharing import SharingMap
    from blockzoo.zoo.store import Zoo


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 when all is well, 1 when --check found something, 2 for a user's mistake."""
    arguments = _parser().parse_args(argv)
    from blockzoo.build.progress import ProgressPrinter
    from blockzoo.engines.base import EngineError
    from blockzoo.zoo.errors import ZooError
    from blockzoo.zoo.placement import PlacementError
    from blockzoo.zoo.store import Zoo

    progress = ProgressPrinter()
    found: dict[str, Any] = {}
    try:
        zoo = Zoo.open(arguments.zoo)
        problems = check(zoo, progress) if arguments.check else None
        if arguments.placement:
            found["placement"], page = _placement(zoo, arguments.placement)
        elif arguments.html:
            from blockzoo.zoo.sharing_page import sharing_page

            page = sharing_page(zoo.manifest, zoo.path.resolve().name)
        if arguments.html:
            Path(arguments.html).write_text(page, "utf-8")
    except (ZooError, EngineError, PlacementError, OSError) as error:
        print(f"zoo-inspect: error: {error}", file=sys.stderr)
        return 2
    finally:
        progress.close()
    if arguments.json:
        found |= {} if problems is None else {"problems": problems}
        print(json.dumps(summary(zoo) | found, indent=1))
    else:
        _print_placement(found["placement"]) if found else _print_zoo(zoo)
        if arguments.html:
            print(f"\nwrote {arguments.html}")
        if problems is not None:
            print("\nchecked: every checksum right, every engine compiles" if not problems else "\nproblems:")
            for problem in problems:
                print(f"  {problem}")
    return 1 if problems else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zoo-inspect", description="Show which models of a zoo share which blocks, and check the zoo."
    )
    parser.add_argument("zoo", metavar="ZOO", help="a zoo written by zoo-compile")
    parser.add_argument("--json", action="store_true", help="print as JSON")
    parser.add_argument("--check", action="store_true", help="verify every checksum and compile every block")
    parser.add_argument("--html", metavar="FILE", help="draw what is shown as one self-contained page")
    parser.add_argument(
        "--placement",
        metavar="WORKERS",
        help="show which of several workers would hold what: 3x8GiB, or a JSON file (docs/cluster.md)",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('blockzoo')}")
    return parser


def check(zoo: "Zoo", progress: "ProgressPrinter") -> list[str]:
    """Every problem of a zoo's files: checksums of blocks and tokenizers, and engines that do not compile."""
    from blockzoo.engines.openvino import OpenVINOEngines
    from blockzoo.zoo.errors import StoreError

    engines = OpenVINOEngines()
    problems: list[str] = []
    for done, (block_id, record) in enumerate(zoo.manifest.blocks.items()):
        progress("checking blocks", done, len(zoo.manifest.blocks))
        try:
            block = zoo.read_block(block_id)
            if record.spec.kind != "embed":  # an embedding is looked up, not compiled
                engines.span([block])
            block.drop_pages()
        except (StoreError, RuntimeError) as error:
            problems.append(str(error))
    for adapter_id in zoo.manifest.adapters:
        try:
            zoo.read_adapter(adapter_id)
        except StoreError as error:
            problems.append(str(error))
    for name in zoo.manifest.models:
        try:
            zoo.tokenizer_dir(name)
        except StoreError as error:
            problems.append(f"{name}: {error}")
    progress("checking blocks", 1, 1)
    return problems


def _placement(zoo: "Zoo", workers: str) -> tuple[dict[str, Any], str]:
    """Where the zoo's spans would be, as data and as a page."""
    from blockzoo.zoo.cluster import read_cluster, zoo_task
    from blockzoo.zoo.errors import ManifestError
    from blockzoo.zoo.placement import place
    from blockzoo.zoo.placement_page import placement_data, placement_page

    if not zoo.manifest.models:
        raise ManifestError(f"{zoo.path}: an empty zoo has nothing to place")
    placed = zoo_task(zoo.manifest, read_cluster(workers))
    plan = place(placed.task)
    title = zoo.path.resolve().name
    return placement_data(zoo.manifest, placed, plan), placement_page(zoo.manifest, placed, plan, title)


def _print_placement(found: dict[str, Any]) -> None:
    for line in found["said"]:
        print(line)
    width = max(6, *(len(worker["name"]) for worker in found["workers"]))
    print(f"\n{'worker':{width}}  memory                  busy  spans")
    for worker in found["workers"]:
        spans = " ".join(worker["spans"]) or "-"
        print(f"{worker['name']:{width}}  {worker['said']:22}  {worker['busy']:4.0%}  {spans}")
    print("\nspan  size      us a call  a token  models  workers")
    for name, span in found["spans"].items():
        times = f"{span['call_us']:9.0f}  {span['token_us']:7.1f}"
        homes = ", ".join(span["workers"]) or "-"
        print(f"{name:4}  {span['size']:8}  {times}  {len(span['models']):6}  {homes}: {span['what']}")
    width = max(5, *(len(name) for name in found["models"]))
    print(f"\n{'model':{width}}  tokens/s  way")
    for name, model in found["models"].items():
        way = " > ".join(f"{span}@{worker}" for span, worker in model["route"])
        print(f"{name:{width}}  {model['tokens_per_s']:8.4g}  {way}")


def summary(zoo: "Zoo") -> dict[str, Any]:
    """What `--json` prints."""
    from blockzoo.zoo.sharing import sharing_map
    from blockzoo.zoo.strict_json import encode
    from blockzoo.zoo.summary import sharing_bytes

    shared = sharing_map(zoo.manifest)
    unshared, stored = sharing_bytes(zoo.manifest)
    models = {
        name: {
            "architecture": record.config.architecture,
            "num_layers": record.config.num_layers,
            "chain": list(record.chain),
            "adapters": encode(record.adapters),
            "recovery": encode(record.recovery),
            "equivalence": encode(record.equivalence),
            "delta": encode(record.delta),
            "quantization": encode(record.quantization),
            "reuse": encode(record.reuse),
            "surrogate": encode(record.surrogate),
            "chain_bytes": shared.all_bytes[name],
            "own_bytes": shared.own_bytes[name],
            "source": encode(record.source),
            "verification": encode(record.verification),
        }
        for name, record in zoo.manifest.models.items()
    }
    blocks = {
        block_id: {
            "kind": record.spec.kind,
            "dtype": record.dtype,
            "num_bytes": record.num_bytes,
            "quantized": encode(record.quantized),
            "users": list(shared.users.get(block_id, ())),
            "plan": record.plan,
            "latency_us": encode(record.latency_us),
        }
        for block_id, record in zoo.manifest.blocks.items()
    }
    return {
        "zoo": str(zoo.path),
        "unshared_bytes": unshared,
        "stored_bytes": stored,
        "models": models,
        "blocks": blocks,
        "adapters": encode(zoo.manifest.adapters),
        "plans": encode(zoo.manifest.plans),
        "tensorrt_plans": encode(zoo.manifest.tensorrt_plans),
    }


def _print_zoo(zoo: "Zoo") -> None:
    from rich.console import Console

    from blockzoo.zoo.sharing import sharing_map
    from blockzoo.zoo.summary import (
        adapters_text,
        delta_text,
        equivalence_text,
        human_bytes,
        quantization_texts,
        reuse_texts,
        saved_text,
        sharing_bytes,
        surrogate_text,
        verification_text,
    )

    console, manifest = Console(highlight=False, soft_wrap=True), zoo.manifest
    if not manifest.models:
        console.print(f"{zoo.path}: an empty zoo")
        return
    shared = sharing_map(manifest)
    _print_map(console, shared)
    unshared, stored = sharing_bytes(manifest)
    console.print(
        f"\n{len(manifest.models)} models, {len(manifest.blocks)} distinct blocks: {human_bytes(stored)} "
        f"stored instead of {human_bytes(unshared)} ({saved_text(stored, unshared)})"
    )
    console.print("\nkind   dtype  blocks  profiles (min opt max tokens)            time of one block")
    for plan_key, plan in sorted(manifest.plans.items(), key=lambda item: item[1].kind):
        blocks = [block for block in manifest.blocks.values() if block.plan == plan_key]
        ranges = ", ".join(f"{p.name} {p.min} {p.opt} {p.max}" for p in plan.profiles)
        times = blocks[0].latency_us or {}
        said = ", ".join(f"{count}: {time / 1000:.3g} ms" for count, time in sorted(times.items()))
        console.print(f"{plan.kind:6} {plan.dtype:6} {len(blocks):6}  {ranges:40} {said or 'not measured'}")
    if manifest.tensorrt_plans:
        _print_tensorrt_plans(console, zoo)
    console.print()
    width = max(map(len, shared.models))
    for name in shared.models:
        record = manifest.models[name].verification
        said = verification_text(record) if record else "not verified"
        if manifest.models[name].adapters:
            console.print(f"{name:{width}}  {adapters_text(manifest, name)}", markup=False)
        if manifest.models[name].equivalence is not None:
            console.print(f"{name:{width}}  {equivalence_text(manifest.models[name])}", markup=False)
        if manifest.models[name].delta is not None:
            console.print(f"{name:{width}}  {delta_text(manifest.models[name])}", markup=False)
        for line in quantization_texts(manifest, manifest.models[name]):
            console.print(f"{name:{width}}  {line}", markup=False)
        if manifest.models[name].surrogate is not None:
            console.print(f"{name:{width}}  {surrogate_text(manifest, manifest.models[name])}", markup=False)
        for line in reuse_texts(manifest.models[name]):
            console.print(f"{name:{width}}  {line}", markup=False)
        console.print(f"{name:{width}}  {said}", markup=False)


def _print_tensorrt_plans(console: Any, zoo: "Zoo") -> None:
    from blockzoo.build.tensorrt_plans import users_of_plans
    from blockzoo.zoo.summary import human_bytes

    plans, users = zoo.manifest.tensorrt_plans, users_of_plans(zoo.manifest)
    console.print("\nTensorRT   target  library                blocks  size     profiles: scratch")
    for key, plan in sorted(plans.items(), key=lambda item: (item[1].target, item[1].part, item[1].lora)):
        scratch = ", ".join(
            f"{p.name} {p.min} {p.opt} {p.max}: {human_bytes(plan.scratch_bytes[p.name])}"
            if p.name in plan.scratch_bytes
            else f"{p.name} {p.min} {p.opt} {p.max}"
            for p in plan.profiles
        )
        library = f"{plan.library} {plan.library_version}"
        size = human_bytes(plan.num_bytes)
        console.print(f"{plan.part:10} {plan.target:7} {library:22} {users[key]:6}  {size:8} {scratch}")
        if plan.lora:
            console.print(f"{'':10} takes adapters of {plan.max_lora_ranks} ranks on {', '.join(plan.lora)}")


def _print_map(console: Any, shared: "SharingMap") -> None:
    """Rows: models. Columns: runs of layers that look the same, a letter for attention and one for ffn."""
    from rich.text import Text

    from blockzoo.zoo.sharing import layer_runs, letters
    from blockzoo.zoo.summary import human_bytes

    labels = letters(shared)
    colours = ("cyan", "green", "yellow", "magenta", "blue", "red")
    runs = layer_runs(shared, labels)
    titles = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    width = max(5, *(len(name) for name in shared.models))
    console.print(
        f"{'model':{width}}  embed  " + " ".join(f"{title:>2}" for title in titles) + "  head    own of total"
    )
    for name in shared.models:
        row = Text(f"{name:{width}}  ")
        parts: list[tuple[tuple[str, ...], int, int, str]] = [(("embed",), 0, 5, "  ")]
        parts += [
            (("attn", "ffn"), first, max(2, len(title)), " ")
            for (first, _), title in zip(runs, titles, strict=True)
        ]
        parts.append((("head",), 0, 5, "  "))
        for kinds, layer, cell_width, gap in parts:
            cell = [labels.get((name, kind, layer), " ") for kind in kinds]
            row.append(" " * (cell_width - len(cell)))
            for letter in cell:
                style = "bold white" if letter == "." else colours[(ord(letter) - ord("A")) % len(colours)]
                row.append(letter, style)
            row.append(gap)
        own, total = human_bytes(shared.own_bytes[name]), human_bytes(shared.all_bytes[name])
        row.append(f"{own:>9} of {total}")
        console.print(row)
    console.print("equal letters in a column: one shared block (attention, ffn); '.': a block of its own")


if __name__ == "__main__":
    sys.exit(main())
