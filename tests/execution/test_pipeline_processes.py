"""A pipeline over real processes gives every one of them the numbers of one device."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

SCRIPT = Path(__file__).with_name("pipeline_process.py")


def started(*arguments):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, SCRIPT, *map(str, arguments)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def free_ports(count):
    """The first of so many neighbouring ports that are free."""
    for first in range(23000 + os.getpid() % 20000, 65000, count):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for offset, each in enumerate(sockets):
                each.bind(("127.0.0.1", first + offset))
        except OSError:
            continue
        else:
            return first
        finally:
            for each in sockets:
                each.close()
    raise AssertionError("no free ports")


def test_processes_give_the_numbers_of_one_device(tmp_path):
    processes, plan = 2, "pipeline=2,microbatches=4,schedule=zb-h1"
    files = [tmp_path / f"{name}.npz" for name in ("one", *range(processes))]
    port = free_ports(processes + 1)
    running = [started(0, 0, 1, "microbatches=4", files[0])]
    running += [started(port, process, processes, plan, file) for process, file in enumerate(files[1:])]
    try:
        told = [process.communicate(timeout=100)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * (processes + 1), told
    one, *others = (list(np.load(file).values()) for file in files)
    for other in others:
        for array, expected in zip(other, one, strict=True):
            np.testing.assert_allclose(array, expected, rtol=1e-12, atol=1e-12)
