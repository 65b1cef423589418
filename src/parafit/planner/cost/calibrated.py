"""What operations take on a calibrated device: between what was measured of it. Plain Python.

Args:
    operation: an operation of the program, but not of its update.
    share: the part of one run of it that a device does.
    nbytes: bytes that a device moves in one run of it.
"""

import math
from collections import Counter
from collections.abc import Callable
from functools import cached_property

from parafit.planner.machine.machine import Device
from parafit.planner.partition import Partition, Share
from parafit.planner.program import Operation, Program, Tensor

_NEAR_BYTES = 1 << 20
"""What a core has near by: the rate at which less is moved says more about starting than about memory."""


NEAR_STACK_BYTES, FAR_STACK_BYTES = 2**22, 2**25
"""What the probes of stacks, arrays that loops fill slice by slice, hold in all."""


class Measured:
    """Seconds from a calibrated device's table of products and curves of other operations.

    Args:
        program: what is computed.
        partition: what of it a device does.
        device: one whose `curves` were measured.
        precision: of products.
        reach_bytes: gives all that a step touches: what is used once a step comes from as far as that reaches.
    """

    def __init__(self, program: Program, partition: Partition, device: Device, precision: str, reach_bytes: Callable[[], float]):
        self.program, self.partition, self.device = program, partition, device
        self.precision, self.reach_bytes = precision, reach_bytes

    def operation_seconds(self, operation: Operation, share: Share) -> float:
        """One run of an operation: as it was measured with its arrays near by, and what it waits for those that are not."""
        if operation.kind == "loop":
            return self.device.loop_seconds
        if operation.kind == "gather":
            return self.gathering_seconds(operation, share.bytes)
        missing = self.missing_seconds(operation, share.bytes) + self.stacking_seconds(operation, share.bytes)
        return self.near_seconds(operation, share) + missing

    def near_seconds(self, operation: Operation, share: Share) -> float:
        """The same with its arrays near by."""
        if operation.kind == "loop":
            return self.device.loop_seconds
        if operation.kind in ("matmul", "convolution", "attention"):
            return self.product_seconds(operation, share)
        return max(self.device.curve_seconds(operation.kind, share.bytes), self.evaluating_seconds(operation, share))

    def stacking_seconds(self, operation: Operation, nbytes: float) -> float:
        """Slices of arrays that hold something of all steps of a loop: each that is written is a copy of its own, and of each that is
        read what it waits for, if all that the step touches lies far."""
        if operation.steps == 1 or "stack" not in self.device.curves:
            return 0.0
        seconds = 0.0
        for names, written in ((operation.inputs, False), (operation.outputs, True)):
            for name in names:
                whole = self.partition.local_bytes(self.program.tensors[name])
                if whole > nbytes:  # more than an operation touches at one step
                    near, far = (self.device.curve_seconds(kind, 2 * whole / operation.steps) for kind in ("stack_near", "stack"))
                    seconds += written * near + max(0.0, far - near) * self.farness
        return seconds

    @cached_property
    def farness(self) -> float:
        """0 for steps that touch as little as the probes of stacks near by, 1 for those that touch as much as those of far ones."""
        return min(1.0, max(0.0, math.log(max(self.reach_bytes(), 1.0) / NEAR_STACK_BYTES, FAR_STACK_BYTES / NEAR_STACK_BYTES)))

    def product_seconds(self, operation: Operation, share: Share) -> float:
        """A product, by the measured rates of its form; attention that is one operation at the best rate."""
        result = self.program.tensors[operation.outputs[0]]
        if operation.kind == "convolution":
            form = "correlation" if result.role == "gradient" else "convolution"
            return self.device.matmul_seconds(self.precision, self.product_of(result, share.flops), form)
        if operation.kind == "matmul" and share.shape:
            form = "gradient" if result.role == "gradient" else "transposed" if operation.phase == "backward" else ""
            return self.device.matmul_seconds(self.precision, share.shape, form if share.shape[0] == 1 else "")
        return share.flops / self.device.peak(self.precision)

    def product_of(self, result: Tensor, flops: float) -> tuple[float, ...]:
        """The product of matrices, (1, rows, inner, columns), that a device's part of a convolution stands for, channels last.

        Args:
            result: the tensor that a convolution gives, channels last.
            flops: operations of one run on a device.
        """
        size = self.partition.local_bytes(result) / result.itemsize
        columns = result.shape[-1] * self.partition.fraction(result.dims[-1:])
        return 1, size / columns, max(1.0, flops / 2 / size), columns

    def missing_seconds(self, operation: Operation, nbytes: float) -> float:
        """What it waits for arrays that were last touched so long ago that nearer memory has lost them, beyond the rate at which an
        operation of its size works."""
        near = self.byte_seconds(nbytes)
        return sum(moved * max(0.0, self.byte_seconds(distance) - near) for moved, distance in self.distances.get(id(operation), ()))

    def byte_seconds(self, reach: float) -> float:
        """Seconds a byte from as far as so many others reach: a probe moves three arrays, of which it has two."""
        moved = 1.5 * max(reach, _NEAR_BYTES)
        return self.device.curve_seconds("elementwise", moved) / moved

    @cached_property
    def distances(self) -> dict[int, list[tuple[float, float]]]:
        """(bytes moved, distance) of the arrays that each operation, by `id`, reads and writes.

        The distance of a read is what the step touches between the array's last use and this one (the reuse distance of Mattson et al.
        1970, what is touched twice counted twice, at most all that the step touches). New memory comes from as far as it is kept: what
        is read soon lies where something else has just been. A write takes two movements, for the processor fetches what it overwrites.
        """
        operations = [operation for operation in self.program.operations if operation.steps == 1]
        clock, used, written = 0.0, dict[str, float](), dict[str, float]()
        kept: dict[str, float] = {}
        found: dict[int, list[tuple[float, float]]] = {}
        for _ in range(2):  # parameters were last used in the step before
            for operation in operations:
                sizes = {name: self.partition.local_bytes(self.program.tensors[name]) for name in (*operation.inputs, *operation.outputs)}
                found[id(operation)] = [(sizes[name], clock - used.get(name, clock)) for name in operation.inputs]
                kept |= {name: clock - written[name] for name in operation.inputs if name in written}
                clock += operation.count * sum(sizes.values())
                used |= dict.fromkeys(sizes, clock)
                written |= dict.fromkeys(operation.outputs, clock)
        for operation in operations:
            found[id(operation)] += [
                (2 * self.partition.local_bytes(self.program.tensors[name]), kept[name]) for name in operation.outputs if name in kept
            ]
        whole = self.reach_bytes()
        return {key: [(moved, min(distance, whole)) for moved, distance in each] for key, each in found.items()}

    def evaluating_seconds(self, operation: Operation, share: Share) -> float:
        """Its arithmetic and its functions, from probes of arrays of float32 that do nothing else."""
        if not operation.flops or not {"arithmetic", "function"} <= set(self.device.curves):
            return 0.0
        part = 4 * share.flops / operation.flops
        counts = {"arithmetic": operation.flops - operation.functions, "function": operation.functions}
        return sum(self.device.curve_seconds(kind, count * part) for kind, count in counts.items() if count)

    def gathering_seconds(self, operation: Operation, nbytes: float) -> float:
        """Rows of a small table, and how much longer those of one that reaches as far as this one take: a probe with a table of this
        size moves half as much."""
        reach = max(self.partition.local_bytes(self.program.tensors[operation.inputs[0]]) / 2, 1.0)
        near = "gather_near" if "gather_near" in self.device.curves else "gather"
        slower = self.device.curve_seconds("gather", reach) / self.device.curve_seconds(near, reach)
        return self.device.curve_seconds(near, nbytes) * max(1.0, slower)

    def far_seconds(self, kind: str, nbytes: float) -> float:
        """Bytes that were last touched a whole step ago.

        Args:
            kind: kind of the operation, by the name of its curve.
        """
        reach = max(self.reach_bytes(), nbytes)
        return self.device.curve_seconds(kind, reach) * nbytes / reach

    def starting_seconds(self) -> float:
        """Starting all operations of a step: each takes longer in a long program, whose operations run in any order, than in a short
        one. A turn of a loop inside the step is a program of its own."""
        if "operation" not in self.device.curves:
            return 0.0
        counts = Counter[int]()
        for operation in self.program.operations:
            counts[operation.steps] += operation.count
        each = {steps: self.device.curve_seconds("operation", count) for steps, count in counts.items()}
        return self.partition.turns * sum(steps * seconds for steps, seconds in each.items())

    def feed_seconds(self, steps_per_dispatch: int) -> float:
        """A batch is copied out of its block; the host gathers the next with one of the cores that the device computes with."""
        if not self.device.feed_bytes_per_second:
            return 0.0
        nbytes = sum(self.partition.local_bytes(tensor) for tensor in self.program.of_role("input"))
        copied = self.device.curve_seconds("slice", 2 * nbytes) if steps_per_dispatch > 1 else 0.0
        return nbytes / self.device.feed_bytes_per_second / max(1, self.device.cores) + copied
