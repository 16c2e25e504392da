"""Distances between rows of features (N, D), made block by block and never as a whole matrix, and checks of the rows.

Rows are of any floating dtype and on any device; `device` says where the work is done, where the rows are if not given.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vca_engine.precision import ieee_float32

BLOCK = 4096  # rows on each side of a block of distances: at D = 2048 about 250 MB of temporaries
ARITHMETICS = {"adm-fp16": torch.float16, "fp32": torch.float32}


def nearest_rows(queries: Tensor, rows: Tensor, k: int = 1, device: Any = None) -> tuple[Tensor, Tensor]:
    """Find the k rows nearest to each query, from near to far.

    Args:
        queries: (Q, D).
        rows: (N, D).
        k: Number of neighbours, up to N; a row equal to the query is one.
        device: Where to compute.

    Returns:
        Distances |query - row|, not squared, (Q, k) float64, and the numbers of the rows (Q, k); on the CPU.

    Raises:
        ValueError: Fewer than k rows, different widths, or rows that are not finite.
    """
    check_k(k)
    queries, rows = check_pair(queries, rows, (1, k), f"a search with k={k}", device, ("queries", "rows"))
    found = smallest(queries, rows, k, "fp32")[1]
    # Once more from differences: d as above is off by about 1e-7 |row|^2, which would part a row from its copy.
    parts = zip(queries.split(64), found.split(64), strict=True)
    distances, order = torch.cat([(rows[f] - q[:, None].double()).norm(dim=2) for q, f in parts]).sort(dim=1)
    return distances.cpu(), found.gather(1, order).cpu()


def distance_blocks(
    u: Tensor, v: Tensor, arithmetic: str, block: int | None = None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield all squared distances between (A, D) and (B, D), a block each, with the rows and columns they are for."""
    block = block or BLOCK
    for i in range(0, len(u), block):
        for j in range(0, len(v), block):
            rows, columns = slice(i, i + block), slice(j, j + block)
            yield rows, columns, squared_distances(u[rows].float(), v[columns].float(), arithmetic)


def smallest(u: Tensor, v: Tensor, k: int, arithmetic: str, block: int | None = None) -> tuple[Tensor, Tensor]:
    """Find the k smallest squared distances (A, k) of each row of u (A, D) to rows of v (B, D), and which those are."""
    found = []
    for part in u.split(block or BLOCK):
        values, indices = [], []
        for _, columns, distances in distance_blocks(part, v, arithmetic, block):
            least = distances.topk(min(k, distances.shape[1]), largest=False)
            values.append(least.values)
            indices.append(least.indices + columns.start)
        values, order = torch.cat(values, dim=1).topk(k, largest=False)
        found.append((values, torch.cat(indices, dim=1).gather(1, order)))
    return torch.cat([values for values, _ in found]), torch.cat([indices for _, indices in found])


@ieee_float32()
def squared_distances(u: Tensor, v: Tensor, arithmetic: str) -> Tensor:
    """Compute max(|u|^2 - 2 u.v + |v|^2, 0), (A, D) and (B, D) -> (A, B) float32, each step in the arithmetic."""
    dtype = ARITHMETICS[arithmetic]
    a, b = u.to(dtype), v.to(dtype)
    norm_u, norm_v = (sum_as_tensorflow(x * x) if dtype is torch.float16 else (x * x).sum(dim=1) for x in (a, b))
    if dtype is torch.float32 and not norm_u.max() + norm_v.max() < torch.finfo(dtype).max / 4:
        raise ValueError("squared distances of these rows are beyond float32; scale the features down.")
    distances = (a.float() @ b.float().T).to(dtype).mul_(-2).add_(norm_u[:, None]).add_(norm_v)
    if dtype is torch.float16 and not distances.isfinite().all():
        return squared_distances(u, v, "fp32")
    return distances.float().clamp_(min=0)


def sum_as_tensorflow(rows: Tensor) -> Tensor:
    """Add up float16 rows (N, D) -> (N,) in the order of TensorFlow's `reduce_sum` on an x86 processor.

    Each addition is rounded to float16: rows longer than 200 packets of 8 numbers are halved; of a part, four packets
    are added to at a time; the four are added up, then the packets that are left, and the 8 lanes of the sum, these in
    float32.
    """
    N, D = rows.shape
    if D > 1600:  # for a D that is no multiple of 8 TensorFlow's cut moves with the row; this is that of the first
        left = -(-D // 16) * 8
        return sum_as_tensorflow(rows[:, :left]) + sum_as_tensorflow(rows[:, left:])
    fours, packets = D // 32, D // 8
    lanes = rows.new_zeros(N, 4, 8)
    for four in rows[:, : 32 * fours].unflatten(1, (fours, 4, 8)).unbind(1):
        lanes += four
    lanes = lanes[:, 0] + lanes[:, 1] + lanes[:, 2] + lanes[:, 3]  # (N, 8)
    for packet in rows[:, 32 * fours : 8 * packets].unflatten(1, (packets - 4 * fours, 8)).unbind(1):
        lanes += packet
    rest = rows.new_zeros(N)
    for column in rows[:, 8 * packets :].unbind(1):
        rest += column
    return rest + lanes.float().sum(dim=1).half()


def check_k(k: int) -> None:
    """Refuse a number of neighbours below 1."""
    if k < 1:
        raise ValueError(f"k is {k}; it counts neighbours and must be at least 1.")


def check_rows(name: str, rows: Tensor, least: int, what: str, device: Any = None) -> Tensor:
    """Take rows (N, D) to the device in float32 or float64; refuse what has another form, too few, or is not finite."""
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise ValueError(f"{name} has shape {tuple(rows.shape)}; expected (N, D).")
    if len(rows) < least:
        raise ValueError(f"{name} has {len(rows)} rows, too few for {what}: give {least} or more.")
    low, high = rows.detach().aminmax(dim=1)  # both NaN where one entry is; isfinite would copy the rows
    finite = low.isfinite() & high.isfinite()
    if not finite.all():
        raise ValueError(f"non-finite values in row {int(finite.int().argmin())} of {name}.")
    rows = rows.detach().to(device)
    return rows if rows.dtype == torch.float64 else rows.float()


def check_pair(
    a: Tensor, b: Tensor, least: tuple[int, int], what: str, device: Any, names: tuple[str, str] = ("real", "fake")
) -> tuple[Tensor, Tensor]:
    """Take (A, D) and (B, D) through `check_rows`, to the same dtype; `least` rows of each; refuse different widths."""
    a, b = (check_rows(*each, what, device) for each in zip(names, (a, b), least, strict=True))
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"{names[0]} is {a.shape[1]}-d and {names[1]} {b.shape[1]}-d; use the same extractor.")
    return a, b.to(a)  # of the same device and dtype, too
