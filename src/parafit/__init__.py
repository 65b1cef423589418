"""parafit fits neural networks in parallel.

```python
import keras, parafit

model = keras.Sequential([keras.Input((784,)), keras.layers.Dense(32, "relu"), keras.layers.Dense(10, "softmax")])
model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
history = parafit.fit(model, x, y, batch_size=32, epochs=10, validation_split=0.1)
labels = parafit.predict(model, x_new)
```

Read `api.py` first. Importing parafit chooses Keras' JAX backend where none was chosen, keeps compiled programs
on disk so that a second start compiles nothing again, and, where JAX computes on the processor, lets all threads share one heap
(`backends/cpu/malloc.py`); Keras and JAX themselves are imported when first needed.
"""

import importlib

from parafit import backends
from parafit.support import environment, imports, programs

__version__ = "0.1.0"
__all__ = ["Machine", "Plan", "errors", "evaluate", "evaluate_many", "explain", "find_plan", "fit", "fit_many", "predict", "predict_many"]

_HOMES = {"fit": "api", "evaluate": "api", "predict": "api", "Plan": "planner.plan"}
_HOMES |= {"fit_many": "populations.many", "evaluate_many": "populations.answers", "predict_many": "populations.answers"}
_HOMES |= {"find_plan": "planning", "explain": "planner.search.explain", "Machine": "planner.machine.machine"}

environment.prepare()
backends.prepare()
imports.defer_slow_parts_of_keras()
imports.when_imported("jax", programs.keep_programs)


def __getattr__(name: str):
    """Import the part of parafit that holds `name` when it is first asked for (PEP 562)."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"parafit.{_HOMES[name]}"), name)
    if name in ("errors", "sklearn"):
        return importlib.import_module(f"parafit.{name}")
    raise AttributeError(f"module 'parafit' has no attribute {name!r}; it offers {', '.join(__all__)}")
