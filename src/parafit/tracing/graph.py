"""Walks a traced step: every equation at every depth becomes a record of an operation over values whose dims are tied."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from parafit.planner.program import Leaf
from parafit.support.jaxprs import Scan, While, called, opened, read_branches, read_scan, read_while
from parafit.tracing.dims import Dims
from parafit.tracing.primitives import matmul_shape, primitive_named
from parafit.tracing.scopes import dim_words, inherited_layer, is_again, label_of, layer_of, shared_folder
from parafit.tracing.values import Record, Value


class Graph:
    """One graph over a traced step.

    Attributes:
        dims: of all values.
        records: operations in the order they run.
        arguments: values of the step's leaves.
        results: (leaf, value) of the leaves that the step returns changed.
        hints: (dims, word, layer, rank): how a dim may be called; the lowest rank first.
        unknown: primitives that are not known.
        batch: the dims of rows.
    """

    def __init__(self, traced, leaves: Sequence[Leaf], results: Sequence[Leaf]):
        self.dims = Dims()
        self.records: list[Record] = []
        self.hints: list[tuple[int, str, str, int]] = []
        self.unknown: dict[str, None] = {}
        self._loop: Record | None = None
        self.arguments = [self._argument(var.aval, leaf) for var, leaf in zip(traced.jaxpr.invars, leaves)]
        self.batch = self._tie_rows()
        self._tie_slots(leaves)
        outputs = self._jaxpr(traced.jaxpr, traced.consts, self.arguments, "", 1)
        for value in outputs:
            value.root().leaves = True
        self.results = list(zip(results, outputs[len(outputs) - len(results) :]))

    def _argument(self, aval, leaf: Leaf) -> Value:
        value = self._value(aval)
        value.name, value.role = leaf.name, leaf.role
        return value

    def _value(self, aval, dims: list[int] | None = None, layer: str = "", *, literal: bool = False) -> Value:
        shape = tuple(getattr(aval, "shape", ()))
        itemsize = getattr(getattr(aval, "dtype", None), "itemsize", 0)
        dims = [self.dims.new(size) for size in shape] if dims is None else dims
        return Value(shape=shape, itemsize=itemsize, dims=dims, layer=layer, literal=literal)

    def _literal(self, var) -> Value:
        value = self._value(var.aval, literal=True)
        value.number = var.val
        return value

    def _tie_rows(self) -> list[int]:
        rows = [value.dims[0] for value in self.arguments if value.role == "input" and value.shape]
        rows = [dim for dim in rows if self.dims.size(dim) == self.dims.size(rows[0])]
        for other in rows[1:]:
            self.dims.tie(rows[0], other)
        return rows[:1]

    def _tie_slots(self, leaves: Sequence[Leaf]) -> None:
        held = {value.name: value for value in self.arguments if value.role == "parameter"}
        for leaf, slot in zip(leaves, self.arguments):
            if leaf.like in held and held[leaf.like].shape == slot.shape:
                self._tie(held[leaf.like].dims, slot.dims)

    def visited(self, equation, inputs: list[Value], outputs: list[Value]) -> None:
        """Called after every equation, at every depth: for those who look for something else than operations.

        Args:
            equation: the equation as traced.
            inputs: the values that it reads.
            outputs: the values that it gives.
        """

    # Jaxprs within jaxprs ------------------------------------------------------------------------------------------------------------

    def _jaxpr(self, jaxpr, consts, inputs: list[Value], scope: str, steps: int) -> list[Value]:
        values = dict(zip(jaxpr.invars, inputs))
        values.update((var, self._value(var.aval)) for var in jaxpr.constvars)
        read = lambda var: self._literal(var) if hasattr(var, "val") else values[var]  # noqa: E731
        for equation in jaxpr.eqns:
            stack = "/".join(part for part in (scope, str(equation.source_info.name_stack)) if part)
            operands = [read(var) for var in equation.invars]
            outputs = self._equation(equation, operands, stack, steps)
            self.visited(equation, operands, outputs)
            values.update(zip(equation.outvars, outputs))
        return [read(var) for var in jaxpr.outvars]

    def _equation(self, equation, inputs: list[Value], scope: str, steps: int) -> list[Value]:
        if scan := read_scan(equation):
            return self._scan(scan, equation.outvars, inputs, scope, steps)
        if loop := read_while(equation):
            return self._while(loop, inputs, scope, steps)
        if branches := read_branches(equation):
            return self._cond(branches, inputs, scope, steps)
        if (inner := called(equation)) is not None:
            return self._jaxpr(*opened(inner), inputs, scope, steps)
        return self._operation(equation, inputs, scope, steps)

    def _scan(self, scan: Scan, results: Sequence, inputs: list[Value], scope: str, steps: int) -> list[Value]:
        length, fixed, carried = scan.length, scan.fixed, scan.carried
        carry, stacked = inputs[fixed : fixed + carried], inputs[fixed + carried :]
        body, consts = opened(scan.body)
        time = self.dims.new(length)
        self.dims.fix([time])
        for value in stacked:
            self.dims.tie(time, value.dims[0])
        outer = self._enter(inputs, carry, scope, steps * length)
        label = shared_folder([value.root().name for value in stacked if value.root().role == "parameter"])
        self.hints.append((time, "steps", layer_of(scope) or label, 4))
        scope = scope if layer_of(scope) else f"{scope}/{label}"
        slices = [self._view(value, var.aval.shape, value.dims[1:]) for var, value in zip(body.invars[fixed + carried :], stacked)]
        leaving = self._jaxpr(body, consts, [*inputs[:fixed], *map(self._view, carry), *slices], scope, steps * length)
        outputs = self._carried(carry, leaving[:carried], scope, steps * length)
        for var, value in zip(results[carried:], leaving[carried:]):
            whole = self._value(var.aval, [time, *value.dims], value.layer)
            whole.loop = self._loop
            self._keep(value, whole, scope, steps * length)
            outputs.append(whole)
        self._loop = outer
        return outputs

    def _while(self, loop: While, inputs: list[Value], scope: str, steps: int) -> list[Value]:
        """A loop whose length the shapes do not tell counts as one step."""
        test, fixed = loop.test_fixed, loop.test_fixed + loop.body_fixed
        carry = inputs[fixed:]
        outer = self._enter(inputs, carry, scope, steps)
        views = [self._view(value) for value in carry]
        self._jaxpr(*opened(loop.test), [*inputs[:test], *views], scope, steps)
        leaving = self._jaxpr(*opened(loop.body), [*inputs[test:fixed], *views], scope, steps)
        outputs = self._carried(carry, leaving, scope, steps)
        self._loop = outer
        return outputs

    def _enter(self, inputs: list[Value], carry: list[Value], scope: str, steps: int) -> Record | None:
        """Start a loop; gives the one that it is inside of."""
        outer = self._loop
        self._loop = self._record("loop", "loop", scope, [], [], steps=steps)
        for value in inputs:
            value.root().leaves = value.root().leaves or not value.root().cheap
        for value in carry:
            value.root().literal, value.root().leaves = False, True
        return outer

    def _view(self, value: Value, shape=None, dims: list[int] | None = None) -> Value:
        """A value as the body of a loop sees it: all of it, or the slice of one step."""
        dims = list(value.dims if dims is None else dims)
        shape = value.shape if shape is None else tuple(shape)
        return Value(shape=shape, itemsize=value.itemsize, dims=dims, layer=value.layer, source=value)

    def _carried(self, carry: list[Value], leaving: list[Value], scope: str, steps: int) -> list[Value]:
        """What a loop carries stays in one place: the new value is written where the first one was."""
        for before, after in zip(carry, leaving):
            self._tie(before.dims, after.dims)
            self._keep(after, before, scope, steps)
        outputs = [self._view(value) for value in carry]
        for value in outputs:
            value.loop = self._loop
        return outputs

    def _keep(self, value: Value, place: Value, scope: str, steps: int) -> None:
        """Let a loop's body write `value` into `place` (one slice of it, at every step)."""
        root = value.root()
        if root is place.root():
            return
        if root.producer is None or root.leaves or root.producer.steps != steps:
            copy = self._record("copy", "move", scope, [value], [], steps=steps)
            root = self._view(value)
            root.source = None
            self._finish(copy, [root])
        root.source, place.root().leaves = place, True
        place.root().readers += root.readers
        if place.root().producer is None and not place.root().name:
            place.root().producer = root.producer

    def _cond(self, cases: tuple, inputs: list[Value], scope: str, steps: int) -> list[Value]:
        """Dims are tied through every branch; the operations are those of the one with most FLOPs."""
        start, branches = len(self.records), []
        for case in cases:
            outputs = self._jaxpr(*opened(case), inputs[1:], scope, steps)
            branches.append((self.records[start:], outputs))
            del self.records[start:]
        records, outputs = max(branches, key=lambda branch: sum(record.flops * record.steps for record in branch[0]))
        self.records += records
        for _, others in branches:
            for one, other in zip(outputs, others):
                self._tie(one.dims, other.dims)
        return outputs

    def _tie(self, ours: Iterable[int], theirs: Iterable[int]) -> None:
        for one, other in zip(ours, theirs):
            self.dims.tie(one, other)

    # Operations ----------------------------------------------------------------------------------------------------------------------

    def _operation(self, equation, inputs: list[Value], scope: str, steps: int) -> list[Value]:
        name, params = equation.primitive.name, equation.params
        ours = primitive_named(name)
        shapes, results = [value.shape for value in inputs], [tuple(getattr(var.aval, "shape", ())) for var in equation.outvars]
        try:
            dims, contracted = ours.rule(self.dims, params, [value.dims for value in inputs], results)
            flops = ours.flops(params, shapes, results)
            assert [len(group) for group in dims] == [len(shape) for shape in results]
        except Exception:  # whatever a primitive brings that its rule did not expect
            ours = primitive_named("")
            (dims, contracted), flops = ours.rule(self.dims, params, [value.dims for value in inputs], results), 0.0
        if ours.kind == "reduction" and name.startswith("reduce_") and inputs[0].shape and math.prod(shapes[0]) == math.prod(results[0]):
            ours, flops = primitive_named("squeeze"), 0.0
        if ours.kind == "unknown" and results:
            self.unknown[name] = None
        record = self._record(name, ours.kind, scope, inputs, contracted, steps=steps, flops=flops)
        record.fuses, record.alias, record.costly, record.absorbs = ours.fuses, ours.alias, ours.costly, ours.absorbs
        record.params = params
        outputs = [self._value(var.aval, group, record.layer) for var, group in zip(equation.outvars, dims)]
        if ours.alias:
            for value, source in zip(outputs, inputs):
                value.source = source
        for value in outputs if ours.fuses else ():
            value.cheap = all(each.literal or each.root().cheap for each in inputs)
        if ours.kind == "matmul":
            record.shape = matmul_shape(params, shapes)
            self._fix_minor(params, inputs)
        self._finish(record, outputs)
        self._hint(equation, record)
        return outputs

    def _fix_minor(self, params: Mapping[str, Any], inputs: Sequence[Value]) -> None:
        """Several dims of a kernel, such as heads and their size, go through a product as one: only the outermost of them can be split."""
        sums, batch = params["dimension_numbers"]
        for side, value in enumerate(inputs):
            free = [place for place in range(len(value.dims)) if place not in {*sums[side], *batch[side]}]
            for joined in (sorted(sums[side]), free) if value.root().role == "parameter" else ():
                wide = [value.dims[place] for place in joined if value.shape[place] > 1]
                self.dims.fix(wide[1:])

    def _record(self, primitive: str, kind: str, scope: str, inputs: list[Value], contracted: list[int], **options) -> Record:
        layer = layer_of(scope) or inherited_layer(inputs)
        record = Record(
            primitive=primitive,
            kind=kind,
            scope=scope,
            layer=layer,
            phase="backward" if "transpose(" in scope else "forward" if "jvp(" in scope else "",
            again=is_again(scope),
            inputs=inputs,
            outputs=[],
            flops=options.pop("flops", 0.0),
            contracted=contracted,
            loop=self._loop,
            **options,
        )
        for value in inputs:
            value.root().readers.append(record)
            if value.root().role == "parameter" and not value.root().layer:
                value.root().layer = layer
        self.records.append(record)
        return record

    def _finish(self, record: Record, outputs: list[Value]) -> None:
        record.outputs = outputs
        for value in outputs:
            value.producer = record

    def _hint(self, equation, record: Record) -> None:
        """Names for the dims of parameters, from what they are used for."""
        for side, value in enumerate(record.inputs):
            root = value.root()
            if root.role == "parameter" and value.shape:
                label, later = label_of(root), 5 * (record.phase == "backward")
                for rank, word, dim in dim_words(equation, record, side, value):
                    at = label.rpartition("/")[0] or label if word.startswith("head") else label
                    self.hints.append((dim, word, at, rank + later))
                if record.primitive == "gather" and side == 0:
                    self.hints += [(dim, "sequence", "", 2) for dim in record.inputs[1].dims[1:-1]]
