"""Route policies that draw lots: any worker, or the better of two. The draw is a hash of the view's
fields, so a replay draws the same."""

from __future__ import annotations

from kvasir.policy.route.balance import load
from kvasir.policy.route.view import Choice, RouteMemory, RouteView, draw


def random_worker(view: RouteView, memory: RouteMemory) -> tuple[Choice, RouteMemory]:
    """Any candidate, each as likely. The floor that every other policy has to beat."""
    at = draw(view) % len(view.candidates)
    return Choice(view.candidates[at].id, f"drawn {at} of {len(view.candidates)}"), memory


def power_of_two(view: RouteView, memory: RouteMemory) -> tuple[Choice, RouteMemory]:
    """The less loaded of two drawn candidates (Mitzenmacher, IEEE TPDS 12(10), 2001)."""
    count = len(view.candidates)
    first = draw(view) % count
    second = (first + 1 + draw(view, "second") % (count - 1)) % count if count > 1 else first
    one, other = view.candidates[first], view.candidates[second]
    best = min(one, other, key=lambda w: (load(view, w), w.id))
    return Choice(
        best.id, f"load {load(view, best):.3g}, drawn {one.id} and {other.id}"
    ), memory
