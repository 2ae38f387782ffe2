"""Ranking candidates without an environment, on the selection split."""

from typing import Any

from offrl_models.evaluation import CHAMPION, Evaluation


def rank(found: Evaluation) -> list[dict[str, Any]]:
    """Candidates from best to worst, by the least that a member of the FQE ensemble says they gain on the champion.

    A member compares both policies on the same resample, so what it gets wrong of both cancels. Ranking by FQE follows
    Paine et al. (2020), https://arxiv.org/abs/2007.09055; the least of the members instead of their mean is pessimism.
    """
    rows = [
        {
            "candidate": name,
            "score": min(found.fqe_gains(name)),
            "gain_by_member": found.fqe_gains(name),
            **found.estimates[name].to_json(),
        }
        for name in found.names
        if name != CHAMPION
    ]
    rows.sort(key=lambda row: (-row["score"], row["candidate"]))
    return [{"rank": place, **row} for place, row in enumerate(rows, 1)]
