"""Standard errors from influence values, clustered by prompt."""

import torch
from torch import Tensor


def by_group(psi: Tensor, group: Tensor) -> Tensor:
    """Sums of influence values over the rows of each prompt, [..., G] from [..., N] and [N]."""
    prompts, index = group.unique(return_inverse=True)
    total = psi.new_zeros(*psi.shape[:-1], len(prompts))
    return total.index_add(-1, index, psi)


def standard_error(psi: Tensor) -> Tensor:
    """``sqrt(G / (G - 1) sum_g psi_g^2)``, [...] from [..., G]; nan for a single prompt.

    The rows of one prompt are correlated, so that prompts are the units of resampling.
    """
    g = psi.shape[-1]
    if g < 2:
        return torch.full(psi.shape[:-1], torch.nan, dtype=psi.dtype, device=psi.device)
    return (g / (g - 1) * (psi * psi).sum(-1)).sqrt()
