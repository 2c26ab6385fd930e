"""Calls from inside `jit` to a batched function of the host, however they are mapped.

`jax.pure_callback` alone has three shortcomings here.  Each `vmap` around it adds an
axis that the host function would have to undo.  Each argument and result costs some
0.03 ms per call; so one array of 32-bit words holds all of them.  And on the CPU client
it can stop for ever: before the host function runs, JAX copies the arguments; a large
one is copied by the very threads that run the programs, and when every such thread
waits in a callback of its own (two virtual devices on two cores) no one is left to
copy.  Measured with jax 0.10.2, two devices on two cores: arguments of 99.8 kB run,
those of 105.6 kB stop; XLA copies up to 100 KiB on the spot.  So the words are handed
over in pieces that are small enough.
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
Row = jax.ShapeDtypeStruct


def _width(row: Row) -> int:
    return math.prod(row.shape)


def _to_words(value: jax.Array) -> jax.Array:
    """A value of 32 bits, or a flag, as uint32 words `[W]`."""
    if value.dtype == jnp.bool_:
        return value.astype(jnp.uint32).ravel()
    return jax.lax.bitcast_convert_type(value, jnp.uint32).ravel()


def _from_words(words: jax.Array, row: Row) -> jax.Array:
    if row.dtype == jnp.bool_:
        return (words != 0).reshape(row.shape)
    return jax.lax.bitcast_convert_type(words, row.dtype).reshape(row.shape)


def _columns(words: np.ndarray, rows: Sequence[Row]) -> list[np.ndarray]:
    """The parts of `words` `[n, W]` as arrays `[n, ...]` of their types."""
    out, start = [], 0
    for row in rows:
        part = np.ascontiguousarray(words[:, start : start + _width(row)])
        part = part != 0 if row.dtype == np.bool_ else part.view(row.dtype)
        out.append(part.reshape(len(words), *row.shape))
        start += _width(row)
    return out


def batched_callback(
    host: Host, arguments: Sequence[Row], results: Sequence[Row]
) -> Callable[..., tuple[jax.Array, ...]]:
    """A function of one example that calls the host once for a whole batch.

    Args:
      host: `(*arguments [n, ...]) -> results [n, ...]`, NumPy arrays, pure: rows depend
        on nothing but the same row of the arguments.  May be called from several
        threads at once.
      arguments: shapes and dtypes of one row of the arguments, of 32 bits or bool.
      results: the same of the results.

    Returns:
      `(*arguments) -> results` for one row, to be used under any `jit`, `scan`,
      `shard_map` and any nest of `vmap`: all mapped axes together become one call with
      n their product.  Derivatives through it are zero.
    """
    words_in, words_out = (sum(map(_width, rows)) for rows in (arguments, results))
    size = max(1, PIECE_BYTES // (4 * words_in))

    def whole(*pieces: Any) -> np.ndarray:
        parts = [np.asarray(piece) for piece in pieces]
        words = parts[0] if len(parts) == 1 else np.concatenate(parts)
        out, start = np.empty((len(words), words_out), np.uint32), 0
        found = host(*_columns(words, arguments))
        for values, row in zip(found, results, strict=True):
            values = values.reshape(len(words), _width(row))
            plain = values if row.dtype == np.bool_ else values.view(np.uint32)
            out[:, start : start + _width(row)] = plain
            start += _width(row)
        return out

    def mapped(prefix: tuple[int, ...]) -> Callable[[jax.Array], jax.Array]:
        """The call for words whose leading axes are `prefix`."""
        n = math.prod(prefix)

        @custom_vmap
        def call(words: jax.Array) -> jax.Array:
            rows = words.reshape(n, words_in)
            pieces = [rows[i : i + size] for i in range(0, n, size)]
            out = jax.pure_callback(whole, Row((n, words_out), jnp.uint32), *pieces)
            return out.reshape(*prefix, words_out)

        @call.def_vmap
        def rule(axis_size: int, mapped_in: Sequence[bool], words: jax.Array):
            # With a single argument there is a call only where it is mapped.
            del mapped_in
            return mapped((axis_size, *prefix))(words), True

        return call

    outermost = mapped(())

    def function(*values: jax.Array) -> tuple[jax.Array, ...]:
        parts = [
            _to_words(jnp.asarray(value, row.dtype))
            for value, row in zip(values, arguments, strict=True)
        ]
        words = outermost(jnp.concatenate(parts))
        out, start = [], 0
        for row in results:
            out.append(_from_words(words[start : start + _width(row)], row))
            start += _width(row)
        return tuple(out)

    return function
