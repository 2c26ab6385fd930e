"""The Cramér-Rao bound, on the host and in float64.

Read backwards, `(n Cov(theta_hat))^-1 -> F` for a maximum-likelihood estimate, it is
the only sense in which the bound *estimates* a Fisher matrix.  It takes thousands of
fits and an identifiable model: a check for tests, no tool for training networks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

# A jacobian may leave the range of F by this much of its length; float32 matrices.
_LARGEST_REST = 1e-4


def crlb(
    fisher: ArrayLike, jacobian: ArrayLike, n: int, rtol: float = 1e-6
) -> NDArray[np.float64]:
    """Smallest covariance of an unbiased estimator of `tau(theta)` from n samples.

    `J F^+ J^T / n` (Rao 1945; Cramér 1946), with a pseudo-inverse for models in which
    only some functions of theta can be estimated.

    Args:
      fisher: `[d, d]`, Fisher matrix of one sample.
      jacobian: `[m, d]`, of tau with respect to theta; the identity for theta itself.
      n: independent samples, at least 1.
      rtol: eigenvalues of F below so much of the largest count as zero.

    Returns:
      `[m, m]`, float64.

    Raises:
      ValueError: tau is not identifiable, that is the jacobian leaves the range of F
        and the bound is infinite; or shapes or `n` make no sense.
    """
    f = np.asarray(fisher, np.float64)
    j = np.asarray(jacobian, np.float64)
    if f.ndim != 2 or f.shape[0] != f.shape[1] or j.ndim != 2 or n < 1:
        raise ValueError(f"no bound for fisher {f.shape}, jacobian {j.shape}, n = {n}")
    if j.shape[1] != f.shape[0]:
        raise ValueError(f"jacobian {j.shape} does not fit a fisher of {f.shape}")
    values, vectors = np.linalg.eigh(0.5 * (f + f.T))
    kept = values > rtol * max(values[-1], 0.0)
    basis = vectors[:, kept]
    along = j @ basis
    rest = np.linalg.norm(j - along @ basis.T, axis=1)
    length = np.linalg.norm(j, axis=1)
    if np.any(lost := rest > _LARGEST_REST * length):
        raise ValueError(
            f"rows {np.flatnonzero(lost).tolist()} of the jacobian leave the range of "
            f"the Fisher matrix (rank {int(kept.sum())} of {f.shape[0]}): these "
            "functions of theta are not identifiable and have no finite bound"
        )
    return (along / values[kept]) @ along.T / n
