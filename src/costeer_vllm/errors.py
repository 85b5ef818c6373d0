"""Every error that costeer-vllm raises on purpose.

CoSteerError
+-- InvalidParameter       a value that a caller gave is outside what is allowed      (also a ValueError)
+-- InvalidDelta           an encoded delta that cannot be used                       (also a ValueError)
+-- InvalidCandidates      encoded candidates that cannot be used                     (also a ValueError)
+-- ProtocolError          a frame or a message order that the protocol forbids
|   +-- LocalProtocolError     we were about to break it
|   +-- RemoteProtocolError    the peer broke it
+-- AdmissionRefused       the hub will not let this request be steered
+-- HubUnavailable         the hub cannot be reached or started
+-- Unsupported            this model, vLLM version or option cannot be steered
"""


class CoSteerError(Exception):
    """Base of all errors of this package."""


class InvalidParameter(CoSteerError, ValueError):
    """A parameter outside its range: names the field, the value and what is allowed."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(f"costeer: {field} is {_shown(value)}; it must be {allowed}")
        self.field = field
        self.value = value
        self.allowed = allowed


class InvalidDelta(CoSteerError, ValueError):
    """An encoded delta with a wrong size, a wrong id or a value that is not finite."""


class InvalidCandidates(CoSteerError, ValueError):
    """Encoded candidates with a wrong size, ids out of order or a value that is no log-probability."""


class ProtocolError(CoSteerError):
    """The protocol was broken."""


class LocalProtocolError(ProtocolError):
    """We were about to send what the protocol forbids: a bug on our side."""


class RemoteProtocolError(ProtocolError):
    """The peer sent what the protocol forbids: look at the peer."""


class AdmissionRefused(CoSteerError, ValueError):
    """The hub refuses the request; the sentence says why and what to do."""


class HubUnavailable(CoSteerError):
    """The hub cannot be reached, started or understood."""


class Unsupported(CoSteerError, ValueError):
    """A model, a vLLM version or an option that cannot be steered."""


def _shown(value: object) -> str:
    try:
        shown = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or lists in lists in lists
        return f"of type {type(value).__name__} and too large to show"
    return shown if len(shown) <= 80 else shown[:77] + "..."
