"""Groups the records of a graph into kernels: chains of elementwise operations run inside what reads them, and are never stored.

A result that can be fused is stored all the same where that moves fewer bytes: with n readers, computing it anew costs n times what
it is made from, storing it costs that once, one write and n reads. Results of costly functions (exp, tanh, a division) are
not computed twice. Both are what XLA's fusion aims at.
"""

from dataclasses import dataclass, field

from parafit.tracing.graph import Graph
from parafit.tracing.values import Record, Value


@dataclass(eq=False, kw_only=True)
class Kernel:
    """What runs as one operation.

    Attributes:
        record: its last operation, which writes to memory.
        reads: bytes read of each array in memory.
        writes: arrays written.
        flops: of all operations inside.
        functions: costly ones among them.
        bytes: moved to and from memory.
    """

    record: Record
    reads: dict[Value, float]
    writes: list[Value]
    flops: float
    functions: float
    bytes: float
    fused: list[Record] = field(default_factory=list)


def group(graph: Graph) -> list[Kernel]:
    """The kernels of a graph, in the order they run."""
    stored = _stored(graph)
    inside: set[int] = set()
    kernels = []
    for record in graph.records:
        writes = [value for value in record.outputs if id(value.root()) in stored]
        if record.alias or (record.outputs and not writes):
            continue
        reads, fused = _reads(record, stored)
        new = [each for each in fused if id(each) not in inside]
        inside.update(id(each) for each in new)
        flops = sum((each.flops for each in new), record.flops)
        functions = sum(each.flops for each in (*new, record) if each.costly)
        moved = _bytes(record, reads, writes)
        kernels.append(Kernel(record=record, reads=reads, writes=writes, flops=flops, functions=functions, bytes=moved, fused=fused))
    return kernels


def _stored(graph: Graph) -> set[int]:
    """The arrays that are written to memory, by `id`."""
    stored = {id(value.root()) for record in graph.records for value in record.inputs if value.root().producer is None}
    kernels: dict[int, set[int]] = {}
    for record in reversed(graph.records):
        for value in record.outputs if not record.alias else ():
            root = value.root()
            readers = set().union(*(kernels.get(id(reader), set()) for reader in root.readers if not reader.alias))
            if _must_store(record, root) or _better_stored(record, value, len(readers)):
                stored.add(id(root))
            else:
                kernels.setdefault(id(record), set()).update(readers)
        if any(id(value.root()) in stored for value in record.outputs) or not record.outputs:
            kernels.setdefault(id(record), set()).add(id(record))
    return stored


def _must_store(record: Record, value: Value) -> bool:
    return (
        not record.fuses
        or value.leaves
        or value.role == "gradient"
        or any(not (reader.fuses or reader.alias or reader.absorbs) for reader in value.readers)
    )


def _better_stored(record: Record, value: Value, readers: int) -> bool:
    if readers < 2 or value.cheap:
        return False
    made_from = sum({id(each.root()): each.bytes for each in record.inputs}.values())
    return record.costly or readers * made_from >= made_from + (readers + 1) * value.bytes


def _reads(record: Record, stored: set[int]) -> tuple[dict[Value, float], list[Record]]:
    """What a record and the chains fused into it read from memory, and the records of those chains."""
    reads: dict[Value, float] = {}
    fused: dict[int, Record] = {}
    pending = [(value, _share_read(record)) for value in reversed(record.inputs)]
    while pending:
        value, share = pending.pop()
        root = value.root()
        if id(root) in stored:
            reads[root] = max(reads.get(root, 0.0), min(value.bytes, root.bytes) * share)
        elif root.producer is not None and id(root.producer) not in fused:
            fused[id(root.producer)] = root.producer
            pending += [(each, share * _share_read(root.producer)) for each in reversed(root.producer.inputs)]
    return {root: size for root, size in reads.items() if not root.literal}, list(fused.values())


def _share_read(record: Record) -> float:
    """The share of its operand that an operation looks at."""
    if record.primitive not in ("slice", "split", "dynamic_slice"):
        return 1.0
    return min(1.0, sum(value.bytes for value in record.outputs) / max(1, record.inputs[0].bytes))


def _bytes(record: Record, reads: dict[Value, float], writes: list[Value]) -> float:
    if record.primitive == "dynamic_update_slice":
        return 2.0 * record.inputs[1].bytes
    if record.kind == "gather":
        return 2.0 * record.outputs[0].bytes + record.inputs[1].bytes
    if record.kind == "scatter" and record.primitive.startswith("scatter"):
        return 3.0 * record.inputs[2].bytes + record.inputs[1].bytes
    return sum(reads.values()) + float(sum(value.bytes for value in writes))
