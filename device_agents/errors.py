"""Errors of the device_agents package, one root, few leaves."""


class DeviceAgentError(Exception):
    """Something on the device stands in the way; the message says what to do next."""


class EnrolmentRefused(DeviceAgentError):
    """The service refused the enrolment token; ask for a new one with `autotune device enroll`."""


class ServiceUnreachable(DeviceAgentError):
    """The service does not answer; check its address and that it is running."""


class IncompatibleProtocol(DeviceAgentError):
    """The service speaks another protocol version; install the agent release it names."""


class RuntimeUnavailable(DeviceAgentError):
    """The runtime or provider is not installed on this device."""


class ArtifactCorrupt(DeviceAgentError):
    """The bytes received do not have the sha256 that was promised."""


class ArtifactMissing(DeviceAgentError):
    """The service does not have the artifact any more."""


class DeviceDiskFull(DeviceAgentError):
    """The device has no room for the artifact; free some space or lower the cache bound."""
