"""Which software made something: what artifacts and manifests say of it."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

from . import __version__


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Of Sotto, Python and those of `packages` that are installed: not every role needs every one."""
    found = {"sotto": __version__, "python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
