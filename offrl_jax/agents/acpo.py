"""ACPO: offline policy optimisation whose constraint tunes itself (a reconstruction).

Han, Fang, Afifi & Marot (2026), "Automatic Constraint Policy Optimization based on
Continuous Constraint Interpolation Framework for Offline RL", arXiv:2601.23010.  With a
behaviour density beta (fitted in the first phase, then frozen) and kappa = lambda /
alpha, the multiplier of the constraint in units of the temperature:

    max_pi E_pi Q + alpha H(pi)   subject to   E_{s, a~pi} log beta(a|s) >= eps     (7)
    pi*(a|s) ~ beta(a|s)^kappa exp(Q / alpha)                                     (8, 9)
    forward:  L(pi) = -E_D [w log pi(a|s)],                                     (10, 11)
              w ~ exp((Q - V) / alpha + (kappa - 1) log beta(a|s))
    reverse:  L(pi) = -E_{a~pi} [Q + alpha kappa log beta(a|s) - alpha log pi(a|s)]
    dual:     kappa <- clip(kappa - eta (E_{a~pi} log beta - eps) / A, 0, max)  (14, 15)

    L(V)   = E (V - [min_i Q'_i - alpha log pi + alpha kappa log beta](s, a~pi))^2
    L(Q_i) = E (Q_i - r - gamma d [min_i Q'_i - alpha log pi](s', a'~pi))^2

Numbers in brackets are the paper's equations as others quote them; the paper itself was
not read.  Ours: losses of Q and V, `reverse`, the rule for eps, self-normalised and cut
weights, alpha in units of the rewards' standard deviation, all defaults.  Formulas with
their tests: `offrl_jax.constraint`; what is whose, in full: docs/algorithms/acpo.md.

A fixed kappa is `kappa_lr = 0`, so that fixed and automatic runs are one population.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from offrl_jax import constraint, densities, distributions, losses, networks
from offrl_jax.agents import optim
from offrl_jax.agents.entry import (
    COUNT,
    NON_NEGATIVE,
    OPEN_UNIT,
    POSITIVE,
    POSITIVE_UNIT,
    UNIT,
    AgentEntry,
    Preset,
    Range,
    check_choices,
    one_of,
    within,
)
from offrl_jax.types import Agent, Array, Key, Metrics, Phase, Spec, Transitions

# Bounds of the policy's log standard deviation, as InAC's (-6, 0) but wider below 1.
LOG_STD_MIN, LOG_STD_MAX = -5.0, 0.0
# Rewards that hardly vary count as this much variation.
_SMALLEST_SCALE = 1e-3
# Lowest rate of the running averages of the reward's variance and of the threshold.
_AVERAGING = 0.005
# Candidates of the rule `ess`, over [0, _LARGEST_CANDIDATE].
_CANDIDATES, _LARGEST_CANDIDATE = 33, 4.0


@dataclasses.dataclass(frozen=True)
class Config:
    """Structure of networks and losses, and names of the data's transforms.

    Attributes:
      behaviour: density model of the data's actions, one of `densities.KINDS`.
      components: of the behaviour models `mixture` and `censored`.
      critic: `soft` (above), `regularised` (adds `alpha kappa log beta` to the target
        of Q), `expectile` (IQL's: V is an expectile of Q over the data's actions, and
        the target of Q is V(s')).
      actor: which projection, `reverse` or `forward`; the paper's is `forward`.
      threshold: rule for eps. `nll`: the mean of log beta over the data's actions
        minus `delta` nats per dimension; `quantile`: their `level`-quantile; `ess`:
        what the closed form reaches with the smallest kappa whose weights have an
        effective sample size of at least `level` of the batch.
    """

    hidden: tuple[int, ...] = within(COUNT, (256, 256))
    batch_size: int = within(COUNT, 256)
    critics: int = within(COUNT, 4)
    layer_norm: bool = True
    behaviour: str = one_of(densities.KINDS, "gaussian")
    components: int = within(COUNT, 5)
    critic: str = one_of(("soft", "regularised", "expectile"), "soft")
    actor: str = one_of(("reverse", "forward"), "reverse")
    threshold: str = one_of(("nll", "quantile", "ess"), "nll")
    obs_transform: str = "standardise"
    reward_transform: str = "none"
    actor_optimiser: str = one_of(optim.ACTOR_OPTIMISERS, "adam")


@struct.dataclass
class Hyper:
    """Traced settings; the paper's values are not known, these are ours."""

    actor_lr: float = within(POSITIVE, 3e-4)
    critic_lr: float = within(POSITIVE, 3e-4)
    value_lr: float = within(POSITIVE, 3e-4)
    behaviour_lr: float = within(POSITIVE, 3e-4)
    discount: float = within(UNIT, 0.99)
    tau: float = within(POSITIVE_UNIT, 0.005)
    # Temperature, in standard deviations of the reward.
    alpha: float = within(POSITIVE, 0.1)
    # Interpolation parameter at the start; it stays there if `kappa_lr` is 0.
    kappa: float = within(NON_NEGATIVE, 1.0)
    kappa_lr: float = within(NON_NEGATIVE, 1e-3)
    kappa_max: float = within(POSITIVE, 10.0)
    # Of the rules `quantile` and `ess`.
    level: float = within(OPEN_UNIT, 0.05)
    # Of the rule `nll`, in nats per action dimension.
    delta: float = within(Range(-20.0, 20.0), 0.0)
    # Of the critic `expectile`.
    expectile: float = within(OPEN_UNIT, 0.7)
    # Of the forward projection, in units of the batch's mean weight.
    largest_weight: float = within(POSITIVE, 100.0)
    # Of `actor_optimiser = rank1`, relative to the mean squared score.
    actor_damping: float = within(POSITIVE, 0.1)


@struct.dataclass
class State:
    """Parameters and Adam moments; critics are tuples.

    Attributes:
      kappa: `[]`, the interpolation parameter.
      threshold: `[]`, eps, a running average over batches, in nats.
      reward_variance: `[]`, a running average over batches.
    """

    behaviour: networks.Params
    actor: networks.Params
    critics: tuple[networks.Params, ...]
    value: networks.Params
    target_critics: tuple[networks.Params, ...]
    behaviour_opt: optim.OptState
    actor_opt: optim.OptState
    critic_opt: optim.OptState
    value_opt: optim.OptState
    kappa: Array
    threshold: Array
    reward_variance: Array


def actor_of(config: Config, spec: Spec) -> networks.GaussianActor:
    """The policy: an unsquashed Normal; tanh of the first output is its mean."""
    return networks.GaussianActor(
        config.hidden, spec.action_dim, state_dependent_std=False
    )


def critic_of(config: Config) -> networks.Critic:
    """The network of one critic."""
    return networks.Critic(config.hidden, config.layer_norm)


def value_of(config: Config) -> networks.Value:
    """The network of the state value."""
    return networks.Value(config.hidden)


def make_acpo(config: Config, spec: Spec) -> Agent:
    """Makes the agent for one structure and one `Spec`.

    Raises:
      UsageError: a structural choice that does not exist.
    """
    check_choices("acpo", config)
    actor, critic, value = actor_of(config, spec), critic_of(config), value_of(config)
    behaviour = densities.make_density(
        config.behaviour, config.hidden, spec, config.components
    )

    def init(key: Key, hyper: Hyper) -> State:
        behaviour_key, actor_key, critic_key, value_key = jax.random.split(key, 4)
        obs = jnp.zeros((1, spec.obs_dim))
        behaviour_params = behaviour.init(behaviour_key)
        actor_params = actor.init(actor_key, obs)
        value_params = value.init(value_key, obs)
        critics = networks.init_critics(
            critic, critic_key, spec.obs_dim, spec.action_dim, config.critics
        )
        return State(
            behaviour=behaviour_params,
            actor=actor_params,
            critics=critics,
            value=value_params,
            # A copy: a donated state must not hold one buffer twice.
            target_critics=jax.tree.map(jnp.copy, critics),
            behaviour_opt=optim.adam_init(behaviour_params),
            actor_opt=optim.actor_init(config.actor_optimiser, actor_params),
            critic_opt=optim.adam_init(critics),
            value_opt=optim.adam_init(value_params),
            kappa=jnp.asarray(hyper.kappa, jnp.float32),
            threshold=jnp.zeros(()),
            reward_variance=jnp.ones(()),
        )

    def log_beta(key: Key, params: networks.Params, obs: Array, action: Array) -> Array:
        found = behaviour.log_prob(key, params, obs, action)
        return constraint.bounded_log_density(found, spec.action_dim)

    def averaged(average: Array, batch: Array, seen: Array) -> Array:
        # The plain mean of the first batches: where it starts does not matter.
        rate = jnp.maximum(_AVERAGING, 1.0 / (seen.astype(jnp.float32) + 1.0))
        return average + rate * (batch - average)

    def fit_behaviour(
        key: Key, state: State, batch: Transitions, hyper: Hyper
    ) -> tuple[State, Metrics]:
        nll, grads = jax.value_and_grad(behaviour.loss, argnums=1)(
            key, state.behaviour, batch.obs, batch.action
        )
        params, opt = optim.adam_step(
            grads, state.behaviour_opt, state.behaviour, hyper.behaviour_lr
        )
        state = dataclasses.replace(
            state,
            behaviour=params,
            behaviour_opt=opt,
            # From here on, so that the policy phase starts with a settled unit.
            reward_variance=averaged(
                state.reward_variance,
                jnp.var(batch.reward),
                optim.steps_taken(state.behaviour_opt),
            ),
        )
        return state, {"behaviour_loss": nll}

    def policy_of(params: networks.Params, obs: Array) -> tuple[Array, Array]:
        mean, raw = networks.apply(actor, params, obs)
        # A bound with a gradient: a policy at its broadest can become narrow again.
        # `raw` starts at 0, the spread at exp(-0.6), half of the box.
        log_std = distributions.soft_bound(raw + 1.0, LOG_STD_MIN, LOG_STD_MAX)
        return jnp.tanh(mean), log_std

    def draw(key: Key, policy: tuple[Array, Array]) -> tuple[Array, Array]:
        """Reparameterised actions within the bounds, and their log density."""
        mean, log_std = policy
        action = mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)
        log_prob = jnp.sum(
            distributions.normal_log_prob(mean, log_std, action), axis=-1
        )
        return jnp.clip(action, -1.0, 1.0), log_prob

    def value_loss(
        params: networks.Params, obs: Array, target: Array, hyper: Hyper
    ) -> tuple[Array, Array]:
        v = networks.apply(value, params, obs)
        level = hyper.expectile if config.critic == "expectile" else jnp.float32(0.5)
        return jnp.mean(jax.vmap(losses.expectile, (0, None))(target - v, level)), v

    def critic_loss(
        critics: tuple[networks.Params, ...], batch: Transitions, target: Array
    ) -> Array:
        q = [networks.apply(critic, p, batch.obs, batch.action) for p in critics]
        return jnp.asarray(sum(jnp.mean(jnp.square(q_i - target)) for q_i in q))

    def forward_loss(
        policy: tuple[Array, Array], action: Array, weight: Array
    ) -> Array:
        log_prob = distributions.normal_log_prob(*policy, action)
        return -jnp.mean(weight * jnp.sum(log_prob, axis=-1))

    def reverse_loss(
        policy: tuple[Array, Array],
        key: Key,
        frozen: State,
        critics: tuple[networks.Params, ...],
        obs: Array,
        alpha: Array,
    ) -> Array:
        action_key, density_key = jax.random.split(key)
        action, log_prob = draw(action_key, policy)
        q = networks.smallest_q(critic, critics, obs, action)
        density = log_beta(density_key, frozen.behaviour, obs, action)
        # Over alpha: its scale does not matter to Adam, but to the metric, and to
        # `actor_optimiser` of another kind.
        return jnp.mean(log_prob - frozen.kappa * density - q / alpha)

    def threshold_of(
        advantage: Array, density: Array, alpha: Array, hyper: Hyper
    ) -> Array:
        """eps on one batch; `density` `[B]` is log beta of the data's actions."""
        if config.threshold == "quantile":
            return jnp.quantile(density, hyper.level)
        if config.threshold == "nll":
            return jnp.mean(density) - hyper.delta * spec.action_dim
        candidates = jnp.linspace(0.0, _LARGEST_CANDIDATE, _CANDIDATES)
        # [candidates, B]
        log_weights = advantage[None, :] / alpha + (
            (candidates[:, None] - 1.0) * density[None, :]
        )
        weights = jax.nn.softmax(log_weights, axis=1)
        sizes = jax.vmap(constraint.effective_sample_size)(weights)
        enough = sizes >= hyper.level
        # Where no kappa gives that many, the one that gives most.
        chosen = jnp.where(jnp.any(enough), jnp.argmax(enough), jnp.argmax(sizes))
        return jnp.sum(weights * density[None, :], axis=1)[chosen]

    def update(
        key: Key, state: State, batch: Transitions, hyper: Hyper
    ) -> tuple[State, Metrics]:
        draw_key, next_key, density_key, actor_key = jax.random.split(key, 4)
        seen = optim.steps_taken(state.critic_opt)
        reward_variance = averaged(
            state.reward_variance,
            jnp.var(batch.reward),
            seen + optim.steps_taken(state.behaviour_opt),
        )
        alpha = hyper.alpha * jnp.maximum(jnp.sqrt(reward_variance), _SMALLEST_SCALE)
        kappa = state.kappa

        # One forward pass serves V's target, the dual and, below, its own gradient.
        policy, pull_back = jax.vjp(lambda p: policy_of(p, batch.obs), state.actor)
        action, log_pi = draw(draw_key, policy)
        # Over actions only: what beta makes of a state is computed once.
        own_density, data_density = jax.vmap(log_beta, (None, None, None, 0))(
            density_key,
            state.behaviour,
            batch.obs,
            jnp.stack([action, batch.action]),
        )
        q = networks.smallest_q(critic, state.target_critics, batch.obs, batch.action)

        if config.critic == "expectile":
            value_target = q
        else:
            value_target = (
                networks.smallest_q(critic, state.target_critics, batch.obs, action)
                - alpha * log_pi
                + alpha * kappa * own_density
            )
        (v_loss, v), grads = jax.value_and_grad(value_loss, has_aux=True)(
            state.value, batch.obs, value_target, hyper
        )
        value_params, value_opt = optim.adam_step(
            grads, state.value_opt, state.value, hyper.value_lr
        )

        if config.critic == "expectile":
            next_value = networks.apply(value, value_params, batch.next_obs)
        else:
            next_policy = policy_of(state.actor, batch.next_obs)
            next_action, next_log_pi = draw(next_key, next_policy)
            next_value = (
                networks.smallest_q(
                    critic, state.target_critics, batch.next_obs, next_action
                )
                - alpha * next_log_pi
            )
            if config.critic == "regularised":
                next_value += (alpha * kappa) * log_beta(
                    next_key, state.behaviour, batch.next_obs, next_action
                )
        target = jax.vmap(losses.td_target, (0, 0, 0, None))(
            batch.reward, batch.discount, next_value, hyper.discount
        )
        q_loss, grads = jax.value_and_grad(critic_loss)(state.critics, batch, target)
        critics, critic_opt = optim.adam_step(
            grads, state.critic_opt, state.critics, hyper.critic_lr
        )

        advantage = q - v
        log_weights = jax.vmap(constraint.log_weight, (0, 0, None, None))(
            advantage, data_density, alpha, kappa
        )
        weight, cut = constraint.self_normalised(log_weights, hyper.largest_weight)
        if config.actor == "forward":
            pi_loss, slope = jax.value_and_grad(forward_loss)(
                policy, batch.action, weight
            )
        else:
            pi_loss, slope = jax.value_and_grad(reverse_loss)(
                policy, actor_key, state, critics, batch.obs, alpha
            )
        (grads,) = pull_back(slope)
        actor_params, actor_opt = optim.actor_step(
            config.actor_optimiser,
            # The key itself is spent; 0 and 1 would be what `split` makes of it.
            jax.random.fold_in(actor_key, 2),
            policy_of,
            batch.obs,
            grads,
            state.actor_opt,
            state.actor,
            hyper.actor_lr,
            hyper.actor_damping,
        )

        threshold = averaged(
            state.threshold, threshold_of(advantage, data_density, alpha, hyper), seen
        )
        # Per dimension: Var(log beta), and with it the largest stable step, grows as A.
        slack = constraint.dual_gradient(own_density, threshold) / spec.action_dim
        state = dataclasses.replace(
            state,
            actor=actor_params,
            critics=critics,
            value=value_params,
            target_critics=optim.polyak(state.target_critics, critics, hyper.tau),
            actor_opt=actor_opt,
            critic_opt=critic_opt,
            value_opt=value_opt,
            # The guard is the dual's: a fixed kappa is what it was set to.
            kappa=jnp.where(
                hyper.kappa_lr > 0.0,
                constraint.dual_step(kappa, slack, hyper.kappa_lr, hyper.kappa_max),
                kappa,
            ),
            threshold=threshold,
            reward_variance=reward_variance,
        )
        return state, {
            "kappa": kappa,
            "lambda": alpha * kappa,
            "epsilon": threshold,
            "log_density_policy": jnp.mean(own_density),
            "log_density_data": jnp.mean(data_density),
            "effective_sample_size": constraint.effective_sample_size(weight),
            "cut_fraction": cut,
            "value_loss": v_loss,
            "critic_loss": q_loss,
            "actor_loss": pi_loss,
            "q_mean": jnp.mean(q),
            "entropy": -jnp.mean(log_pi),
        }

    def act(key: Key, state: State, obs: Array, hyper: Hyper) -> Array:
        del key, hyper
        mean, _ = networks.apply(actor, state.actor, obs)
        return jnp.tanh(mean)

    phases = (Phase("behaviour", fit_behaviour), Phase("train", update))
    return Agent(init, act, phases, config.batch_size)


ENTRY = AgentEntry(
    name="acpo",
    title="ACPO (reconstruction)",
    reference="Han, Fang, Afifi & Marot 2026, arXiv:2601.23010, from second-hand "
    "equations",
    config=Config,
    hyper=Hyper,
    make=make_acpo,
    critic=critic_of,
    presets={
        "rank1": Preset(
            config={"actor_optimiser": "rank1"},
            hyper={"actor_lr": 1e-3},
            source="ours: rank-1 natural gradients for the policy, untuned",
        ),
        "quick": Preset(
            config={"hidden": (64, 64), "batch_size": 128, "critics": 2},
            hyper={
                "actor_lr": 1e-3,
                "critic_lr": 1e-3,
                "value_lr": 1e-3,
                "behaviour_lr": 1e-3,
            },
            source="ours: for some 6,000 updates on two CPU cores",
        ),
        "small": Preset(
            config={"hidden": (64, 64), "batch_size": 128},
            hyper={
                "actor_lr": 1e-3,
                "critic_lr": 1e-3,
                "value_lr": 1e-3,
                "behaviour_lr": 1e-3,
            },
            source="ours: the nets of the experiments in docs/algorithms/acpo.md",
        ),
        "paper": Preset(
            config={"actor": "forward", "critics": 2},
            source="forward projection of the second-hand equations, with the notes' "
            "rule for the threshold",
        ),
        "in_sample": Preset(
            config={
                "actor": "forward",
                "critic": "expectile",
                "threshold": "ess",
                "critics": 2,
            },
            hyper={"alpha": 1.0, "level": 0.5},
            source="ours: nothing is ever evaluated at actions outside of the data",
        ),
    },
)
