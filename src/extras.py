"""What an installation may lack: packages that only an extra of the distribution brings."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Final

from .errors import ConfigError

_PARTY: Final = ("torch",)
_RANDHIE: Final = ("statsmodels",)
PACKAGES: Final = {"party": _PARTY, "randhie": _RANDHIE, "demo": (*_PARTY, *_RANDHIE, "matplotlib")}
"""By extra: what it installs and its code imports. A package belongs to the first extra that has it."""


def require(extra: str, what: str) -> None:
    """Raise ConfigError where the packages of an extra are not installed; `what` needs them, in words."""
    text = lacking(extra, what)
    if text:
        raise ConfigError(text)


def explained(error: ModuleNotFoundError) -> ConfigError | None:
    """What to install where the missing module is of an extra; None for any other."""
    package = (error.name or "").partition(".")[0]
    extra = extra_of(package)
    if extra is None or find_spec(package) is not None:  # it is there, and broken: that is another matter
        return None
    return _lacking(extra, "this", [package])


def extra_of(package: str) -> str | None:
    """The extra that brings a package; None for a package of none."""
    return next((name for name, packages in PACKAGES.items() if package in packages), None)


def lacking(extra: str, what: str) -> str:
    """What to install where the packages of an extra are not; `what` needs them, in words. Empty where they are."""
    missing = [name for name in PACKAGES[extra] if find_spec(name) is None]
    return _lacking(extra, what, missing).message if missing else ""


def _lacking(extra: str, what: str, missing: list[str]) -> ConfigError:
    verb = "is" if len(missing) == 1 else "are"
    return ConfigError(
        f"{what} needs the extra `{extra}`, and {', '.join(missing)} {verb} not installed: "
        f"pip install 'sotto-fl[{extra}]'"
    )
