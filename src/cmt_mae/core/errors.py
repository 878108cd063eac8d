"""The ways in which a command ends early on purpose."""


class InputError(Exception):
    """Something the user can mend: one line that says what, where and the mend. Exit status 2."""


class Stopped(Exception):
    """A signal asked the run to stop and the checkpoint is written. Exit status 75."""


class LostProcess(Stopped):
    """Another process of the run is gone. Told on stderr at once: torchrun is about to end this one too."""
