"""Errors that a user can cause. Each message names the value, what was expected and what to do."""


class JoyJaxError(Exception):
    """A user's mistake or a broken input; the message alone is enough to act on."""


class RequestError(JoyJaxError):
    """An argument that is invalid or unsupported."""


class PictureError(JoyJaxError):
    """A picture that cannot be read or used."""


class CheckpointError(JoyJaxError):
    """A checkpoint that is missing, incomplete, or does not match its configuration."""


class ConfigError(CheckpointError):
    """A configuration value that this code does not implement."""


class MeshError(JoyJaxError):
    """A device mesh that does not fit the model or the machine."""


class Cancelled(Exception):  # noqa: N818 - not an error: the caller asked for it
    """Raise it in the callback of `edit` to stop within one step."""


class AdviceWarning(UserWarning):
    """A request will run, but is outside the model's domain, or part of a picture is not used."""
