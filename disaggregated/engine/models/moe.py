"""A feed-forward part of many experts, of which a router picks a few for each token (Mixtral, Qwen3-MoE, DeepSeek).

Row-invariant: the router's product is exact, its softmax, its choice and its ties depend on a token's own scores, each
expert sees its tokens through the op table, and what experts say of a token is added in the order of the experts.

Legend: T tokens, H hidden, X experts, C chosen experts of each token, Q groups of experts, others as in `ops/api.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Final

import torch

from disaggregated.engine.models.mlp import GatedMlp
from disaggregated.engine.models.weight_reader import NamedWeights
from disaggregated.engine.ops.api import Ops
from disaggregated.engine.ops.row_invariant import row_sum
from disaggregated.model_files.model_parts import ExpertsConfig

TINY: Final = 1e-20
"""Keeps a sum of scores that are all zero from being divided by (DeepSeek V3)."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    config: ExpertsConfig
    gate: Any
    """H → X, in float32 and never quantised: a small error would choose another expert."""
    correction_X: torch.Tensor | None

    @classmethod
    def read(cls, weights: NamedWeights, config: ExpertsConfig, hidden_size: int) -> Router:
        gate = weights.tensor("weight", config.num_experts, hidden_size, dtype=torch.float32)
        correction = None
        if config.has_correction_bias:
            correction = weights.tensor("e_score_correction_bias", config.num_experts, dtype=torch.float32)
        return cls(config=config, gate=weights.prepare(lambda: (gate, None), exact=True), correction_X=correction)

    def choose(self, normed_TH: torch.Tensor, ops: Ops) -> tuple[torch.Tensor, torch.Tensor]:
        """(T, C) experts and their weights in float32, best first; of equal ones the lower number."""
        config = self.config
        logits_TX = ops.linear(normed_TH.float(), self.gate)
        scores_TX = _softmax(logits_TX) if config.scoring == "softmax" else 1.0 / logits_TX.neg().exp_().add_(1.0)
        merits_TX = scores_TX if self.correction_X is None else scores_TX + self.correction_X
        if config.num_groups > 1:
            merits_TX = merits_TX.masked_fill(~self._in_chosen_groups(merits_TX), -torch.inf)
        chosen_TC = _best(merits_TX, config.num_chosen)
        weights_TC = scores_TX.gather(1, chosen_TC)
        if config.is_normalised:
            weights_TC = weights_TC / (row_sum(weights_TC) + TINY)[:, None]
        return chosen_TC, weights_TC * config.scale

    def _in_chosen_groups(self, merits_TX: torch.Tensor) -> torch.Tensor:
        """A group is as good as its best expert, or where scores are sigmoids, as its best two together."""
        config = self.config
        groups_TQX = merits_TX.view(len(merits_TX), config.num_groups, -1)
        num_counted = 2 if config.scoring == "sigmoid" else 1
        merits_TQ = row_sum(torch.sort(groups_TQX, descending=True).values[..., :num_counted])
        allowed_TQ = torch.zeros_like(merits_TQ, dtype=torch.bool)
        allowed_TQ.scatter_(1, _best(merits_TQ, config.num_chosen_groups), True)
        return allowed_TQ[..., None].expand_as(groups_TQX).flatten(1)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MixtureOfExperts:
    """Implements `FeedForward`."""

    router: Router
    experts: Sequence[GatedMlp]
    shared: GatedMlp | None = None
    """Every token goes through it, beside its experts."""

    def forward(self, normed_TH: torch.Tensor, ops: Ops) -> torch.Tensor:
        chosen_TC, weights_TC = self.router.choose(normed_TH, ops)
        out_TH = torch.zeros_like(normed_TH)
        # Places of T * C by expert, and within one by token. One sync with the host: it decides what to launch.
        by_expert = chosen_TC.flatten().argsort(stable=True)
        counts = chosen_TC.flatten().bincount(minlength=len(self.experts)).tolist()
        tokens, weights = by_expert // chosen_TC.shape[1], weights_TC.flatten().index_select(0, by_expert)
        parts = (torch.split(tokens, counts), torch.split(weights, counts))
        for expert, own, own_weights in zip(self.experts, *parts, strict=True):
            if len(own):
                said = expert.forward(normed_TH.index_select(0, own), ops)
                out_TH.index_add_(0, own, (said * own_weights[:, None]).to(out_TH.dtype))
        return out_TH if self.shared is None else out_TH + self.shared.forward(normed_TH, ops)


def _best(merits: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` greatest of each row. A stable sort, where topk leaves the order of equal ones open."""
    return torch.sort(merits, dim=-1, descending=True, stable=True).indices[:, :count]


def _softmax(logits_TX: torch.Tensor) -> torch.Tensor:
    grown = (logits_TX - logits_TX.amax(-1, keepdim=True)).exp_()
    return grown / row_sum(grown)[:, None]
