"""What further limits of the guards would buy: a curve in place of a point.

Once a fit has ended, its gates go on from there under each further limit in turn, for a part of the
fit's steps. Nearly all of the way is common to all limits, so that a point costs little.
"""

from __future__ import annotations

from mergekit_wp.joint.ascent import FitState, Fitting

#: a point takes at most one step for so many of the fit
SHARE = 3


def front(fitting: Fitting, fitted: FitState) -> list[FitState]:
    """Where the gates come under each of the request's further limits.

    Args:
        fitting: its guards allow the last of the limits when this is done.
        fitted: at the end of the fit.
    """
    points: list[FitState] = []
    most = max(1, fitted.climb.steps // SHARE)
    # points of a fit that was given more steps since then began elsewhere: their names tell
    for limit in fitting.request.front:
        fitting.allow(limit)
        start = (points or [fitted])[-1].onwards()
        where = f"allowed {limit:g} times the base's perplexity"
        point = fitting.climb(start, most, f"front-{fitted.climb.steps}-{len(points)}", where)
        fitting.progress.note(f"{where}, {fitting.said(point.reached)}")
        points.append(point)
    return points
