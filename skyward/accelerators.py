"""Accelerators by name: one table, from which factories, matching and MIG rules follow. Imports only errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Final, TypeAlias

from skyward.errors import SpecError

_MIG_COMPUTE_SLICES = 7
_MIG_MEMORY_SLICES = 8
# Profiles of each memory size of a GPU: (compute slices, memory slices).
# Source: NVIDIA Multi-Instance GPU User Guide, "Supported MIG Profiles".
_MIG: Mapping[tuple[str, int], Mapping[str, tuple[int, int]]] = {
    ("A100", 40): {"1g.5gb": (1, 1), "2g.10gb": (2, 2), "3g.20gb": (3, 4), "4g.20gb": (4, 4), "7g.40gb": (7, 8)},
    ("A100", 80): {
        "1g.10gb": (1, 1), "1g.20gb": (1, 2), "2g.20gb": (2, 2), "3g.40gb": (3, 4), "4g.40gb": (4, 4), "7g.80gb": (7, 8)
    },
    ("H100", 80): {
        "1g.10gb": (1, 1), "1g.20gb": (1, 2), "2g.20gb": (2, 2), "3g.40gb": (3, 4), "4g.40gb": (4, 4), "7g.80gb": (7, 8)
    },
    ("H200", 141): {
        "1g.18gb": (1, 1), "1g.35gb": (1, 2), "2g.35gb": (2, 2), "3g.71gb": (3, 4), "4g.71gb": (4, 4),
        "7g.141gb": (7, 8),
    },
    ("B200", 180): {
        "1g.23gb": (1, 1), "1g.45gb": (1, 2), "2g.45gb": (2, 2), "3g.90gb": (3, 4), "4g.90gb": (4, 4),
        "7g.180gb": (7, 8),
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Model:
    name: str
    vendor: str
    memory_gb: tuple[int, ...]  # variants; the first is what the plain name means
    form_factors: tuple[str, ...] = ()


# Memory per device as the vendors' data sheets have it.
_TABLE = (
    _Model("T4", "NVIDIA", (16,)),
    _Model("L4", "NVIDIA", (24,)),
    _Model("L40", "NVIDIA", (48,)),
    _Model("L40S", "NVIDIA", (48,)),
    _Model("A10", "NVIDIA", (24,)),
    _Model("A10G", "NVIDIA", (24,)),
    _Model("V100", "NVIDIA", (16, 32), ("SXM", "PCIe")),
    _Model("A100", "NVIDIA", (80, 40), ("SXM", "PCIe")),
    _Model("H100", "NVIDIA", (80, 94), ("SXM", "PCIe", "NVL")),
    _Model("H200", "NVIDIA", (141,), ("SXM", "NVL")),
    _Model("B100", "NVIDIA", (192,), ("SXM",)),
    _Model("B200", "NVIDIA", (180, 192), ("SXM",)),
    _Model("B300", "NVIDIA", (288, 268), ("SXM",)),
    _Model("GB200", "NVIDIA", (186, 192)),
    _Model("GH200", "NVIDIA", (96, 144)),
    _Model("RTX-4000-Ada", "NVIDIA", (20,)),
    _Model("RTX-6000-Ada", "NVIDIA", (48,)),
    _Model("RTX-A4000", "NVIDIA", (16,)),
    _Model("RTX-A5000", "NVIDIA", (24,)),
    _Model("RTX-A6000", "NVIDIA", (48,)),
    _Model("RTX-PRO-6000", "NVIDIA", (96,)),
    _Model("RTX-4090", "NVIDIA", (24,)),
    _Model("RTX-5090", "NVIDIA", (32,)),
    _Model("Trainium1", "AWS", (32,)),
    _Model("Trainium2", "AWS", (96,)),
    _Model("Trainium3", "AWS", (144,)),
    _Model("Inferentia1", "AWS", (8,)),
    _Model("Inferentia2", "AWS", (32,)),
    _Model("MI210", "AMD", (64,)),
    _Model("MI250X", "AMD", (128,)),
    _Model("MI300X", "AMD", (192,)),
    _Model("MI325X", "AMD", (256,)),
    _Model("MI350X", "AMD", (288,)),
    _Model("MI355X", "AMD", (288,)),
    _Model("TPU-v2", "Google", (16,)),
    _Model("TPU-v3", "Google", (32,)),
    _Model("TPU-v4", "Google", (32,)),
    _Model("TPU-v5e", "Google", (16,)),
    _Model("TPU-v5p", "Google", (95,)),
    _Model("TPU-v6e", "Google", (32,)),
    _Model("Gaudi1", "Habana", (32,)),
    _Model("Gaudi2", "Habana", (96,)),
    _Model("Gaudi3", "Habana", (128,)),
)


def _key(name: str) -> str:
    return "".join(c for c in name.upper() if c not in " -_.")


_MODELS = {_key(m.name): m for m in _TABLE}
_ALIASES = {
    "TRAINIUM": "TRAINIUM1",
    "TRN1": "TRAINIUM1",
    "TRN2": "TRAINIUM2",
    "TRN3": "TRAINIUM3",
    "INFERENTIA": "INFERENTIA1",
    "INF1": "INFERENTIA1",
    "INF2": "INFERENTIA2",
    "GAUDI": "GAUDI1",
    "RTX4000": "RTX4000ADA",
    "RTX6000": "RTX6000ADA",
}


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
            raise _error(f"{self.model}:{self.count}", "a count that is a whole number from 1")
        model = _MODELS.get(_ALIASES.get(_key(self.model), _key(self.model))) if isinstance(self.model, str) else None
        if model is None:
            raise _unknown(self.model)
        memory = _memory(model, self.memory)
        settle = object.__setattr__
        settle(self, "model", model.name)
        settle(self, "memory", memory)
        settle(self, "mig", _fit(model, memory, self.mig) if self.mig else ())
        settle(self, "form_factor", _form_factor(model, self.form_factor))

    @property
    def vendor(self) -> str:
        return _MODELS[_key(self.model)].vendor

    @property
    def name(self) -> str:
        """The model, with its memory where that is not the usual one: ``"A100"``, ``"A100-40GB"``."""
        usual = _MODELS[_key(self.model)].memory_gb[0]
        return self.model if self.memory == usual else f"{self.model}-{self.memory}GB"

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
            raise _error(text, "a name such as 'A100' or 'A100:4', or an sky.Accelerator")
        name, colon, count = text.partition(":")
        if colon and not count.strip().isdecimal():
            raise _error(text, "a count that is a whole number from 1, as in 'A100:4'")
        model, rest = _split(name)
        if model is None:
            raise _unknown(text)
        memory, form_factor = _qualifiers(rest)
        return _make(model, int(count) if colon else 1, memory=memory, form_factor=form_factor)


def known_name(*names: str) -> str | None:
    """Return the catalogue's name of the first of `names` that is in it; None when none is."""
    for name in names:
        try:
            return Accelerator.parse(name).name
        except SpecError:
            continue
    return None


def _split(name: str) -> tuple[_Model | None, str]:
    """Return the model whose name `name` begins with, the longest one, and what follows it."""
    key = _key(name)
    known = sorted([*_MODELS, *_ALIASES], key=len, reverse=True)
    for prefix in known:
        rest = key.removeprefix(prefix)
        if key.startswith(prefix) and (not rest or _is_qualifier(rest)):
            return _MODELS[_ALIASES.get(prefix, prefix)], rest
    return None, ""


def _is_qualifier(rest: str) -> bool:
    import re

    return re.fullmatch(r"(SXM\d?|PCIE|NVL|OAM)?(\d+GB)?(SXM\d?|PCIE|NVL|OAM)?", rest) is not None


def _qualifiers(rest: str) -> tuple[int, str | None]:
    """Return the memory and the form factor that follow a model's name; 0 and None where they are not said."""
    import re

    # The generation of an SXM socket stands right before the memory in "SXM5-80GB".
    memory = re.search(r"(\d+)GB", re.sub(r"SXM[2-6]?(?=\D|\d{2,}GB|$)", "", rest))
    form = re.search(r"SXM|PCIE|NVL|OAM", rest)
    return (int(memory[1]) if memory else 0), (form[0] if form else None)


def _memory(model: _Model, memory: int) -> int:
    if not memory:
        return model.memory_gb[0]
    if memory not in model.memory_gb:
        sizes = " or ".join(f"{m} GB" for m in sorted(model.memory_gb))
        raise _error(f"{model.name}-{memory}GB", f"{sizes} for {model.name}")
    return memory


def _form_factor(model: _Model, form_factor: str | None) -> str | None:
    if form_factor is None:
        return None
    found = {f.upper(): f for f in model.form_factors}.get(form_factor.upper())
    if found is None:
        accepted = f"one of {', '.join(model.form_factors)}" if model.form_factors else "none at all"
        raise _error(f"{model.name}-{form_factor}", f"for the form factor of {model.name} {accepted}")
    return found


def _unknown(text: Any) -> SpecError:
    import difflib

    names = {_key(m.name): m.name for m in _TABLE}
    near = difflib.get_close_matches(_key(str(text).partition(":")[0]), names, n=3, cutoff=0.4)
    hint = f"; did you mean {' or '.join(repr(names[n]) for n in near)}?" if near else ""
    return _error(text, f"one of {', '.join(names.values())}{hint}")


def _error(value: Any, accepted: str) -> SpecError:
    shown = value if isinstance(value, str) else repr(value)
    return SpecError(
        f"accelerator={shown!r}: accepted is {accepted}", option="accelerator", value=value, accepted=accepted
    )


def _make(
    model: _Model,
    count: int,
    *,
    memory: int | None = None,
    mig: str | Sequence[str] | None = None,
    form_factor: str | None = None,
) -> Accelerator:
    size = _memory(model, memory or 0)
    return Accelerator(model.name, count, size, _fit(model, size, mig) if mig else (), form_factor)


def memory_sizes(model: str) -> tuple[int, ...]:
    """Return the GB per device that a model comes with, the usual one first."""
    return _MODELS[_key(model)].memory_gb


# --- MIG ----------------------------------------------------------------------------------------------------


def mig_profiles(model: str, memory: int) -> Mapping[str, int]:
    """Return the MIG profiles of a GPU model, each with how many of it fit on one device; empty without MIG."""
    profiles = _MIG.get((model, memory), {})
    return {
        name: min(_MIG_COMPUTE_SLICES // compute, _MIG_MEMORY_SLICES // memory_slices)
        for name, (compute, memory_slices) in profiles.items()
    }


def _fit(model: _Model, memory: int, mig: str | Sequence[str]) -> tuple[str, ...]:
    """Return the profiles of each device, or raise when they don't fit. One name means: as many as fit."""
    most = mig_profiles(model.name, memory)
    label = f"{model.name} with mig={mig!r}"
    if not most:
        raise _error(label, f"no mig at all: {model.name} ({memory} GB) can't be partitioned")
    wanted = [mig] if isinstance(mig, str) else list(mig)
    for profile in wanted:
        if profile not in most:
            raise _error(label, f"for mig of {model.name} ({memory} GB): {', '.join(most)}")
    if isinstance(mig, str):
        return (mig,) * most[mig]
    slices = [_MIG[model.name, memory][p] for p in wanted]
    compute, memory_slices = sum(s[0] for s in slices), sum(s[1] for s in slices)
    if compute > _MIG_COMPUTE_SLICES or memory_slices > _MIG_MEMORY_SLICES:
        raise _error(
            label,
            f"up to {_MIG_COMPUTE_SLICES} compute and {_MIG_MEMORY_SLICES} memory slices per GPU; "
            f"these profiles take {compute} and {memory_slices}",
        )
    return tuple(wanted)


# --- factories ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Factory:
    """Makes accelerators of one model: ``Accelerator.NVIDIA.A100(count=4, mig="3g.40gb")``."""

    _model: _Model = field(repr=False)

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
        model = _MODELS.get(_ALIASES.get(_key(name), _key(name)))
        if model is None or model.vendor != "NVIDIA":
            raise AttributeError(f"Accelerator.NVIDIA has no {name!r}; it has {', '.join(dir(self))}")
        return _Factory(model)

    def __dir__(self) -> list[str]:
        return [m.name.replace("-", "_").upper() for m in _TABLE if m.vendor == "NVIDIA"]


def _versioned(family: str, version: object, count: int) -> Accelerator:
    model = _MODELS.get(_key(f"{family}{version}"))
    if model is None:
        versions = [m.name.removeprefix(family).lstrip("-") for m in _TABLE if m.name.startswith(family)]
        raise _error(f"{family}{version}", f"a version of {family}: {', '.join(versions)}")
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
            raise _error(topology, "a slice such as 'v5p-8': version, dash, number of cores")
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
    model = _split(name.partition(":")[0])[0] if name else None
    return model is not None and model.name.startswith("Trainium")


def _vendor_of(accelerator: Accelerator | str | None) -> str | None:
    if isinstance(accelerator, Accelerator):
        return accelerator.vendor
    model = _split(accelerator.partition(":")[0])[0] if accelerator else None
    return model.vendor if model else None
