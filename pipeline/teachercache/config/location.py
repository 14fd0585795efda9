"""Locations of caches: folders and URLs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def is_url(location: str | Path) -> bool:
    """Tells whether the location of a cache is a URL, such as `s3://BUCKET/PREFIX`; all others are folders."""
    return isinstance(location, str) and _URL.match(location) is not None


def folder_name(location: str | Path) -> str:
    """The last part of a cache's location: what recipes call it."""
    return Path(str(location)).name


def _folder_or_url(location: Any) -> Any:
    if not is_url(location):
        return Path(location) if isinstance(location, str) else location
    authority = location.partition("://")[2].partition("/")[0]
    if ":" in authority.partition("@")[0] and "@" in authority:
        raise ValueError(
            "a URL must not hold credentials, which would be written into run folders; set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY"
        )
    return location


# A folder, or a URL such as s3://BUCKET/PREFIX.
CacheLocation = Annotated[Path | str, BeforeValidator(_folder_or_url)]
