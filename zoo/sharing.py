"""Who shares which block: the map of models x layers that `zoo-inspect` prints and draws."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from blockzoo.zoo.manifest import Manifest
from blockzoo.zoo.summary import model_bytes

KINDS = ("embed", "attn", "ffn", "head")


@dataclass(frozen=True, slots=True)
class SharingMap:
    """Models x chain positions; a position is (kind, layer), embed and head having layer 0."""

    models: tuple[str, ...]
    """In the order in which they are best read: models that share much stand together."""
    columns: tuple[tuple[str, int], ...]
    """Every position of the longest chain, head last."""
    cells: dict[tuple[str, str, int], str]
    """(model, kind, layer) -> block id."""
    users: dict[str, tuple[str, ...]]
    """Block id -> the models that use it, in the order of `models`."""
    own_bytes: dict[str, int]
    """Model -> bytes of the blocks and adapters that only it uses."""
    all_bytes: dict[str, int]
    """Model -> bytes of its chain and adapters."""


def sharing_map(manifest: Manifest) -> SharingMap:
    """The sharing map of a zoo."""
    models = _ordered(manifest)
    cells: dict[tuple[str, str, int], str] = {}
    users: dict[str, list[str]] = defaultdict(list)
    for name in models:
        for index, block_id in enumerate(manifest.models[name].chain):
            kind = manifest.blocks[block_id].spec.kind
            layer = (index - 1) // 2 if kind in ("attn", "ffn") else 0
            cells[name, kind, layer] = block_id
            if name not in users[block_id]:
                users[block_id].append(name)
    layers = max((model.config.num_layers for model in manifest.models.values()), default=0)
    middle = [(kind, layer) for layer in range(layers) for kind in ("attn", "ffn")]
    own = dict.fromkeys(models, 0)
    for block_id, names in users.items():
        if len(names) == 1:
            own[names[0]] += manifest.blocks[block_id].num_bytes
    holders: dict[str, set[str]] = defaultdict(set)
    for name in models:
        for adapter_id in manifest.models[name].adapters.values():
            holders[adapter_id].add(name)
    for adapter_id, names_of in holders.items():
        if len(names_of) == 1:
            own[next(iter(names_of))] += manifest.adapters[adapter_id].num_bytes
    return SharingMap(
        models=models,
        columns=(("embed", 0), *middle, ("head", 0)),
        cells=cells,
        users={block_id: tuple(names) for block_id, names in users.items()},
        own_bytes=own,
        all_bytes={name: model_bytes(manifest, manifest.models[name]) for name in models},
    )


def _ordered(manifest: Manifest) -> tuple[str, ...]:
    """Start with the model that shares most, and let the one follow that shares most with the last."""
    names = sorted(manifest.models)
    chains = [set(manifest.models[name].chain) for name in names]
    users: dict[str, list[int]] = defaultdict(list)
    for number, chain in enumerate(chains):
        for block_id in chain:
            users[block_id].append(number)
    rows = {block_id: np.array(numbers) for block_id, numbers in users.items()}

    def shared_with(number: int) -> np.ndarray:
        """Bytes that each model shares with one: [models] int64."""
        found = np.zeros(len(names), np.int64)
        for block_id in chains[number]:
            found[rows[block_id]] += manifest.blocks[block_id].num_bytes
        return found

    def shared_with_others(number: int) -> int:
        return sum(
            manifest.blocks[block_id].num_bytes * (len(users[block_id]) - 1) for block_id in chains[number]
        )

    order: list[int] = []
    first = np.zeros(len(names), np.int64)
    while len(order) < len(names):
        if order:
            wanted = first + shared_with(order[-1])
            wanted[order] = -1
            order.append(int(wanted.argmax()))
        else:
            order.append(max(range(len(names)), key=shared_with_others))
            first = shared_with(order[0])
    return tuple(names[number] for number in order)


def letters(shared: SharingMap) -> dict[tuple[str, str, int], str]:
    """A letter per cell: equal letters in a column are one block; '.' is a block that no other model uses."""
    labels: dict[tuple[str, str, int], str] = {}
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    for kind, layer in shared.columns:
        seen: dict[str, str] = {}
        for name in shared.models:
            block_id = shared.cells.get((name, kind, layer))
            if block_id is None:
                continue
            if len(shared.users[block_id]) == 1:
                labels[name, kind, layer] = "."
                continue
            if block_id not in seen:
                seen[block_id] = alphabet[len(seen)] if len(seen) < len(alphabet) else "#"
            labels[name, kind, layer] = seen[block_id]
    return labels


def layer_runs(shared: SharingMap, labels: dict[tuple[str, str, int], str]) -> list[tuple[int, int]]:
    """Consecutive layers in which the map looks the same, as (first, last): one printed column each."""
    layers = 1 + max((layer for kind, layer in shared.columns if kind == "attn"), default=-1)

    def look(layer: int) -> list[str]:
        return [labels.get((name, kind, layer), " ") for name in shared.models for kind in ("attn", "ffn")]

    runs: list[tuple[int, int]] = []
    for layer in range(layers):
        if runs and look(layer) == look(runs[-1][0]):
            runs[-1] = (runs[-1][0], layer)
        else:
            runs.append((layer, layer))
    return runs
