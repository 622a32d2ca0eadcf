"""Stopping in the middle: what everything that waits may raise. What is finished is kept."""


class Stopped(Exception):
    """The user cancelled the job or the service is going down."""


class DeviceAway(Exception):
    """The job's device went offline; the job goes on when its agent is back."""
