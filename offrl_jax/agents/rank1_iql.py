"""IQL whose policy moves by rank-1 natural gradients in the place of Adam.

Ours: the rule of Huo et al. (2026), arXiv:2601.18626 (a reconstruction, see
`rank1_ac`), carried over to an offline agent.  Everything is `iql`, with
`actor_optimiser = rank1`: the gradient of the weighted likelihood loses what it has in
common with the score of one action, drawn from the policy in one state of the batch,
and the policy takes a plain step along the rest,

    c     = <v, g> / (lam + |v|^2) ,      lam = actor_damping * running mean of |v|^2
    theta <- theta - actor_lr * (g - c v) .

The score's action is the policy's and not the data's: with the data's own, v would be
one term of the gradient itself, and the matrix the empirical Fisher's.  What this buys
is measured in docs/algorithms/rank1.md.
"""

from __future__ import annotations

from offrl_jax.agents import iql
from offrl_jax.agents.entry import AgentEntry, Preset

ENTRY = AgentEntry(
    name="rank1_iql",
    title="Rank-1 IQL",
    reference="IQL with the actor step of arXiv:2601.18626 (reconstruction)",
    config=iql.Config,
    hyper=iql.Hyper,
    make=iql.make_iql,
    critic=iql.critic_of,
    base=Preset(
        config={"actor_optimiser": "rank1"},
        hyper={"actor_lr": 1e-3, "actor_damping": 0.01},
        source="ours, by benchmarks/suites/rank1_offline_tuning.toml",
    ),
    presets={
        "quick": Preset(
            config={"hidden": (64, 64), "batch_size": 128},
            hyper={"critic_lr": 1e-3, "value_lr": 1e-3},
            source="ours: for some 6,000 updates on two CPU cores",
        ),
    },
)
