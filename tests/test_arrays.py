"""What callers may pass as an array, and what they read when it does not fit."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from gemloupe.arrays import as_float32


def test_a_float32_array_is_not_copied() -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert np.shares_memory(as_float32(x, "x"), x)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int32, np.uint8, ">f4"])
def test_other_real_dtypes_are_converted(dtype: str) -> None:
    array = as_float32(np.array([[1, 2], [3, 4]], dtype), "x")
    assert array.dtype == np.float32 and array.tolist() == [[1, 2], [3, 4]]


def test_lists_numbers_and_strided_views_are_accepted() -> None:
    assert as_float32([[1, 2.5], [3, 4]], "x").tolist() == [[1, 2.5], [3, 4]]
    assert as_float32(0.5, "x").shape == () and as_float32(np.float64(0.5), "x") == 0.5
    view = as_float32(np.arange(12.0)[::2].reshape(2, 3).T, "x")
    assert view.flags.c_contiguous and view.tolist() == [[0, 6], [2, 8], [4, 10]]


def test_torch_tensors_are_accepted_with_gradients_bfloat16_and_strides() -> None:
    values = [[1.0, -2.0, 0.5]]
    for tensor in (
        torch.tensor(values),
        torch.tensor(values, requires_grad=True),
        torch.tensor(values, dtype=torch.bfloat16, requires_grad=True),
        torch.tensor(values, dtype=torch.float16),
        torch.tensor(values, dtype=torch.float64),
        torch.nn.Parameter(torch.tensor(values)),
        torch.tensor(values).T.contiguous().T,
        torch._neg_view(-torch.tensor(values)),
    ):
        assert as_float32(tensor, "x").tolist() == values
    tensor = torch.tensor(values)
    assert np.shares_memory(as_float32(tensor, "x"), tensor.numpy())


def test_objects_with_only_one_of_the_protocols_are_accepted() -> None:
    class Array:
        def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
            return np.ones((2, 2))

    class Dlpack:
        def __dlpack__(self, **arguments: object) -> object:
            return np.ones(3).__dlpack__()

        def __dlpack_device__(self) -> tuple[int, int]:
            return (1, 0)

    assert as_float32(Array(), "x").shape == (2, 2)
    assert as_float32(Dlpack(), "x").shape == (3,)


def test_a_tensor_on_another_device_says_how_to_move_it() -> None:
    class OnGpu:
        device = "cuda:0"

        def __dlpack__(self, **arguments: object) -> object:
            raise AssertionError("not asked")

        def __dlpack_device__(self) -> tuple[int, int]:
            return (2, 0)

    with pytest.raises(ValueError, match=r"steering is on cuda:0.*steering\.cpu\(\)"):
        as_float32(OnGpu(), "steering")
    with pytest.raises((TypeError, ValueError), match="steering"):
        as_float32(torch.ones(2, device="meta"), "steering")


@pytest.mark.parametrize(
    "x",
    [
        "text",
        None,
        {"a": 1},
        np.array([1j]),
        np.array([True]),
        np.array(["a"]),
        np.array([None]),
        [[1], [1, 2]],
        object(),
        np.ma.masked_array([1.0]),
        torch.ones(2).to_sparse(),
        torch.ones(2, dtype=torch.complex64),
    ],
)
def test_what_holds_no_real_numbers_is_a_type_error_naming_the_argument(x: object) -> None:
    with pytest.raises(TypeError, match="direction"):
        as_float32(x, "direction")


def test_a_wrong_shape_names_both() -> None:
    with pytest.raises(ValueError, match=r"v has shape \[2, 3\]; expected \[T, 4\]"):
        as_float32(np.ones((2, 3)), "v", ("T", 4))
    with pytest.raises(ValueError, match=r"v has shape \[3\]; expected \[any, 3\]"):
        as_float32(np.ones(3), "v", (None, 3))
    with pytest.raises(ValueError, match=r"v has shape \[2, 3\]; expected \[S, S\]"):
        as_float32(np.ones((2, 3)), "v", ("S", "S"))
    assert as_float32(np.ones((2, 0)), "v", ("T", None)).shape == (2, 0)
    assert as_float32(1, "v", ()).shape == ()


def test_numbers_beyond_float32_are_an_error_but_infinities_pass() -> None:
    with pytest.raises(ValueError, match="1e\\+300"):
        as_float32(np.array([1.0, 1e300]), "x")
    passed = as_float32(np.array([np.inf, -np.inf, np.nan]), "x")
    assert np.isposinf(passed[0]) and np.isneginf(passed[1]) and np.isnan(passed[2])


def test_torch_is_not_imported() -> None:
    code = (
        "import sys, numpy; from gemloupe.arrays import as_float32; "
        "as_float32(numpy.ones(2), 'x'); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(filter(None, sys.path))},
    )
    assert done.stdout.strip() == "False"
