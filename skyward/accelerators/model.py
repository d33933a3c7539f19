"""Accelerators as a pool asks for them: made by name, by factory or from text. `catalog` has the ones that exist."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar, Final, TypeAlias

from skyward.accelerators import catalog
from skyward.accelerators.catalog import Model, bad, unknown
from skyward.errors import SpecError


@dataclass(frozen=True, slots=True)
class Accelerator:
    """An accelerator to be had, and how many of it per node.

    Made by `parse`, or by a vendor's factories: ``Accelerator.NVIDIA.A100(count=4)``.

    Attributes
    ----------
    model
        The model's name without its memory, e.g. ``"A100"``.
    memory
        GB per device; 0 when it is made: the model's usual one.
    mig
        MIG profiles that each device is divided into; empty: not divided.
    slice_topology
        For a slice of several TPU hosts, e.g. ``"v5p-8"``.
    """

    model: str
    count: int = 1
    memory: int = 0
    mig: tuple[str, ...] = ()
    form_factor: str | None = None
    slice_topology: str | None = None

    NVIDIA: ClassVar[_Nvidia]
    AWS: ClassVar[_Aws]
    AMD: ClassVar[_Amd]
    Google: ClassVar[_Google]
    Habana: ClassVar[_Habana]

    def __post_init__(self) -> None:
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 1:
            raise bad(f"{self.model}:{self.count}", "a count that is an integer >= 1")
        model = catalog.find(self.model) if isinstance(self.model, str) else None
        if model is None:
            raise unknown(self.model)
        memory = catalog.check_memory(model, self.memory)
        set_field = object.__setattr__
        set_field(self, "model", model.name)
        set_field(self, "memory", memory)
        set_field(self, "mig", catalog.fit(model, memory, self.mig) if self.mig else ())
        set_field(self, "form_factor", catalog.check_form_factor(model, self.form_factor))

    @property
    def facts(self) -> Model:
        """Its line of the catalogue."""
        model = catalog.find(self.model)
        assert model is not None
        return model

    @property
    def vendor(self) -> str:
        return self.facts.vendor

    @property
    def name(self) -> str:
        """The model, with its memory where that is not the usual one: ``"A100"``, ``"A100-40GB"``."""
        return self.model if self.memory == self.facts.memory_gb[0] else f"{self.model}-{self.memory}GB"

    @property
    def partitions(self) -> int:
        """Number of MIG partitions per node; 0 without MIG."""
        return self.count * len(self.mig)

    def __str__(self) -> str:
        return self.name if self.count == 1 else f"{self.name}:{self.count}"

    @classmethod
    def parse(cls, text: str | Accelerator) -> Accelerator:
        """Return what a text such as ``"A100"``, ``"A100:4"``, ``"a100-40gb"`` or ``"H100-SXM"`` means.

        Letter case, dashes and spaces don't matter.

        Raises
        ------
        SpecError
            No such accelerator; the message has the nearest name.
        """
        if isinstance(text, Accelerator):
            return text
        if not isinstance(text, str):
            raise bad(text, "a name such as 'A100' or 'A100:4', or an sky.Accelerator")
        name, colon, count = text.partition(":")
        if colon and not count.strip().isdecimal():
            raise bad(text, "a count that is an integer >= 1, as in 'A100:4'")
        model, rest = catalog.split(name)
        if model is None:
            raise unknown(text)
        memory, form_factor = catalog.qualifiers(rest)
        return _make(model, int(count) if colon else 1, memory=memory, form_factor=form_factor)


def known_name(*names: str) -> str | None:
    """Return the catalogue's name of the first of `names` that is in it; None when none is."""
    for name in names:
        try:
            return Accelerator.parse(name).name
        except SpecError:
            continue
    return None


def _make(
    model: Model,
    count: int,
    *,
    memory: int | None = None,
    mig: str | Sequence[str] | None = None,
    form_factor: str | None = None,
) -> Accelerator:
    size = catalog.check_memory(model, memory or 0)
    return Accelerator(model.name, count, size, catalog.fit(model, size, mig) if mig else (), form_factor)


# --- factories ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Factory:
    """Makes accelerators of one model: ``Accelerator.NVIDIA.A100(count=4, mig="3g.40gb")``."""

    _model: Model = field(repr=False)

    def __call__(
        self,
        count: int = 1,
        *,
        memory: int | None = None,
        mig: str | Sequence[str] | None = None,
        form_factor: str | None = None,
    ) -> Accelerator:
        """Return `count` devices per node.

        `memory` is in GB, where the model comes with several; `mig` divides each device: one profile as often as
        it fits, or the list of profiles given.
        """
        return _make(self._model, count, memory=memory, mig=mig, form_factor=form_factor)


class _Nvidia:
    """NVIDIA's models as attributes: ``T4``, ``L4``, ``A100``, ``H100``, ``RTX_4000_ADA`` and so on."""

    def __getattr__(self, name: str) -> _Factory:
        model = catalog.find(name)
        if model is None or model.vendor != "NVIDIA":
            raise AttributeError(f"Accelerator.NVIDIA has no {name!r}; it has {', '.join(dir(self))}")
        return _Factory(model)

    def __dir__(self) -> list[str]:
        return [m.name.replace("-", "_").upper() for m in catalog.TABLE if m.vendor == "NVIDIA"]


def _versioned(family: str, version: object, count: int) -> Accelerator:
    model = catalog.find(f"{family}{version}")
    if model is None:
        versions = [m.name.removeprefix(family).lstrip("-") for m in catalog.TABLE if m.name.startswith(family)]
        raise bad(f"{family}{version}", f"a version of {family}: {', '.join(versions)}")
    return _make(model, count)


class _Aws:
    """AWS's own accelerators, by version."""

    def Trainium(self, version: int = 1, count: int = 1) -> Accelerator:  # noqa: N802 - product names
        return _versioned("Trainium", version, count)

    def Inferentia(self, version: int = 2, count: int = 1) -> Accelerator:  # noqa: N802
        return _versioned("Inferentia", version, count)


class _Amd:
    """AMD's Instinct accelerators, by model."""

    def MI(self, model: str, count: int = 1) -> Accelerator:  # noqa: N802
        """Return ``MI300X`` for ``MI("300X")``."""
        return _versioned("MI", model, count)


class _Google:
    """Google's TPUs."""

    def TPU(self, version: str, count: int = 1) -> Accelerator:  # noqa: N802
        """Return TPU devices of a version such as ``"v5e"``."""
        return _versioned("TPU", version, count)

    def TPUSlice(self, topology: str) -> Accelerator:  # noqa: N802
        """Return a slice such as ``"v5p-8"``: TPU v5p with 8 cores."""
        version, dash, cores = topology.partition("-")
        if not dash or not cores.isdecimal() or int(cores) < 1:
            raise bad(topology, "a slice such as 'v5p-8': version, dash, number of cores")
        device = _versioned("TPU", version, 1)
        return Accelerator(device.model, 1, device.memory, slice_topology=topology)


class _Habana:
    """Intel Habana's accelerators, by version."""

    def Gaudi(self, version: int = 2, count: int = 1) -> Accelerator:  # noqa: N802
        return _versioned("Gaudi", version, count)


Accelerator.NVIDIA = _Nvidia()
Accelerator.AWS = _Aws()
Accelerator.AMD = _Amd()
Accelerator.Google = _Google()
Accelerator.Habana = _Habana()


# --- names --------------------------------------------------------------------------------------------------


class NVIDIA(StrEnum):
    """Names of NVIDIA's GPUs: a value for ``accelerator=``, a type for annotations."""

    T4 = "T4"
    L4 = "L4"
    L40 = "L40"
    L40S = "L40S"
    A10 = "A10"
    A10G = "A10G"
    V100 = "V100"
    A100 = "A100"
    H100 = "H100"
    H200 = "H200"
    B100 = "B100"
    B200 = "B200"
    B300 = "B300"
    GB200 = "GB200"
    GH200 = "GH200"
    RTX_4000_ADA = "RTX-4000-Ada"
    RTX_6000_ADA = "RTX-6000-Ada"
    RTX_A4000 = "RTX-A4000"
    RTX_A5000 = "RTX-A5000"
    RTX_A6000 = "RTX-A6000"
    RTX_PRO_6000 = "RTX-PRO-6000"
    RTX_4090 = "RTX-4090"
    RTX_5090 = "RTX-5090"


class Trainium(StrEnum):
    """Names of AWS's training accelerators."""

    TRAINIUM1 = "Trainium1"
    TRAINIUM2 = "Trainium2"
    TRAINIUM3 = "Trainium3"


class Architecture(StrEnum):
    """Instruction sets of machines."""

    X86_64 = "x86_64"
    ARM64 = "arm64"


class _Auto:
    def __repr__(self) -> str:
        return "sky.Auto"

    def __reduce__(self) -> str:
        return "Auto"


Auto: Final = _Auto()
"""Leave an option of a pool to skyward; the same as None."""

GPU: TypeAlias = NVIDIA | Accelerator
"""For annotations: a GPU by name or as an `Accelerator`."""


def is_nvidia(accelerator: Accelerator | str | None) -> bool:
    """Tell whether an accelerator, or what its name means, is NVIDIA's."""
    return _vendor_of(accelerator) == "NVIDIA"


def is_trainium(accelerator: Accelerator | str | None) -> bool:
    """Tell whether an accelerator, or what its name means, is an AWS Trainium."""
    name = accelerator.model if isinstance(accelerator, Accelerator) else accelerator
    model = catalog.split(name.partition(":")[0])[0] if name else None
    return model is not None and model.name.startswith("Trainium")


def _vendor_of(accelerator: Accelerator | str | None) -> str | None:
    if isinstance(accelerator, Accelerator):
        return accelerator.vendor
    model = catalog.split(accelerator.partition(":")[0])[0] if accelerator else None
    return model.vendor if model else None
