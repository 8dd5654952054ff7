"""The figure of a sweep, by what its grid varies."""

import pandas
from matplotlib.figure import Figure

from eora_lab.plots.curves import plot_setting
from eora_lab.plots.findings import touched, varied
from eora_lab.plots.front import plot_front
from eora_lab.plots.spend import plot_spend


def plot_sweep(frame: pandas.DataFrame) -> Figure:
    """A grid's results: `plot_setting` where one or two settings vary besides the method, else `plot_front`.

    Of two settings the one with more values is the axis, the other one a panel or a line a value. Where more vary and
    factors are shared or not, it is `plot_spend`, which compares bits with rank.
    """
    done = frame[frame["status"] == "done"]
    others = [name for name in varied(done) if name != "method"] if len(done) else []
    if len(others) > 2 and "shared_factors" in others:
        return plot_spend(frame)
    if len(others) > 2 or not others:
        return plot_front(frame)
    return plot_setting(
        frame, max(others, key=lambda name: (done.loc[touched(done, name), name].nunique(), name != "bits"))
    )
