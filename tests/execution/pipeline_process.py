"""One of several processes that train a pipeline together: `python pipeline_process.py PORT PROCESS PROCESSES PLAN OUTPUT`.

It writes the weights and the history that it has in the end.
"""

import os
import sys

import parafit  # isort: skip  (chooses Keras' backend, so it comes first)

import jax
import keras
import numpy as np
from keras.src.backend.common.dtypes import BIT64_TO_BIT32_DTYPE


def main() -> None:
    port, process, processes = map(int, sys.argv[1:4])
    plan, output = sys.argv[4:]
    jax.config.update("jax_num_cpu_devices", 1 if processes > 1 else 8)
    jax.config.update("jax_enable_x64", True)
    keras.config.set_floatx("float64")
    BIT64_TO_BIT32_DTYPE["float64"] = "float64"  # as in conftest.py
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.config.update("jax_cross_host_transfer_socket_address", f"127.0.0.1:{port + 1 + process}")
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)
    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.Input((6,)), *(keras.layers.Dense(8, "tanh") for _ in range(4)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(1e-2, global_clipnorm=0.1), "mse", metrics=["mae"])
    x = np.random.default_rng(0).normal(size=(22, 6))
    options = {"batch_size": 8, "verbose": 0, "plan": plan}
    history = parafit.fit(model, x, x[:, :1], epochs=2, validation_split=0.2, **options)
    predicted = parafit.predict(model, x, **options)
    arrays = [*model.get_weights(), *map(np.asarray, history.history.values()), predicted]
    np.savez(output, *arrays)
    if processes > 1:
        jax.distributed.shutdown()
    os._exit(0)


if __name__ == "__main__":
    main()
