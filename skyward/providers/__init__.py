"""Where machines come from. Each provider's configuration is a small frozen object; making one does no I/O."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any, TypeAlias, TypeVar

from skyward.errors import ProviderError, SkywardError, invalid
from skyward.providers.base import Cloud
from skyward.providers.dask import Dask
from skyward.providers.local import Local
from skyward.providers.ssh import SSH

Provider: TypeAlias = Local | Dask | SSH | Cloud
Resolved: TypeAlias = Local | Dask | SSH | tuple[Cloud, ...]
"""Where a pool's machines come from: clouds are several, of which one is chosen."""
ProviderLike: TypeAlias = Provider | str | Sequence[Provider | str] | None

T = TypeVar("T")

_CLOUDS = {"aws": "AWS", "digitalocean": "DigitalOcean", "verda": "Verda"}


def resolve(provider: ProviderLike, region: str | Mapping[str, str] | None = None) -> Resolved:
    """Return the provider that `provider` means, or the clouds; None means this machine.

    Parameters
    ----------
    region
        For clouds that are given by name: one for all of them, or one for each of some.

    Raises
    ------
    SpecError
        Unknown name, something that is no provider, several that are not all clouds, or no region of a cloud's.
    """
    if provider is None:
        return Local()
    if isinstance(provider, str):
        provider = _named(provider, region)
    if isinstance(provider, (Local, Dask, SSH)):
        return provider
    if isinstance(provider, Sequence):
        return _several(provider, region)
    if all(hasattr(provider, name) for name in ("offers", "launch", "end")):
        return (provider,)
    raise invalid("provider", provider, "a provider such as sky.AWS() or sky.SSH(hosts), or a name such as 'aws'")


def provider_names(provider: Resolved) -> str:
    """Return where a pool's machines come from, in words."""
    clouds = provider if isinstance(provider, tuple) else (provider,)
    return " or ".join(dict.fromkeys(one.name for one in clouds))


def _several(given: Sequence[Provider | str], region: str | Mapping[str, str] | None) -> Resolved:
    found = [resolve(p, region) for p in given]
    if len(found) == 1:
        return found[0]
    several = [p for p in found if isinstance(p, tuple)]
    if not found or len(several) < len(found):
        accepted = "one provider, or several clouds to choose from: sky.AWS(), sky.DigitalOcean(), sky.Verda()"
        raise invalid("provider", given, accepted)
    return tuple(cloud for one in several for cloud in one)


def make(name: str, settings: Mapping[str, Any]) -> Cloud:
    """Return the cloud that was written down with its `Cloud.settings`.

    Raises
    ------
    SkywardError
        This version knows no such cloud.
    """
    if name not in _CLOUDS:
        raise SkywardError(
            f"machines are on {name!r}, which this skyward can't end: it knows {', '.join(_CLOUDS)}. "
            "Use the version that started them"
        )
    return _cloud(name)(**settings)


def clouds() -> list[Cloud]:
    """Return every cloud as it is without options."""
    return [_cloud(name)() for name in _CLOUDS]


def ask_all(clouds: Sequence[Cloud], question: Callable[[Cloud], T]) -> list[T | ProviderError]:
    """Return what each cloud answers, all asked at once, or why it could not be asked."""

    def ask(cloud: Cloud) -> T | ProviderError:
        try:
            return question(cloud)
        except ProviderError as exc:
            return exc

    if len(clouds) > 1:
        # What SDKs share, before their threads import it at once: it sets filters of warnings, which are global.
        with contextlib.suppress(ImportError):  # where no SDK needs it
            import_module("requests")
    with ThreadPoolExecutor(max(1, len(clouds)), thread_name_prefix="skyward-ask") as threads:
        return list(threads.map(ask, clouds))


def _cloud(name: str) -> Callable[..., Cloud]:
    kind: Callable[..., Cloud] = getattr(import_module(f"skyward.providers.{name}.provider"), _CLOUDS[name])
    return kind


def _named(name: str, region: str | Mapping[str, str] | None) -> Provider:
    key = name.lower()
    if key == "local":
        return Local()
    if key in _CLOUDS:
        chosen = region if isinstance(region, str) else _check_regions(region or {}).get(key)
        return _cloud(key)(region=chosen) if chosen else _cloud(key)()
    names = ["local", *_CLOUDS]
    if key == "dask":
        raise invalid("provider", name, "sky.Dask(client_or_address): the name alone does not say which cluster")
    if key == "ssh":
        raise invalid("provider", name, "sky.SSH(hosts): the name alone does not say which hosts")
    close = difflib.get_close_matches(key, names, 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    accepted = ", ".join(map(repr, names))
    raise invalid("provider", name, f"{accepted}, sky.SSH(hosts) or sky.Dask(client){hint}")


def _check_regions(regions: Mapping[str, str]) -> Mapping[str, str]:
    for name in regions:
        if name not in _CLOUDS:
            close = difflib.get_close_matches(name, _CLOUDS, 1)
            accepted = f"for each of {', '.join(_CLOUDS)} a region" + (f"; did you mean {close[0]!r}?" if close else "")
            raise invalid("region", regions, accepted, shown=f"region={dict(regions)!r}")
    return regions
