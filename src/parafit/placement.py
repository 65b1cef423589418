"""A plan on real devices: one mesh, and where each array of a step lives on it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from parafit.planner.layout import GROUP, Layout, Spec, axis_size
from parafit.planner.plan import Plan
from parafit.planner.program import Leaf


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

    One device: everything lives on JAX's default device and nothing is constrained. Otherwise parameters and what is shaped
    like them live as the layout says, other state is whole on every device, and the batch dim of every array is split over
    the axis that the plan maps it to; a batch that the axis does not divide is whole on every device.

    Args:
        plan: the plan to run.
        layout: how parameters are split; empty: whole on every device.
        devices: of the mesh; empty: JAX's first ones.
    """

    plan: Plan
    layout: Layout = field(default_factory=Layout)
    devices: tuple[Any, ...] = ()

    @cached_property
    def mesh(self) -> Mesh | None:
        """The device mesh, None for one device."""
        if self.plan.device_count == 1 and not self.devices:
            return None
        axes = dict(part for axis in self.plan.axes or {"data": 1} for part in _mesh_parts(self.plan, axis))
        # Keras layers mix sharded and replicated arrays freely, which JAX's default, Explicit axes, refuses.
        automatic = (AxisType.Auto,) * len(axes)
        devices = self.devices or jax.devices()[: self.plan.device_count]
        return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=automatic, devices=devices)

    @cached_property
    def pipeline(self) -> tuple["Placement", ...]:
        """For each device of a pipeline, which may be several that share its stages, where these live; empty without a pipeline."""
        count, inside = self.plan.axes.get("pipeline", 0), self.plan.inside
        size = inside.device_count
        return tuple(
            Placement(inside, self.layout, devices=tuple(jax.devices()[device * size : (device + 1) * size])) for device in range(count)
        )

    @cached_property
    def is_here(self) -> bool:
        """Whether its devices are this process's."""
        return all(device.process_index == jax.process_index() for device in self.devices)

    @cached_property
    def replicated(self) -> NamedSharding | None:
        """Whole on every device."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    def block(self, shape: tuple[int, ...]) -> NamedSharding | None:
        """Where an array of shape (steps, batch, ...) enters a program, or leaves it."""
        if self.mesh is None:
            return None
        whole_shares = len(shape) > 1 and shape[1] % self.batch_parts == 0
        return NamedSharding(self.mesh, PartitionSpec(None, self._batch_axes)) if whole_shares else self.replicated

    def blocks(self, arrays: Any) -> Any:
        """`block` for every array of a block; what stays on the devices is whole on each."""
        if isinstance(arrays, Lookup):
            return Lookup(self.block(arrays.rows.shape), jax.tree.map(lambda array: self.replicated, arrays.table))
        return jax.tree.map(lambda array: self.block(array.shape), arrays)

    def split_batch(self, batch: Any) -> Any:
        """Inside a program: split arrays of shape (batch, ...) over the devices, where these divide the batch."""
        if self.mesh is None:
            return batch
        return jax.tree.map(lambda array: jax.lax.with_sharding_constraint(array, self.batch(array.shape)), batch)

    def batch(self, shape: tuple[int, ...]) -> NamedSharding | None:
        """Where an array of shape (batch, ...) is while a step reads it."""
        if self.mesh is None:
            return None
        divides = bool(shape) and shape[0] % self.batch_parts == 0
        return NamedSharding(self.mesh, PartitionSpec(self._batch_axes)) if divides else self.replicated

    def stored(self, leaf: Leaf, array: Any) -> NamedSharding | None:
        """Where an array of the state rests between steps.

        Args:
            leaf: what the array is.
            array: the array, or anything of its shape.
        """
        return self._sharding(self.layout.store.get(leaf.role, self.layout.compute).get(leaf.parameter, ()), array.shape)

    def computed(self, leaf: Leaf, array: Any) -> NamedSharding | None:
        """Where an array of the state is while operations read it; slots, which only the update reads, stay where they rest.

        Args:
            leaf: what the array is.
            array: the array, or anything of its shape.
        """
        return self.stored(leaf, array) if leaf.role == "slot" else self._sharding(self.layout.compute.get(leaf.parameter, ()), array.shape)

    def constrain(self, where: Callable[[Leaf, Any], Any], leaves: Any, arrays: Any) -> Any:
        """Inside a program: bring arrays to where a method says.

        Args:
            where: `stored` or `computed`.
            leaves: a tree of what the arrays are.
            arrays: a tree of the same structure.
        """
        if self.mesh is None:
            return arrays
        return jax.tree.map(lambda leaf, array: jax.lax.with_sharding_constraint(array, where(leaf, array)), leaves, arrays)

    def replicate(self, arrays: Any) -> Any:
        """Inside a program: keep arrays whole on every device."""
        return arrays if self.mesh is None else jax.tree.map(lambda array: jax.lax.with_sharding_constraint(array, self.replicated), arrays)

    def put_state(self, leaf: Leaf, array: jax.Array) -> jax.Array:
        """One array of the state, brought to where this plan keeps it.

        Args:
            leaf: what the array is.
            array: the array, whole on any device.
        """
        if self.mesh is not None:
            return jax.device_put(array, self.stored(leaf, array))
        device = jax.devices()[0]
        return array if array.devices() == {device} else jax.device_put(array, device)

    def put_block(self, arrays: Any) -> Any:
        """A block's arrays of shape (steps, batch, ...) brought to the devices."""
        return jax.device_put(arrays, None if self.mesh is None else self.blocks(arrays))

    def bring_home(self, array: jax.Array) -> jax.Array:
        """An array of the state whole on the first device: what is left in the model after a run."""
        if self.mesh is None:
            return array
        return array.addressable_shards[0].data if array.is_fully_replicated else jax.device_put(array, jax.devices()[0])

    @property
    def _batch_axes(self) -> tuple[str, ...] | None:
        """The mesh axes the batch is split over, None where it is whole."""
        axis = self.plan.compute.get("batch")
        return tuple(part for part, _ in _mesh_parts(self.plan, axis)) if axis else None

    @property
    def batch_parts(self) -> int:
        """How many devices share a batch between them."""
        return self.plan.axes.get(self.plan.compute.get("batch", ""), 1)

    def _sharding(self, spec: Spec, shape: tuple[int, ...]) -> NamedSharding | None:
        """The sharding of an array; one whose shape is not what the layout was made for stays whole."""
        if self.mesh is None:
            return None
        fits = len(spec) == len(shape) and all(size % axis_size(self.plan, axis) == 0 for size, axis in zip(shape, spec))
        parts = [axis and tuple(part for part, _ in _mesh_parts(self.plan, axis)) for axis in spec]
        return NamedSharding(self.mesh, PartitionSpec(*parts)) if fits else self.replicated


def _mesh_parts(plan: Plan, axis: str) -> list[tuple[str, int]]:
    """The axes of the mesh, with their sizes, that make up an axis of the plan: two where state is split inside groups of it."""
    if axis == GROUP:
        return [(GROUP, plan.store_group)]
    size = plan.axes.get(axis, 1)
    if axis in plan.store.values() and 0 < plan.store_group < size:
        return [(axis, size // plan.store_group), (GROUP, plan.store_group)]
    return [(axis, size)]
