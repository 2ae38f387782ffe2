"""The evidence in a few sentences."""

from typing import Any

from offrl_models.course import KEPT
from offrl_models.gate import Status

SETTLED_BY_MORE = (
    "episodes",
    "effective transitions",
    "one episode",
    "influence",
    "lower bound",
    "newer half",
)  # of the same logs


def brief(shown: dict[str, Any]) -> list[str]:
    """What someone who signs has to know, a sentence each: what decided, what would settle it, how the policy differs."""
    verdict, behind = shown["verdict"], shown["detail"]
    measures = verdict["measures"]
    said = [
        f"It was decided by: {verdict['decided_by']}. The difference to {shown['champion']['name']} is "
        f"{measures['difference']:+.4g}, between {measures['lower_bound']:+.4g} and {measures['upper_bound']:+.4g}, each bound at "
        f"{1 - measures['alpha']:.2%} confidence.",
    ]
    older, newer, least = measures["older_half"], measures["newer_half"], measures["kept_bound"]
    said.append(
        f"In the {older['episodes']:,} older ones of {measures['episodes']:,} episodes the difference is "
        f"{older['difference']:+.4g}, in the newer ones {newer['difference']:+.4g}, which is more than {KEPT:g} of that "
        f"by {measures['kept']:+.4g}, " + ("too few for a bound." if least is None else f"at least by {least:+.4g}.")
    )
    if verdict["proven_by_betting"]:
        said.append(f"Betting alone proves the gain (e-value {measures['e_value']:.3g}): the certificate is exact.")
    if measures["smoothed_lower"] is not None:
        said.append(
            f"By logarithmic smoothing, which needs no model and no bound of the weights, the difference is at least "
            f"{measures['smoothed_lower']:+.4g} at {1 - measures['alpha']:.2%} confidence, for this number of episodes."
        )
    if verdict["status"] == Status.FAIL:
        said.append("More of the same logs would not change it: the harm is shown.")
    elif verdict["status"] != Status.PASS:
        decided = verdict["decided_by"]
        needed = (
            behind["episodes_needed"] if decided in SETTLED_BY_MORE or decided.startswith(("bound ", "size ")) else None
        )
        said.append(
            f"If difference and spread stay what they are, {needed:,} gate episodes would put the lower bound above the margin; "
            f"there are {measures['episodes']:,}."
            if needed and needed > measures["episodes"]
            else "More of the same logs would not settle it: what decided has to change."
            if not needed
            else "The lower bound is above the margin already; what decided is another check."
        )
    if shown["canary"] is not None:
        said.append(
            f"Played in at most {shown['canary']:.3%} of the episodes, drawn at random, it could cost no more than the allowed "
            "`gate.canary_loss` per episode, however bad it is; what such a canary logs says more of it than these logs do."
        )
    said.append(f"On average {behind['differs']:.1%} of the decisions would be other ones than the champion's.")
    if behind["gamma_star"]:
        said.append(
            f"Hidden confounding that changes the odds of an action by less than a factor of {behind['gamma_star']:.4g} at every "
            "step leaves the lower bound above the margin, values and visits taken as they were fitted."
        )
    if behind["pareto_k"] is not None:
        k, limit = behind["pareto_k"], behind["pareto_k_limit"]
        said.append(
            f"The weights of whole episodes have a tail of Pareto k = {k:.2f}, {'within' if k <= limit else 'above'} the limit of "
            f"{limit:.2f} up to which they can be relied on."
        )
    if behind["agreement"]:
        gap = behind["agreement"]
        said.append(
            f"The estimators that agree the least, {gap['first']} and {gap['second']}, lie {gap['standardized']:.1f} standard "
            "errors apart."
        )
    said += [
        f"{group['name']}: {group['episodes']:,} episodes, worth {behind['effective_transitions_by_group'][group['name']]:,.0f} "
        f"transitions, {_span(group)}."
        for group in measures["subgroups"]
    ]
    said += [f"{cost['name']}: {cost['episodes']:,} episodes, {_span(cost)}." for cost in measures["costs"]]
    return said


def _span(contrast: dict[str, Any]) -> str:
    low, high = contrast["lower_bound"], contrast["upper_bound"]
    bounds = "too few for a bound" if low is None else f"between {low:+.4g} and {high:+.4g}"
    return f"difference {contrast['difference']:+.4g}, {bounds}"
