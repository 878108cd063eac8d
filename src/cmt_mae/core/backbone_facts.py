"""What features depend on and a weights file does not always say: settings wherever a backbone is named."""

from dataclasses import dataclass, field
from typing import ClassVar

from cmt_mae.core.settings import RESUME_SAFE, Amount, Count, Positive, resume_safe


@dataclass(kw_only=True)
class BackboneFacts:
    """Given where the file does not contain them; what it contains and what is given here must agree."""

    prefix: ClassVar[str] = "--"
    """How these settings are written on the command line."""
    binding: ClassVar[bool] = True
    """False: taken where a file says nothing, without a refusal where it says something else."""
    given: ClassVar[bool] = True
    """False: this place has no such settings, and only a file that says everything will do."""

    # these may change when a run is continued: what was found is compared (`Backbone.facts`), not its origin
    arch: str | None = resume_safe(None)
    """timm's name of the network in the file; with its tag it says how the input is normalised too."""
    mean: list[Amount] = field(default_factory=list, metadata=RESUME_SAFE)
    """Per channel mean that its input is normalised with, for pixels in 0..1, as in --mean=[0.5,0.5,0.5]."""
    std: list[Positive] = field(default_factory=list, metadata=RESUME_SAFE)
    """Per channel standard deviation that its input is normalised with, for pixels in 0..1."""
    heads: Count | None = resume_safe(None)
    """Attention heads of a block."""
    grid: list[Count] = field(default_factory=list, metadata=RESUME_SAFE)
    """Rows and columns of patches that its positions are for."""


@dataclass(kw_only=True)
class AssumedFacts(BackboneFacts):
    """What a network that is filled from a file has anyway, such as a student's start."""

    prefix: ClassVar[str] = "the student's "
    binding: ClassVar[bool] = False


@dataclass(kw_only=True)
class NoFacts(BackboneFacts):
    """Of a network that is named beside the one whose facts are given, or in the app."""

    given: ClassVar[bool] = False


FACTS = ("arch", "mean", "std", "heads", "grid")
"""Names of these settings. They say what a file holds; results are compared by what was found, not by them."""
