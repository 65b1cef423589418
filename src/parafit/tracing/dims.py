"""Which dimensions of a program's arrays are one and the same: unification of dimensions that reshapes may have cut or joined.

A dimension is a sequence of **factors**, the outermost first: (batch, positions) flattened to one dimension has the factors of
both, and a dimension of 512 that is once seen as 8 heads of 64 has the factors 8 and 64 wherever it occurs. Tying two
dimensions ties their factors one by one, and cuts a factor where the other side is finer. A split of a dimension is a split of
its outermost factor, which gives it its name. Plain Python: imports neither JAX nor Keras.
"""

import math
from collections.abc import Iterable, Sequence


class Dims:
    """Dimensions as numbers; equal factors found by union-find.

    >>> dims = Dims()
    >>> rows, heads, size = dims.new(32), dims.new(8), dims.new(64)
    >>> kernel = dims.new(512)
    >>> (joined,) = dims.reshape([heads, size], [512])
    >>> dims.tie(kernel, joined), dims.major(kernel) == dims.major(heads)
    (True, True)
    """

    def __init__(self):
        self._parents: list[int] = []
        self._sizes: list[int] = []
        self._parts: dict[int, tuple[int, ...]] = {}
        self._fixed: set[int] = set()

    def new(self, size: int) -> int:
        """A dimension that is tied to none."""
        self._parents.append(len(self._parents))
        self._sizes.append(size)
        return len(self._parents) - 1

    def size(self, dim: int) -> int:
        """How many elements the dimension has."""
        return self._sizes[dim]

    def factors(self, dim: int) -> tuple[int, ...]:
        """The factors of a dimension, the outermost first; none for a dimension of size 1."""
        root = self._root(dim)
        if root in self._parts:
            return tuple(factor for part in self._parts[root] for factor in self.factors(part))
        return () if self._sizes[root] == 1 else (root,)

    def major(self, dim: int) -> int | None:
        """The outermost factor: what a split of the dimension splits."""
        root = self._root(dim)
        while root in self._parts:
            root = self._root(self._parts[root][0])
        return None if self._sizes[root] == 1 else root

    def fix(self, dims: Iterable[int]) -> None:
        """Note that some operation cannot split these dimensions."""
        self._fixed.update(dims)

    def fixed(self) -> frozenset[int]:
        """The factors that cannot be split."""
        return frozenset(factor for dim in self._fixed for factor in self.factors(dim))

    def tie(self, one: int, other: int) -> bool:
        """Make two dimensions of equal size the same; where their factors do not fit each other, fix both and return False.

        Args:
            one, other: dimensions.
        """
        left, right = [one], [other]
        while left and right:
            a, b = self._pop(left), self._pop(right)
            if a is None or b is None or a == b:
                continue
            small, large = sorted((a, b), key=self._sizes.__getitem__)
            if self._sizes[small] == self._sizes[large]:
                self._parents[b] = a
            elif self._sizes[large] % self._sizes[small]:
                self.fix((one, other))
                return False
            else:
                rest = self._cut(large, small)
                (left if large == a else right).append(rest)
        return True

    def reshape(self, dims: Sequence[int], sizes: Sequence[int]) -> list[int]:
        """The dimensions of a row-major reshape: cut and joined where factors fit, else new ones, and the old ones fixed.

        Args:
            dims: dimensions of the operand.
            sizes: sizes of the result's dimensions.
        """
        result: list[int] = []
        for old, new in groups([self._sizes[dim] for dim in dims], sizes):
            result += self._regroup([dims[index] for index in old], [sizes[index] for index in new])
        return result

    def _regroup(self, dims: list[int], sizes: list[int]) -> list[int]:
        pending = dims[::-1]
        result = []
        for size in sizes:
            parts = self._take(pending, size)
            if parts is None:
                self.fix(dims)
                return result + [self.new(size) for size in sizes[len(result) :]]
            result.append(self._join(parts))
        return result

    def _take(self, pending: list[int], size: int) -> list[int] | None:
        parts = []
        while size > 1:
            factor = self._pop(pending)
            if factor is None:
                return None
            if size % self._sizes[factor] == 0:
                parts.append(factor)
                size //= self._sizes[factor]
            elif self._sizes[factor] % size == 0:
                head = self.new(size)
                pending.append(self._cut(factor, head))
                parts.append(head)
                size = 1
            else:
                return None
        return parts

    def _join(self, parts: list[int]) -> int:
        if len(parts) == 1:
            return parts[0]
        joined = self.new(math.prod(self._sizes[part] for part in parts))
        if parts:
            self._parts[joined] = tuple(parts)
        return joined

    def _cut(self, factor: int, head: int) -> int:
        rest = self.new(self._sizes[factor] // self._sizes[head])
        self._parts[factor] = (head, rest)
        return rest

    def _pop(self, pending: list[int]) -> int | None:
        """The next factor of a stack of dimensions, as they are factored by now; None when the stack is empty."""
        while pending:
            root = self._root(pending.pop())
            if root in self._parts:
                pending.extend(reversed(self._parts[root]))
            elif self._sizes[root] > 1:
                return root
        return None

    def _root(self, dim: int) -> int:
        while self._parents[dim] != dim:
            self._parents[dim] = self._parents[self._parents[dim]]
            dim = self._parents[dim]
        return dim


def groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of old and new dimensions with equal products.

    Args:
        old: sizes before a reshape.
        new: sizes after it, with the same product.

    >>> groups([4, 6, 5], [24, 5])
    [([0, 1], [0]), ([2], [1])]
    """
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        start, begin, left, right = i, j, 1, 1
        while (i, j) == (start, begin) or left != right:
            if i < len(old) and (left <= right or j == len(new)):
                left, i = left * old[i], i + 1
            elif j < len(new):
                right, j = right * new[j], j + 1
            else:
                break
        found.append((list(range(start, i)), list(range(begin, j))))
    return found
