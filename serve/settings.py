"""What a server allows, and to whom."""

from __future__ import annotations

from dataclasses import dataclass

MAX_SEED = 2**53 - 1
"""The highest seed: what every reader of JSON, JavaScript too, holds exactly."""
MAX_TEMPERATURE = 100.0
"""The highest temperature; long before it all tokens are equally likely."""


@dataclass(frozen=True)
class Limits:
    """What one request and one client may take.

    Attributes:
        images: Images of a request.
        deadline_s: Seconds after which a request ends undrawn; it may ask for fewer.
        body_bytes: Size of a request's body.
        body_s: Seconds in which a request's head, and then its body, must have come.
        stall_s: Seconds without reading after which a client is dropped.
    """

    images: int = 10
    deadline_s: float = 300.0
    body_bytes: int = 64 << 10
    body_s: float = 10.0
    stall_s: float = 30.0


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Attributes:
        api_key: The bearer key of `/v1` and `/metrics`; None for none.
        cors_origins: Whose pages may read answers in a browser, such as "https://example.com"; "*"
            for anybody's.
        hosts: Names under which it may be addressed, without ports; None for any.
    """

    api_key: str | None = None
    cors_origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] | None = None
