"""`Software`: facts about the framework that runs a program, as far as they change what it costs. Plain Python."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Software:
    """Facts about the framework that runs a program; the default is parafit's own.

    Attributes:
        precision: of matmuls; "" as the plan has it.
        overlap_gradients: whether gradients are reduced while the backward pass goes on.
        overlap_tensor: which collectives along the tensor axis run beside products: "all", cut into pieces beside the pieces of their own
            product; "independent", beside the other product of a layer's backward pass, which does not wait for them; "" none.
        prefetch: phases in which the next block's parameters are gathered while this one computes.
        sums_microbatches: below ZeRO-2, gradients of microbatches are summed before they are reduced; pipelines always do it.
        reduces_whole: gradients are all-reduced even where their slots are split.
        launch_seconds: what the host takes to launch one operation; it matters where the device is faster.
        collective_seconds: what the host takes to launch one collective of a microbatch.
        overlap_sends: whether what stages of a pipeline send travels while they compute; else sender and receiver wait for it.
        send_split: whether the devices of a tensor axis each send a part of what passes between stages.
        bucket_bytes: gradients are reduced, and updated parameters gathered, in buckets of so much; 0: block by block.
        attention: share of the peak that fused attention reaches, "forward" and "backward", where another version is used.
        recomputes_all: recomputation runs the whole block again, not only what the backward pass reads.
        equal_stages: every pipeline stage has as many blocks; else stages are cut where their times are closest.
        flat_state: state is split as one flat buffer, whatever its tensors' shapes; else each along a dimension that the axis divides.
        update_passes: how often the optimiser's memory traffic is repeated (1 where it is one fused operation).
        memory_slack: share of the arrays' bytes that the allocator loses.
        steps_per_dispatch: steps that one compiled program runs.
    """

    precision: str = ""
    overlap_gradients: bool = True
    overlap_tensor: str = ""
    prefetch: tuple[str, ...] = ("forward", "backward")
    sums_microbatches: bool = False
    reduces_whole: bool = False
    launch_seconds: float = 0.0
    collective_seconds: float = 0.0
    overlap_sends: bool = True
    send_split: bool = False
    bucket_bytes: float = 0.0
    attention: Mapping[str, float] = field(default_factory=dict)
    recomputes_all: bool = False
    equal_stages: bool = False
    flat_state: bool = False
    update_passes: float = 1.0
    memory_slack: float = 0.0
    steps_per_dispatch: int = 1
