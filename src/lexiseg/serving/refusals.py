"""Requests that are not served, by the status of HTTP that they get."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from lexiseg.errors import LexisegError

RETRY_SECONDS = 1


class RequestError(LexisegError):
    """What is asked for cannot be done.

    Attributes:
        status: of HTTP.
        code: `error_code` of the answer, in the words of MLflow.
        headers: that the answer has besides.
    """

    status: ClassVar[int] = 400
    code: ClassVar[str] = "INVALID_PARAMETER_VALUE"
    headers: ClassVar[Mapping[str, str]] = {}


class FormError(RequestError):
    """The body has not the form of a request."""

    code = "BAD_REQUEST"


class AddressError(RequestError):
    """Nothing is served there."""

    status, code = 404, "ENDPOINT_NOT_FOUND"


class MethodError(RequestError):
    """The address is served by another method."""

    status, code = 405, "METHOD_NOT_ALLOWED"


class SlowError(RequestError):
    """The body did not arrive in time."""

    status, code = 408, "REQUEST_TIMEOUT"


class SizeError(RequestError):
    """The body is too large."""

    status, code = 413, "REQUEST_TOO_LARGE"


class ContentTypeError(RequestError):
    """The body is of a type that is not read."""

    status, code = 415, "UNSUPPORTED_MEDIA_TYPE"


class OverloadError(RequestError):
    """Too many requests wait already."""

    status, code = 503, "TEMPORARILY_UNAVAILABLE"
    headers: ClassVar[Mapping[str, str]] = {"Retry-After": str(RETRY_SECONDS)}
