"""Products of bfloat16 operands with float32 results."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, JaxprEqn

from parafit.errors import PlanError
from parafit.tracing.passes import Exchange


def in_bfloat16(closed: ClosedJaxpr) -> ClosedJaxpr:
    """`closed` with float32 products of matrices and convolutions of bfloat16 operands, at every depth; their results stay float32.

    Raises:
        PlanError: it has no such products, nor products of numbers of two bytes.

    >>> import jax.extend, jax.numpy as jnp
    >>> closed = in_bfloat16(jax.make_jaxpr(lambda x: x @ x)(jnp.full((2, 2), 1 + 2**-9)))
    >>> jax.extend.core.jaxpr_as_fun(closed)(jnp.full((2, 2), 1 + 2**-9))[0].tolist()
    [[2.0, 2.0], [2.0, 2.0]]
    """
    half = HalfProducts()
    halved = Exchange(dict.fromkeys(("dot_general", "conv_general_dilated"), half.choose)).closed(closed)
    half.check()
    return halved


class HalfProducts:
    """Chooses which products round their operands to bfloat16.

    Each must be of float32 throughout, multiply a matrix (an inner product of vectors is a sum), and not ask for a precision of its own.
    The order of operations is that of mixed precision training: operands are rounded, products are exact, sums and results are float32.
    """

    def __init__(self):
        self.multiplied: set[str] = set()
        self.rounds = False

    def choose(self, equation: JaxprEqn) -> Callable | None:
        """`equation` with rounded operands, None where it stays as it is."""
        operands = {var.aval.dtype.name for var in equation.invars}
        self.multiplied |= operands
        if operands != {"float32"} or equation.outvars[0].aval.dtype != jnp.float32 or not _may_round(equation):
            return None
        self.rounds = True
        options = {**equation.params, "preferred_element_type": jnp.dtype("float32")}
        multiply = _MULTIPLY[equation.primitive.name]
        return lambda left, right: multiply(left.astype(jnp.bfloat16), right.astype(jnp.bfloat16), **options)

    def check(self) -> None:
        """Refuse a step in which bfloat16 products change nothing although it has no such products of its own."""
        if not self.rounds and not self.multiplied & {"bfloat16", "float16"}:
            found = ", ".join(sorted(self.multiplied)) or "no matrices"
            raise PlanError(
                "precision=bfloat16 changes nothing here: it rounds operands of float32 products that ask for no precision of their own, "
                f"and this step multiplies {found}. Leave it out of the plan, or build the model in float32."
            )


def _may_round(equation: JaxprEqn) -> bool:
    if equation.params["precision"] not in (None, (lax.Precision.DEFAULT,) * 2):
        return False
    if equation.primitive.name == "conv_general_dilated":
        return True
    sums, batch = equation.params["dimension_numbers"]
    return any(len(sums[side]) + len(batch[side]) < equation.invars[side].aval.ndim for side in (0, 1))


_MULTIPLY = {"dot_general": lax.dot_general, "conv_general_dilated": lax.conv_general_dilated}
