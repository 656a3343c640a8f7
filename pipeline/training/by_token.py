"""Decide token by token, `influence.unit: token`."""

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.config.schema_influence import PolicyConfig
from pipeline.influence.policy import decide_tokens
from pipeline.influence.scorer import Scored
from pipeline.record.outcome import Decided, OfTokens, UnitTable


def decide_by_token(
    units: UnitTable,
    scored: list[Scored],
    rank: int,
    policy: PolicyConfig,
    step: int,
    seed: int,
    batch: int,
    all_gather_rows: Callable[[Tensor], Tensor],
) -> list[Decided]:
    """For each micro-batch of this rank in `scored`, decided together with the others and with all ranks' `units`.
    Collective: a gather of 8 bytes a labelled token for each."""
    gathered = []
    for part in scored:
        assert part.by_token_n2 is not None
        gathered.append(all_gather_rows(part.by_token_n2).cpu())
    scores, losses = torch.cat(gathered).double().T
    decision, weights = decide_tokens(scores, units.tokens, units.finite, policy, step, seed, batch)
    unit = torch.arange(len(units.tokens)).repeat_interleave(units.tokens.long())  # that a token belongs to
    kept, decided = weights > 0, []
    for m in range(len(scored)):
        mask = units.micro_steps == m
        here = mask[unit]
        trained = here & kept  # what is not finite is not
        loss = float((weights * losses)[trained].sum() / weights[trained].sum()) if trained.any() else 0.0
        own = weights[here & (units.ranks == rank)[unit]]
        decided.append(Decided(units.of(mask), decision.of(mask), OfTokens(own, int((here & ~kept).sum()), loss)))
    return decided
