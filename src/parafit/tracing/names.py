"""Unique names for the dims and tensors of a graph; under them its operations are written down. Plain Python."""

from collections import defaultdict

from parafit.planner.program import Operation, Tensor
from parafit.tracing.fusion import Kernel
from parafit.tracing.graph import Graph
from parafit.tracing.values import Value


class Names:
    """Unique names of dims and tensors.

    Args:
        graph: one that `phases.attribute` went over.

    Attributes:
        dims: names of factors of dims.
        tensors: what is written down so far, by name.
        sizes: of named dims.
    """

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
        """A kernel as an operation of the program."""
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
