"""Ephemeral cloud compute: machines that live as long as a `with` block, on Dask.

This is the public face: everything a user needs is an attribute of this module, and the module itself is an
execution target, ``train(x) >> sky``, wherever a pool is active. Names are imported when they are first used:
``import skyward`` loads nothing but the standard library and the few modules that say what a call is.
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import TYPE_CHECKING, Any

# Submodules share these two names. Imported here, the decorators replace them as attributes for good.
from skyward.compute import compute as compute
from skyward.pool import pool as pool
from skyward.version import __version__ as __version__

if TYPE_CHECKING:
    from skyward import conc as conc
    from skyward import integrations as integrations
    from skyward.accelerators.model import GPU as GPU
    from skyward.accelerators.model import NVIDIA as NVIDIA
    from skyward.accelerators.model import Accelerator as Accelerator
    from skyward.accelerators.model import Architecture as Architecture
    from skyward.accelerators.model import Auto as Auto
    from skyward.accelerators.model import Trainium as Trainium
    from skyward.accelerators.model import is_nvidia as is_nvidia
    from skyward.accelerators.model import is_trainium as is_trainium
    from skyward.compute import ComputeFunction as ComputeFunction
    from skyward.compute import PendingBatch as PendingBatch
    from skyward.compute import PendingCompute as PendingCompute
    from skyward.compute import PendingStream as PendingStream
    from skyward.compute import gather as gather
    from skyward.compute import lazy as lazy
    from skyward.compute import ref as ref
    from skyward.data import DistributedSampler as DistributedSampler
    from skyward.data import shard as shard
    from skyward.data import shard_iterator as shard_iterator
    from skyward.engine.persisted import Persisted as Persisted
    from skyward.errors import AllProvidersFailedError as AllProvidersFailedError
    from skyward.errors import BootstrapError as BootstrapError
    from skyward.errors import CapacityError as CapacityError
    from skyward.errors import CredentialsError as CredentialsError
    from skyward.errors import MachineLostError as MachineLostError
    from skyward.errors import NoActivePoolError as NoActivePoolError
    from skyward.errors import NoAvailableProviderError as NoAvailableProviderError
    from skyward.errors import NoMatchingInstanceError as NoMatchingInstanceError
    from skyward.errors import PoolBudgetError as PoolBudgetError
    from skyward.errors import PoolError as PoolError
    from skyward.errors import PoolTimeoutError as PoolTimeoutError
    from skyward.errors import ProviderError as ProviderError
    from skyward.errors import QuotaError as QuotaError
    from skyward.errors import RemoteTraceback as RemoteTraceback
    from skyward.errors import SerializationError as SerializationError
    from skyward.errors import SkywardError as SkywardError
    from skyward.errors import SpecError as SpecError
    from skyward.errors import TaskExitError as TaskExitError
    from skyward.errors import VersionMismatchError as VersionMismatchError
    from skyward.errors import VolumeError as VolumeError
    from skyward.errors import WorkerDiedError as WorkerDiedError
    from skyward.events import BootstrapCompleted as BootstrapCompleted
    from skyward.events import BootstrapProgress as BootstrapProgress
    from skyward.events import BootstrapStarting as BootstrapStarting
    from skyward.events import Callback as Callback
    from skyward.events import ClusterSetupCompleted as ClusterSetupCompleted
    from skyward.events import CostFinal as CostFinal
    from skyward.events import CostUpdate as CostUpdate
    from skyward.events import Error as Error
    from skyward.events import InfraCreated as InfraCreated
    from skyward.events import InfraCreating as InfraCreating
    from skyward.events import InstanceLaunching as InstanceLaunching
    from skyward.events import InstanceLost as InstanceLost
    from skyward.events import InstanceProvisioned as InstanceProvisioned
    from skyward.events import InstanceReplaced as InstanceReplaced
    from skyward.events import InstanceStopping as InstanceStopping
    from skyward.events import LogLine as LogLine
    from skyward.events import Metrics as Metrics
    from skyward.events import PoolStarted as PoolStarted
    from skyward.events import PoolStopping as PoolStopping
    from skyward.events import ProvisioningCompleted as ProvisioningCompleted
    from skyward.events import RegionAutoSelected as RegionAutoSelected
    from skyward.events import SchedulerMoved as SchedulerMoved
    from skyward.events import SkywardEvent as SkywardEvent
    from skyward.events import TaskPoolInitCompleted as TaskPoolInitCompleted
    from skyward.events import TaskProgress as TaskProgress
    from skyward.events import compose as compose
    from skyward.events import emit as emit
    from skyward.events import use_callback as use_callback
    from skyward.executor import Executor as Executor
    from skyward.launch.plan import select_available as select_available
    from skyward.launch.plan import select_cheapest as select_cheapest
    from skyward.launch.plan import select_first as select_first
    from skyward.launch.selection import select_instance as select_instance
    from skyward.launch.selection import select_instances as select_instances
    from skyward.multipool import MultiPool as MultiPool
    from skyward.pool import ComputePool as ComputePool
    from skyward.providers.aws.provider import AWS as AWS
    from skyward.providers.dask import Dask as Dask
    from skyward.providers.digitalocean.provider import DigitalOcean as DigitalOcean
    from skyward.providers.local import Local as Local
    from skyward.providers.ssh import SSH as SSH
    from skyward.providers.verda.provider import Verda as Verda
    from skyward.spec.allocation import Allocation as Allocation
    from skyward.spec.image import Image as Image
    from skyward.spec.instance import ExitedInstance as ExitedInstance
    from skyward.spec.instance import Instance as Instance
    from skyward.spec.instance import InstanceSpec as InstanceSpec
    from skyward.spec.log import LogConfig as LogConfig
    from skyward.spec.volume import S3Volume as S3Volume
    from skyward.spec.volume import Volume as Volume
    from skyward.worker.context import InstanceInfo as InstanceInfo
    from skyward.worker.context import current_accelerator as current_accelerator
    from skyward.worker.context import instance_info as instance_info
else:  # a type checker that saw this would believe that every name exists
    # Each name is written once, above: the table of names and modules is read from this file's own source.
    _SOURCE = __spec__.loader.get_source(__name__)
    _IMPORT = re.compile(r"^    from (\S+) import (\w+) as \2$", re.MULTILINE)
    _MODULES = {name: module for module, name in _IMPORT.findall(_SOURCE)}
    __all__ = sorted([*_MODULES, "compute", "pool"])

    def __dir__() -> list[str]:
        return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})

    def __getattr__(name: str) -> Any:
        module = _MODULES.get(name)
        if module is None:
            raise AttributeError(_unknown(name, __all__))
        value = import_module(f"skyward.{name}") if module == "skyward" else getattr(import_module(module), name)
        globals()[name] = value
        return value


def _unknown(name: str, names: list[str]) -> str:
    message = f"module 'skyward' has no attribute {name!r}"
    if name.startswith("_"):  # a tool that asks, not a slip of the pen
        return message
    import difflib

    lowered = {known.lower(): known for known in names}
    near = difflib.get_close_matches(name.lower(), lowered, n=1)
    return f"{message}. Did you mean {lowered[near[0]]!r}?" if near else message
