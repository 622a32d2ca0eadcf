"""Stopping in the middle: one exception for everything that waits."""


class Stopped(Exception):
    """The user cancelled the job or the service is going down; what was finished is kept."""
