"""What a manifest says about its models, in bytes and in lines for people."""

from collections.abc import Collection
from dataclasses import replace
from math import prod

from blockzoo.zoo.blocks import tensor_shapes
from blockzoo.zoo.manifest import (
    LossRecord,
    Manifest,
    ModelRecord,
    QuantizationRecord,
    ReuseSettings,
    VerificationRecord,
)
from blockzoo.zoo.packing import GROUPS, WHOLE_ROW


def model_bytes(manifest: Manifest, model: ModelRecord) -> int:
    """Bytes of a model's chain and adapters when nothing of them is shared."""
    adapters = sum(manifest.adapters[adapter_id].num_bytes for adapter_id in model.adapters.values())
    return adapters + sum(manifest.blocks[block_id].num_bytes for block_id in model.chain)


def sharing_bytes(manifest: Manifest) -> tuple[int, int]:
    """(bytes of all models if each were a checkpoint of its own, bytes stored)."""
    # a merged checkpoint is as large as its base: adapters do not count
    unshared = sum(
        manifest.blocks[block_id].num_bytes for model in manifest.models.values() for block_id in model.chain
    )
    stored = sum(block.num_bytes for block in manifest.blocks.values())
    return unshared, stored + sum(adapter.num_bytes for adapter in manifest.adapters.values())


def saved_text(stored: int, unshared: int) -> str:
    """What sharing saves. It costs something where a model stands on blocks of one that has left."""
    share = 1 - stored / unshared if unshared else 0.0
    return f"{share:.0%} saved" if stored <= unshared else f"{-share:.0%} more"


def human_bytes(count: int) -> str:
    """A byte count for people: 1.5 MB is 1500000 bytes."""
    if count < 1000:
        return f"{count} B"
    value, units = float(count), iter("kMGTP")
    unit = ""
    while value >= 999.5:
        value, unit = value / 1000, next(units)
    return f"{value:.3g} {unit}B"


def loss_text(loss: LossRecord) -> str:
    """What a model loses as it is stored, beside what bf16 loses of the checkpoint."""
    found, bf16 = loss.stored, loss.bf16
    return (
        f"KL {found.kl:.1e} (bf16 alone {bf16.kl:.1e}), logit error {found.max_relative_error:.1e} "
        f"({bf16.max_relative_error:.1e}), same top token {found.top1:.1%} ({bf16.top1:.1%}), "
        f"{loss.clear_top1:.1%} without the {loss.ties:.0%} ties, over {loss.num_tokens} tokens"
    )


def verification_text(record: VerificationRecord) -> str:
    """One line of verification figures."""
    said = [
        f"{precision} greedy {figures.greedy_agreement:.1%}, logit error {figures.max_relative_error:.1e}"
        for precision, figures in sorted(record.figures.items(), key=lambda item: item[0] != "f32")
    ]
    if record.rounding_error is not None:
        said.append(f"rounding of weights {record.rounding_error:.1e}")
    if record.loss is not None:
        said.append(f"taken apart it loses {loss_text(record.loss)}")
    if record.kv is not None:
        said.append(f"with KV in 8 bits it loses {loss_text(record.kv)}")
    twin = f" (same chain as {record.same_as})" if record.same_as else ""
    return f"verified on {record.num_tokens} tokens{twin}: {'; '.join(said)}"


def quantization_texts(manifest: Manifest, model: ModelRecord) -> list[str]:
    """What a quantized model is stored in, and how near it is to what was given: a line of each."""
    found = model.quantization
    if found is None:
        return []
    sizes: dict[str, list[int]] = {}
    for key in model.chain:
        sizes.setdefault(manifest.blocks[key].dtype, []).append(manifest.blocks[key].num_bytes)
    blocks = ", ".join(
        f"{len(sizes[dtype])} blocks {dtype} ({human_bytes(sum(sizes[dtype]))})" for dtype in sorted(sizes)
    )
    shapes = [shape for key in model.chain for shape in tensor_shapes(manifest.blocks[key].spec).values()]
    bits = 8 * sum(map(sum, sizes.values())) / sum(map(prod, shapes))
    groups = f" {_in_groups(found, 'i4' in sizes)}" if "i8" in sizes else ""
    lines = [f"weights {found.weights}{groups}: {blocks}, {bits:.1f} bits a value"]
    if found.figures:
        lines[0] += (
            f"; over {found.num_tokens} tokens of {found.probe} text, perplexity {found.perplexity:.4g}"
        )
        lines += [
            f"  {name}: KL {figures.kl:.2e}, same top token {figures.top1:.1%}, greedy "
            f"{figures.greedy_agreement:.1%}, perplexity {figures.perplexity:.4g}"
            for name, figures in found.figures.items()
        ]
    return lines


def _in_groups(record: QuantizationRecord, has_four: bool) -> str:
    made = record.group if record.group_made is None else record.group_made
    said = {group: f"groups of {group}" if group else "one scale a row" for group in (record.group, made)}
    how = f"with {said[made]}" if made == WHOLE_ROW else f"in {said[made]}"
    if made == WHOLE_ROW and has_four:
        how += f", 4 bits in groups of {max(GROUPS)} at most"
    return how if made == record.group else f"{how} (which is what {said[record.group]} come to here)"


def surrogate_text(manifest: Manifest, model: ModelRecord) -> str:
    """One line about what guesses for a model, and what that gives."""
    found = model.surrogate
    assert found is not None
    rates = ", ".join(f"{rate:.0%}" for rate in found.acceptance)
    figures = (
        f"{found.cost:.2f} of a step; guesses come true in {rates} (1st to {len(found.acceptance)}th, "
        f"{found.num_guesses} places of {found.probe} text): about {found.speedup:.2f} times as fast alone"
    )
    if found.model is not None:
        return f"surrogate: model {found.model}, {figures}"
    size = sum(manifest.blocks[key].num_bytes for key in set(found.blocks.values()) - set(model.chain))
    own = "in 4 bits" if size else "of its own"
    missing = [at for at in range(len(model.chain)) if at not in found.blocks]
    said = f"{len(found.blocks)} blocks {own}" + (f", without those at {_ranges(missing)}" if missing else "")
    return f"surrogate: {said} ({human_bytes(size)} more), {figures}"


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers, runs of them as "3-7"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def equivalence_text(model: ModelRecord) -> str:
    """One line about the blocks of other models that stand for a model's own."""
    found = model.equivalence
    assert found is not None
    scores = f"KL {found.kl:.1e}, same top token {found.top1:.1%}, over {found.num_tokens} tokens"
    scores = scores if found.loss is None else loss_text(found.loss)
    return (
        f"{len(found.own_blocks)} blocks replaced by equivalent ones: cosine {found.cosine:.4f} (asked for "
        f"{found.threshold:g}), {scores} of {found.probe} text"
    )


def delta_text(model: ModelRecord) -> str:
    """One line about the blocks of a full fine-tune that are stored as differences to other models'."""
    found = model.delta
    assert found is not None
    differences = sum(at in model.adapters for at in found.own_blocks)
    text = f"{found.probe} text"
    if found.tuned_kl is not None:
        text += f", where tuning changed {found.tuned_kl:.1e}"
    return (
        f"{len(found.own_blocks)} blocks are another model's, {differences} of them with differences of rank "
        f"{found.rank}, {found.share:.1%} of their own bytes: {loss_text(found.loss)} of {text}"
    )


def adapters_text(manifest: Manifest, name: str) -> str:
    """One line about a model's adapters."""
    model = manifest.models[name]
    records = [manifest.adapters[adapter_id] for adapter_id in model.adapters.values()]
    rank, size = max(r.spec.rank for r in records), human_bytes(sum(r.num_bytes for r in records))
    said = f"adapters of rank {rank} on {len(records)} blocks, {size}"
    if model.recovery is not None:
        said += (
            f", {len(model.recovery.own_blocks)} of them recovered from merged weights "
            f"(left out: {model.recovery.rounding:.2f} times the rounding)"
        )
        if model.recovery.given_back:
            said += f", {len(model.recovery.given_back)} blocks given back: they lost too much"
    return said


def part_of(manifest: Manifest, names: Collection[str]) -> Manifest:
    """The manifest with some of its models, and the blocks and adapters that these use.

    A verification that was taken over from a model which is not among them does not name that.
    """
    models = {name: record for name, record in manifest.models.items() if name in names}
    for name, record in models.items():
        checked = record.verification
        if checked is not None and checked.same_as is not None and checked.same_as not in names:
            models[name] = replace(record, verification=replace(checked, same_as=None))
    blocks = {block_id for model in models.values() for block_id in model.block_ids}
    adapters = {adapter_id for model in models.values() for adapter_id in model.adapters.values()}
    return replace(
        manifest,
        models=models,
        blocks={block_id: record for block_id, record in manifest.blocks.items() if block_id in blocks},
        adapters={key: record for key, record in manifest.adapters.items() if key in adapters},
    )


def reuse_texts(model: ModelRecord) -> list[str]:
    """How a model reuses KV approximately, and what was tried, a line of each; none where nobody asked."""
    found = model.reuse
    if found is None:
        return []
    chosen = "exactly alone" if found.settings is None else reuse_settings_text(found.settings)
    lines = [
        f"approximate reuse of KV: {chosen}; asked {found.asked:.1%} of the agreement in bf16 "
        f"({found.bf16_agreement:.1%}) and {found.least_speedup:g} times the speed, over {found.num_tokens} "
        f"tokens of {found.num_prompts} prompts ({found.prompts})"
    ]
    lines += [
        f"  {reuse_settings_text(point.settings)}: same top token {point.agreement:.1%}, KL {point.kl:.1e}, "
        f"computes {point.computed:.0%}, first token {point.speedup:.1f} times as fast"
        for point in found.curve
    ]
    return lines


def reuse_settings_text(settings: ReuseSettings) -> str:
    """Settings in a few words."""
    guard = f", all where the first token leads by less than {settings.guard:.2g}" if settings.guard else ""
    if settings.recompute == 1:
        return f"behind edits alone: {settings.edit_recompute:.0%}, right behind each{guard}"
    if settings.selector == "head-of-run":
        return f"heads of runs, {settings.recompute:.0%}{guard}"
    beside = f", {settings.refresh} beside each token" if settings.refresh else ""
    return (
        f"{settings.unit}s that the question points at, {settings.recompute:.0%}, heads of {settings.head}, "
        f"{settings.edit} behind edits{beside}{guard}"
    )
