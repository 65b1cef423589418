"""PyTorch's DistributedDataParallel: two processes on this machine, gloo, half of the rows and of the batch each.

The worker is process 0 and starts process 1, which repeats what it is told through the process group.
"""

import multiprocessing
import socket
from multiprocessing.process import BaseProcess

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.contenders import torch_models
from benchmarks.contenders.torch_loop import Loop
from benchmarks.workloads import Workload

PROCESSES = 2


def make(workload: Workload, x: np.ndarray, y: np.ndarray):
    """The contender, in process 0. Process 1 ends with it: its next broadcast fails."""
    port = _free_port()
    other = multiprocessing.get_context("spawn").Process(
        target=_follow, args=(workload, x[1::PROCESSES], y[1::PROCESSES], port), daemon=True
    )
    other.start()
    return _Leader(_join(workload, x[::PROCESSES], y[::PROCESSES], port, rank=0), other)


class _Leader:
    def __init__(self, loop: Loop, other: BaseProcess):
        self._loop, self.other_processes = loop, (other.pid,)

    def train(self, epochs: int) -> list[float]:
        dist.broadcast(torch.tensor(epochs), src=0)
        return self._loop.train(epochs)


def _follow(workload: Workload, x: np.ndarray, y: np.ndarray, port: int) -> None:
    loop = _join(workload, x, y, port, rank=1)
    epochs = torch.tensor(0)
    while True:
        dist.broadcast(epochs, src=0)
        loop.train(int(epochs))


def _join(workload: Workload, x: np.ndarray, y: np.ndarray, port: int, *, rank: int) -> Loop:
    torch.set_num_threads(max(torch.get_num_threads() // PROCESSES, 1))
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=PROCESSES)
    model = DistributedDataParallel(torch_models.build(workload))
    rows = torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(np.ascontiguousarray(y)).long()
    return Loop(model, *rows, workload.batch_size // PROCESSES)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
