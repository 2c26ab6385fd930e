"""MISA: mutual-information regularised offline RL, with all four bounds.

Ma, Kang, Xu, Lin & Yan (2023), "Mutual Information Regularized Offline Reinforcement
Learning", arXiv:2210.07484.  Critics Q_1, Q_2 with targets Q', policy pi a
tanh-Gaussian.  A lower bound of the mutual information I(S; A) of the data, with pi as
the model of p(a|s) and T = Q / c as the critic of the bound, regularises both:

    I     = E_D log pi(a|s) + H(A) + gain(T)               gain: mutual_information.py
    ba      0
    f       E_D T - E_{s, a~pi} exp(T - 1)
    dv      E_D T - log E_{s, a~pi} exp T
    misa    E_D T - E_s log E_{a~pi} exp T                 the tightest, the default

    y      = r + gamma * d * min_i Q'_i(s', a'),  a' ~ pi(. | s')
    L(Q_i) = E (Q_i(s, a) - y)^2 - critic_weight * c * gain(Q_i / c)
    L(pi)  = -E min_i Q_i(s, a~) + policy_weight * (alpha * log pi(a~|s) - log pi(a|s))
             + correction_weight * E_{p*} log pi(a|s)      a~ reparameterised
    p*(a|s) = pi(a|s) exp T(s, a) / Z(s);  T of min_i Q_i
    L(log alpha) = -log alpha * E (log pi(a~|s) - A)       target entropy -A

d is 0 at terminal states only.  The last term of L(pi) is the gradient of the gain in
pi, on fixed actions.  It is intractable and estimated (`correction`) by Markov chains
from p* (`mcmc`, the paper's), by the K actions of pi that the critics' gain has drawn
anyway, weighted by exp T (`importance`), or dropped (`none`, the biased estimator).
For `dv` and `f` states do not count alike: by Z(s) / E Z, and by Z(s) / e.  Evaluated
with tanh(mean).

From the abstract and the authors' code, which has `misa` alone; written anew.  Our
deviations, undone by the preset `released`: several short chains in the policy's noise
with an adapted step size instead of HMC in action space, which hardly ever accepts;
log K as normaliser, not log(batch size).  docs/algorithms/misa.md says more.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from offrl_jax import (
    distributions,
    losses,
    mutual_information,
    networks,
    sampling,
)
from offrl_jax.agents import optim
from offrl_jax.agents.entry import (
    COUNT,
    NON_NEGATIVE,
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

# Bounds of the authors' code: of the Gaussian before tanh, recorded actions, and the
# Lagrange multiplier.
LARGEST_MEAN, LOG_STD_MIN, LOG_STD_MAX = 9.0, -5.0, 2.0
LARGEST_ACTION = 0.999
LARGEST_MULTIPLIER = 1e6
# Where the corrected sampler's step size starts, in standard deviations of the policy.
FIRST_STEP = 0.5

Gaussian = tuple[Array, Array]
"""Mean and log standard deviation before tanh, `[B, A]` each."""

_FOUND = "scripts by the authors that a code index has, not the paper's table"


@dataclasses.dataclass(frozen=True)
class Config:
    """Structure of networks and losses, and names of the data's transforms.

    Attributes:
      bound: of the mutual information; see above.
      samples: K, actions of the policy per state in the gain.
      add_positive: counts the data's action as one more sample of the gain.
      normaliser: of the gain's log-sum-exp, the number of `samples`, or of rows in the
        `batch` as in the authors' code.
      correction: estimate of the gain's gradient in pi.
      sampler: of `mcmc`: `corrected`, in the policy's noise, starting from pi's draws,
        with a step size that adapts from update to update; or `released`, in action
        space, starting from the data's action.
      chains, draws, burn_in, leapfrogs: of `mcmc`, per state; `released` has one chain.
      lagrange: multiplies the critics' gain by a learned multiplier.
      automatic_alpha: whether alpha is learned; otherwise it is 1.
    """

    hidden: tuple[int, ...] = within(COUNT, (256, 256))
    batch_size: int = within(COUNT, 256)
    layer_norm: bool = False
    bound: str = one_of(mutual_information.BOUNDS, "misa")
    samples: int = within(COUNT, 50)
    add_positive: bool = False
    normaliser: str = one_of(("samples", "batch"), "samples")
    correction: str = one_of(("mcmc", "importance", "none"), "mcmc")
    sampler: str = one_of(("corrected", "released"), "corrected")
    chains: int = within(COUNT, 10)
    draws: int = within(COUNT, 5)
    burn_in: int = within(Range(low=0.0), 5)
    leapfrogs: int = within(COUNT, 2)
    lagrange: bool = False
    automatic_alpha: bool = True
    obs_transform: str = "none"
    reward_transform: str = "none"
    actor_optimiser: str = one_of(optim.ACTOR_OPTIMISERS, "adam")


@struct.dataclass
class Hyper:
    """Traced settings; the defaults are those of the authors' code for locomotion."""

    actor_lr: float = within(POSITIVE, 1e-4)
    critic_lr: float = within(POSITIVE, 3e-4)
    alpha_lr: float = within(POSITIVE, 1e-4)
    multiplier_lr: float = within(POSITIVE, 3e-4)
    discount: float = within(UNIT, 0.99)
    tau: float = within(POSITIVE_UNIT, 0.005)
    # gamma_1 and gamma_2 of the paper; 5 and 0.5.
    critic_weight: float = within(NON_NEGATIVE, 5.0)
    policy_weight: float = within(NON_NEGATIVE, 0.5)
    # In theory equal to `policy_weight`; the code's value.
    correction_weight: float = within(NON_NEGATIVE, 0.1)
    # c, the scale of T = Q / c.
    critic_scale: float = within(POSITIVE, 1.0)
    # Of `lagrange`: 3 where the normaliser is the batch, see docs/algorithms/misa.md.
    gap: float = within(Range(-100.0, 100.0), 4.61)
    # Of `actor_optimiser = rank1`, relative to the mean squared score.
    actor_damping: float = within(POSITIVE, 0.1)


@struct.dataclass
class State:
    """Parameters and Adam moments; critics are tuples of two.

    Attributes:
      actor: of the network (`net`), and the two numbers that its log standard
        deviation is multiplied by (`gain`) and shifted by (`shift`).
      log_alpha, log_multiplier: `[]`, of the entropy, and of the Lagrange multiplier.
      log_step: `[]`, natural logarithm of the corrected sampler's step size.
    """

    actor: networks.Params
    critics: tuple[networks.Params, ...]
    target_critics: tuple[networks.Params, ...]
    log_alpha: Array
    log_multiplier: Array
    log_step: Array
    actor_opt: optim.OptState
    critic_opt: optim.OptState
    alpha_opt: optim.OptState
    multiplier_opt: optim.OptState


def actor_of(config: Config, spec: Spec) -> networks.GaussianActor:
    """The network of the policy; its outputs are unbounded."""
    return networks.GaussianActor(
        config.hidden,
        spec.action_dim,
        hidden_init=networks.lecun_normal,
        out_init=networks.scaled_uniform(1e-2),
        layer_norm=config.layer_norm,
        norm_first=True,
    )


def critic_of(config: Config) -> networks.Critic:
    """The network of one critic."""
    return networks.Critic(
        config.hidden,
        config.layer_norm,
        networks.lecun_normal,
        networks.scaled_uniform(1e-2),
        nn.elu,
        norm_first=True,
    )


def make_misa(config: Config, spec: Spec) -> Agent:
    """Makes the agent for one structure and one `Spec`.

    Raises:
      UsageError: a structural choice that does not exist.
    """
    check_choices("misa", config)
    actor, critic = actor_of(config, spec), critic_of(config)
    # The gain of `ba` is 0 whatever the critic: there is nothing to draw or correct.
    drawn_count = 0 if config.bound == "ba" else config.samples
    correction = "none" if config.bound == "ba" else config.correction
    terms = config.samples + config.add_positive
    normaliser = config.batch_size if config.normaliser == "batch" else terms

    def init(key: Key, hyper: Hyper) -> State:
        del hyper
        actor_key, critic_key = jax.random.split(key)
        actor_params = {
            "net": actor.init(actor_key, jnp.zeros((1, spec.obs_dim))),
            "gain": jnp.ones(()),
            "shift": -jnp.ones(()),
        }
        critics = networks.init_critics(
            critic, critic_key, spec.obs_dim, spec.action_dim, 2
        )
        log_alpha, log_multiplier = jnp.zeros(()), jnp.ones(())
        return State(
            actor=actor_params,
            critics=critics,
            # A copy: a donated state must not hold one buffer twice.
            target_critics=jax.tree.map(jnp.copy, critics),
            log_alpha=log_alpha,
            log_multiplier=log_multiplier,
            log_step=jnp.float32(math.log(FIRST_STEP)),
            actor_opt=optim.actor_init(config.actor_optimiser, actor_params),
            critic_opt=optim.adam_init(critics),
            alpha_opt=optim.adam_init(log_alpha),
            multiplier_opt=optim.adam_init(log_multiplier),
        )

    def policy_of(params: Any, obs: Array) -> Gaussian:
        mean, raw = networks.apply(actor, params["net"], obs)
        log_std = params["gain"] * raw + params["shift"]
        return (
            jnp.clip(mean, -LARGEST_MEAN, LARGEST_MEAN),
            jnp.clip(log_std, LOG_STD_MIN, LOG_STD_MAX),
        )

    def gain_of(q: Array, scale: Array | float) -> Array:
        """The bound's gain in units of Q; `q` `[1 + K, B]`, the data's action first."""
        t_data, t_policy = q[0] / scale, q[0 if config.add_positive else 1 :] / scale
        gain = mutual_information.gain(config.bound, t_data, t_policy, normaliser)
        return scale * gain

    def critic_loss(
        critics: tuple[networks.Params, ...],
        obs: Array,
        action: Array,
        target: Array,
        multiplier: Array,
        hyper: Hyper,
    ) -> tuple[Array, tuple[Array, Array, Array]]:
        """`obs` `[B, O]`; `action` `[1 + K, B, A]`, the data's first: one product."""
        rows = jnp.broadcast_to(obs, (action.shape[0], *obs.shape))
        q = [networks.apply(critic, params, rows, action) for params in critics]
        td = jnp.asarray(sum(jnp.mean(jnp.square(q_i[0] - target)) for q_i in q))
        # Minus the gain is what the authors call the regulariser.
        gain = jnp.asarray(sum(gain_of(q_i, hyper.critic_scale) for q_i in q)) / len(q)
        excess = -gain - (hyper.gap if config.lagrange else 0.0)
        loss = td + multiplier * hyper.critic_weight * len(q) * excess
        return loss, (td, excess, jnp.minimum(q[0][1:], q[1][1:]))

    def chains_of(
        key: Key,
        state: State,
        batch: Transitions,
        policy: Gaussian,
        noise: Array,
        t: Array,
        hyper: Hyper,
    ) -> tuple[Array, Array]:
        """Draws of p* before tanh, `[K', B, A]`, and the chains' acceptance `[]`.

        `noise` `[K, B, A]` and `t` `[K, B]` are of the actions that pi has drawn.
        """
        released = config.sampler == "released"
        chains = 1 if released else config.chains

        def per_chain(x: Array) -> Array:
            return jnp.broadcast_to(x, (chains, *x.shape)).reshape(-1, x.shape[-1])

        obs, mean, log_std = map(per_chain, (batch.obs, *policy))
        counts = {n: getattr(config, n) for n in ("draws", "burn_in", "leapfrogs")}

        def t_of(action: Array) -> Array:
            q = networks.smallest_q(critic, state.critics, obs, action)
            return q / hyper.critic_scale

        if released:
            target = sampling.raw(t_of, mean, log_std)
            draws, _ = sampling.hmc_released(key, target, batch.action, **counts)
            before = jnp.arctanh(draws.positions)
        else:
            target = sampling.whitened(t_of, mean, log_std)
            start_key, key = jax.random.split(key)
            # From pi's own actions chosen by weight: nearly draws of p* already.
            start = sampling.resampled(start_key, t, noise, chains)
            draws = sampling.hmc(
                key,
                target.log_density,
                start.reshape(-1, spec.action_dim),
                step_size=jnp.exp(state.log_step),
                **counts,
            )
            before = target.pre_tanh(draws.positions)
        return before.reshape(-1, *batch.action.shape), draws.acceptance

    def actor_loss(
        policy: Gaussian,
        state: State,
        batch: Transitions,
        noise: Array,
        tilted: Array,
        weight: Array,
        hyper: Hyper,
    ) -> tuple[Array, tuple[Array, Array, Array]]:
        """`tilted` `[K, B, A]` before tanh, with `weight` `[K, B]`."""
        mean, log_std = policy
        before = mean + jnp.exp(log_std) * noise
        log_pi = jnp.mean(distributions.tanh_normal_log_prob(mean, log_std, before))
        log_pi_data = jnp.mean(
            distributions.tanh_normal_log_prob(mean, log_std, jnp.arctanh(batch.action))
        )
        q = networks.smallest_q(critic, state.critics, batch.obs, jnp.tanh(before))
        alpha = jnp.exp(state.log_alpha) if config.automatic_alpha else 1.0
        loss = hyper.policy_weight * (alpha * log_pi - log_pi_data) - jnp.mean(q)
        if correction != "none":
            # At fixed actions the Jacobian of tanh has no gradient: a Gaussian will do.
            each = distributions.normal_log_prob(mean[None], log_std[None], tilted)
            weighted = weight * jnp.sum(each, axis=-1)
            loss += hyper.correction_weight * jnp.mean(jnp.sum(weighted, axis=0))
        return loss, (log_pi, log_pi_data, jnp.mean(q))

    def update(
        key: Key, state: State, batch: Transitions, hyper: Hyper
    ) -> tuple[State, Metrics]:
        next_key, drawn_key, actor_key, chain_key = jax.random.split(key, 4)
        batch = batch._replace(
            action=jnp.clip(batch.action, -LARGEST_ACTION, LARGEST_ACTION)
        )
        mean, log_std = policy_of(state.actor, batch.next_obs)
        next_noise = jax.random.normal(next_key, batch.action.shape)
        next_action = jnp.tanh(mean + jnp.exp(log_std) * next_noise)
        target = jax.vmap(losses.td_target, (0, 0, 0, None))(
            batch.reward,
            batch.discount,
            networks.smallest_q(
                critic, state.target_critics, batch.next_obs, next_action
            ),
            hyper.discount,
        )
        # One forward pass serves all draws and, below, the policy's own gradient.
        policy, pull_back = jax.vjp(lambda p: policy_of(p, batch.obs), state.actor)
        noise = jax.random.normal(drawn_key, (drawn_count, *batch.action.shape))
        drawn = policy[0][None] + jnp.exp(policy[1])[None] * noise
        actions = jnp.concatenate([batch.action[None], jnp.tanh(drawn)])
        multiplier = jnp.ones(())
        if config.lagrange:
            multiplier = jnp.minimum(jnp.exp(state.log_multiplier), LARGEST_MULTIPLIER)
        (_, (td_loss, excess, q_drawn)), grads = jax.value_and_grad(
            critic_loss, has_aux=True
        )(state.critics, batch.obs, actions, target, multiplier, hyper)
        critics, critic_opt = optim.adam_step(
            grads, state.critic_opt, state.critics, hyper.critic_lr
        )

        # As in the authors' code all losses see the critics of before the step.
        metrics: dict[str, Array] = {}
        t = q_drawn / hyper.critic_scale
        tilted, weight = drawn, jnp.zeros(drawn.shape[:2])
        if correction == "mcmc":
            tilted, metrics["acceptance"] = chains_of(
                chain_key, state, batch, policy, noise, t, hyper
            )
            weight = jnp.full(tilted.shape[:2], 1.0 / tilted.shape[0])
        elif correction == "importance":
            # Less their mean: the score's expectation under pi is 0, and with that of
            # its samples most of the estimate's noise goes.
            weight = sampling.self_normalised_weights(t) - 1.0 / config.samples
        if correction != "none":
            log_z = mutual_information.log_mean_exp(t)
            weight *= mutual_information.state_weight(config.bound, log_z)[None]
        noise = jax.random.normal(actor_key, batch.action.shape)
        (pi_loss, (log_pi, log_pi_data, q_mean)), slope = jax.value_and_grad(
            actor_loss, has_aux=True
        )(policy, state, batch, noise, tilted, weight, hyper)
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
        metrics |= {
            "critic_loss": td_loss,
            "actor_loss": pi_loss,
            "q_mean": q_mean,
            "log_density_data": log_pi_data,
            "entropy": -log_pi,
        }
        changed: dict[str, Any] = {}
        if config.bound != "ba":
            metrics["regulariser"] = excess
        if correction == "mcmc" and config.sampler == "corrected":
            metrics["step_size"] = jnp.exp(state.log_step)
            changed["log_step"] = sampling.adapt_step(
                state.log_step, metrics["acceptance"], leapfrogs=config.leapfrogs
            )
        if config.automatic_alpha:
            metrics["alpha"] = jnp.exp(state.log_alpha)
            slope = spec.action_dim - log_pi
            changed["log_alpha"], changed["alpha_opt"] = optim.adam_step(
                slope, state.alpha_opt, state.log_alpha, hyper.alpha_lr
            )
        if config.lagrange:
            metrics["multiplier"] = multiplier
            slope = -multiplier * hyper.critic_weight * excess
            changed["log_multiplier"], changed["multiplier_opt"] = optim.adam_step(
                slope,
                state.multiplier_opt,
                state.log_multiplier,
                hyper.multiplier_lr,
            )
        state = dataclasses.replace(
            state,
            actor=actor_params,
            critics=critics,
            target_critics=optim.polyak(state.target_critics, critics, hyper.tau),
            actor_opt=actor_opt,
            critic_opt=critic_opt,
            **changed,
        )
        return state, metrics

    def act(key: Key, state: State, obs: Array, hyper: Hyper) -> Array:
        del key, hyper
        return jnp.tanh(policy_of(state.actor, obs)[0])

    return Agent(init, act, (Phase("train", update),), config.batch_size)


ENTRY = AgentEntry(
    name="misa",
    title="MISA",
    reference="Ma, Kang, Xu, Lin & Yan 2023, arXiv:2210.07484",
    config=Config,
    hyper=Hyper,
    make=make_misa,
    critic=critic_of,
    presets={
        "rank1": Preset(
            config={"actor_optimiser": "rank1"},
            hyper={"actor_lr": 1e-3},
            source="ours: rank-1 natural gradients for the policy, untuned",
        ),
        "quick": Preset(
            config={
                "hidden": (64, 64),
                "batch_size": 128,
                "samples": 4,
                "correction": "importance",
            },
            hyper={"actor_lr": 1e-3, "critic_lr": 1e-3, "alpha_lr": 1e-3},
            source="ours: for some 6,000 updates on two CPU cores",
        ),
        "released": Preset(
            config={
                "sampler": "released",
                "chains": 1,
                "draws": 50,
                "normaliser": "batch",
            },
            hyper={"gap": 3.0},
            source="what the authors' code does, its settings for locomotion",
        ),
        "biased": Preset(
            config={"correction": "none"},
            source="the paper's biased estimator: without the Markov chains",
        ),
        "antmaze": Preset(
            {"lagrange": True, "add_positive": True, "layer_norm": True},
            {"critic_lr": 1e-4, "multiplier_lr": 1e-4},
            _FOUND,
        ),
        "kitchen": Preset(
            {"layer_norm": True}, {"critic_lr": 1e-4, "policy_weight": 3.0}, _FOUND
        ),
        "adroit": Preset(
            {"layer_norm": True, "automatic_alpha": False},
            {"policy_weight": 5.0},
            _FOUND,
        ),
    },
)
