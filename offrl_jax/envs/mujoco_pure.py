"""MuJoCo bodies as pure environments: episodes inside `jit`, stepped on the host.

`as_pure` gives the functions of a `PureEnv`; each call of a whole batch of episodes,
under any nest of `vmap`, is one callback, whose episodes are spread over the engine's
threads.  The state of an episode is an explicit array, the simulator's complete
integration state with the solver's warm start, so that the host remembers nothing
between calls: a state that was saved goes on with the same bits.  Observations and
rewards are those of `MujocoEnv`, thus Gymnasium's, in float32.

Cost: a callback takes some 0.2 ms beside the simulation itself, most of it JAX's own;
so step as many episodes together as the algorithm allows.  On two cores 8 Hoppers run
at 0.6 of the speed of `MujocoEnv`, 32 at 0.8, 192 as fast; Humanoids at 0.9 and more.
Programs run on CPU with any number of devices: under `shard_map` each device makes its
own calls (see `host_calls` for what would stop them for ever), under automatic
partitioning JAX gathers the whole batch on one device for each call.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from offrl_jax.envs.base import PureEnv, TimeStep
from offrl_jax.envs.host_calls import Row, batched_callback
from offrl_jax.envs.mujoco import Cell, Engine, mujoco
from offrl_jax.errors import OffrlError
from offrl_jax.types import Array, Key

# Time, positions, velocities, activations and what warm-starts the solver.  The rest of
# mjSTATE_INTEGRATION is the user's input: the controls, which every step sets, and
# forces that no task applies; it would make a humanoid's state three times as long.
_FULL: int = (
    mujoco.mjtState.mjSTATE_FULLPHYSICS.value | mujoco.mjtState.mjSTATE_WARMSTART.value
)


class MujocoState(NamedTuple):
    """An episode.

    Attributes:
      bits: `[2 * K]`, uint32: the K float64s of the simulator's state, the last one the
        place from which the next step measures velocity, each as two words.  JAX
        computes in 32 bits, but must not round these.
      t: `[]`, int32, steps taken.
    """

    bits: Array
    t: Array


class Simulation:
    """The host's side: batches of states in, batches of states out, nothing kept.

    Beside the engine it holds simulators that no call uses at the moment.  Safe to call
    from several threads.

    Args:
      env_id: a key of `mujoco_bodies.BODIES`.
      threads: workers; all cores that the process may use if None.

    Raises:
      UsageError: the id is unknown.
      OffrlError: the installed Gymnasium lacks the model.
    """

    def __init__(self, env_id: str, threads: int | None = None) -> None:
        self._name = env_id
        self._engine = Engine(env_id, threads)
        self.spec = self._engine.body.spec
        self._size = mujoco.mj_stateSize(self._engine.model, _FULL)
        self.words = 2 * (self._size + 1)
        self._idle: list[Cell] = []

    def begin(self, seed: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, ...]:
        """Starts the episodes that `MujocoEnv.reset` starts, where they are wanted.

        Args:
          seed: `[n]`, uint32.
          wanted: `[n]`, bool.

        Returns:
          Bits `[n, 2 * K]` and observations `[n, O]`; zeros in the other rows.

        Raises:
          OffrlError: the simulator failed.
        """
        rows = np.flatnonzero(wanted)
        engine = self._engine

        def start(cell: Cell, i: int) -> None:
            engine.place(cell, *engine.drawn_start(int(seed[rows[i]])))

        states, read = self._simulate(len(rows), start)
        states[:, -1] = engine.progress(read)
        bits = np.zeros((len(seed), self.words), np.uint32)
        obs = np.zeros((len(seed), self.spec.obs_dim), np.float32)
        bits[rows], obs[rows] = states.view(np.uint32), engine.observe(read)
        return bits, obs

    def step(self, bits: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, ...]:
        """Advances every episode by one step.

        Args:
          bits: `[n, 2 * K]`, uint32.
          action: `[n, A]`, float32.

        Returns:
          The new bits, observations `[n, O]` and rewards `[n]` in float32, whether the
          episode terminated `[n]`.

        Raises:
          OffrlError: the simulator failed.
        """
        engine = self._engine
        before = bits.view(np.float64)
        control, drive = engine.controls(action)

        def advance(cell: Cell, i: int) -> None:
            mujoco.mj_setState(engine.model, cell.data, before[i, :-1], _FULL)
            engine.advance(cell, drive[i])

        states, read = self._simulate(len(before), advance)
        states[:, -1] = engine.progress(read)
        reward, ended = engine.outcome(read, before[:, -1], states[:, -1], control)
        obs = engine.observe(read)
        return states.view(np.uint32), obs, reward.astype(np.float32), ended

    def _simulate(self, n: int, work: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Calls `work(cell, i)` for n episodes; their states `[n, K]` and readings."""
        engine = self._engine
        states, read = np.empty((n, self._size + 1)), engine.readings(n)
        targets = tuple(read.values())

        def slice_(rows: np.ndarray) -> None:
            # A pop is atomic; a cell whose simulator failed is not put back.
            try:
                cell = self._idle.pop()
            except IndexError:
                cell = engine.new_cell()
            for i in rows:
                work(cell, i)
                mujoco.mj_getState(engine.model, cell.data, states[i, :-1], _FULL)
                for target, view in zip(targets, cell.views, strict=True):
                    target[i] = view
            self._idle.append(cell)

        try:
            engine.in_threads(slice_, np.arange(n))
        except Exception as error:
            raise OffrlError(
                f"the simulator of '{self._name}' failed: {error or type(error)}"
            ) from error
        return states, read


def pure_from(simulation: Simulation, env_id: str) -> PureEnv:
    """The pure functions over a simulation; see `as_pure`."""
    spec = simulation.spec
    bits, seed = Row((simulation.words,), jnp.uint32), Row((), jnp.uint32)
    obs, action = (
        Row((spec.obs_dim,), jnp.float32),
        Row((spec.action_dim,), jnp.float32),
    )
    reward, flag = Row((), jnp.float32), Row((), jnp.bool_)
    begin = batched_callback(simulation.begin, (seed, flag), (bits, obs))
    advance = batched_callback(
        simulation.step, (bits, action), (bits, obs, reward, flag)
    )

    def reset(key: Key) -> tuple[MujocoState, Array]:
        """The episode of `MujocoEnv.reset` for a seed of 32 bits drawn from the key."""
        start, shown = begin(jax.random.bits(key), jnp.ones((), bool))
        return MujocoState(start, jnp.zeros((), jnp.int32)), shown

    def renew(
        key: Key, state: MujocoState, obs: Array, over: Array
    ) -> tuple[MujocoState, Array]:
        """See `PureEnv.renew`; only episodes that are over cost a start."""
        start, shown = begin(jax.random.bits(key), over)
        fresh = MujocoState(start, jnp.zeros((), jnp.int32))
        kept = jax.tree.map(lambda new, old: jnp.where(over, new, old), fresh, state)
        return kept, jnp.where(over, shown, obs)

    def step(state: MujocoState, action: Array) -> tuple[MujocoState, TimeStep]:
        """One step under `action` `[A]`; no gradient passes through it."""
        new, shown, reward, terminated = advance(state.bits, action)
        t = state.t + 1
        outcome = TimeStep(
            obs=shown,
            reward=reward,
            terminated=terminated,
            truncated=t >= spec.horizon,
            success=jnp.zeros((), bool),
        )
        return MujocoState(new, t), outcome

    return PureEnv(env_id, spec, reset, step, renew=renew)


@functools.cache
def as_pure(env_id: str) -> PureEnv:
    """A MuJoCo body as a pure environment, `reset(key)` and `step(state, action)`.

    The same id gives the same functions, so that a program is compiled once.  Its
    threads, and one simulator for each, live as long as the process.  An episode that
    has ended can be stepped on and must be ignored, as with any `PureEnv`.  An error of
    the simulator reaches the caller as `jax.errors.JaxRuntimeError`, the text of the
    `OffrlError` in it.

    Args:
      env_id: a key of `mujoco_bodies.BODIES`.

    Raises:
      UsageError: the id is unknown.
      OffrlError: the installed Gymnasium lacks the model.
    """
    return pure_from(Simulation(env_id), env_id)
