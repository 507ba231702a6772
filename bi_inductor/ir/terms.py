"""Values as terms: what an element is, in full, from the inputs on. Equal terms are one number."""

from __future__ import annotations

from typing import Any

import numpy as np

#: Operations whose operands are looked into by ``orders.py``.
ADD, MULTIPLY = "arith.addf", "arith.mulf"
PAIR = "pair:"  # the same, as the combine of a two-element tt.reduce
DOT, VECTOR = "dot:", "vector"
CONSTANT, INPUT = "constant", "input"


class Terms:
    """A table of terms; a term is (operation, operands...), and its number is its place in the table."""

    def __init__(self) -> None:
        self.nodes: list[tuple[Any, ...]] = []
        self._numbers: dict[tuple[Any, ...], int] = {}

    def one(self, operation: str, *operands: Any) -> int:
        """The number of one term."""
        key = (operation, *operands)
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self.nodes)
            self.nodes.append(key)
        return number

    def constant(self, value: Any) -> int:
        """A number that is known; floats by their spelling, so that -0.0 is not 0.0."""
        return self.one(CONSTANT, repr(value))

    def each(self, operation: str, *operands: np.ndarray) -> np.ndarray:
        """``operation`` of corresponding elements; operands are arrays of numbers of terms."""
        arrays = np.broadcast_arrays(*operands)
        columns = np.stack([array.reshape(-1) for array in arrays], axis=1)
        if len(arrays) <= 2:  # two numbers in one, which sorts much faster than rows
            _, first, inverse = np.unique(
                (columns[:, 0] << 32) + columns[:, -1], return_index=True, return_inverse=True
            )
            unique = columns[first]
        else:
            unique, inverse = np.unique(columns, axis=0, return_inverse=True)
        made = [self.one(operation, *row) for row in unique.tolist()]
        return np.array(made, dtype=np.int64)[inverse.reshape(-1)].reshape(arrays[0].shape)

    def rows(self, matrix: np.ndarray) -> np.ndarray:
        """One term for each row of [m, k]: the vector of its elements, in order."""
        return np.array([self.one(VECTOR, *row) for row in matrix.tolist()], dtype=np.int64)
