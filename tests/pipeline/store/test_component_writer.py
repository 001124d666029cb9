"""What is appended to a component: rows that hold a NaN or an infinity are found by the bits of their exponents."""

import numpy as np
import pytest

from repa.pipeline.store.component_writer import rows_not_finite


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_that_are_not_finite_are_those_that_numpy_names(dtype: str) -> None:
    largest, smallest = np.finfo(dtype).max, np.finfo(dtype).smallest_subnormal
    values = np.random.default_rng(0).normal(size=(64, 2, 5, 3)).astype(dtype)
    for row, value in enumerate([np.nan, np.inf, -np.inf, -np.nan, largest, -largest, smallest, -0.0]):
        values[row, 1, 4, 2] = value
    values[9, 0, 0, 0] = np.inf
    expected = np.flatnonzero(~np.isfinite(values).reshape(64, -1).all(axis=1)).tolist()
    assert rows_not_finite(values) == expected == [0, 1, 2, 3, 9]
    assert rows_not_finite(values[::-1]) == [54, 60, 61, 62, 63]  # not contiguous
    assert rows_not_finite(values[:0]) == rows_not_finite(values[:, :0]) == []
