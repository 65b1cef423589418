"""The published tables, row by row: which program, plan and machine each row describes, by what its source states.

Facts about the software (what it overlaps, what it recomputes, how it computes the loss) stand once for each framework, with their source.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarks.published_software import (
    ALPA,
    BIGSCIENCE,
    FOUNDRY,
    MEGATRON_2021,
    MEGATRON_LOSS,
    SUMMED,
    TRITON_ATTENTION,
    SkippedError,
    megatron_core,
    nanotron,
)
from parafit.planner.cost.cost import Cost
from parafit.planner.cost.estimator import price
from parafit.planner.cost.framework import Software
from parafit.planner.machine.machine import Machine
from parafit.planner.networks.transformer import Transformer, transformer_program
from parafit.planner.plan import STORED, Plan

Row = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A row that can be priced: what ran, on what, and how long it took (0 where it did not fit)."""

    table: str
    sweep: str
    shape: Transformer
    plan: Plan
    machine: Machine
    software: Software
    seconds: float
    fits: bool
    memory_bytes: float = 0.0
    label: str = ""


def price_of(case: Case) -> Cost:
    """What the case is predicted to take."""
    return price(transformer_program(case.shape), case.plan, case.machine, software=case.software)


def number(row: Row, name: str, default: float | None = None) -> float:
    """A number of a row; skips the row where it is blank and has no default."""
    if row.get(name):
        return float(row[name])
    if default is None:
        raise SkippedError(f"no {name}")
    return default


def whole(row: Row, name: str, default: int | None = None) -> int:
    """A whole number of a row."""
    return int(number(row, name, default))


def trusted(row: Row) -> None:
    """Skips rows that the collection says not to trust."""
    for word in ("INCONSISTENT", "SUSPECT"):
        if word in row["note"]:
            raise SkippedError(f"marked {word}")


def layout(
    row: Row,
    *,
    dp: int,
    tp: int = 1,
    pp: int = 1,
    micro_batch: int,
    zero: int = 0,
    sequence_parallel: bool = False,
    precision: str = "bfloat16",
    interleave: int = 1,
    recompute: bool = False,
) -> Plan:
    """A plan from the sizes that tables print."""
    batch = whole(row, "global_batch")
    compute = {"batch": "data", "heads": "tensor", "ffn": "tensor", "vocabulary": "tensor", "blocks": "pipeline"}
    compute |= {"sequence": "tensor"} if sequence_parallel else {}
    axes = {axis: size for axis, size in (("pipeline", pp), ("data", dp), ("tensor", tp)) if size > 1}
    return Plan(
        axes=axes,
        compute={dim: axis for dim, axis in compute.items() if axis in axes},
        store=dict.fromkeys(STORED[:zero], "data") if dp > 1 else {},
        microbatches=max(1, round(batch / (dp * micro_batch))),
        recompute="blocks" if recompute else "none",
        precision=precision,
        interleave=interleave if pp > 1 else 1,
        schedule="interleaved" if interleave > 1 and pp > 1 else "1f1b",
    )


def shape_of(row: Row, **more) -> Transformer:
    """The network of a row."""
    sizes = {name: whole(row, name) for name in ("layers", "hidden", "heads")}
    sizes |= {"sequence": whole(row, "seq_len"), "vocabulary": whole(row, "vocab", 51200), "batch": whole(row, "global_batch")}
    return Transformer(**(sizes | {"ffn": whole(row, "ffn", 0), "kv_heads": whole(row, "kv_heads", 0)} | more))


def megatron_seconds(row: Row, shape: Transformer, teraflops: float) -> float:
    """Seconds of a step from Megatron's TFLOP/s, which count full recomputation (Narayanan et al. 2021, equation 3)."""
    hidden, layers, length = shape.hidden, shape.layers, shape.sequence
    per_token = 96 * layers * hidden**2 * (1 + length / (6 * hidden) + shape.vocabulary / (16 * layers * hidden))
    return per_token * shape.batch * length / (teraflops * 1e12 * whole(row, "gpus"))


SC21 = {
    **{f"GPT-{size}B": (16, 1) for size in ("1.7", "3.6", "7.5")},
    **{"GPT-18B": (8, 1), "GPT-39B": (4, 1), "GPT-76B": (2, 3), "GPT-145B": (2, 2), "GPT-310B": (1, 2)},
    **{"GPT-291B": (1, 1), "GPT-530B": (1, 3), "GPT-1T": (1, 1)},
}
"""Microbatch and chunks a stage by model: Megatron-LM examples/sc21/run_table_1.sh."""


def megatron(row: Row) -> Case:
    """Megatron-LM: tables of 2020, 2021 and 2024."""
    trusted(row)
    source = row["source"]
    if "H100" in row["gpu"]:
        return _megatron_core(row)
    old = "tables.tex" in source
    shape = shape_of(row, fused=False, dropout=True, loss_passes=MEGATRON_LOSS)
    parts = whole(row, "gpus") // whole(row, "dp")
    tp = whole(row, "tp", min(8, parts))
    pp = whole(row, "pp", parts // tp)
    micro, chunks = (shape.batch // whole(row, "dp"), 1) if old else SC21[row["model"]]
    preset = "v100x16" if "V100" in row["gpu"] else "a100x8"
    seconds = number(row, "step_time_s", 0.0) or megatron_seconds(row, shape, number(row, "tflops_per_gpu"))
    plan = layout(row, dp=whole(row, "dp"), tp=tp, pp=pp, micro_batch=micro, interleave=chunks if "april" in source else 1, recompute=True)
    table = "Megatron 2020" if old else "Megatron SC21" if "april" in source else "Megatron January 2021"
    return Case(
        table=table,
        sweep=f"{table} {row['model']}",
        shape=shape,
        plan=plan,
        machine=_cluster(preset, row),
        software=MEGATRON_2021,
        seconds=seconds,
        fits=True,
        label=row["model"],
    )


def _megatron_core(row: Row) -> Case:
    """Megatron-Core 0.8: microbatch and chunks are not printed; taken are those of the lowest price that fits. Its schedule with chunks
    takes only numbers of microbatches that the stages divide."""
    shape = shape_of(row, tied=False, gradient_itemsize=4, compiled=True, loss_passes=MEGATRON_LOSS)
    tp, pp = whole(row, "tp", 8), whole(row, "pp", 6)
    dp = whole(row, "gpus") // (tp * pp)
    table = f"Megatron-Core H100{' digitised' if row['status'] == 'digitised' else ''}"
    seconds = 0.75 * megatron_seconds(row, shape, number(row, "tflops_per_gpu"))  # these count no recomputation
    plans = [
        layout(row, dp=dp, tp=tp, pp=pp, micro_batch=micro, zero=1, sequence_parallel=True, interleave=chunks)
        for micro in (1, 2, 4)
        for chunks in (1, 2, 4, 7)
        if shape.batch % (dp * micro) == 0
        and (chunks == 1 or (pp > 1 and shape.layers % (pp * chunks) == 0 and shape.batch // (dp * micro) % pp == 0))
    ]
    if not plans:
        raise SkippedError("layout not given, and tensor 8 with pipeline 6 does not divide the batch")
    common = {"shape": shape, "machine": _cluster("h100x8", row), "seconds": seconds, "fits": True}
    cases = [Case(table=table, sweep="", plan=plan, software=megatron_core(plan), label=row["model"], **common) for plan in plans]
    prices = [(case, price_of(case)) for case in cases]
    fitting = [pair for pair in prices if pair[1].peak_bytes <= pair[0].machine.device.memory_bytes]
    return min(fitting or prices, key=lambda pair: pair[1].seconds)[0]


def foundry(row: Row) -> Case:
    """MosaicML llm-foundry: FSDP, eager PyTorch, FlashAttention in Triton."""
    trusted(row)
    if row["precision"] == "amp_fp8":
        raise SkippedError("fp8")
    pure = "PURE" in row["sharding"]
    shape = shape_of(
        row, gradient_itemsize=2 if pure else 4, logit_itemsize=2, slot_bytes=10
    )  # FSDP keeps no copy beside the float32 shard
    zero = whole(row, "zero_stage")
    plan = layout(row, dp=whole(row, "dp"), micro_batch=whole(row, "micro_batch"), zero=zero, recompute=row["recompute"] == "full")
    machine = _cluster({"a100_40gb": "a100x8-40gb", "a100_80gb": "a100x8", "h100_80gb": "h100x8"}[row["gpu"]], row)
    seconds = shape.batch * shape.sequence / (number(row, "tokens_per_s_per_gpu") * whole(row, "gpus"))
    return Case(
        table=f"llm-foundry {row['gpu']}",
        sweep=f"{row['gpu']} {row['gpus']} {row['seq_len']}",
        shape=shape,
        plan=plan,
        machine=machine,
        software=replace(FOUNDRY, attention=TRITON_ATTENTION["h100" in row["gpu"]]),
        seconds=seconds,
        fits=True,
        label=f"{row['model']} s={row['seq_len']} n={row['gpus']}",
    )


def ultrascale(row: Row) -> Case:
    """Ultra-scale playbook: nanotron on H100 with EFA."""
    trusted(row)
    shape = shape_of(row, gated=True, rotary=True, biases=False, gradient_itemsize=4, tied="1B" in row["model"], loss_passes=MEGATRON_LOSS)
    sizes = {name: whole(row, name) for name in ("dp", "tp", "pp")}
    shape = replace(shape, spare_itemsize=4 if sizes["dp"] > 1 and row["zero_stage"] == "0" else 2)
    plan = layout(row, **sizes, micro_batch=whole(row, "micro_batch"), zero=whole(row, "zero_stage"), sequence_parallel=sizes["tp"] > 1)
    gpus, fits, machine = whole(row, "gpus"), row["status"] == "ok", _cluster("h100x8", row, "efa")
    seconds = shape.batch * shape.sequence / (number(row, "tokens_per_s_per_gpu") * gpus) if fits else 0.0
    return Case(
        table=f"ultra-scale {row['model'][-2:]}",
        sweep=f"{row['model']} {gpus}",
        shape=shape,
        plan=plan,
        machine=machine,
        software=nanotron(shape, plan, machine.hosts),
        seconds=seconds,
        fits=fits,
        memory_bytes=number(row, "mem_gib", 0.0) * 2**30,
        label=f"{row['model']} n={gpus} mbs={row['micro_batch']} tp={sizes['tp']} pp={sizes['pp']} dp={sizes['dp']} z={row['zero_stage']}",
    )


def bigscience(row: Row) -> Case:
    """BigScience: Megatron-DeepSpeed on Jean Zay."""
    trusted(row)
    if row["status"] == "failed":
        raise SkippedError("failed for another reason than memory")
    wide = row["precision"] == "bf16"
    a100 = "A100" in row["gpu"]
    shape = shape_of(
        row,
        fused=False,
        dropout=True,
        gradient_itemsize=4 if wide else 2,
        spare_itemsize=2 if wide else 0,
        vocabulary=250880 if a100 else 51200,
        loss_passes=MEGATRON_LOSS,
    )
    sizes = {name: whole(row, name) for name in ("dp", "tp", "pp")}
    if math.prod(sizes.values()) != whole(row, "gpus"):
        raise SkippedError("layout does not multiply to the devices")
    if row["zero_stage"] in ("2", "3"):
        raise SkippedError("ZeRO 2 or 3 with offload or of an old branch")
    micro = whole(row, "micro_batch")
    zero = 1 if row["zero_stage"].startswith("1") or "tr3m" in row["source"] else 0  # tr3m-1B3-emb-norm-pile.slurm: ZERO_STAGE=1
    plan = layout(row, **sizes, micro_batch=micro, zero=zero, recompute=row["recompute"] == "full")
    fits = row["status"] == "ok"
    seconds = number(row, "step_time_s", 0.0)
    if fits and not seconds:
        raise SkippedError("no step time")
    preset = "a100x8" if a100 else "v100x4-16gb" if "16GB" in row["gpu"] else "v100x4"
    table = "BigScience A100" if a100 else "BigScience V100"
    return Case(
        table=table,
        sweep=f"{row['gpu']} {row['model']} {row['gpus']} {row['global_batch']}",
        shape=shape,
        plan=plan,
        machine=_cluster(preset, row, "jean-zay" if a100 else None),
        software=replace(BIGSCIENCE, equal_stages=shape.layers % sizes["pp"] == 0 or (shape.layers + 2) % sizes["pp"] != 0),
        seconds=seconds,
        fits=fits,
        memory_bytes=number(row, "mem_gib", 0.0) * 2**30,
        label=f"{row['model']} {row['layers']}x{row['hidden']}/{row['heads']} mbs={micro} gbs={row['global_batch']} {row['precision']}",
    )


def alpa(row: Row) -> Case:
    """Alpa's artifact: GPT on V100."""
    trusted(row)
    if not row["model"].startswith("GPT"):
        raise SkippedError("not a dense transformer")
    sizes = {name: whole(row, name) for name in ("dp", "tp", "pp")}
    fits = row["status"] == "ok"
    zero = whole(row, "zero_stage", 2 if "auto_sharding" in row["model"] else 0)  # it prefers to reduce-scatter: same bytes as zero_2
    shape = shape_of(row, fused=False, dropout="megatron" in row["model"], compiled="megatron" not in row["model"])
    gpus, micro = whole(row, "gpus"), whole(row, "micro_batch", shape.batch // sizes["dp"])
    plan = layout(row, **sizes, micro_batch=micro, zero=zero, recompute=True)
    if row["step_time_s"] or not fits:
        seconds = number(row, "step_time_s", 0.0)
    else:
        hidden, length = shape.hidden, shape.sequence
        flops = 96 * length * hidden**2 * shape.layers * (1 + length / (6 * hidden)) + 6 * length * hidden * shape.vocabulary
        seconds = flops * shape.batch / (number(row, "tflops_per_gpu") * 1e12 * gpus)
    machine = _cluster("v100x8-16gb", row, "p3.16xlarge")
    table = "Alpa Megatron" if "megatron" in row["model"] else "Alpa 8 layers"
    return Case(
        table=table,
        sweep=f"{row['model'].split(' (')[0]} {gpus}",
        shape=shape,
        plan=plan,
        machine=machine,
        software=ALPA,
        seconds=seconds,
        fits=fits,
        memory_bytes=number(row, "mem_gib", 0.0) * 2**30,
        label=f"{row['model']} {plan.short()}",
    )


def bert(row: Row) -> Case:
    """NVIDIA's BERT-large in TensorFlow with XLA. TensorFlow's automatic precision lets a softmax between half-precision products stay in
    half precision, but takes means, and so what passes through normalisations, in float32 (auto_mixed_precision_lists.h, from memory)."""
    trusted(row)
    if "BERT" not in row["model"]:
        raise SkippedError("convolutional")
    half = row["precision"].startswith("fp16")
    precision = {"fp16 mixed": "float16", "tf32": "tensorfloat32", "fp32": "float32"}[row["precision"]]
    shape = shape_of(
        row,
        fused=False,
        dropout=True,
        compiled=True,
        itemsize=2 if half else 4,
        activation_itemsize=4,
        score_itemsize=2 if half else 4,
        gradient_itemsize=4,
        predictions={128: 20, 512: 80}[whole(row, "seq_len")],
    )  # max_predictions_per_seq of the README's scripts
    plan = layout(row, dp=whole(row, "dp"), micro_batch=whole(row, "micro_batch"))
    preset = "a100x8" if "A100" in row["gpu"] else "v100x16" if "DGX-2" in row["gpu"] else "v100x8"
    software = replace(SUMMED, precision=precision)
    return Case(
        table=f"BERT {preset[:4]} {row['precision']}",
        sweep=f"{row['gpu']} {row['precision']} {row['seq_len']}",
        shape=shape,
        plan=plan,
        machine=_cluster(preset, row),
        software=software,
        seconds=number(row, "step_time_s"),
        fits=True,
        label=f"{row['gpu']} n={row['gpus']} s={row['seq_len']}",
    )


def fms(row: Row) -> Case:
    """IBM's fms-fsdp: FSDP, compiled, FlashAttention 2; Vela's nodes have two ports of 100 Gbit/s for 8 GPUs (from memory)."""
    trusted(row)
    shape = shape_of(row, gated=True, rotary=True, biases=False, tied=False, compiled=True, gradient_itemsize=2)
    plan = layout(row, dp=whole(row, "dp"), micro_batch=whole(row, "micro_batch"), zero=3, recompute=row["recompute"] == "full")
    if row["sharding"] == "HSDP":
        plan = replace(plan, store_group=8)
    seconds = shape.batch * shape.sequence / (number(row, "tokens_per_s_per_gpu") * whole(row, "gpus"))
    return Case(
        table="fms-fsdp",
        sweep="",
        shape=shape,
        plan=plan,
        machine=_cluster("a100x8", row, "25Gb"),
        software=Software(),
        seconds=seconds,
        fits=True,
        label=row["model"],
    )


def _cluster(preset: str, row: Row, network: str | None = None) -> Machine:
    return Machine.load(preset, network=network).of(whole(row, "gpus"))


TABLES: dict[str, Callable[[Row], Case]] = {
    "megatron_readme": megatron,
    "llm_foundry_mpt": foundry,
    "ultrascale_playbook_h100": ultrascale,
    "bigscience_a100_176b_sweep": bigscience,
    "bigscience_v100_and_bloom": bigscience,
    "alpa_osdi22_v100": alpa,
    "nvidia_dlexamples_bert_resnet": bert,
    "ibm_fms_fsdp": fms,
}
