"""Data of a MuJoCo environment, collected by a trained SAC actor, as a file to import.

Example:
  python benchmarks/actor_data.py sac-Hopper-v3-actor.npz --env Hopper-v5 \
      --out hopper.npz
  offrl data import hopper.npz --task local/hopper-sac-v0

The actor is a plain `.npz` with the weights of two ReLU layers and of a tanh-Gaussian:
`w0 b0 w1 b1 w_mu b_mu w_log_std b_log_std`, as Stable-Baselines3 names nothing but
orders them.  Actions are sampled, and a share of them is replaced by uniform ones, so
that the data hold worse actions, too; every episode draws its share below `--epsilon`.
"""

from __future__ import annotations

import dataclasses
import sys
import zipfile
from pathlib import Path

import gymnasium
import numpy as np
import tyro
from tyro.conf import Positional

from offrl_jax import envs
from offrl_jax.errors import OffrlError, UsageError

LAYERS = ("w0", "b0", "w1", "b1", "w_mu", "b_mu", "w_log_std", "b_log_std")


@dataclasses.dataclass(frozen=True)
class ActorData:
    """Rolls an actor out."""

    actor: Positional[Path]
    """Its weights, `[out, in]` and `[out]`."""
    env: str
    """Gymnasium id of a body that this package knows, such as Hopper-v5."""
    out: Path
    """The `.npz` file to write."""
    transitions: int = 50_000
    """At least so many; the last episode is finished."""
    epsilon: float = 0.3
    """Largest share of random actions; every episode draws its own below it."""
    seed: int = 0
    """Of all randomness."""


def read_actor(path: Path) -> dict[str, np.ndarray]:
    """The weights.

    Raises:
      UsageError: no such file, or of another form.
    """
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} is no readable .npz file: {error}") from error
    with found:
        missing = sorted(set(LAYERS) - set(found))
        if missing:
            raise UsageError(f"{path} lacks {', '.join(missing)}; it has {list(found)}")
        return {name: np.asarray(found[name], np.float64) for name in LAYERS}


def act(
    actor: dict[str, np.ndarray], obs: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """A sampled action `[A]` at `obs` `[O]`."""
    hidden = np.maximum(actor["w0"] @ obs + actor["b0"], 0.0)
    hidden = np.maximum(actor["w1"] @ hidden + actor["b1"], 0.0)
    log_std = np.clip(actor["w_log_std"] @ hidden + actor["b_log_std"], -20.0, 2.0)
    mean = actor["w_mu"] @ hidden + actor["b_mu"]
    return np.tanh(mean + np.exp(log_std) * rng.normal(size=mean.shape))


def main(arguments: ActorData) -> None:
    """Collects and writes.

    Raises:
      UsageError: an unknown environment, or one that the actor does not fit.
    """
    env_id = f"mujoco/{arguments.env}"
    spec = envs.spec_of(env_id)
    actor = read_actor(arguments.actor)
    shape = actor["w0"].shape[1], actor["w_mu"].shape[0]
    if shape != (spec.obs_dim, spec.action_dim):
        raise UsageError(
            f"{arguments.actor} is of {shape[0]} observations and {shape[1]} actions, "
            f"{arguments.env} has {spec.obs_dim} and {spec.action_dim}"
        )
    env = gymnasium.make(arguments.env)
    rng = np.random.default_rng(arguments.seed)
    fields = "obs", "action", "reward", "next_obs", "terminated", "truncated"
    rows: dict[str, list] = {name: [] for name in fields}
    returns = []
    while len(rows["reward"]) < arguments.transitions:
        obs, _ = env.reset(seed=int(rng.integers(2**31)))
        epsilon, total, ended = rng.uniform(0.0, arguments.epsilon), 0.0, False
        while not ended:
            action = act(actor, obs, rng)
            if rng.random() < epsilon:
                action = rng.uniform(-1.0, 1.0, action.shape)
            next_obs, reward, terminated, truncated, _ = env.step(action)
            step = obs, action, reward, next_obs, terminated, truncated
            for name, value in zip(fields, step, strict=True):
                rows[name].append(value)
            obs, ended = next_obs, terminated or truncated
            total += float(reward)
        returns.append(total)
    env.close()
    arrays = {
        name: np.asarray(values, bool if name.endswith("ated") else np.float32)
        for name, values in rows.items()
    }
    arrays["env_id"] = np.array(env_id)
    np.savez_compressed(arguments.out, allow_pickle=False, **arrays)
    print(
        f"{len(returns)} episodes, {len(arrays['reward'])} transitions, mean return "
        f"{np.mean(returns):.1f}: {arguments.out}"
    )


if __name__ == "__main__":
    try:
        main(tyro.cli(ActorData, description=__doc__))
    except OffrlError as error:
        sys.exit(f"error: {error}")
