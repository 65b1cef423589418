"""Writes down a graph as a `Program`: phases, owners, names of tensors and dims, bytes moved, what couples the rows of a batch."""

from collections import defaultdict

from parafit.planner.program import Operation, Program, Tensor, with_dims_of
from parafit.tracing.blocks import share_dims
from parafit.tracing.fusion import Kernel, group
from parafit.tracing.graph import Graph, Record, Value


def attribute(graph: Graph) -> None:
    """Drop what leads to no result; fill in phases, owners, gradients, and the places of what the step returns."""
    _drop_unread(graph)
    _set_phases(graph)
    _set_owners(graph)
    _update_in_place(graph)


def describe(graph: Graph, name: str, like: Program | None = None) -> Program:
    """The program of a graph; dims are named as in another program of the same arguments, where one is given.

    Args:
        graph: the step as traced.
        name: name of the program.
        like: a program of the same arguments.
    """
    attribute(graph)
    names = _Names(graph)
    operations = tuple(names.operation(kernel) for kernel in group(graph))
    program = Program(
        name=name,
        operations=operations,
        tensors=names.tensors,
        sizes=names.sizes,
        unknown=tuple(graph.unknown),
        couples_batch=_coupling(graph),
        fixed=frozenset(names.dims[factor] for factor in graph.dims.fixed() if factor in names.dims),
    )
    return with_dims_of(like, program) if like else share_dims(program)


# Phases, owners and gradients ---------------------------------------------------------------------------------------------------------


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


# Names --------------------------------------------------------------------------------------------------------------------------------


class _Names:
    """Unique names of dims and tensors."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.dims: dict[int, str] = {}
        self.tensors: dict[str, Tensor] = {}
        self._taken: dict[str, int] = defaultdict(int)
        self._tensor_names: dict[int, str] = {}
        self._tensor_taken: dict[str, int] = defaultdict(int)
        self._name_dims()
        self.sizes = {name: graph.dims.size(factor) for factor, name in self.dims.items()}
        for value in graph.arguments:
            self.tensor(value)

    def operation(self, kernel: Kernel) -> Operation:
        record = kernel.record
        contracted = dict.fromkeys(self._dim(dim, record.layer) for dim in record.contracted)
        return Operation(
            name=record.layer,
            kind="elementwise" if record.kind == "move" and kernel.flops else record.kind,
            phase=record.phase,
            inputs=tuple(self.tensor(value) for value in kernel.reads),
            outputs=tuple(dict.fromkeys(self.tensor(value.root()) for value in kernel.writes)),
            flops=kernel.flops,
            functions=kernel.functions,
            bytes=kernel.bytes,
            contracted=tuple(dim for dim in contracted if dim),
            shape=record.shape,
            steps=record.steps,
            again=record.again,
        )

    def tensor(self, value: Value) -> str:
        """The name of a value's tensor, which is written down at its first use."""
        if id(value) not in self._tensor_names:
            seen = value.seen or value
            plain = value.name or f"{value.layer}/{value.producer.primitive if value.producer else 'value'}".lstrip("/")
            name = self._tensor_names[id(value)] = _unique(plain, self._tensor_taken)
            dims = tuple(self._dim(dim, value.layer) for dim in seen.dims)
            self.tensors[name] = Tensor(name=name, shape=seen.shape, dims=dims, itemsize=value.itemsize, role=value.role)
        return self._tensor_names[id(value)]

    def _name_dims(self) -> None:
        graph = self.graph
        for dim in graph.batch:
            self._call(dim, "batch")
        hints = [*graph.hints, *_input_hints(graph)]
        for dim, word, label, _ in sorted(hints, key=lambda hint: hint[3]):
            self._call(dim, f"{label}/{word}" if label else word)

    def _dim(self, dim: int, layer: str) -> str:
        self._call(dim, f"{layer}/dim" if layer else "dim")
        factor = self.graph.dims.major(dim)
        return "" if factor is None else self.dims[factor]

    def _call(self, dim: int, name: str) -> None:
        factor = self.graph.dims.major(dim)
        if factor is not None and factor not in self.dims:
            self.dims[factor] = _unique(name, self._taken)
            if hasattr(self, "sizes"):
                self.sizes[self.dims[factor]] = self.graph.dims.size(factor)


def _input_hints(graph: Graph):
    """Names for what the dims of a batch's arrays usually are."""
    for value in graph.arguments:
        if value.role == "input":
            middle = {3: ["sequence"], 4: ["height", "width"], 5: ["depth", "height", "width"]}.get(len(value.shape), [])
            words = ["rows", *middle, f"{value.name}/features"] if len(value.shape) > 1 else ["rows"]
            yield from ((dim, word, "", 3) for dim, word in zip(value.dims, words))


def _unique(name: str, taken: dict[str, int]) -> str:
    taken[name] += 1
    return name if taken[name] == 1 else f"{name}_{taken[name]}"


# Coupled rows -------------------------------------------------------------------------------------------------------------------------


def _coupling(graph: Graph) -> str:
    """Why rows are not independent: what was summed over them comes back to them, or numbers were drawn for all of them."""
    rows = {factor for dim in graph.batch for factor in graph.dims.factors(dim)}
    reasons: dict[str, None] = {}
    mixed: set[int] = set()
    for record in graph.records:
        if record.phase != "forward":
            continue
        touched = any(id(value.root()) in mixed for value in record.inputs)
        has_rows = any(rows & set(graph.dims.factors(dim)) for value in record.outputs for dim in value.dims)
        if touched and has_rows:
            reasons[f"batch statistics in {record.layer!r}"] = None
        elif touched or any(rows & set(graph.dims.factors(dim)) for dim in record.contracted):
            mixed.update(id(value.root()) for value in record.outputs)
        if record.kind == "random" and has_rows:
            reasons[f"random numbers for the whole batch in {record.layer!r}"] = None
    return "; ".join(reasons)
