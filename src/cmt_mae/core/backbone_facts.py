"""What features depend on and a weights file does not always say: settings wherever a backbone is named."""

from dataclasses import dataclass, field
from typing import ClassVar


@dataclass(kw_only=True)
class BackboneFacts:
    """Given where the file does not say them; what it says and what is given here must agree."""

    prefix: ClassVar[str] = "--"
    """How these settings are written on the command line."""

    arch: str | None = None
    """timm's name of the network in the file; with its tag it says how the input is normalised too."""
    mean: list[float] = field(default_factory=list)
    """Per channel mean that its input is normalised with, for pixels in 0..1, as in --mean=[0.5,0.5,0.5]."""
    std: list[float] = field(default_factory=list)
    """Per channel standard deviation that its input is normalised with, for pixels in 0..1."""
    heads: int | None = None
    """Attention heads of a block."""
    grid: list[int] = field(default_factory=list)
    """Rows and columns of patches that its positions are for."""


FACTS = ("arch", "mean", "std", "heads", "grid")
"""Names of these settings. They say what a file holds; results are compared by what was found, not by them."""
