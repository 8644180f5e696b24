"""Dense linear algebra on tensors: the one eigenproblem behind every low-rank step, and small helpers.

All functions take and return tensors, leave their arguments alone and compute in float64 (the squared condition number
of a Gram matrix costs half of the digits, which float64 can spare and float32 cannot: a float32 Cholesky or inverse
square root of a calibration Gram matrix fails or returns NaN on rank-deficient data).
"""

from __future__ import annotations

import torch
from torch import Tensor


def smaller_side(
    weight: Tensor,  # (out, in)
) -> tuple[Tensor | None, Tensor]:
    """(rotation, core) with W = rotation @ core, core (k, in), k = min(out, in), and orthonormal columns in rotation.

    For out <= in the core is W itself and there is no rotation; for out > in they are the QR factors. Eigenvectors of
    W H W^T are the rotation times those of the k x k matrix core H core^T, orthonormal even where energies vanish.
    """
    w = weight.double()
    if w.shape[0] <= w.shape[1]:
        return None, w
    rotation, core = torch.linalg.qr(w)
    return rotation, core


def principal_axes(
    moment: Tensor,  # (k, k), positive semidefinite up to rounding
) -> tuple[Tensor, Tensor]:
    """Eigenvalues (k,), decreasing and >= 0, and eigenvectors (k, k) in columns, of the symmetric part."""
    energies, vectors = torch.linalg.eigh((moment + moment.T) / 2)
    return energies.flip(0).clamp_min(0), vectors.flip(1)


def output_basis(
    weight: Tensor,  # (out, in)
    gram: Tensor | None,  # (in, in), symmetric positive semidefinite; None is the identity
) -> tuple[Tensor, Tensor]:
    """Eigenvectors of W H W^T, largest first: an orthonormal basis of the outputs, best at every rank.

    The minimum of ||(W - W') H^(1/2)||_F over matrices W' of rank r is W' = U_r U_r^T W (Eckart-Young on W H^(1/2),
    whose left singular vectors are the eigenvectors of W H W^T). No inverse and no damping constant occurs, so a
    singular H is no special case. The problem is solved on the smaller side, see `smaller_side`.

    Returns:
        basis: (out, k) float64, k = min(out, in), orthonormal columns.
        energies: (k,) float64, the eigenvalues, decreasing and >= 0; sum over j >= r is the squared error at rank r.
    """
    rotation, core = smaller_side(weight)
    energies, vectors = principal_axes(core @ core.T if gram is None else core @ gram.double() @ core.T)
    return (vectors if rotation is None else rotation @ vectors), energies


def row_energies(
    rows: Tensor,  # (k, in)
    gram: Tensor | None,  # (in, in)
) -> Tensor:
    """diag(rows H rows^T): the mean squared output along each row. (k,)"""
    return (rows * rows).sum(1) if gram is None else ((rows @ gram.to(rows.dtype)) * rows).sum(1)


def solve_psd(
    matrix: Tensor,  # (k, k), symmetric positive semidefinite
    right: Tensor,  # (k, n)
) -> Tensor:
    """The solution of (matrix + 1e-10 mean(diag) I) X = right: a singular matrix gives a bounded, near-least one."""
    jitter = 1e-10 * float(matrix.diagonal().mean().clamp_min(1e-290))
    root = torch.linalg.cholesky(matrix + jitter * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device))
    return torch.cholesky_solve(right, root)


def balanced(
    left: Tensor,  # (out, rank)
    right: Tensor,  # (rank, in)
) -> tuple[Tensor, Tensor]:
    """The same product with ||column j of L|| = ||row j of R||, so that gradients of L and R are of one scale."""
    norms_left, norms_right = left.norm(dim=0), right.norm(dim=1)
    usable = (norms_left > 0) & (norms_right > 0)
    scale = torch.where(usable, (norms_right / norms_left.clamp_min(1e-300)).sqrt(), torch.ones_like(norms_right))
    return left * scale, right / scale[:, None]


def principal(
    left: Tensor,  # (out, rank)
    right: Tensor,  # (rank, in)
) -> tuple[Tensor, Tensor]:
    """The same product as sqrt(S)-scaled singular vectors, most important first: orthogonal components of equal norm in
    both factors, whatever the condition of those given; components of no size keep a row of R of norm 1 (beside L = 0),
    from which they can train. float64."""
    outer, inner = torch.linalg.qr(left.double())
    rows, other = torch.linalg.qr(right.double().T)
    u, s, vt = torch.linalg.svd(inner @ other.T, full_matrices=False)  # of more components than outputs too
    root = s.sqrt()
    absent = s <= len(s) * torch.finfo(s.dtype).eps * s[:1]
    right = (torch.where(absent, 1.0, root)[:, None] * vt) @ rows.T
    return outer @ (u * torch.where(absent, 0.0, root)), right
