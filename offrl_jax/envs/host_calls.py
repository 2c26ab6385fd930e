"""Calls from inside `jit` to a batched function of the host, however they are mapped.

`jax.pure_callback` alone has two shortcomings here.  Each `vmap` around it adds an axis
that the host function would have to undo.  And on the CPU client it can stop for ever:
before the host function runs, JAX copies the arguments; a large one is copied by the
very threads that run the programs, and when every such thread waits in a callback of
its own (two virtual devices on two cores) no one is left to copy.  Measured with jax
0.10.2: arguments of 150 kB stop two devices on two cores, of 80 kB do not; XLA copies
up to 100 kB on the spot.  So arguments are handed over in pieces that are small enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap

PIECE_BYTES = 64 * 1024
"""Most bytes of one argument of a callback; see above."""

Host = Callable[..., Sequence[np.ndarray]]


def _pieces(rows: jax.Array) -> list[jax.Array]:
    """`[n, ...]` in parts of at most `PIECE_BYTES` (or one row) each."""
    row_bytes = rows.dtype.itemsize * math.prod(rows.shape[1:])
    size = max(1, PIECE_BYTES // row_bytes)
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def batched_callback(
    host: Host, results: Sequence[jax.ShapeDtypeStruct]
) -> Callable[..., tuple[jax.Array, ...]]:
    """A function of one example that calls the host once for a whole batch.

    Args:
      host: `(*arguments [n, ...]) -> results [n, ...]`, NumPy arrays, pure: rows depend
        on nothing but the same row of the arguments.  May be called from several
        threads at once.
      results: shapes and dtypes of one row of the results, of 32 bits or less.

    Returns:
      `(*arguments) -> results` for one row, to be used under any `jit`, `scan`,
      `shard_map` and any nest of `vmap`: all mapped axes together become one call with
      n their product.  Not differentiable.
    """

    def whole(*pieces: list[Any]) -> tuple[np.ndarray, ...]:
        joined = [
            np.asarray(parts[0])
            if len(parts) == 1
            else np.concatenate([np.asarray(part) for part in parts])
            for parts in pieces
        ]
        return tuple(host(*joined))

    def mapped(prefix: tuple[int, ...]) -> Callable[..., tuple[jax.Array, ...]]:
        """The function for arguments whose leading axes are `prefix`."""
        n = math.prod(prefix)

        @custom_vmap
        def call(*arguments: jax.Array) -> tuple[jax.Array, ...]:
            rows = [x.reshape(n, *x.shape[len(prefix) :]) for x in arguments]
            out = jax.pure_callback(
                whole,
                tuple(jax.ShapeDtypeStruct((n, *r.shape), r.dtype) for r in results),
                *(_pieces(x) for x in rows),
            )
            return tuple(x.reshape(*prefix, *x.shape[1:]) for x in out)

        @call.def_vmap
        def rule(size: int, mapped_in: Sequence[bool], *arguments: jax.Array):
            arguments = tuple(
                x if batched else jnp.broadcast_to(x, (size, *x.shape))
                for x, batched in zip(arguments, mapped_in, strict=True)
            )
            out = mapped((size, *prefix))(*arguments)
            return out, (True,) * len(out)

        return call

    return mapped(())
