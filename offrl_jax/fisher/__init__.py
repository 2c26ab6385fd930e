"""Fisher information: scores, matrices, products, directions, bounds, transformations.

Arrays in, arrays out: nothing here knows an agent.  docs/fisher.md introduces it.
"""

from offrl_jax.fisher.bounds import crlb
from offrl_jax.fisher.kfac import (
    KFACFactors,
    average_factors,
    empty_factors,
    kfac_direction,
    kfac_factors,
)
from offrl_jax.fisher.matrices import (
    categorical_fisher,
    categorical_output_fisher,
    empirical_fisher,
    gaussian_fisher,
    gaussian_output_fisher,
    monte_carlo_fisher,
    output_space_fisher,
    second_moment,
)
from offrl_jax.fisher.measures import (
    cosine,
    cosine_to_natural,
    kl_of_step,
    spectrum,
    top_energy,
)
from offrl_jax.fisher.products import (
    categorical_kl,
    categorical_output_product,
    fisher_vector_product,
    gauss_newton_product,
    gaussian_kl,
    gaussian_output_product,
)
from offrl_jax.fisher.scores import (
    flatten_scores,
    per_sample_scores,
    pseudo_likelihood_score,
)
from offrl_jax.fisher.solvers import (
    blockwise_rank1_direction,
    blockwise_woodbury_direction,
    conjugate_gradient,
    dense_direction,
    diagonal_direction,
    rank1_coefficient,
    rank1_deflation,
    rank1_direction,
    solve_spd,
    woodbury_deflation,
    woodbury_direction,
)
from offrl_jax.fisher.transforms import (
    ScaleByFisherState,
    ScaleByTrustRegionState,
    diagnostics,
    scale_by_rank1_fisher,
    scale_by_trust_region,
    scale_by_woodbury_fisher,
    trust_region_rate,
)
from offrl_jax.fisher.tree_algebra import inner, norm2

__all__ = [
    "KFACFactors",
    "ScaleByFisherState",
    "ScaleByTrustRegionState",
    "average_factors",
    "blockwise_rank1_direction",
    "blockwise_woodbury_direction",
    "categorical_fisher",
    "categorical_kl",
    "categorical_output_fisher",
    "categorical_output_product",
    "conjugate_gradient",
    "cosine",
    "cosine_to_natural",
    "crlb",
    "dense_direction",
    "diagnostics",
    "diagonal_direction",
    "empirical_fisher",
    "empty_factors",
    "fisher_vector_product",
    "flatten_scores",
    "gauss_newton_product",
    "gaussian_fisher",
    "gaussian_kl",
    "gaussian_output_fisher",
    "gaussian_output_product",
    "inner",
    "kfac_direction",
    "kfac_factors",
    "kl_of_step",
    "monte_carlo_fisher",
    "norm2",
    "output_space_fisher",
    "per_sample_scores",
    "pseudo_likelihood_score",
    "rank1_coefficient",
    "rank1_deflation",
    "rank1_direction",
    "scale_by_rank1_fisher",
    "scale_by_trust_region",
    "scale_by_woodbury_fisher",
    "second_moment",
    "solve_spd",
    "spectrum",
    "top_energy",
    "trust_region_rate",
    "woodbury_deflation",
    "woodbury_direction",
]
