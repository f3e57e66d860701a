"""Do not disaggregate this one: when so little is left to prefill that shipping would not pay.

llm-d's decider (`nonCachedTokens`) by another name: a decode worker that already holds all but
`local_prefill_tokens` of the prompt runs the rest itself. 0 switches the rule off.
"""

from __future__ import annotations

from kvasir.policy.route.view import Choice, RouteView, cached_tokens


def stays(view: RouteView) -> Choice | None:
    """The decode candidate that should run both phases, or None. `view.stage` is "decode"."""
    limit = view.spec.local_prefill_tokens
    if limit <= 0:
        return None
    best = max(view.candidates, key=lambda w: (cached_tokens(view, w), -w.decoding, w.id))
    left = view.input_tokens - cached_tokens(view, best)
    if left > limit:
        return None
    return Choice(best.id, f"only {left} tokens to prefill, at most {limit} stay")
