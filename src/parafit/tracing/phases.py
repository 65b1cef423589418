"""Which pass each operation of a graph belongs to, what owns it, and where what the step returns lives. Plain Python."""

from parafit.tracing.graph import Graph
from parafit.tracing.values import Record, Value


def attribute(graph: Graph) -> None:
    """Drop what leads to no result; fill in phases, owners, gradients, and the places of what the step returns."""
    _drop_unread(graph)
    _set_phases(graph)
    _set_owners(graph)
    _update_in_place(graph)


def _drop_unread(graph: Graph) -> None:
    """Leave out what leads to no result, as compilers do."""
    used: set[int] = set()
    kept: list[Record] = []
    for record in reversed(graph.records):
        if not record.outputs or any(value.root().leaves or id(value.root()) in used for value in record.outputs):
            used.update(id(value.root()) for value in record.inputs)
            kept.append(record)
    graph.records = kept[::-1]
    alive = {id(record) for record in kept}
    for value in (value for record in kept for value in record.inputs):
        root = value.root()
        root.readers = [reader for reader in root.readers if id(reader) in alive]


def _set_phases(graph: Graph) -> None:
    """What has no phase of its own is the update if it follows from a gradient, leads to nothing else, or shares the scope of what does."""
    after, scopes = set(), set()
    for record in graph.records:
        if record.phase == "backward" or (not record.phase and any(id(value.root()) in after for value in record.inputs)):
            after.update(id(value.root()) for value in record.outputs)
            if not record.phase:
                record.phase = "update"
                scopes.add(record.scope)
    for record in graph.records:
        updates = (record.scope and record.scope in scopes) or any(value.root().role == "slot" for value in record.inputs)
        record.phase = record.phase or ("update" if updates else "")
    for record in reversed(graph.records):
        readers = [reader for value in record.outputs for reader in value.root().readers]
        only_updates = bool(readers) and all(reader.phase == "update" for reader in readers)
        record.phase = record.phase or ("update" if only_updates else "forward")


def _set_owners(graph: Graph) -> None:
    """An operation of the update belongs to the parameter's layer whose new value it leads to, if to one alone."""
    owners: dict[int, Value | None] = {}
    held = {value.name: value for value in graph.arguments}
    for leaf, value in graph.results:
        if leaf.role == "parameter":
            owners[id(value.root())] = held[leaf.name]
    for record in reversed(graph.records):
        found = {id(owners[root]): owners[root] for value in record.outputs if (root := id(value.root())) in owners}
        if record.phase != "update" or not found:
            continue
        owner = next(iter(found.values())) if len(found) == 1 else None
        if owner is not None:
            record.layer = owner.layer or owner.name
        for root in (value.root() for value in record.inputs):
            owners[id(root)] = owner if owners.get(id(root), owner) is owner else None
            if owner is not None and root.role == "slot" and not root.layer:
                root.layer = record.layer
    for leaf, value in graph.results:
        _own_gradient(held.get(leaf.name) if leaf.role == "parameter" else None, value)
    for record in graph.records:
        if record.phase == "update":
            for value in record.inputs:
                _own_gradient(owners.get(id(value.root())), value)


def _own_gradient(owner: Value | None, value: Value) -> None:
    root = value.root()
    if owner is None or root.producer is None or root.producer.phase != "backward" or root.name or owner.shape != value.shape:
        return
    root.role, root.name, root.seen = "gradient", f"{owner.name}/gradient", value


def _update_in_place(graph: Graph) -> None:
    """New weights and slots are written where the old ones were."""
    held = {value.name: value for value in graph.arguments}
    for leaf, value in graph.results:
        root, old = value.root(), held.get(leaf.name)
        if (
            old is not None
            and root.producer is not None
            and root.producer.phase == "update"
            and root.shape == old.shape
            and root is not old
        ):
            root.source, old.leaves = old, True
