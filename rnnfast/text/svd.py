"""Dense vectors of few dimensions from large matrices, by truncated SVD or PCA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rnnfast.text.checks import check_positive


def reduce_svd(matrix: Any, size: int) -> Any:
    """Turn the rows of a matrix (N, D) into dense vectors (N, size) by a truncated SVD.

    The matrix A is about U S V^T, with the `size` largest singular values in S. The vectors are
    A V = U S. For counts of words this is latent semantic analysis (Deerwester et al., 1990).
    Columns are not centred, so a sparse matrix stays sparse. ``reduce_svd(A - A.mean(0), size)`` is
    the principal component analysis (PCA) of A.

    The rows of `cooccurrence` become word vectors, which are close to each other for words that are
    used alike. The rows of `one_hot` are all orthogonal or equal, so the SVD finds no likeness in
    them: the `size` most frequent tokens keep a direction each, and all others become zeros.

    The SVD is that of `torch.svd_lowrank` (Halko et al., 2009), which takes sparse matrices and
    does not compute all min(N, D) directions. It searches 2 size + 256 dimensions: the result is
    exact up to that min(N, D), and nearly exact beyond it. Two choices make the result unique. The
    random start is always the same. The largest entry of each direction, the first of several
    equals, is positive. Only directions whose singular values are equal may still turn into one
    another where rounding differs.

    The gradient of the vectors treats the directions as constants.

    To project further rows on the same directions, or to see how much of the variance they
    explain, use ``sklearn.decomposition.TruncatedSVD`` or ``PCA``.

    Args:
        matrix: an array, a tensor (dense or sparse) or a SciPy sparse matrix. float32 and float64
            stay what they are, other types become torch's default dtype.
        size: the number of directions to keep.

    Returns:
        (N, size), a tensor on the device of the matrix for a tensor, else an array.

    Raises:
        TypeError: the matrix is none of these, or has complex entries.
        ValueError: it does not have two dimensions, has fewer rows or columns than `size`, only
            zeros, or an entry that is infinite or not a number; or size is not a positive integer.
    """
    check_positive(size=size)
    A = _as_matrix(matrix)
    if size > min(A.shape):
        raise ValueError(
            f"size must be at most the smaller side of the matrix, got {size} for {tuple(A.shape)}"
        )
    entries = A if A.layout == torch.strided else A.values()
    if not entries.isfinite().all():
        raise ValueError("expected finite entries, got some that are infinite or not a number")
    if not entries.any():
        raise ValueError("expected a matrix with directions, got only zeros")
    with torch.no_grad(), _same_random_numbers(A.device):
        _, _, V = torch.svd_lowrank(A, min(2 * size + 256, *A.shape), niter=4)
    V = V[:, :size]
    # Entries that differ by rounding only are equals; argmax takes the first.
    largest = (V.abs() > 0.999 * V.abs().amax(0)).int().argmax(0)
    vectors = A @ (V * V.gather(0, largest[None]).sign())
    return vectors if isinstance(matrix, Tensor) else vectors.numpy()


@contextmanager
def _same_random_numbers(device: torch.device) -> Iterator[None]:
    """Seed the device's default generator, and restore its state afterwards."""
    on_cuda = device.type == "cuda"
    generator = torch.cuda.default_generators[device.index] if on_cuda else torch.default_generator
    with torch.random.fork_rng([device] if on_cuda else []):
        generator.manual_seed(0)
        yield


def _as_matrix(matrix: Any) -> Tensor:
    """Turn a matrix into a float32 or float64 tensor, either dense or coalesced COO."""
    if hasattr(matrix, "tocoo"):  # a SciPy sparse matrix; this does not import SciPy
        coo = matrix.tocoo()
        places = torch.from_numpy(np.stack([coo.row, coo.col]).astype(np.int64))
        values = torch.from_numpy(np.array(coo.data))
        matrix = torch.sparse_coo_tensor(
            places, values, coo.shape, device=values.device, check_invariants=True
        )
    elif isinstance(matrix, np.ndarray):
        matrix = torch.from_numpy(np.array(matrix, order="C"))
    elif not isinstance(matrix, Tensor):
        raise TypeError(
            f"expected an array, a tensor or a SciPy sparse matrix, got {type(matrix).__name__}"
        )
    if matrix.is_complex():
        raise TypeError(f"expected real entries, got {matrix.dtype}")
    if matrix.dim() != 2:
        raise ValueError(f"expected a matrix of shape (N, D), got {tuple(matrix.shape)}")
    if matrix.dtype not in (torch.float32, torch.float64):
        matrix = matrix.to(torch.get_default_dtype())
    return matrix if matrix.layout == torch.strided else matrix.to_sparse_coo().coalesce()
