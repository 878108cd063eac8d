"""``cmt-mae ablate``: a plan of runs x seeds, worked off by one process or many, and one table of the results."""

from cmt_mae.tools.ablate.command import AblateConfig, ablate

__all__ = ["AblateConfig", "ablate"]
