"""Dense vectors of few dimensions from large matrices: truncated SVD, and so PCA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rnnfast.text.checks import check_positive


class TruncatedSVD:
    """Dense vectors for the rows of a matrix, by its largest singular values.

    A (N, D) is about U S V^T with the `size` largest singular values in S; the dense vectors of the
    rows are A V = U S. For counts of words this is latent semantic analysis (Deerwester et al.,
    1990). Columns are not centred, so a sparse matrix stays sparse. Of a matrix whose columns have
    mean 0, ``A - A.mean(0)``, this is principal component analysis (PCA): `components` are the
    principal axes, `transform` gives the principal components.

    It is computed by `torch.svd_lowrank` (Halko et al., 2009): unlike `torch.linalg.svd` it takes
    sparse matrices and does not compute all min(N, D) directions, and unlike scikit-learn's class
    of this name it runs where the matrix is and needs nothing but torch. The search space has
    2 size + 256 dimensions: up to that min(N, D) the result is exact, beyond it nearly so. Each
    direction's largest entry (the first of equals) is made positive, and the random start is
    always the same, so a matrix has one result; only directions with equal singular values may turn
    into one another where rounding differs.

    A matrix is an array, a tensor (dense or sparse) or a SciPy sparse matrix. float32 and float64
    stay what they are, other types become torch's default dtype.

    Args:
        size: the number of directions to keep.

    Attributes:
        components: V^T (size, D), orthonormal rows; a tensor on the device of the matrix.
        singular_values: the diagonal of S (size,), the largest first.
        explained_variance_ratio: s_i ** 2 / sum of A_ij ** 2 (size,): the share of each direction
            in the squares of all entries, that is in the variance about zero.

    Raises:
        ValueError: size is not a positive integer.
    """

    components: Tensor
    singular_values: Tensor
    explained_variance_ratio: Tensor

    def __init__(self, size: int) -> None:
        check_positive(size=size)
        self.size = size

    def __repr__(self) -> str:
        return f"TruncatedSVD({self.size})"

    @torch.no_grad()
    def fit(self, matrix: Any) -> TruncatedSVD:
        """Find the directions of a matrix (N, D); returns self.

        Raises:
            TypeError: the matrix is none, or has complex entries.
            ValueError: it has not two dimensions, fewer rows or columns than `size`, only zeros,
                or an entry that is infinite or not a number.
        """
        A = _as_matrix(matrix)
        if self.size > min(A.shape):
            raise ValueError(
                f"size must be at most the smaller side of the matrix, got {self.size} for "
                f"{tuple(A.shape)}"
            )
        entries = A if A.layout == torch.strided else A.values()
        if not entries.isfinite().all():
            raise ValueError("expected finite entries, got some that are infinite or not a number")
        if not entries.any():
            raise ValueError("expected a matrix with directions, got only zeros")
        with _same_random_numbers(A.device):
            _, S, V = torch.svd_lowrank(A, min(2 * self.size + 256, *A.shape), niter=4)
        S, V = S[: self.size], V[:, : self.size]
        # Entries that differ by rounding only are equals; argmax takes the first.
        largest = (V.abs() > 0.999 * V.abs().amax(0)).int().argmax(0)
        self.components = (V * V.gather(0, largest[None]).sign()).T.contiguous()
        self.singular_values = S
        self.explained_variance_ratio = S.square() / entries.square().sum()
        return self

    def transform(self, rows: Any) -> Any:
        """Project rows (M, D), new ones or those of `fit`, on the directions: A V.

        Returns:
            (M, size), a tensor for a tensor, else an array.

        Raises:
            RuntimeError: there was no `fit` before.
            TypeError: as for `fit`.
            ValueError: the rows have not D columns.
        """
        if not hasattr(self, "components"):
            raise RuntimeError("TruncatedSVD: call fit before transform")
        A = _as_matrix(rows)
        if A.size(1) != self.components.size(1):
            raise ValueError(f"expected rows of {self.components.size(1)} columns, got {A.size(1)}")
        vectors = A.to(self.components.dtype) @ self.components.T
        return vectors if isinstance(rows, Tensor) else vectors.numpy()

    def fit_transform(self, matrix: Any) -> Any:
        """`fit`, then `transform` of the same matrix: U S."""
        return self.fit(matrix).transform(matrix)


def reduce_svd(matrix: Any, size: int) -> Any:
    """Turn the rows of a matrix (N, D) into vectors (N, size): `TruncatedSVD(size)` at once.

    ``reduce_svd(A - A.mean(0), size)`` is the PCA of A.

    The rows of `cooccurrence` become word vectors, close to each other for words used alike. Those
    of `one_hot` have nothing in common but the token: of them the `size` most frequent tokens keep
    a direction each, and the others become zeros.
    """
    return TruncatedSVD(size).fit_transform(matrix)


@contextmanager
def _same_random_numbers(device: torch.device) -> Iterator[None]:
    """Seed what `svd_lowrank` draws from, the device's own generator, and put it back after."""
    on_cuda = device.type == "cuda"
    generator = torch.cuda.default_generators[device.index] if on_cuda else torch.default_generator
    before = generator.get_state()
    generator.manual_seed(0)
    try:
        yield
    finally:
        generator.set_state(before)


def _as_matrix(matrix: Any) -> Tensor:
    """A float32 or float64 tensor of two dimensions, dense or coalesced COO."""
    if hasattr(matrix, "tocoo"):  # SciPy's sparse kinds, without importing SciPy
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
