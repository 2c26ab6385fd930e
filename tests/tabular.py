"""Small random tabular MDPs, solved exactly in float64 NumPy.

X states, K actions.  A row of `transition` may sum to less than one: the rest is the
probability that the episode terminates there, and nothing follows a termination.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.optimize


class TabularMDP(NamedTuple):
    reward: np.ndarray  # [X, K]
    transition: np.ndarray  # [X, K, X]
    start: np.ndarray  # [X]
    gamma: float


def random_mdp(
    rng: np.random.Generator,
    states: int = 5,
    actions: int = 4,
    gamma: float = 0.9,
    terminates: float = 0.2,
) -> TabularMDP:
    """Rewards in [-1, 1]; each pair ends the episode at a rate below `terminates`."""
    following = rng.dirichlet(np.ones(states), (states, actions))
    goes_on = 1.0 - rng.uniform(0.0, terminates, (states, actions, 1))
    return TabularMDP(
        reward=rng.uniform(-1.0, 1.0, (states, actions)),
        transition=following * goes_on,
        start=rng.dirichlet(np.ones(states)),
        gamma=gamma,
    )


def random_policy(
    rng: np.random.Generator, mdp: TabularMDP, concentration: float = 1.0
) -> np.ndarray:
    """`[X, K]`, one Dirichlet draw per state; small concentrations are near greedy."""
    states, actions = mdp.reward.shape
    draw = rng.dirichlet(np.full(actions, concentration), states)
    # Far enough from zero for logarithms, and still far from uniform.
    return (draw + 1e-6) / (1.0 + actions * 1e-6)


def entropy(policy: np.ndarray) -> np.ndarray:
    """`[X, K] -> [X]`, nats, with `0 log 0 = 0`."""
    return -np.where(policy > 0, policy * np.log(np.maximum(policy, 1e-300)), 0).sum(-1)


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """`KL(p || q)`, `[X, K], [X, K] -> [X]`, nats; q > 0 wherever p > 0."""
    ratio = np.where(p > 0, p, 1.0) / np.where(p > 0, q, 1.0)
    return (p * np.log(ratio)).sum(-1)


def soft_values(
    mdp: TabularMDP, policy: np.ndarray, alpha: float
) -> tuple[np.ndarray, np.ndarray]:
    """Soft values of a policy: `V = E_pi[Q - alpha log pi]`, `Q = r + gamma E V`.

    Returns:
      V `[X]` and Q `[X, K]`; `alpha = 0` gives the ordinary values.
    """
    onwards = np.einsum("xk,xky->xy", policy, mdp.transition)
    gain = (policy * mdp.reward).sum(-1) + alpha * entropy(policy)
    v = np.linalg.solve(np.eye(len(gain)) - mdp.gamma * onwards, gain)
    return v, mdp.reward + mdp.gamma * mdp.transition @ v


def soft_return(mdp: TabularMDP, policy: np.ndarray, alpha: float) -> float:
    """`E sum gamma^t (r_t - alpha log pi(a_t|s_t))` from the start distribution."""
    return float(mdp.start @ soft_values(mdp, policy, alpha)[0])


def occupancy(mdp: TabularMDP, policy: np.ndarray) -> np.ndarray:
    """`[X]`, `(1 - gamma) sum_t gamma^t P(s_t = x)`; sums to 1 without terminations."""
    onwards = np.einsum("xk,xky->xy", policy, mdp.transition)
    system = np.eye(len(onwards)) - mdp.gamma * onwards.T
    return (1.0 - mdp.gamma) * np.linalg.solve(system, mdp.start)


def constrained_optimum(
    q: np.ndarray,
    log_beta: np.ndarray,
    alpha: float,
    kappa: float = 0.0,
    least: float | None = None,
) -> tuple[np.ndarray, float]:
    """Maximises `E_x[E_pi Q + alpha H(pi) + alpha kappa E_pi log beta]` by SLSQP.

    A general-purpose solver that is told the objective, the simplices and, with
    `least`, the constraint `E_x E_pi log beta >= least`: no multiplier, no closed form.

    Args:
      q: `[X, K]`; the states x count alike.
      log_beta: `[X, K]`, finite.
      alpha: temperature.
      kappa: weight of the density in the objective.
      least: lower bound of the mean log density, over all states together.

    Returns:
      The policy `[X, K]` and the objective there.
    """
    states, actions = q.shape
    bonus = q + alpha * kappa * log_beta

    def cost(flat: np.ndarray) -> float:
        policy = flat.reshape(q.shape)
        return -float((policy * (bonus - alpha * np.log(policy))).sum() / states)

    def slope(flat: np.ndarray) -> np.ndarray:
        policy = flat.reshape(q.shape)
        return -(bonus - alpha * (np.log(policy) + 1.0)).ravel() / states

    rows = np.kron(np.eye(states), np.ones(actions))
    constraints = [
        {"type": "eq", "fun": lambda flat: rows @ flat - 1.0, "jac": lambda _: rows}
    ]
    if least is not None:
        mean = log_beta.ravel() / states
        constraints.append(
            {"type": "ineq", "fun": lambda f: f @ mean - least, "jac": lambda _: mean}
        )
    found = scipy.optimize.minimize(
        cost,
        np.full(q.size, 1.0 / actions),
        jac=slope,
        method="SLSQP",
        bounds=[(1e-13, 1.0)] * q.size,
        constraints=constraints,
        options={"ftol": 1e-15, "maxiter": 500},
    )
    assert found.success, found.message
    return found.x.reshape(q.shape), -found.fun
