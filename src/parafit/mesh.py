"""A plan on real devices: one mesh, and where each array of a step lives on it."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from parafit.errors import PlanError
from parafit.plan import Plan

RESIDENT_SHARE = 0.25
"""Data stays on an accelerator if it takes less than this share of the memory that is free there."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lookup:
    """A block that names rows of data that stays on the devices.

    Attributes:
        rows: row numbers, int32, of shape (capacity, batch).
        table: pytree of arrays of shape (all rows, ...).
    """

    rows: Any
    table: Any


@dataclass(frozen=True)
class Placement:
    """Where state and batches of a step live under a plan.

    One device: everything lives on JAX's default device and nothing is constrained. Otherwise state is kept whole on
    every device and the batch dim of every array is split over the plan's axis; a batch that the axis does not divide
    is split unevenly inside the program, which leaves the numbers as they are.

    Args:
        plan: the plan to run.

    Raises:
        PlanError: the plan wants more devices than there are.
    """

    plan: Plan

    def __post_init__(self):
        wanted, there = self.plan.device_count, jax.device_count()
        if wanted > there:
            raise PlanError(
                f"plan {self.plan.short()!r} wants {wanted} devices, but there are {there} ({jax.default_backend()}). "
                f"Choose a smaller plan, or, to simulate devices on CPU, call jax.config.update('jax_num_cpu_devices', {wanted}) first."
            )

    @cached_property
    def mesh(self) -> Mesh | None:
        """The device mesh, None for one device."""
        if self.plan.device_count == 1:
            return None
        axes = self.plan.axes
        # Keras layers mix sharded and replicated arrays freely, which JAX's default, Explicit axes, refuses.
        automatic = (AxisType.Auto,) * len(axes)
        return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=automatic, devices=jax.devices()[: self.plan.device_count])

    @cached_property
    def replicated(self) -> NamedSharding | None:
        """Whole on every device."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    def block(self, shape: tuple[int, ...]) -> NamedSharding | None:
        """Where an array of shape (steps, batch, ...) enters a program, or leaves it."""
        if self.mesh is None:
            return None
        whole_shares = len(shape) > 1 and shape[1] % self._batch_size_divisor == 0
        return NamedSharding(self.mesh, PartitionSpec(None, self._batch_axis)) if whole_shares else self.replicated

    def blocks(self, arrays: Any) -> Any:
        """`block` for every array of a block; what stays on the devices is whole on each."""
        if isinstance(arrays, Lookup):
            return Lookup(self.block(arrays.rows.shape), jax.tree.map(lambda array: self.replicated, arrays.table))
        return jax.tree.map(lambda array: self.block(array.shape), arrays)

    def split_batch(self, batch: Any) -> Any:
        """Inside a program: split arrays of shape (batch, ...) over the devices."""
        if self.mesh is None:
            return batch
        split = NamedSharding(self.mesh, PartitionSpec(self._batch_axis))
        return jax.tree.map(lambda array: jax.lax.with_sharding_constraint(array, split) if array.ndim else array, batch)

    def replicate(self, state: Any) -> Any:
        """Inside a program: keep state whole on every device."""
        if self.mesh is None:
            return state
        return jax.tree.map(lambda array: jax.lax.with_sharding_constraint(array, self.replicated), state)

    def put_state(self, array: jax.Array) -> jax.Array:
        """One array of the state, brought to where this plan keeps it."""
        if self.replicated is not None:
            return jax.device_put(array, self.replicated)
        device = jax.devices()[0]
        return array if array.devices() == {device} else jax.device_put(array, device)

    def put_block(self, arrays: Any) -> Any:
        """A block's arrays of shape (steps, batch, ...) brought to the devices."""
        return jax.device_put(arrays, None if self.mesh is None else self.blocks(arrays))

    def keeps(self, byte_count: int) -> bool:
        """Whether data of this size should stay on the devices: on accelerators where it fits; on CPU it is there anyway."""
        memory = jax.devices()[0].memory_stats() or {}
        return byte_count < RESIDENT_SHARE * (memory.get("bytes_limit", 0) - memory.get("bytes_in_use", 0))

    def bring_home(self, array: jax.Array) -> jax.Array:
        """The copy of a replicated array on the first device: what is left in the model after a run."""
        return array if self.mesh is None else array.addressable_shards[0].data

    @property
    def _batch_axis(self) -> str:
        return self.plan.compute["batch"]

    @property
    def _batch_size_divisor(self) -> int:
        return self.plan.axes[self._batch_axis]
