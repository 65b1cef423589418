"""What a schedule takes at least, and keeps at most, without its grid: for a search, which looks at many. Plain Python.

A device d of p starts when a microbatch has come through the stages before it, and when it has done its last B a gradient has to go back
through them. So no schedule ends before

    head(d) + m × (F + B + W)(d) + tail(d)            for any d

with head the F of stages before d and what they send, and tail their B, less what d does meanwhile: gradients of weights that it put off.
On equal stages that send nothing this is what `simulate` finds (GPipe, 1F1B, interleaved 1F1B, ZB-H1); on others it is less.
"""

from collections.abc import Sequence
from itertools import accumulate

from parafit.planner.schedules.interleaved import most_in_flight
from parafit.planner.schedules.times import TaskTimes

SPLITS = {"zb-h1": True, "list": None}
"""Whether a schedule makes the gradients of weights tasks of their own (None: it may); one that is not named does not."""


def least_makespan(schedule: str, times: TaskTimes, *, devices: int, microbatches: int) -> float:
    """Seconds that a schedule takes at least.

    Args:
        schedule: its name.
        times: what each stage's tasks take.
        devices: how many; stages go round them.
        microbatches: how many.

    >>> least_makespan("1f1b", TaskTimes.equal(4), devices=4, microbatches=16)
    57.0
    >>> least_makespan("zb-h1", TaskTimes.equal(4), devices=4, microbatches=16)
    51.0
    """
    splits = SPLITS.get(schedule, False)
    back = times.seconds("B", whole=splits is False)
    last = 0.0 if splits is False else times.weights[0]
    most = 0.0
    for device, (head, tail) in enumerate(zip(_before(times.forward, times, devices), _before(back, times, devices))):
        forward, backward, weights = (sum(parts[device::devices]) for parts in (times.forward, times.backward, times.weights))
        late = {False: 0, True: min(device + 1, microbatches), None: microbatches}[splits]
        most = max(most, head + microbatches * (forward + backward + weights) + max(0.0, tail + last - late * weights))
    return most


def _before(seconds: Sequence[float], times: TaskTimes, devices: int) -> list[float]:
    """What tasks of the stages before each of as many devices take, and send."""
    return list(accumulate(map(sum, zip(seconds, times.send[: devices - 1])), initial=0.0))


def kept(schedule: str, *, devices: int, microbatches: int, interleave: int = 1) -> tuple[int, ...]:
    """Results of stages that each device keeps at most for the backward pass: what the `Grid.in_flight` of a schedule says.

    Args:
        schedule: its name.
        devices: how many.
        microbatches: how many.
        interleave: stages a device.

    >>> kept("1f1b", devices=4, microbatches=16), kept("zb-h1", devices=4, microbatches=16), kept("gpipe", devices=2, microbatches=16)
    ((4, 3, 2, 1), (4, 4, 4, 4), (16, 16))
    """
    if schedule == "gpipe":
        most = [microbatches] * devices
    elif schedule == "zb-h1":
        most = [devices] * devices
    elif interleave > 1 or schedule == "interleaved":
        most = most_in_flight(devices, interleave)
    else:
        most = range(devices, 0, -1)
    return tuple(min(microbatches * interleave, each) for each in most)
