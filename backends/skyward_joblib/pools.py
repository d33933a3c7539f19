"""Pools that are joblib's default backend inside their block, and blocks for pools that are there already."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Unpack

import skyward as sky
from skyward.errors import VersionMismatchError
from skyward.pool import ComputePool, PoolOptions
from skyward_joblib.backend import SkywardBackend
from skyward_joblib.block import Block

if TYPE_CHECKING:
    from skyward.providers import ProviderLike


PRELOAD = ("sklearn.ensemble",)
"""It imports what most calls need: linear models, trees, metrics, preprocessing, pipelines, SciPy, joblib."""


class JoblibPool(ComputePool):
    """A pool that runs `joblib.Parallel` inside its block.

    All threads of the process use it there. Takes the options of `ComputePool`. ``n_jobs=-1``, which is also the
    default, means all slots; another number limits how many tasks run at once; ``n_jobs=1`` runs in this process.

    Parameters
    ----------
    joblib_version
        The version of joblib that must be installed here and on the machines; None: the one that is installed here.

    Raises
    ------
    VersionMismatchError
        Another version is installed here.

    Examples
    --------
    >>> from joblib import Parallel, delayed
    >>> with JoblibPool("local", nodes=2, display="quiet"):
    ...     Parallel()(delayed(pow)(i, 2) for i in range(4))
    [0, 1, 4, 9]
    """

    def __init__(
        self, provider: ProviderLike = None, *, joblib_version: str | None = None, **options: Unpack[PoolOptions]
    ) -> None:
        super().__init__(provider, **_with_package(options, "joblib", joblib_version, "joblib_version"))
        self._block: Block | None = None

    def _use(self) -> None:
        super()._use()
        self._block = Block(SkywardBackend(pool=self))

    def _unuse(self) -> None:
        block, self._block = self._block, None
        if block is not None:
            block.end()
        super()._unuse()


class ScikitLearnPool(JoblibPool):
    """A pool that runs scikit-learn's parallel work inside its block.

    Takes the options of `ComputePool`. Every estimator or function with `n_jobs` uses the pool's slots; the results are
    the same as without the pool. Machines import scikit-learn once for all their slots: see `preload` of `Image`.

    Parameters
    ----------
    sklearn_version
        The version of scikit-learn that must be installed here and on the machines; None: the one that is installed
        here.

    Raises
    ------
    ModuleNotFoundError
        scikit-learn is not installed here.
    VersionMismatchError
        Another version is installed here.
    """

    def __init__(
        self, provider: ProviderLike = None, *, sklearn_version: str | None = None, **options: Unpack[PoolOptions]
    ) -> None:
        _require_sklearn()
        options = _with_package(options, "scikit-learn", sklearn_version, "sklearn_version")
        image = options.get("image")
        providers = provider if isinstance(provider, (list, tuple)) else (provider,)
        if isinstance(image, sky.Image) and not any(isinstance(one, sky.Dask) for one in providers):
            options = {**options, "image": replace(image, preload=tuple(dict.fromkeys([*PRELOAD, *image.preload])))}
        super().__init__(provider, **options)


def _with_package(options: PoolOptions, package: str, version: str | None, option: str) -> PoolOptions:
    """Return the options with `package` in the image, in the version that is installed here."""
    here = importlib.metadata.version(package)
    if version is not None and version != here:
        raise VersionMismatchError(
            f"{option}={version!r}, but {package} {here} is installed here; both sides need the "
            f"same version. Run `pip install {package}=={version}` here, or leave out {option}.",
            table=((package, here, version),),
        )
    image: Any = options.get("image") or sky.Image()
    if not isinstance(image, sky.Image):
        return options  # the pool itself says what is wrong with it
    return {**options, "image": replace(image, pip=(*image.pip, f"{package}=={here}"))}


def _require_sklearn() -> None:
    try:
        importlib.metadata.version("scikit-learn")
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError(
            "scikit-learn is not installed here: run `pip install 'skyward[sklearn]'`", name="sklearn"
        ) from None


@contextlib.contextmanager
def joblib_backend(pool: Any, *, inner_max_num_threads: int | None = None) -> Iterator[ComputePool]:
    """Run `joblib.Parallel` inside the block on an active pool, or on the cluster of a Dask client.

    Threads outside any other pool's block use it too.

    Parameters
    ----------
    pool
        An active `ComputePool`, a `distributed.Client`, or a Dask cluster object. A cluster is joined for the block
        and left as it was.
    inner_max_num_threads
        Threads that numeric libraries may use inside a task; None: the cores of a slot.
    """
    with contextlib.ExitStack() as stack:
        if not isinstance(pool, ComputePool):
            pool = stack.enter_context(ComputePool(sky.Dask(pool), display="quiet"))
        pool.engine  # noqa: B018 - raises the error that says why, when the pool is not active
        stack.callback(Block(SkywardBackend(pool=pool, inner_max_num_threads=inner_max_num_threads)).end)
        yield pool


def sklearn_backend(
    pool: Any, *, inner_max_num_threads: int | None = None
) -> contextlib.AbstractContextManager[ComputePool]:
    """Run scikit-learn's parallel work inside the block on `pool`; see `joblib_backend`.

    Raises
    ------
    ModuleNotFoundError
        scikit-learn is not installed here.
    """
    _require_sklearn()
    return joblib_backend(pool, inner_max_num_threads=inner_max_num_threads)
