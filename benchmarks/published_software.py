"""What the frameworks of the published tables do, by their own sources: facts, each once."""

import math
from dataclasses import replace

from parafit.planner.cost.framework import Software
from parafit.planner.networks.transformer import Transformer
from parafit.planner.plan import Plan


class SkippedError(Exception):
    """Why a row is not used."""


EAGER_LAUNCH = 6e-5
"""Eager PyTorch: one operation of a program is about five kernels, each of which takes the host about 12 microseconds (from memory)."""
CACHING = 0.1
"""Share of memory that PyTorch's caching allocator loses to fragments (from memory)."""
MEGATRON_LOSS = (9.5, 1.75)
"""Megatron-LM core/tensor_parallel/cross_entropy.py, in float32, operation by operation: 38 bytes a logit forward, 14 backward."""
SUMMED = Software(sums_microbatches=True, flat_state=True, overlap_sends=False)
"""Runs the microbatches of a step before it reduces their gradients, as no_sync does in PyTorch, and splits state as one flat buffer, as
Megatron's distributed optimizer, DeepSpeed and FSDP do. A stage waits for what it sends and receives (from memory)."""
MEGATRON_2021 = replace(SUMMED, precision="float16", overlap_gradients=False, send_split=True, recomputes_all=True, equal_stages=True)
MEGATRON_CORE = replace(SUMMED, overlap_gradients=True, overlap_tensor="all", equal_stages=True)

TRITON_ATTENTION = ({"forward": 0.40, "backward": 0.35}, {"forward": 0.19, "backward": 0.165})
"""FlashAttention in Triton: on A100 100 to 120 TFLOP/s forward and backward together at 2k to 16k, causal (Dao 2023, figure 4;
from memory);
on H100 1.5 times that, as FlashAttention-2 without Hopper's instructions (335 against 225 TFLOP/s, ibid.)."""
FOUNDRY = Software(prefetch=("forward",), flat_state=True, launch_seconds=EAGER_LAUNCH, memory_slack=CACHING)
"""Composer's FSDP: backward_prefetch BACKWARD_POST gathers a block only once the gradients of the one before are done (from memory)."""

NANOTRON = replace(
    SUMMED, overlap_tensor="independent", reduces_whole=True, launch_seconds=EAGER_LAUNCH, collective_seconds=2e-4, memory_slack=CACHING
)
"""nanotron @9055c664. tensor_parallel/functional.py: exchanges of column-parallel layers run beside the other product of the backward
pass. trainer.py: gradients are all-reduced whatever the ZeRO stage. A collective takes the host about 0.2 ms: splits, three products
instead of one, checks, events (from the rows of 1B on one host that are bound by it; those of 8B agree)."""
NANOTRON_ZERO = replace(NANOTRON, overlap_gradients=False, bucket_bytes=math.inf)
"""trainer.py, make_ddp: with ZeRO 1 and sums in float32 there is no DDP, but one all-reduce after the backward pass; zero.py gathers the
parameters in one coalesced call."""
CHECK_SECONDS = 3.2e-4
"""run_multinode.sh @77f54c10 exports TORCH_DISTRIBUTED_DEBUG=DETAIL: before each collective every member of the group meets the first one
over TCP (PyTorch's monitored barrier), one after the other. Seconds a member, from rows of 1B; those of 8B agree. By their times, the rows
whose pipeline crosses hosts were run so, the others not."""

BIGSCIENCE = replace(SUMMED, precision="float16", overlap_gradients=False, recomputes_all=True, send_split=True, memory_slack=CACHING)
"""DeepSpeed's pipeline sends a part of each activation from each device of a tensor group (is_pipe_partitioned) and balances its stages."""

ALPA = replace(SUMMED, precision="float16", overlap_gradients=False, prefetch=())
"""XLA of 2022 waits for each collective."""


def megatron_core(plan: Plan) -> Software:
    """What Megatron-Core does under a plan: only its schedule with chunks computes while it sends (arguments.py, overlap_p2p_comm; from
    memory)."""
    return replace(MEGATRON_CORE, overlap_sends=plan.interleave > 1)


def nanotron(shape: Transformer, plan: Plan, hosts: int) -> Software:
    """What nanotron does under a plan.

    Raises:
        SkippedError: it refuses so few microbatches (pipeline_parallel/engine.py), or its way to cut a pipeline leaves stages empty.
    """
    stages = plan.axes.get("pipeline", 1)
    if plan.microbatches < stages - 1:
        raise SkippedError("nanotron refuses fewer microbatches than stages but one")
    if nanotron_leaves_empty(shape, stages):
        raise SkippedError("nanotron's cut leaves stages empty")
    software = NANOTRON_ZERO if plan.zero_stage else NANOTRON
    checked = plan.axes.get("tensor", 1) - 1 if stages > 1 and hosts > 1 else 0
    return replace(software, collective_seconds=software.collective_seconds + checked * CHECK_SECONDS)


def nanotron_leaves_empty(shape: Transformer, stages: int) -> bool:
    """Whether some stage gets nothing: models/base.py fills a stage until the products counted so far pass its share of all; embedding,
    normalisation, cast and loss count nothing (models/llama.py, get_block_compute_costs).

    >>> shape = Transformer(layers=16, hidden=2048, heads=32, ffn=8192, vocabulary=131072)
    >>> nanotron_leaves_empty(shape, 8), nanotron_leaves_empty(shape, 16)
    (False, True)
    """
    block, head = shape.hidden * (4 * shape.hidden + 3 * shape.ffn), shape.hidden * shape.vocabulary
    passed, stage, used = 0, 0, 0
    for cost in (0, *[block] * shape.layers, 0, head, 0, 0):
        passed, used = passed + cost, stage
        stage += passed * stages > (shape.layers * block + head) * (stage + 1)
    return used < stages - 1
