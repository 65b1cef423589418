"""What collectives take: the alpha-beta model over a machine's two kinds of link. Plain Python.

A group of devices sends in a ring that passes through each host once, so each host boundary is crossed by one message a step and the
slowest link sets the pace. With n devices on h hosts and b bytes on each device (the whole vector), a ring takes

    all-reduce                     2 (n - 1) / n · b / β + latency of 2 (n - 1) steps
    all-gather, reduce-scatter       (n - 1) / n · b / β + latency of   (n - 1) steps

(Thakur, Rabenseifner, Gropp 2005); a tree sends a small all-reduce in 2 log₂ h steps between hosts. Where a group has several
devices in a host, it drives as many network ports, so that β = min(inner, devices in the host × port), or no more than was measured over
as many hosts: one group's channels do not fill all ports of many hosts.
"""

import functools
import math
from collections import Counter
from dataclasses import dataclass

from parafit.planner.machine.machine import Link, Machine

ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER, ALL_TO_ALL, SEND = KINDS = "all-reduce", "reduce-scatter", "all-gather", "all-to-all", "send"


@dataclass(frozen=True)
class Group:
    """Devices that take part in a collective.

    Attributes:
        size: how many.
        stride: distance from one to the next in the order of devices, hosts filled one after the other.
        total: devices of all such groups side by side, from the first of a host on; 0: every group starts with a host.
    """

    size: int
    stride: int = 1
    total: int = 0

    def split(self, devices_per_host: int) -> tuple[int, int]:
        """Members in one host, and hosts that the group reaches; of the group that has it worst where not all lie alike.

        >>> Group(16).split(8), Group(4, stride=8).split(8), Group(4, stride=2).split(8)
        ((8, 2), (1, 4), (4, 1))
        >>> Group(5, total=15).split(8)
        (2, 2)
        """
        span = self.size * self.stride
        even = not devices_per_host % span or not (span % devices_per_host or devices_per_host % self.stride)
        if self.total > devices_per_host and not even and self.stride % devices_per_host:
            return _worst(self.size, self.stride, self.total, devices_per_host)
        inside = max(1, min(self.size, devices_per_host // self.stride))
        return inside, math.ceil(self.size / inside)


@functools.lru_cache(4096)
def _worst(size: int, stride: int, total: int, devices_per_host: int) -> tuple[int, int]:
    found = set[tuple[int, int]]()
    for first in (start + offset for start in range(0, total, size * stride) for offset in range(stride)):
        members = Counter((first + index * stride) // devices_per_host for index in range(size))
        found.add((min(members.values()), len(members)))
    return max(found, key=lambda pair: (pair[1], -pair[0]))


def seconds(kind: str, nbytes: float, group: Group, machine: Machine) -> float:
    """Seconds that a collective takes.

    Args:
        kind: one of `KINDS`.
        nbytes: of the whole vector: what each device holds before an all-reduce or a reduce-scatter, and after an all-gather.
        group: who takes part.
        machine: with the links.

    >>> machine = Machine.load("a100x8", hosts=4)
    >>> round(1e3 * seconds("all-reduce", 1e9, Group(8), machine), 2)
    7.51
    >>> seconds("all-gather", 1e9, Group(8), machine) < seconds("all-gather", 1e9, Group(16), machine)
    True
    """
    if group.size <= 1:
        return 0.0
    latency, rate = _price(kind, group, machine)
    return latency + nbytes / rate


def _price(kind: str, group: Group, machine: Machine) -> tuple[float, float]:
    inside, hosts = group.split(machine.devices_per_host)
    rate = _bus(kind, inside, hosts, machine)
    if kind == SEND:
        link = machine.network if hosts > 1 else machine.inner
        together = max(1.0, machine.devices_per_host / group.stride) if hosts > 1 and link.shared else 1.0
        return link.start_seconds + link.alpha_seconds, link.bytes_per_second * link.share * together
    latency = _latency(kind, inside, hosts, machine)
    rounds = 2 if kind == ALL_REDUCE else 1
    share = (group.size - 1) / group.size * rounds
    if kind == ALL_TO_ALL and hosts > 1:  # all but the host's own part crosses the network, each device through its own port
        return latency, _port(machine) / ((hosts - 1) / hosts)
    return latency, rate / share


def _bus(kind: str, inside: int, hosts: int, machine: Machine) -> float:
    """Bytes per second that pass each point of the ring."""
    inner = _measured(kind, machine.inner, inside) or machine.inner.bytes_per_second * machine.inner.share
    if hosts == 1:
        return inner
    across = _measured(kind, machine.network, hosts * machine.devices_per_host)
    outer = min(inside * _port(machine), across or math.inf)
    return min(inner, outer) if inside > 1 else outer


def _port(machine: Machine) -> float:
    return machine.network.bytes_per_second * machine.network.share


def _measured(kind: str, link: Link, devices: int) -> float:
    """Measured bus bandwidth over so many devices, interpolated between the logarithms of its neighbours; 0 where nothing was measured."""
    parts = kind in (ALL_GATHER, REDUCE_SCATTER) and link.measured_parts
    points = sorted(parts or link.measured)
    if not points:
        return 0.0
    below = max((point for point in points if point[0] <= devices), default=points[0])
    above = min((point for point in points if point[0] >= devices), default=points[-1])
    if below[0] == above[0]:
        return below[1]
    weight = math.log(devices / below[0]) / math.log(above[0] / below[0])
    return math.exp((1 - weight) * math.log(below[1]) + weight * math.log(above[1]))


def _latency(kind: str, inside: int, hosts: int, machine: Machine) -> float:
    inner, outer = machine.inner, machine.network
    start = outer.start_seconds if hosts > 1 else inner.start_seconds
    ring = (inside * hosts - hosts) * inner.alpha_seconds + (hosts - 1) * outer.alpha_seconds
    if kind != ALL_REDUCE:
        return start + ring
    tree = (inside - 1) * inner.alpha_seconds + math.ceil(math.log2(hosts)) * outer.alpha_seconds
    return start + 2 * min(ring, tree)
