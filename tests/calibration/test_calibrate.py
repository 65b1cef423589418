"""What this machine does: found, measured, kept; residuals of past fits. No absolute time is asserted."""

import itertools
import json
import math
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import numpy as np
import pytest

from parafit import backends
from parafit.backends.backend import Backend
from parafit.backends.cpu import malloc
from parafit.calibration import calibrate, detect, history, probes, product_probes
from parafit.calibration.history import Residual, append, correction, load
from parafit.planner.cost.estimator import Estimator, price
from parafit.planner.cost.framework import Software
from parafit.planner.machine.machine import Device
from parafit.planner.machine.matmul import Matmul
from parafit.planner.networks import named
from parafit.planner.plan import Plan
from parafit.tracing.trace import trace_loss


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "parafit" / "machines"


def few_probes():
    yield from (probes._network(2), probes._network(4), probes._turn(), *product_probes.dense_layer(16, 16, 16))
    for size in (2**10, 2**14):
        yield from (probes._elementwise(size), probes._update(size), *probes._reductions(size), probes._slice(size))
        yield from (probes._function("exp", jax.numpy.exp, size), probes._arithmetic(size))
    yield from (product_probes.matmul("float64", 8, 8, 8), product_probes.batched("float32", 4, 4, 4))
    yield from (*product_probes.convolutions(1, 4, 2, 2, window=(3, 3)), *product_probes.convolutions(1, 4, 2, 2, window=(3,)))


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """A machine calibrated with few probes, and the file it was kept in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(calibrate, "probes", few_probes)
        patch.setattr(calibrate, "_LEAST_PROBES", 99)
        return calibrate.calibrate(seconds=1.0), detect.machine_path(), detect.here()


def test_a_machine_that_was_never_calibrated_says_that_its_numbers_are_defaults(cache):
    machine = detect.here()
    assert not cache.exists(), "looking at the machine must not write"
    assert machine.device_count == jax.device_count()
    written = json.loads(machine.to_json())["device"]
    assert written["memory_bytes_per_second"]["source"] == "default"
    assert written["memory_bytes"]["source"] == "the operating system"
    assert 0 < machine.device.memory_bytes < 1e16


def test_a_calibration_is_kept_and_found_again(calibrated):
    machine, path, found = calibrated
    assert found == machine
    assert path.exists()
    assert [each.suffix for each in path.parent.iterdir()] == [".json"], "a part of a file is left"


def test_every_measured_number_says_how(calibrated):
    sources = calibrated[0].sources
    for name in ("matmul.table", "peak_flops.float32", "curves.operation", "loop_seconds", "curves.elementwise", "dispatch_seconds"):
        assert re.search(r"measured with parafit on .+, JAX \d.*, \d{4}-\d\d-\d\d", sources[f"device.{name}"]), name


def test_a_calibration_has_curves_that_rise_and_products_of_every_form(calibrated):
    device = calibrated[0].device
    assert {"elementwise", "update", "reduction", "slice", "operation", "function", "arithmetic"} <= set(device.curves)
    for points in device.curves.values():
        assert all(small <= large and fast <= slow for (small, fast), (large, slow) in itertools.pairwise(points))
    forms = {row[0] for row in device.matmul.table}
    assert {"float32", "float32 gradient", "float64", "float32 batched", "float32 convolution", "float32 correlation"} <= forms


def test_a_calibrated_machine_prices_more_work_higher(calibrated):
    machine = calibrated[0].of(1)
    small, large = (price(named("gpt:125m", batch=batch), Plan(), machine) for batch in (2, 4))
    assert small.seconds < large.seconds
    assert math.isclose(sum(large.times.values()), large.seconds)


@pytest.mark.parametrize("content", [b'{"format": 99}', b'{"format": 1, "na', b"", b"\xff\xfe\0", b"[1]"])
def test_a_file_of_another_version_or_a_damaged_one_goes_with_a_line(cache, caplog, content):
    path = detect.machine_path()
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert detect.here() == detect.detect()
    assert "measure anew with `parafit machine --calibrate`" in caplog.text
    caplog.clear()
    assert not path.exists()
    assert detect.here() == detect.detect()
    assert not caplog.records


def test_a_calibration_is_its_owners_alone_and_a_small_part_of_what_may_be_kept(calibrated):
    path = calibrated[1]
    assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
    assert stat.S_IMODE(path.parent.stat().st_mode) & 0o077 == 0
    assert path.stat().st_size < calibrate._MOST_BYTES / 100


def test_the_id_tells_versions_and_devices_apart():
    name = detect.machine_id()
    assert f"jax-{jax.__version__}" in name
    assert f"{jax.device_count()}-cpu" in name
    assert re.fullmatch(r"[a-z0-9.-]+", name)


@pytest.mark.parametrize(
    ("kind", "memory"), [("NVIDIA H100 80GB HBM3", 80e9), ("NVIDIA A100-SXM4-40GB", 40e9), ("Tesla V100-SXM2-16GB", 16e9)]
)
def test_an_accelerator_has_the_numbers_of_its_preset(monkeypatch, kind, memory):
    class Fake:
        device_kind, platform = kind, "gpu"

    monkeypatch.setattr(jax, "devices", lambda: [Fake()])
    assert detect.detect().device.memory_bytes == pytest.approx(memory, rel=0.1)


def test_several_devices_have_their_link_measured():
    script = """
import jax
jax.config.update("jax_num_cpu_devices", 4)
from parafit.calibration import calibrate, detect
link = calibrate._linked(detect.detect()).inner
print([int(size) for size, _ in link.measured], link.alpha_seconds > 0, link.bytes_per_second > 0)
"""
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "[2, 4] True True"


def test_what_starting_operations_takes_grows_with_the_program(calibrated):
    machine = calibrated[0].of(1)
    slower = {**machine.device.curves, "operation": tuple((size, 2 * seconds) for size, seconds in machine.device.curves["operation"])}
    program = trace_loss(probes.network_loss, *probes.network_shapes(6), optimizer=probes.ADAM)
    costs = [price(program, Plan(), replace(machine, device=replace(machine.device, curves=curves)))
             for curves in (machine.device.curves, slower)]  # fmt: skip
    assert costs[1].times["operations"] == pytest.approx(2 * costs[0].times["operations"])
    assert costs[0].times["operations"] > 0


def test_rows_of_a_near_table_come_faster():
    curves = {"elementwise": ((1e3, 1e-7), (1e8, 1e-2)), "gather": ((1e3, 1e-7), (1e7, 1e-2)), "gather_near": ((1e3, 1e-7), (1e7, 1e-3))}
    device = Device(name="", peak_flops={"float32": 1e9}, memory_bytes=1e9, memory_bytes_per_second=1e9, curves=curves)
    machine = replace(detect.detect(), device=device)

    def seconds(words):
        shapes = jax.ShapeDtypeStruct((words, 16), np.float32), jax.ShapeDtypeStruct((4096,), np.int32)
        program = trace_loss(lambda table, words: jax.numpy.take(table, words, axis=0, mode="clip").sum(), *shapes)
        return price(program, Plan(), machine).times["forward gather"]

    assert seconds(100) < seconds(100_000)


def test_probes_compute_what_they_say():
    x, kernel, result = np.arange(12.0).reshape(3, 4), np.arange(20.0).reshape(4, 5), np.arange(15.0).reshape(3, 5)
    products = {probe.kind: probe for probe in product_probes.dense_layer(3, 4, 5)}
    found = {kind: probe.body((x, kernel, result)) for kind, probe in products.items()}
    np.testing.assert_allclose(found["float32"][2], x @ kernel)
    np.testing.assert_allclose(found["float32 transposed"][0], result @ kernel.T)
    np.testing.assert_allclose(found["float32 gradient"][1], x.T @ result)
    assert [probe.size for probe in products.values()] == [(3, 4, 5), (3, 5, 4), (5, 3, 4)]
    sizes = [probe.size for probe in probes.probes() if probe.kind == "elementwise"]
    assert sizes == sorted(sizes)


def machine_of(table):
    """A calibrated machine with these rates of products, that does everything else at once."""
    device = Device(
        name="",
        peak_flops={"float32": 1e10},
        memory_bytes=1e9,
        memory_bytes_per_second=1e9,
        matmul=Matmul(table=table),
        curves={"elementwise": ((1e3, 1e-12), (1e9, 1e-12))},
    )
    return replace(detect.detect(), device=device)


def test_each_product_of_a_layer_has_rates_of_its_own():
    """Forward, for the kernel's gradient and for the input's; of batched kernels all are batched products."""
    rates = {"float32": 8e9, "float32 gradient": 4e9, "float32 transposed": 2e9, "float32 batched": 1e9}
    machine = machine_of(tuple((name, 64, 64, 64, rate) for name, rate in rates.items()))

    def ratio(*batch):
        square = jax.ShapeDtypeStruct((*batch, 64, 64), np.float32)
        weights = {"first": square, "second": square}
        program = trace_loss(lambda kernels, x: (x @ kernels["first"] @ kernels["second"]).sum(), weights, square)
        times = price(program, Plan(), machine).times
        return times["backward matmul"] / times["forward matmul"]

    assert ratio() == pytest.approx((2 * 2 + 4) / 2, rel=1e-3), "two gradients of kernels, and one of an input"
    assert ratio(8) == pytest.approx(3 / 2, rel=1e-3)


def test_a_part_of_a_batch_is_convolved_with_whole_kernels():
    """Two microbatches take as long as the batch where the rate follows the kernel alone."""
    shapes = [(rows, inner, 8) for rows in (512, 1024, 2048) for inner in (18, 36, 72)]
    machine = machine_of(tuple(("float32 convolution", *shape, 1e8 * shape[1]) for shape in shapes))

    def loss(kernel, images):
        return jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")).sum()

    program = trace_loss(loss, jax.ShapeDtypeStruct((3, 3, 4, 8), np.float32), jax.ShapeDtypeStruct((8, 16, 16, 4), np.float32))
    whole, halves = (price(program, Plan(microbatches=count), machine).times["forward convolution"] for count in (1, 2))
    assert halves == pytest.approx(whole, rel=0.02)


def test_what_was_used_long_ago_is_waited_for():
    """Layer after layer, forward and back: the first layer's result is read last, when much else has been touched."""
    near, far = ((1e3, 1e-7), (1e5, 1e-5), (1e9, 1e-1)), ((1e3, 1e-7), (1e5, 1e-5), (2e6, 2e-4), (1e9, 1.0))

    def loss(kernels, x):
        for kernel in kernels:
            x = jax.numpy.tanh(x @ kernel)
        return x.sum()

    square = jax.ShapeDtypeStruct((256, 256), np.float32)

    def waited(layers, curve):
        program = trace_loss(loss, [square] * layers, jax.ShapeDtypeStruct((4096, 256), np.float32))
        device = Device(name="", peak_flops={"float32": 1e12}, memory_bytes=1e9, memory_bytes_per_second=1e9, curves={"elementwise": curve})
        pricing = Estimator(program, Plan(), replace(detect.detect(), device=device), Software())
        return sum(pricing.measured.missing_seconds(operation, 1e6) for operation in program.operations)

    assert waited(4, near) == pytest.approx(0.0, abs=1e-9), "memory that is as fast everywhere is never waited for"
    assert 0 < waited(2, far) < waited(4, far) / 2, "more layers, and each of them from farther away"


def test_slices_that_a_loop_stores_are_copies_and_come_from_afar_where_much_is_touched():
    def loss(kernel, xs):
        return jax.lax.scan(lambda hidden, x: (jax.numpy.tanh(x + hidden @ kernel), None), xs[0], xs)[0].sum()

    def seconds(steps, far):
        shapes = jax.ShapeDtypeStruct((64, 64), np.float32), jax.ShapeDtypeStruct((steps, 128, 64), np.float32)
        program = trace_loss(loss, *shapes)
        flat = ((1e3, 1e-9), (1e9, 1e-3))
        curves = {"elementwise": flat, "stack_near": ((1e3, 1e-6), (1e5, 1e-6)), "stack": ((1e3, far), (1e5, far))}
        device = Device(name="", peak_flops={"float32": 1e12}, memory_bytes=1e9, memory_bytes_per_second=1e9, curves=curves)
        measured = Estimator(program, Plan(), replace(detect.detect(), device=device), Software()).measured
        found = ((operation, measured.partition.of(operation).bytes) for operation in program.operations)
        return sum(operation.steps * measured.stacking_seconds(operation, nbytes) for operation, nbytes in found)

    stored = seconds(100, far=1e-6)
    copies = stored / 100e-6
    assert copies >= 1
    assert copies == pytest.approx(round(copies)), "one at every step for each array that is stored"
    assert seconds(100, far=5e-6) > stored
    assert seconds(5, far=5e-6) == pytest.approx(seconds(5, far=1e-6)), "few steps touch little"


RESIDUAL = Residual(
    machine="m",
    model="net",
    batch=32,
    plan="single",
    predicted_seconds=1.0,
    measured_seconds=1.2,
    predicted_bytes=10,
    measured_bytes=11,
    date="2026-01-01T00:00:00",
)


def test_residuals_come_back_in_order(tmp_path):
    path = tmp_path / "folder" / "residuals.jsonl"
    assert load(path) == []
    for batch in (1, 2, 3):
        append(replace(RESIDUAL, batch=batch), path)
    append(replace(RESIDUAL, machine="other"), path)
    assert [each.batch for each in load(path, machine="m")] == [1, 2, 3]
    assert len(load(path)) == 4


@pytest.mark.parametrize("junk", ['{"machine": "m", "mod', "[]", '{"machine": "m"}', "\x00\xff", '{"a": NaN}'])
def test_a_torn_line_costs_no_other(tmp_path, junk):
    path = tmp_path / "residuals.jsonl"
    append(RESIDUAL, path)
    with path.open("a", encoding="latin-1") as file:
        file.write(junk)
    append(replace(RESIDUAL, batch=64), path)
    assert [each.batch for each in load(path)] == [32, 64]


def test_impossible_residuals_are_passed_over(tmp_path):
    path = tmp_path / "residuals.jsonl"
    for seconds in (0.0, -1.0, math.inf, math.nan):
        append(replace(RESIDUAL, measured_seconds=seconds), path)
    assert load(path) == []


def test_the_file_stays_small_and_keeps_the_newest(tmp_path, monkeypatch):
    path = tmp_path / "residuals.jsonl"
    monkeypatch.setattr(history, "MOST_BYTES", 2000)
    for batch in range(1, 101):
        append(replace(RESIDUAL, batch=batch), path)
    assert path.stat().st_size <= 2000
    kept = [each.batch for each in load(path)]
    assert kept == list(range(kept[0], 101))


def test_processes_that_append_at_once_lose_nothing(tmp_path):
    path = tmp_path / "residuals.jsonl"
    script = f"""
from pathlib import Path
from parafit.calibration.history import Residual, append
for batch in range(50):
    append(Residual(**{RESIDUAL.__dict__!r}), Path({str(path)!r}))
"""
    running = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert len(load(path)) == 150


def test_correction_is_the_median_of_recent_fits_of_this_program_if_there_are_any():
    slow = [replace(RESIDUAL, predicted_seconds=2.0, measured_seconds=6.0)] * 5
    assert correction([*slow, RESIDUAL], 1.0) == pytest.approx(1.2)
    old = [replace(RESIDUAL, measured_seconds=100.0)] * 3
    assert correction(old + [RESIDUAL] * history.RECENT, 1.0) == pytest.approx(1.2)


def test_other_programs_correct_as_far_as_they_agree():
    def of(*ratios):
        return correction([replace(RESIDUAL, measured_seconds=ratio) for ratio in ratios], 2.0)

    assert of(3.0, 3.0, 3.0) == pytest.approx(3.0, rel=0.01), "a machine that others keep busy"
    assert of(3.0, 3.1, 2.9) > of(3.0, 6.0, 1.5) > 1
    assert of(1.05, 1.05, 1.05) < 1.02, "no more than prices are wrong by in any case"
    assert of(1 / 3, 1 / 3) == pytest.approx(1 / 3, rel=0.01)
    assert of(0.9, 1.0, 1.1) == 1.0


def test_a_corrected_prediction_is_nearer_to_what_comes():
    load_factors = np.exp(np.random.default_rng(0).normal(np.log(1.4), 0.1, 40))
    fits = [replace(RESIDUAL, measured_seconds=factor) for factor in load_factors]
    raw = [abs(math.log(fit.measured_seconds / fit.predicted_seconds)) for fit in fits]
    mended = [abs(math.log(fit.measured_seconds / fit.predicted_seconds / correction(fits[:place]))) for place, fit in enumerate(fits)]
    assert np.median(mended) < np.median(raw) / 2


def test_residuals_need_no_jax():
    script = "import sys, parafit.calibration.history; print([name for name in ('jax', 'keras') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@dataclass
class Watched:
    """In the place of a probe: tells when it is compiled and timed."""

    kind: str
    tell: Callable[[str, str], None]
    seconds: float = 1.0

    def compile(self):
        self.tell("compile", self.kind)

    def time(self):
        self.tell("time", self.kind)


def test_probes_are_compiled_and_timed_with_the_heap_as_a_fit_keeps_it():
    seen = set()
    probe = Watched("elementwise", lambda name, _: seen.add((name, malloc._compiling > 0, malloc._runs > 0)))
    with backends.current().running():
        calibrate._measure([probe], ends=0.0)
    assert seen == {("compile", True, True), ("time", False, True)}


def test_probes_of_a_kind_follow_each_other():
    """A library's threads are awake then; see `Probe.seconds`."""
    timed = []
    calibrate._measure([Watched(kind, lambda name, kind: timed.append((name, kind))) for kind in 2 * ("a", "b", "c")], ends=0.0)
    first = [kind for name, kind in timed if name == "time"][:6]
    assert [kind for kind, _ in itertools.groupby(first)] == ["a", "b", "c"]


def test_of_calls_of_a_library_the_lower_quartile_counts():
    called, own = product_probes.matmul("float32", 2, 2, 2), probes._elementwise(2**10)
    called.samples, own.samples = [5.0, 1.0, 4.0, 2.0, 3.0], [5.0, 1.0, 4.0, 2.0, 3.0]
    assert (called.seconds, own.seconds) == (2.0, 3.0)


def test_where_jax_computes_elsewhere_probes_are_compiled_as_they_are():
    told = []

    class Told(Backend):
        def compile(self, lowered, options):
            told.append(options)
            return super().compile(lowered, options)

    *_, convolution = product_probes.convolutions(1, 4, 2, 2, window=(3, 3))
    with backends.using(Told()):
        convolution.compile()
    assert told == [{}]
