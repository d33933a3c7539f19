"""Where machines come from. Each provider's configuration is a small frozen object; making one does no I/O."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, TypeAlias

from skyward.errors import SpecError
from skyward.providers.dask import Dask
from skyward.providers.local import Local
from skyward.providers.ssh import SSH

Provider: TypeAlias = Local | Dask | SSH
ProviderLike: TypeAlias = Provider | str | Sequence[Provider | str] | None

_BY_NAME: dict[str, type[Local]] = {"local": Local}
_PLANNED = ("aws", "digitalocean", "verda")


def resolve(provider: ProviderLike) -> Provider:
    """Return the provider that `provider` means; None means this machine.

    Raises
    ------
    SpecError
        Unknown name, or something that is no provider.
    """
    if provider is None:
        return Local()
    if isinstance(provider, (Local, Dask, SSH)):
        return provider
    if isinstance(provider, str):
        return _named(provider)
    if isinstance(provider, Sequence):
        found = [resolve(p) for p in provider]
        if len(found) == 1:
            return found[0]
        raise _error(provider, "one provider; choosing among several needs cloud providers, which this release lacks")
    raise _error(provider, "a provider such as sky.Local() or sky.SSH(hosts), or a name such as 'local'")


def _named(name: str) -> Provider:
    key = name.lower()
    if key in _BY_NAME:
        return _BY_NAME[key]()
    accepted = ", ".join(repr(n) for n in _BY_NAME)
    if key == "dask":
        raise _error(name, "sky.Dask(client_or_address): the name alone does not say which cluster")
    if key == "ssh":
        raise _error(name, "sky.SSH(hosts): the name alone does not say which hosts")
    if key in _PLANNED:
        raise _error(name, f"{accepted}; {name!r} is not in this release")
    close = difflib.get_close_matches(key, [*_BY_NAME, *_PLANNED], 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise _error(name, f"{accepted}, sky.Local(), sky.SSH(hosts) or sky.Dask(client){hint}")


def _error(value: Any, accepted: str) -> SpecError:
    return SpecError(f"provider={value!r}: accepted is {accepted}", option="provider", value=value, accepted=accepted)
