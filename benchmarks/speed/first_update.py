"""What `startup.py` times in a process of its own: the way to a first update.

Makes the population that `td3_bc@quick` with 5 seeds trains and does two updates (one
actor step), as the runner would, but on synthetic transitions.  Prints the name of each
stage as it ends.
"""

from __future__ import annotations


def main() -> None:
    """Goes all the way, one printed line per stage."""
    import jax
    import numpy as np

    from offrl_jax.agents.entry import resolve
    from offrl_jax.agents.registry import get_entry
    from offrl_jax.benchmark.jax_settings import configure_jax
    from offrl_jax.population import make_population, place
    from offrl_jax.sources import dataset_sampler, stack_tasks
    from offrl_jax.types import Spec, Transitions

    print("imports", flush=True)
    configure_jax()
    seeds, rows, spec = 5, 10_000, Spec(obs_dim=3, action_dim=1, horizon=200)
    entry = get_entry("td3_bc")
    config, hyper = resolve(entry, family="", preset="quick", overrides={})
    agent = entry.make(config, spec)
    rng = np.random.default_rng(0)
    obs = rng.standard_normal((rows, spec.obs_dim), np.float32)
    action = rng.uniform(-1, 1, (rows, spec.action_dim)).astype(np.float32)
    one = np.ones(rows, np.float32)
    arrays = (obs, action, -one, one, obs, action, one)
    table = stack_tasks([Transitions(*arrays)])  # pyright: ignore[reportArgumentType]
    population = make_population(agent, dataset_sampler(), seeds)
    members = jax.tree.map(lambda x: np.full(seeds, x, np.float32), hyper)
    arguments = place(population, table, np.zeros(seeds, np.int32), members)
    state = jax.block_until_ready(population.init(np.arange(seeds), members))
    print("initial state", flush=True)
    stride = agent.phases[-1].stride
    jax.block_until_ready(population.run[-1](state, *arguments, stride))
    print("first update", flush=True)


if __name__ == "__main__":
    main()
