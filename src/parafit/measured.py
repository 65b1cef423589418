"""What operations take on a calibrated device: between what was measured of it. Plain Python."""

from collections import Counter
from collections.abc import Callable

from parafit.machine import Device
from parafit.plan import Plan
from parafit.program import Operation, Program, Tensor
from parafit.shares import Share, Shares


class Measured:
    """Seconds from a calibrated device's table of products and curves of other operations.

    Args:
        program: what is computed.
        plan: under which plan.
        shares: what of it a device does.
        device: one whose `curves` were measured.
        precision: of products.
        reach_bytes: gives all that a step touches: what is used once a step comes from as far as that reaches.
    """

    def __init__(self, program: Program, plan: Plan, shares: Shares, device: Device, precision: str, reach_bytes: Callable[[], float]):
        self.program, self.plan, self.shares, self.device = program, plan, shares, device
        self.precision, self.reach_bytes = precision, reach_bytes

    def operation_seconds(self, operation: Operation, share: Share) -> float:
        """One run of an operation."""
        if operation.kind == "loop":
            return self.device.loop_seconds
        if operation.kind in ("matmul", "convolution", "attention"):
            return max(self.product_seconds(operation, share), self.far_seconds("elementwise", self.weight_bytes(operation)))
        if operation.kind == "gather":
            return self.gathering_seconds(operation, share.bytes)
        return max(self.device.curve_seconds(operation.kind, share.bytes), self.evaluating_seconds(operation, share))

    def product_seconds(self, operation: Operation, share: Share) -> float:
        """A product, by the measured rates of its form; attention that is one operation at the best rate."""
        if operation.kind == "convolution":
            result = self.program.tensors[operation.outputs[0]]
            form = "correlation" if result.role == "gradient" else "convolution"
            return self.device.matmul_seconds(self.precision, _product_of(result, share.flops), form)
        if operation.kind == "matmul" and share.shape:
            return self.device.matmul_seconds(self.precision, share.shape)
        return share.flops / self.device.peak(self.precision)

    def weight_bytes(self, operation: Operation) -> float:
        """Of the parameters that it reads, each once a step."""
        read = [self.program.tensors[name] for name in operation.inputs if operation.steps == 1]
        return sum(self.shares.local_bytes(tensor) for tensor in read if tensor.role == "parameter")

    def evaluating_seconds(self, operation: Operation, share: Share) -> float:
        """Its arithmetic and its functions, from probes of arrays of float32 that do nothing else."""
        if not operation.flops or not {"arithmetic", "function"} <= set(self.device.curves):
            return 0.0
        part = 4 * share.flops / operation.flops
        counts = {"arithmetic": operation.flops - operation.functions, "function": operation.functions}
        return sum(self.device.curve_seconds(kind, count * part) for kind, count in counts.items() if count)

    def gathering_seconds(self, operation: Operation, bytes_: float) -> float:
        """Rows come from as far as their table reaches: at the rate of a probe with this table, which is twice what a probe moves."""
        reach = max(self.shares.local_bytes(self.program.tensors[operation.inputs[0]]) / 2, 1.0)
        return self.device.curve_seconds("gather", reach) * bytes_ / reach

    def far_seconds(self, kind: str, bytes_: float) -> float:
        """Bytes that were last touched a whole step ago."""
        reach = max(self.reach_bytes(), bytes_)
        return self.device.curve_seconds(kind, reach) * bytes_ / reach

    def starting_seconds(self) -> float:
        """Starting all operations of a step: each takes longer in a long program, whose operations run in any order, than in a short
        one. A turn of a loop inside the step is a program of its own."""
        if "operation" not in self.device.curves:
            return 0.0
        counts = Counter[int]()
        for operation in self.program.operations:
            counts[operation.steps] += operation.count
        each = {steps: self.device.curve_seconds("operation", count) for steps, count in counts.items()}
        return self.plan.microbatches * sum(steps * seconds for steps, seconds in each.items())

    def feed_seconds(self, steps_per_dispatch: int) -> float:
        """A batch is copied out of its block; the host gathers the next with one of the cores that the device computes with."""
        if not self.device.feed_bytes_per_second:
            return 0.0
        bytes_ = sum(self.shares.local_bytes(tensor) for tensor in self.program.of_role("input"))
        copied = self.device.curve_seconds("slice", 2 * bytes_) if steps_per_dispatch > 1 else 0.0
        return bytes_ / self.device.feed_bytes_per_second / max(1, self.device.cores) + copied


def _product_of(result: Tensor, flops: float) -> tuple[float, ...]:
    """The product of matrices, (1, rows, inner, columns), that a convolution stands for, channels last."""
    columns = result.shape[-1]
    return 1, result.size // columns, max(1.0, flops / 2 / result.size), columns
