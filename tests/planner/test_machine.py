"""Machines: presets, files, errors, and the shape of matmul rates and collective times."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parafit.errors import MachineError
from parafit.planner.cost.collectives import ALL_REDUCE, KINDS, SEND, Group, seconds
from parafit.planner.machine.files import PRESETS
from parafit.planner.machine.machine import Machine
from parafit.planner.machine.matmul import rate_between

NAMES = sorted(path.stem for path in PRESETS.glob("*.json"))


@pytest.mark.parametrize("name", NAMES)
def test_every_number_of_a_preset_has_a_source(name):
    machine = Machine.load(name, hosts=2)
    assert Machine.from_json(machine.to_json()) == machine
    for path in ("device.memory_bytes", "device.memory_bytes_per_second", "inner.bytes_per_second", "network.alpha_seconds"):
        assert machine.sources[path].strip(), path
    assert machine.device_count == 2 * machine.devices_per_host


def test_network_by_bandwidth_or_by_name():
    assert Machine.load("h100x8", network="200Gb").network.bytes_per_second == 25e9
    assert Machine.load("h100x8", network="efa").network.name == "EFA"
    with pytest.raises(MachineError, match=r"network='fast'.*'400Gb' or one of efa"):
        Machine.load("h100x8", network="fast")


def preset(change):
    content = json.loads(Machine.load("a100x8").to_json())
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["device"].pop("memory_bytes"), "device lacks memory_bytes"),
        (lambda c: c.pop("network"), "no 'network'"),
        (lambda c: c["device"]["memory_bytes"].update(value=-1), r"device.memory_bytes=-1: expected a number above 0"),
        (lambda c: c["inner"]["share"].update(value=1.5), r"inner.share=1.5: .* at most 1"),
        (lambda c: c["hosts"].update(value=0), "hosts=0: expected a whole number"),
        (lambda c: c["device"].update(memory_bytes=80e9), "has no source"),
        (lambda c: c["device"].update(colour={"value": 1, "source": "x"}), "colour, which parafit does not know"),
        (lambda c: c["device"].update(peak_flops={"int4": {"value": 1.0, "source": "x"}}), "precision 'int4'"),
        (lambda c: c.update(format=9), "not a machine of format 1"),
    ],
)
def test_impossible_files_say_what_is_wrong(tmp_path, change, message):
    path = tmp_path / "machine.json"
    path.write_text(preset(change), encoding="utf-8")
    with pytest.raises(MachineError, match=message):
        Machine.load(path)


def test_a_missing_file_names_the_presets():
    with pytest.raises(MachineError, match="a100x8"):
        Machine.load("cray-1")


def test_a_precision_the_device_lacks():
    with pytest.raises(MachineError, match="no peak_flops for 'bfloat16'"):
        Machine.load("v100x8").device.peak("bfloat16")


@pytest.mark.parametrize(("name", "widths"), [("float32", (1, 2)), ("float32 gradient", (0, 2))])
def test_rates_between_follow_how_rows_share_lines_of_a_cache(name, widths):
    def shape(width):
        return [width if place in widths else 64 for place in range(3)]

    rates = [(name, *shape(800), 2e11), (name, *shape(1024), 1e11)]
    assert rate_between(rates, name, *shape(1000)) > 1.5e11, "1,000 is nearer to 1,024, but its rows start at other lines"
    rates = [(name, *shape(112), 2e11), (name, *shape(104), 1e11)]
    assert rate_between(rates, name, *shape(108)) < 1.2e11, "rows of 112 numbers start with a line, those of 104 and 108 do not"


def test_a_calibrated_machine_is_a_table_of_rates():
    def change(content):
        table = [["float32", 256, 256, 256, 2e11], ["float32", 2048, 2048, 2048, 4e11]]
        content["device"]["matmul"]["table"] = {"value": table, "source": "measured"}

    device = Machine.from_json(preset(change)).device
    assert device.matmul_seconds("float32", (1, 256, 256, 256)) == pytest.approx(2 * 256**3 / 2e11)
    between = 2 * 512**3 / device.matmul_seconds("float32", (1, 512, 512, 512))
    assert 2e11 < between < 4e11
    assert device.matmul_seconds("float16", (1, 256, 256, 256)) > 0, "precisions that were not measured keep the geometry"


def rate(device, *shape):
    batches, rows, inner, columns = shape
    return 2 * batches * rows * inner * columns / device.matmul_seconds("bfloat16", shape)


def test_shapes_that_fit_the_hardware_run_faster():
    device = Machine.load("a100x8").device
    best = rate(device, 1, 8192, 8192, 8192)
    assert 0.6 * 312e12 < best < 0.87 * 312e12
    assert rate(device, 1, 8192, 128, 8192) < 0.5 * best, "a short inner length does not fill the pipeline"
    assert rate(device, 1, 130, 8192, 128) < 0.1 * best, "two tiles leave most of the device idle"
    assert rate(device, 512, 2048, 108, 2048) < 0.3 * rate(device, 512, 2048, 112, 2048), "heads of 108 lose the tensor cores"


GROUPS = st.builds(Group, st.integers(1, 64), st.sampled_from([1, 2, 8]))


@given(st.sampled_from(KINDS), st.sampled_from(NAMES), GROUPS, st.floats(1, 1e11), st.floats(1, 1e9))
def test_more_bytes_never_take_less_time(kind, name, group, nbytes, more):
    machine = Machine.load(name, hosts=64)
    assert 0 <= seconds(kind, nbytes, group, machine) <= seconds(kind, nbytes + more, group, machine)


def test_large_all_reduces_move_at_the_measured_bus_bandwidth():
    machine = Machine.load("a100x8", hosts=16)
    bus = 2 * 7 / 8 * 4e9 / seconds(ALL_REDUCE, 4e9, Group(8), machine)
    assert bus == pytest.approx(235e9, rel=0.02), "stas00/ml-engineering: 235 GB/s on 8 A100"
    across = 2 * 127 / 128 * 4e9 / seconds(ALL_REDUCE, 4e9, Group(128), machine)
    assert 0.7 * 180e9 < across < 180e9, "eight ports of 25 GB/s at 90 %"


def test_a_group_with_one_device_a_host_has_one_port():
    machine = Machine.load("a100x8", hosts=16)
    assert seconds(ALL_REDUCE, 1e9, Group(16, stride=8), machine) > 3 * seconds(ALL_REDUCE, 1e9, Group(16), machine)


def test_one_group_gets_no_more_than_was_measured_over_as_many_hosts():
    """With EFA: one device a host drives its own port; eight do not drive eight, because the channels of one group do not fill them."""
    machine = Machine.load("h100x8", hosts=32, network="efa")
    rates = [1e11 / seconds(ALL_REDUCE, 1e11, group, machine) for group in (Group(32, stride=8), Group(64, stride=4), Group(256))]
    assert rates[0] == pytest.approx(0.85 * 50e9 / 2, rel=0.05)
    assert rates[1] == pytest.approx(64.93e9 / 2, rel=0.05)
    assert rates[2] == pytest.approx(64.93e9 / 2, rel=0.05)


def test_small_tiles_lose_less_where_products_are_slower():
    """What a small tile loses it waits for operands: at an eighth of the rate, operands twice as wide cost a quarter of that."""
    device = Machine.load("v100x8").device
    efficiency = {
        precision: 2
        * 512**3
        / device.matmul_seconds(precision, (1, 512, 512, 512))
        / device.peak(precision)
        / device.matmul.best[precision]
        for precision in ("float16", "float32")
    }
    assert efficiency["float32"] > 1.2 * efficiency["float16"]
    assert all(value < 1 for value in efficiency.values())


def test_a_shared_port_serves_one_sender_fully():
    machine = Machine.load("v100x8", hosts=2, network="p3.16xlarge")
    alone, together = seconds(SEND, 1e8, Group(16), machine), seconds(SEND, 1e8, Group(2, stride=8), machine)
    assert together == pytest.approx(8 * alone, rel=0.01)
