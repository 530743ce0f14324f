"""Which experts a token gets, and that its mates have no say in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disaggregated.engine.models.mlp import GatedMlp
from disaggregated.engine.models.moe import MixtureOfExperts, Router
from disaggregated.engine.ops.reference import ReferenceOps
from disaggregated.model_files.model_parts import ExpertsConfig

HIDDEN = 32


def experts_config(**changes: Any) -> ExpertsConfig:
    values = {"num_experts": 8, "num_chosen": 3, "width": 48, "scoring": "softmax", "is_normalised": False}
    return ExpertsConfig(is_sparse=(True,), **{**values, **changes})


def router(ops: ReferenceOps, config: ExpertsConfig, gate_XH: torch.Tensor, correction: Any = None) -> Router:
    return Router(config=config, gate=ops.prepare_linear(gate_XH, None, exact=True), correction_X=correction)


def randn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def scores_router(ops: ReferenceOps, scores: list[float], **changes: Any) -> tuple[Router, torch.Tensor]:
    """A router, and the one token that it gives these scores before softmax or sigmoid."""
    config = experts_config(num_experts=len(scores), **changes)
    x = torch.zeros(1, HIDDEN)
    x[0, 0] = 1.0
    gate = torch.zeros(len(scores), HIDDEN)
    gate[:, 0] = torch.tensor(scores)
    return router(ops, config, gate), x


def mixture(ops: ReferenceOps, config: ExpertsConfig) -> MixtureOfExperts:
    def mlp(seed: int) -> GatedMlp:
        gate_up, down = randn(2 * config.width, HIDDEN, seed=seed), randn(HIDDEN, config.width, seed=seed + 50)
        return GatedMlp(gate_up=ops.prepare_linear(gate_up, None), down=ops.prepare_linear(down, None))

    return MixtureOfExperts(
        router=router(ops, config, randn(config.num_experts, HIDDEN)),
        experts=[mlp(i + 1) for i in range(config.num_experts)],
        shared=mlp(99) if config.shared_width else None,
    )


@pytest.fixture
def ops() -> ReferenceOps:
    return ReferenceOps()


def test_the_best_are_chosen_and_weigh_their_share_of_all(ops: ReferenceOps) -> None:
    picks, x = scores_router(ops, [0.0, 3.0, 1.0, 2.0], num_chosen=2)
    chosen, weights = picks.choose(x, ops)
    assert chosen.tolist() == [[1, 3]]
    torch.testing.assert_close(weights[0], torch.tensor([0.0, 3.0, 1.0, 2.0]).softmax(0)[[1, 3]])


def test_normalised_weights_sum_up_to_the_scale(ops: ReferenceOps) -> None:
    picks, x = scores_router(ops, [0.0, 3.0, 1.0, 2.0], num_chosen=2, is_normalised=True, scale=2.5)
    _, weights = picks.choose(x, ops)
    torch.testing.assert_close(weights.sum(), torch.tensor(2.5))


def test_equal_scores_go_to_the_lower_number(ops: ReferenceOps) -> None:
    picks, x = scores_router(ops, [1.0] * 8, num_chosen=3)
    assert picks.choose(x, ops)[0].tolist() == [[0, 1, 2]]


def test_only_the_best_groups_are_chosen_from(ops: ReferenceOps) -> None:
    """The second best expert of all is in a group that loses."""
    scores = [9.0, 0.0, 8.0, 0.0, 8.5, 0.0, 0.0, 7.0]
    picks, x = scores_router(ops, scores, num_chosen=2, num_groups=4, num_chosen_groups=1)
    assert picks.choose(x, ops)[0].tolist() == [[0, 1]]


def test_sigmoid_groups_are_as_good_as_their_best_two(ops: ReferenceOps) -> None:
    scores = [3.0, -9.0, 1.0, 1.0]
    one, x = scores_router(ops, scores, num_chosen=2, num_groups=2, num_chosen_groups=1)
    two, _ = scores_router(ops, scores, num_chosen=2, num_groups=2, num_chosen_groups=1, scoring="sigmoid")
    assert one.choose(x, ops)[0].tolist() == [[0, 1]]
    assert two.choose(x, ops)[0].tolist() == [[2, 3]]


def test_a_correction_changes_the_choice_but_not_the_weight(ops: ReferenceOps) -> None:
    plain, x = scores_router(ops, [2.0, 1.0, 0.0], num_chosen=1, scoring="sigmoid")
    corrected = router(
        ops, plain.config, torch.tensor([[2.0], [1.0], [0.0]]) * torch.eye(1, HIDDEN), torch.tensor([0, 0, 9.0])
    )
    chosen, weights = corrected.choose(x, ops)
    assert chosen.tolist() == [[2]]
    torch.testing.assert_close(weights, torch.tensor([[0.5]]))


@settings(max_examples=25)
@given(
    num_tokens=st.integers(1, 40),
    seed=st.integers(0, 1000),
    shared=st.sampled_from([0, 48]),
    scoring=st.sampled_from(["softmax", "sigmoid"]),
)
def test_a_token_is_bitwise_the_same_in_any_company(num_tokens: int, seed: int, shared: int, scoring: str) -> None:
    ops = ReferenceOps()
    moe = mixture(ops, experts_config(shared_width=shared, scoring=scoring, num_groups=4, num_chosen_groups=2))
    x = randn(40, HIDDEN, seed=seed)
    alone = torch.cat([moe.forward(x[i : i + 1].clone(), ops) for i in range(num_tokens)])
    assert torch.equal(moe.forward(x[:num_tokens].clone(), ops), alone)


def test_experts_say_the_weighted_sum_of_what_each_says(ops: ReferenceOps) -> None:
    moe = mixture(ops, experts_config(shared_width=48))
    x = randn(9, HIDDEN, seed=5)
    chosen, weights = moe.router.choose(x, ops)
    assert moe.shared is not None
    expected = moe.shared.forward(x, ops).double()
    for token in range(len(x)):
        for expert, weight in zip(chosen[token].tolist(), weights[token].tolist(), strict=True):
            expected[token] += moe.experts[expert].forward(x[token : token + 1], ops)[0].double() * weight
    torch.testing.assert_close(moe.forward(x, ops).double(), expected, rtol=1e-4, atol=1e-4)
