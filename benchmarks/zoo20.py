"""Twenty fine-tunes of every kind in one zoo, against twenty of everything.

    python -m benchmarks.zoo20 [--repeats N] [--parts decode ...]

The models (benchmarks/finetunes.py) are trained on first use, and kept: five LoRA folders, five merged LoRAs,
four with tuned last layers, three lightly tuned in all layers, two aliases, one that is unrelated. Figures:

    disk        the zoo against the folders as given, and against twenty full checkpoints
    compile     one zoo-compile of all against twenty, each with one model (a LoRA with its base)
    memory      a process that serves all against twenty times one that serves the base
    agreement   greedy tokens in f32 with transformers and PEFT, by model
    decode      tokens/s of all twenty at once against twenty requests of one tenant, and against GenAI

Some of the parts alone are printed and not kept; without `compile` they use the zoos that are there.
The lightly tuned models share by `--share equivalent --threshold 0.98`; the figures without are given too.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from benchmarks.common import (
    Samples,
    arguments,
    genai_missing,
    interleave,
    machine_facts,
    print_table,
    save_report,
    timed,
)
from benchmarks.finetune_zoos import THRESHOLD, Zoos
from benchmarks.finetunes import BASE, MODELS, FineTunes
from benchmarks.memory import memory_of
from benchmarks.sides import EngineSide, Settings, decode_turn
from blockzoo.engines.openvino import OpenVINOEngines
from blockzoo.runtime import LLM, SamplingParams
from blockzoo.zoo.demo import tasks
from blockzoo.zoo.store import Zoo

STEPS = 8
LORA_TENANT = "lora-all-16"  # the LoRA tenant that is measured alone
PARTS = ("compile", "disk", "memory", "agreement", "decode", "genai")
_RATES = ("rate to base alone", "rate to a LoRA alone")
_ANSWERS, _TOKENS = 6, 32  # by model, for the agreement


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], shape="demo", repeats=8)
    parser.add_argument("--context", type=int, default=512, help="tokens before decode steps (512)")
    parser.add_argument("--steps-scale", type=float, default=1.0, help="share of the usual training steps")
    parser.add_argument("--without-genai", action="store_true", help="leave its pipelines out")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="only these figures")
    parser.add_argument("--resident", nargs=2, metavar=("ZOO", "MODELS"), help="(a measured process)")
    args = parser.parse_args()
    count = len(MODELS)
    settings = Settings(
        precision=OpenVINOEngines(args.precision).precision,
        num_threads=args.threads,
        max_seqs=count,
        context=args.context,
        max_tokens=args.context,
        longest_prompt=args.context,
    )
    if args.resident:
        _serve(Path(args.resident[0]), args.resident[1].split(","), settings)
        return
    machine = machine_facts()
    models = _trained(args.workdir / "zoo20", args.steps_scale)
    zoos = Zoos(models)
    results: dict[str, Any] = {"precision": settings.precision, "threshold": THRESHOLD}
    if "genai" in args.parts and (missing := "left out" if args.without_genai else genai_missing()):
        print(f"without genai: {missing}")
        args.parts = [part for part in args.parts if part != "genai"]
    figures: dict[str, Callable[[], Any]] = {
        "compile": zoos.compile_all,
        "disk": zoos.disk,
        "memory": partial(_memory, zoos),
        "agreement": partial(_agreement, zoos),
        "decode": partial(_decode, zoos, settings, args.repeats),
        "genai": partial(_against_genai, zoos, settings, args.repeats),
    }
    results |= {part: measure() for part, measure in figures.items() if part in args.parts}
    _print(results)
    if {*PARTS} - {"genai"} <= {*args.parts}:
        print(save_report("zoo20", args, machine, results))


def _trained(folder: Path, steps_scale: float) -> FineTunes:
    """The folders, made by another process where any is missing: it imports torch."""
    models = FineTunes(folder)
    if not models.complete():
        command = [sys.executable, "-m", "benchmarks.finetunes", str(folder)]
        subprocess.run([*command, "--steps-scale", str(steps_scale)], check=True)
    return models


# ---- memory


def _memory(zoos: Zoos) -> dict[str, Any]:
    """PSS of a process that has served all, and of one that has served the base, whose pool is a 20th."""
    everyone = ",".join(zoos.models.names)
    all_of = {"zoo": zoos.all, "zoo_without_equivalence": zoos.distinct}
    facts = {label: _resident(zoo, everyone) for label, zoo in all_of.items()}
    facts["single"] = _resident(zoos.alone(BASE), BASE)
    count = len(zoos.models.names)
    for label in all_of:
        facts[f"{label}_to_{count}_single"] = facts[label] / (count * facts["single"])
    return facts


def _resident(zoo: Path, models: str) -> Any:
    command = [sys.executable, "-m", "benchmarks.zoo20", *sys.argv[1:], "--resident", str(zoo), models]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)["pss"]


def _serve(zoo: Path, models: Sequence[str], settings: Settings) -> None:
    """Serve every model once and print what is resident afterwards, scratch given back as when idle."""
    side = EngineSide(Zoo.open(zoo), models, replace(settings, max_seqs=len(models)))
    side.generate_each(16)
    side.release_memory()
    print(json.dumps(memory_of("self")))


# ---- agreement


def _agreement(zoos: Zoos) -> dict[str, Any]:
    """By model, the share of our greedy tokens in f32 that transformers and PEFT would have chosen."""
    models, prompts = zoos.models, _prompts(zoos.models)
    greedy = SamplingParams(max_tokens=_TOKENS, temperature=0.0, ignore_eos=True)
    llm = LLM(zoos.all, precision="f32", kv_cache_bytes=64 << 20)
    jobs = {}
    for name in models.names:
        answers = llm.generate(name, prompts, greedy, progress=False)
        lora = MODELS[name].kind == "lora"
        jobs[name] = {
            "folder": str(models.folder(name)),
            "base": str(models.folder(BASE)) if lora else None,
            "answers": [(list(answer.prompt), list(answer.token_ids)) for answer in answers],
        }
    path = zoos.path / "answers.json"
    path.write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "benchmarks.peers.hf", str(path)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: found[name] | {"kind": MODELS[name].kind} for name in models.names}


def _prompts(models: FineTunes) -> list[list[int]]:
    """The beginnings of some samples of the demo's tasks."""
    tokenizer = Tokenizer.from_file(str(models.folder(BASE) / "tokenizer.json"))
    texts = (tokenizer.encode(text).ids for text in tasks.sample_texts(random.Random(0), _ANSWERS))
    return [ids[: max(4, len(ids) // 2)] for ids in texts]


# ---- decode


def _decode(zoos: Zoos, settings: Settings, rounds: int) -> dict[str, Any]:
    """All tenants at once, against as many requests of one tenant in a zoo of its own."""
    names = zoos.models.names
    adapted = {*zoos.models.of_kind("lora", "merged")}
    own = {*zoos.models.of_kind("layers", "light", "unrelated"), "last-2-values-again"}
    sides = {
        "all": EngineSide(Zoo.open(zoos.all), names, settings),
        "all, without equivalence": EngineSide(Zoo.open(zoos.distinct), names, settings),
        "base alone": EngineSide(Zoo.open(zoos.alone(BASE)), [BASE], settings),
        "a LoRA alone": EngineSide(Zoo.open(zoos.alone(LORA_TENANT)), [LORA_TENANT], settings),
        "five LoRAs": EngineSide(Zoo.open(zoos.all), zoos.models.of_kind("lora"), settings),
        "LoRAs, given and merged": EngineSide(
            Zoo.open(zoos.all), zoos.models.of_kind("lora", "merged"), settings
        ),
        # what the kinds cost: the base in their place
        "all but adapters": EngineSide(Zoo.open(zoos.all), _replaced(names, adapted), settings),
        "all but own layers": EngineSide(Zoo.open(zoos.all), _replaced(names, own), settings),
    }
    turns = {name: partial(decode_turn, side, len(names), STEPS) for name, side in sides.items()}
    samples = interleave(turns, rounds)
    for side in sides.values():
        side.close()
    return {
        name: _rates(taken, len(names))
        | {key: samples[key.removeprefix("rate to ")].ratio_to(taken) for key in _RATES}
        for name, taken in samples.items()
    }


def _replaced(names: Sequence[str], by_base: set[str]) -> list[str]:
    return [BASE if name in by_base else name for name in names]


def _rates(taken: Samples, count: int) -> dict[str, Any]:
    return {"tokens_per_s": round(count / taken.median, 1), **taken.summary()}


def _against_genai(zoos: Zoos, settings: Settings, rounds: int) -> dict[str, Any]:
    """All at once, against GenAI: one pipeline for the base and its LoRA folders, which switches between
    adapters from request to request, and a pipeline for each other model; all in turn."""
    from benchmarks.peers.genai import GenAISide, write_once

    models = zoos.models
    loras = models.of_kind("lora")
    files = [models.folder(name) / "adapter_model.safetensors" for name in loras]
    others = [name for name in models.names if name not in (BASE, *loras)]
    folders = {
        name: write_once(models.folder(name), models.path / "genai" / name) for name in (BASE, *others)
    }
    base = GenAISide(folders[BASE], replace(settings, max_seqs=len(loras) + 1), files)
    single = replace(settings, max_seqs=1)
    pipelines = [GenAISide(folders[name], single) for name in others]
    side = EngineSide(Zoo.open(zoos.all), models.names, settings)

    def in_turn() -> None:
        base.decode(2 * STEPS)
        for i in range(len(loras)):
            base.decode(2 * STEPS, prompt=i + 1, adapter=i)
        for pipeline in pipelines:
            pipeline.decode(2 * STEPS)

    count = len(models.names)
    samples = interleave(
        {
            "blockzoo": partial(decode_turn, side, count, STEPS),
            "genai": lambda: [seconds / (2 * STEPS) for seconds in timed(in_turn, 1)],
        },
        rounds,
    )
    return {
        **{name: _rates(taken, count) for name, taken in samples.items()},
        "rate to genai": samples["genai"].ratio_to(samples["blockzoo"]),
        "pipelines": 1 + len(pipelines),
        "adapters_in_one_batch": _mixes_adapters(folders[BASE], files[-2:], settings, _prompts(models)),
    }


def _mixes_adapters(
    folder: Path, files: Sequence[Path], settings: Settings, prompts: Sequence[Sequence[int]]
) -> str:
    """What becomes of two requests with an adapter each in one GenAI batch, by prompts to which the two
    adapters answer otherwise; a new pipeline for each batch, as its prefix cache does not tell them apart."""
    from benchmarks.peers.genai import GenAISide

    def batch(asked: Sequence[Sequence[int]], adapters: Sequence[int]) -> list[list[int]]:
        side = GenAISide(folder, replace(settings, max_seqs=len(asked)), files)
        return side.decode_batch(_TOKENS, asked, adapters)

    answers = [batch(prompts, len(prompts) * [adapter]) for adapter in (0, 1)]
    telling = [at for at, (first, last) in enumerate(zip(*answers, strict=True)) if first != last][:2]
    if len(telling) < 2:
        raise RuntimeError("two adapters give the same tokens: GenAI does not apply them")
    first, last = ([alone[at] for at in telling] for alone in answers)
    try:
        mixed = batch([prompts[at] for at in telling], (0, 1))
    except RuntimeError as error:
        return f"refused: {error}"
    if mixed == [first[0], last[1]]:
        return "each request gets its own"
    both = {"first": first, "last": last}
    return next((f"all get the {name} one's" for name, alone in both.items() if mixed == alone), "neither")


def _print(results: dict[str, Any]) -> None:
    if {"disk", "memory"} <= results.keys():
        _print_bytes(results["disk"], results["memory"])
    if "compile" in results:
        compiled = results["compile"]
        seconds = compiled["one_zoo_s"], compiled["separate_s"], compiled["one_zoo_to_separate"]
        print_table("zoo-compile, s", ("", "one zoo", "separate", "ratio"), [("all", *map(float, seconds))])
    if "agreement" in results:
        agreed = [(name, found["kind"], found["agreement"]) for name, found in results["agreement"].items()]
        print_table("greedy tokens of transformers and PEFT in f32", ("", "kind", "agreement"), agreed)
    if "decode" in results:
        decode = [
            (name, case["tokens_per_s"], case["median_ms"], *(case[key]["ratio"] for key in _RATES))
            for name, case in results["decode"].items()
        ]
        columns = ("", "tokens/s", "median ms", *_RATES)
        print_table(f"decode, {len(MODELS)} requests", columns, decode)
    if "genai" in results:
        genai = results["genai"]
        print(f"GenAI, {genai['pipelines']} pipelines in turn: {genai['genai']['tokens_per_s']} tokens/s;")
        print(f"blockzoo beside it: {genai['blockzoo']['tokens_per_s']} tokens/s")
        print(f"GenAI on two adapters in one batch: {genai['adapters_in_one_batch']}")


def _print_bytes(disk: dict[str, Any], memory: dict[str, Any]) -> None:
    mib, count = 2**20, len(MODELS)
    rows: list[tuple[object, ...]] = []
    for label in ("zoo", "zoo_without_equivalence"):
        full = disk[f"{label}_to_full_checkpoints"]
        rows.append((f"disk, {label}", disk[label] / mib, disk["full_checkpoints"] / mib, full))
        single = count * memory["single"] / mib
        rows.append((f"resident, {label}", memory[label] / mib, single, memory[f"{label}_to_{count}_single"]))
    print_table(f"{count} models: MiB", ("", "one zoo", "separate", "ratio"), rows)


if __name__ == "__main__":
    main()
