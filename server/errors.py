"""Every error a user can meet, with its HTTP status and its OpenAI error type.

::

    GaleError
     +- SettingsError            command line or environment; exit code 2
     +- CheckpointError          the model folder cannot be served; exit code 1
     +- ApiError                 answered over HTTP as {"error": {message, type, param, code}}
         +- InvalidRequestError  400
         +- AuthenticationError  401
         +- StatesLimitError     403: delete some
         +- NotFoundError        404
         +- MethodNotAllowedError  405
         +- RequestTimeoutError  408
         +- BodyTooLargeError    413
         +- UnsupportedMediaTypeError  415
         +- RateLimitError       429 with Retry-After
         +- QueueFullError       503 with Retry-After
         +- StatesFullError      507: delete some
         +- StateNotSavedError   507: the disk
         +- StateNotAbsorbedError  507: memory
         +- EngineUnavailableError  503 with Retry-After: starting, draining or dead
             +- EngineAsleepError  503 with Retry-After: sent to sleep
         +- InternalError        500
"""


class GaleError(Exception):
    """Base of all errors raised on purpose. ``str(error)`` is one line that names the cause."""


class SettingsError(GaleError):
    """A flag, or a combination of flags, that cannot work."""


class CheckpointError(GaleError):
    """A model or tokenizer folder that cannot be loaded. Names the file and the key."""


class ApiError(GaleError):
    """An error with an HTTP answer.

    Args:
        message: one sentence for the client.
        param: the request field at fault, if one is.
        code: machine-readable code, OpenAI's where it has one.
    """

    status: int = 500
    type: str = "server_error"
    code: str | None = None
    retry_after: int | None = None
    """Seconds for the Retry-After header."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code

    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON body, in OpenAI's shape."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class InvalidRequestError(ApiError):
    """The request can never succeed as it is."""

    status = 400
    type = "invalid_request_error"


class AuthenticationError(ApiError):
    """No API key, or a wrong one."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class StatesLimitError(ApiError):
    """As many states are saved with the API key as may be."""

    status = 403
    type = "permission_error"
    code = "states_limit_exceeded"


class NotFoundError(ApiError):
    """Unknown model or route."""

    status = 404
    type = "invalid_request_error"


class MethodNotAllowedError(ApiError):
    """The route exists, but not for this HTTP method."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_supported"


class RequestTimeoutError(ApiError):
    """The client sends nothing of what it has announced."""

    status = 408
    type = "invalid_request_error"
    code = "request_timeout"


class BodyTooLargeError(ApiError):
    """The request body exceeds the server's limit."""

    status = 413
    type = "invalid_request_error"
    code = "body_too_large"


class UnsupportedMediaTypeError(ApiError):
    """The request body is declared to be something else than plain JSON."""

    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"


class RateLimitError(ApiError):
    """The API key has as many choices waiting and running as it may."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    retry_after = 1


class QueueFullError(ApiError):
    """Too many requests wait already."""

    status = 503
    type = "overloaded_error"
    code = "queue_full"
    retry_after = 1


class StatesFullError(ApiError):
    """As many states are saved as may be."""

    status = 507
    type = "overloaded_error"
    code = "states_full"


class StateNotSavedError(ApiError):
    """A state's file could not be written, or not be removed: the disk is full, or ill."""

    status = 507
    code = "state_not_saved"


class StateNotAbsorbedError(ApiError):
    """A state's snapshot is lost, and there is no room for another one."""

    status = 507
    code = "state_not_absorbed"


class EngineUnavailableError(ApiError):
    """The engine is starting, draining or dead."""

    status = 503
    type = "service_unavailable"
    code = "engine_unavailable"
    retry_after = 5


class EngineAsleepError(EngineUnavailableError):
    """The engine was sent to sleep; somebody has to wake it."""

    code = "engine_asleep"
    retry_after = 30


class InternalError(ApiError):
    """The server failed; the fault is not the client's."""

    code = "internal_error"
