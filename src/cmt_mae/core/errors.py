"""The ways in which a command ends early on purpose."""


class InputError(Exception):
    """A wrong input: one line that says what is wrong, where, and how to fix it. Exit status 2."""


class Stopped(Exception):
    """The run was stopped by a signal, and its checkpoint is written. Exit status 75."""


class LostProcess(Stopped):
    """Another process of the run has ended. Printed at once, as torchrun is about to end this one too."""
