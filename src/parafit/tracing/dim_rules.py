"""Which dims of a primitive's results are those of its operands: one rule for each kind of primitive.

A **rule** takes the dims of the operands and returns those of the results, and the dims summed over. It ties (the same
elements on both sides) and fixes (the primitive cannot split this dimension without moving data between devices).
JAX is not imported: a rule reads the parameters of a traced equation. Each is written as in einsum: (dims of an operand), ... → (dims of a
result); a dim that appears on both sides is the same, n is a new one, and [n] is fixed.

Args:
    dims: all dims of the step, where the rule ties and fixes them.
    params: parameters of the equation.
    inputs: dims of the operands.
    shapes: shapes of the results.
"""

from collections.abc import Callable
from typing import Any

from parafit.tracing.dims import Dims

Shape = tuple[int, ...]
Ties = tuple[list[list[int]], list[int]]
"""Dims of each result, and the dims summed over."""

Rule = Callable[[Dims, dict[str, Any], list[list[int]], list[Shape]], Ties]


def _news(dims: Dims, shape: Shape) -> list[int]:
    return [dims.new(size) for size in shape]


def unknown(dims: Dims, params, inputs, shapes) -> Ties:
    """`(a b), (c) → (d)`: nothing is tied, and all is fixed."""
    outputs = free(dims, params, inputs, shapes)[0]
    dims.fix(dim for group in (*inputs, *outputs) for dim in group)
    return outputs, []


def free(dims: Dims, params, inputs, shapes) -> Ties:
    """`(a b) → (c d)`: results have dims of their own."""
    return [_news(dims, shape) for shape in shapes], []


def elementwise(dims: Dims, params, inputs, shapes) -> Ties:
    """`(a b), (a b) → (a b)`; a result's dim is new where no operand has it in its size."""
    return [_meet(dims, inputs, shape) for shape in shapes], []


def _meet(dims: Dims, inputs: list[list[int]], shape: Shape) -> list[int]:
    result = []
    for place, size in enumerate(shape):
        same = [group[place] for group in inputs if len(group) == len(shape) and dims.size(group[place]) == size]
        for other in same[1:]:
            dims.tie(same[0], other)
        result.append(same[0] if same else dims.new(size))
    return result


def identity(dims: Dims, params, inputs, shapes) -> Ties:
    """`(a b), (c) → (a b), (c)`"""
    return [list(group) for group in inputs], []


def broadcast(dims: Dims, params, inputs, shapes) -> Ties:
    """`(b) → (a b)`, a new."""
    result = _news(dims, shapes[0])
    for dim, place in zip(inputs[0] if inputs else (), params["broadcast_dimensions"]):
        if dims.size(dim) == shapes[0][place]:
            result[place] = dim
    return [result], []


def transpose(dims: Dims, params, inputs, shapes) -> Ties:
    """`(a b) → (b a)`"""
    return [[inputs[0][place] for place in params["permutation"]]], []


def reshape(dims: Dims, params, inputs, shapes) -> Ties:
    """`(a b c) → (ab c)` and back: dims are cut into factors, which stay the same."""
    return [dims.reshape(inputs[0], shapes[0])], []


def reverse(dims: Dims, params, inputs, shapes) -> Ties:
    """`(a b) → (a b)`, b turned round and fixed."""
    dims.fix(inputs[0][place] for place in params["dimensions"])
    return [list(inputs[0])], []


def reduce(dims: Dims, params, inputs, shapes) -> Ties:
    """`(a b) → (a)`, summed over b."""
    axes = set(params["axes"])
    return [[dim for place, dim in enumerate(inputs[0]) if place not in axes]], [inputs[0][axis] for axis in axes]


def reduce_oddly(dims: Dims, params, inputs, shapes) -> Ties:
    """`(a b) → (a)`, b fixed: no sum, maximum or minimum over devices joins partial results."""
    axes = set(params.get("axes", params.get("dimensions", ())))
    dims.fix(inputs[0][axis] for axis in axes)
    return [[dim for place, dim in enumerate(inputs[0]) if place not in axes] for _ in shapes], []


def dot(dims: Dims, params, inputs, shapes) -> Ties:
    """`(n b i), (n i o) → (n b o)`, summed over i."""
    (left_sums, right_sums), (left_batch, right_batch) = params["dimension_numbers"]
    left, right = inputs
    for one, other in zip((*left_sums, *left_batch), (*right_sums, *right_batch)):
        dims.tie(left[one], right[other])
    free = [[dim for place, dim in enumerate(group) if place not in taken] for group, taken in _taken(inputs, params)]
    return [[left[place] for place in left_batch] + free[0] + free[1]], [left[place] for place in left_sums]


def _taken(inputs, params):
    sums, batch = params["dimension_numbers"]
    return [(group, {*sums[side], *batch[side]}) for side, group in enumerate(inputs)]


def convolution(dims: Dims, params, inputs, shapes) -> Ties:
    """`(b y x i), (h w i o) → (b y x o)`, summed over i; y, x, h and w fixed where windows slide along them."""
    numbers = params["dimension_numbers"]
    (batch, feature, *places), (leaving, entering, *windows), (out_batch, out_feature, *outs) = (
        numbers.lhs_spec,
        numbers.rhs_spec,
        numbers.out_spec,
    )
    images, kernel = inputs
    result = _news(dims, shapes[0])
    groups, batch_groups = params["feature_group_count"], params["batch_group_count"]
    rows, channels = images[batch], images[feature]
    if groups > 1:
        shared, channels = dims.reshape([channels], [groups, dims.size(channels) // groups])
        dims.tie(dims.reshape([kernel[leaving]], [groups, dims.size(kernel[leaving]) // groups])[0], shared)
    if batch_groups > 1:
        shared, rows = dims.reshape([rows], [batch_groups, dims.size(rows) // batch_groups])
        dims.tie(dims.reshape([kernel[leaving]], [batch_groups, dims.size(kernel[leaving]) // batch_groups])[0], shared)
    dims.tie(channels, kernel[entering])
    result[out_batch], result[out_feature] = rows, kernel[leaving]
    contracted = [channels]
    for place, window, out in zip(places, windows, outs):
        if dims.size(kernel[window]) == 1 and dims.size(images[place]) == shapes[0][out]:
            result[out] = images[place]
        else:
            result[out] = _windowed(dims, images[place], shapes[0][out])
            dims.fix([kernel[window]])
    return [result], contracted


def _windowed(dims: Dims, dim: int, size: int) -> int:
    """A dimension that windows slide over: neighbours meet, so that no device can do its part alone."""
    out = dim if dims.size(dim) == size else dims.new(size)
    dims.fix((dim, out))
    return out


def window(dims: Dims, params, inputs, shapes) -> Ties:
    """`(b y x c) → (b y x c)`, y and x fixed where windows slide along them."""
    windows = zip(params["window_dimensions"], params["window_strides"])
    moved = [window != 1 or stride != 1 for window, stride in windows]
    return [[_windowed(dims, dim, size) if slides else dim for dim, size, slides in zip(inputs[-1], shapes[0], moved)] for _ in shapes], []


def window_gradient(dims: Dims, params, inputs, shapes) -> Ties:
    """`(b v u c), (b y x c) → (b y x c)`, v, u, y and x fixed where windows slide along them."""
    source, operand = inputs[0], inputs[1]
    for one, other in zip(source, operand):
        if dims.size(one) == dims.size(other):
            dims.tie(one, other)
    moved = [window != 1 or stride != 1 for window, stride in zip(params["window_dimensions"], params["window_strides"])]
    dims.fix(dim for group in (source, operand) for dim, slides in zip(group, moved) if slides)
    return [list(operand)], []


def along(name: str) -> Rule:
    """`(a b), (a b) → (a b), (a b)`, b fixed: the one that the equation's parameter of this name says."""

    def rule(dims: Dims, params, inputs, shapes) -> Ties:
        outputs = elementwise(dims, params, inputs, shapes)[0]
        dims.fix([inputs[0][params[name]]])
        return outputs, []

    return rule


def top(dims: Dims, params, inputs, shapes) -> Ties:
    """`(a b) → (a k), (a k)`, b and k fixed."""
    axis = params["axis"]
    new = dims.new(params["k"])
    dims.fix((inputs[0][axis], new))
    result = [new if place == axis else dim for place, dim in enumerate(inputs[0])]
    return [list(result) for _ in shapes], []


def concatenate(dims: Dims, params, inputs, shapes) -> Ties:
    """`(a b), (a c) → (a d)`, b and c fixed."""
    axis = params["dimension"]
    result = []
    for place, size in enumerate(shapes[0]):
        first = inputs[0][place]
        for group in inputs[1:]:
            if place != axis:
                dims.tie(first, group[place])
        result.append(first if place != axis else dims.new(size))
    dims.fix(group[axis] for group in inputs)
    return [result], []


def stack(dims: Dims, params, inputs, shapes) -> Ties:
    """`(a b), (a b) → (a s b)`, s new and fixed."""
    one = elementwise(dims, params, inputs, [_without(shapes[0], params["axis"])])[0][0]
    new = dims.new(len(inputs))
    dims.fix([new])
    return [[*one[: params["axis"]], new, *one[params["axis"] :]]], []


def _without(shape: Shape, axis: int) -> Shape:
    return (*shape[:axis], *shape[axis + 1 :])


def unstack(dims: Dims, params, inputs, shapes) -> Ties:
    """`(a s b) → (a b), (a b)`, s fixed."""
    dims.fix([inputs[0][params["axis"]]])
    return [[dim for place, dim in enumerate(inputs[0]) if place != params["axis"]] for _ in shapes], []


def crop(dims: Dims, params, inputs, shapes) -> Ties:
    """`(a b) → (a c)`, b cut and fixed, for a split could not follow: slices, splits and tiles."""
    return [_keep(dims, inputs[0], shape) for shape in shapes], []


def _keep(dims: Dims, group: list[int], shape: Shape) -> list[int]:
    dims.fix(dim for dim, size in zip(group, shape) if dims.size(dim) != size)
    return [dim if dims.size(dim) == size else dims.new(size) for dim, size in zip(group, shape)]


def pad(dims: Dims, params, inputs, shapes) -> Ties:
    """`(a b) → (a c)`, b padded and fixed."""
    same = [tuple(config) == (0, 0, 0) for config in params["padding_config"]]
    dims.fix(dim for dim, kept in zip(inputs[0], same) if not kept)
    return [[dim if kept else dims.new(size) for dim, size, kept in zip(inputs[0], shapes[0], same)]], []


def update(dims: Dims, params, inputs, shapes) -> Ties:
    """`(a b), (a c) → (a b)`, b and c fixed: what is written is a part of the first."""
    for dim, part in zip(inputs[0], inputs[1]):
        if dims.size(dim) == dims.size(part):
            dims.tie(dim, part)
        else:
            dims.fix((dim, part))
    return [list(inputs[0])], []


def gather(dims: Dims, params, inputs, shapes) -> Ties:
    """`(v d), (n 1) → (n d)`, summed over v; what of d is cut is fixed."""
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    operand, indices = inputs
    for place, other in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims):
        dims.tie(operand[place], indices[other])
    looked_up = [place for place in range(len(operand)) if place in numbers.collapsed_slice_dims]
    windows = iter(place for place in range(len(operand)) if place not in {*looked_up, *numbers.operand_batching_dims})
    rows = iter(indices[:-1])
    result = []
    for place in range(len(shapes[0])):
        if place in numbers.offset_dims:
            window = next(windows)
            result += _keep(dims, [operand[window]], (sizes[window],))
        else:
            result.append(next(rows))
    return [result], [operand[place] for place in looked_up]


def scatter(sums: bool) -> Rule:
    """`(v d), (n 1), (n d) → (v d)`, summed over n, or n fixed where what is written is no sum."""

    def rule(dims: Dims, params, inputs, shapes) -> Ties:
        numbers = params["dimension_numbers"]
        operand, indices, updates = inputs
        for place, other in zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims):
            dims.tie(operand[place], indices[other])
        outside = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
        windows = iter(place for place in range(len(operand)) if place not in outside)
        rows = iter(enumerate(indices[:-1]))
        scattered = []
        for place, dim in enumerate(updates):
            if place in numbers.update_window_dims:
                update(dims, params, [[operand[next(windows)]], [dim]], shapes)
            else:
                index, row = next(rows)
                dims.tie(row, dim)
                scattered += [] if index in numbers.scatter_indices_batching_dims else [dim]
        if not sums:
            dims.fix(scattered)
        return [list(operand)], scattered if sums else []

    return rule
