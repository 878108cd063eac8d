"""`cmt-mae doctor`: the machine, the images, the teacher, what a run will cost, and why one does not learn."""

from cmt_mae.tools.diagnose.command import DoctorConfig, doctor

__all__ = ["DoctorConfig", "doctor"]
