"""What XLA:CPU is asked for beside the program: the order of a step, which library runs its convolutions, how quickly to compile."""

import jax
from jax.extend.core import ClosedJaxpr

from parafit.tracing.passes import equations

CompilerOptions = dict[str, str | bool]
"""As `jax.stages.Lowered.compile` takes them."""


def compiler_options(closed: ClosedJaxpr, *, seldom: bool = False) -> CompilerOptions:
    """Options to compile a step with.

    XLA:CPU gives convolutions to a library that runs them on one thread where no other was just at work (JAX 0.10.2); without it they use
    all. By themselves, with 32 channels or more, they then were 1.0 to 5 times as fast on 2 cores of an AMD EPYC (decision 0009).

    What runs seldom is compiled with XLA's older emitter of fused loops. That takes about half as long, a transformer's no less, and the
    steps of the benchmark's networks then took 0.95 to 1.8 times as long (JAX 0.10.2, same machine; the smallest network's the longest).

    Args:
        closed: a step, as traced.
        seldom: whether compiling it will take longer than running it.

    >>> compiler_options(jax.make_jaxpr(lambda x: x + 1)(1.0))
    {}
    """
    convolves = "conv_general_dilated" in _primitives(closed)
    threads: CompilerOptions = {"xla_cpu_experimental_ynn_fusion_type": ",".join(_FUSIONS)} if convolves else {}
    order: CompilerOptions = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"} if saves_memory(closed) else {}
    emitter: CompilerOptions = {"xla_cpu_use_fusion_emitters": False} if seldom else {}
    return threads | order | emitter


_FUSIONS = ("LIBRARY_FUSION_TYPE_DOT", "LIBRARY_FUSION_TYPE_REDUCE", "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT")
"""All that XLA gives to the library by itself, but for convolutions."""


def saves_memory(closed: ClosedJaxpr) -> bool:
    """Whether a step runs best in the order that holds least, instead of XLA's default, in which as much as possible runs side by side.

    The random bits of dropout need nothing else of a step: side by side with products that use all cores themselves, both get slower.
    Measured with JAX 0.10.2 on 2 cores of an Intel Xeon, the other order against the default: an MLP with dropout gains 9 to 13 %, a
    transformer 5 to 8 %, two MLPs with dropout and large batches 0 and -3 %. Steps without random bits or convolutions differ by less than
    4 %. Of convolutional networks one loses 18 %, one gains 16 %, two are level. The order changes no value.

    Args:
        closed: a step, as traced.

    >>> saves_memory(jax.make_jaxpr(lambda x: x + 1)(1.0))
    False
    >>> saves_memory(jax.make_jaxpr(lambda key: jax.random.uniform(key))(jax.random.key(0)))
    True
    """
    names = _primitives(closed)
    return "random_bits" in names and "conv_general_dilated" not in names


def compiled(lowered: jax.stages.Lowered, options: CompilerOptions) -> jax.stages.Compiled:
    """A program compiled with those of the options that this jaxlib takes: they change how fast it is, not what it computes.

    jaxlib 0.12 refuses `xla_cpu_use_fusion_emitters`, for one. An option that was refused is not tried again.

    Args:
        lowered: the program.
        options: for the compiler.

    >>> program = compiled(jax.jit(lambda x: x + 1).lower(1.0), {"xla_no_such_option": True})
    >>> float(program(1.0))
    2.0
    """
    try:
        return lowered.compile({name: value for name, value in options.items() if (name, value) not in _REFUSED})
    except jax.errors.JaxRuntimeError:
        refused = {option for option in options.items() if _is_refused(option)}
        if refused <= _REFUSED:
            raise
        _REFUSED.update(refused)
        return compiled(lowered, options)


_REFUSED: set[tuple[str, str | bool]] = set()


def _is_refused(option: tuple[str, str | bool]) -> bool:
    """Whether the smallest program cannot be compiled with it."""
    try:
        jax.jit(lambda: 0).lower().compile(dict([option]))
    except jax.errors.JaxRuntimeError:
        return True
    return False


def _primitives(closed: ClosedJaxpr) -> set[str]:
    return {equation.primitive.name for equation in equations(closed.jaxpr)}
