"""The accelerators that skyward knows, in one table: names, memory, MIG profiles, and the clouds that have them.

Factories, parsing, matching and the reference page follow from it. Imports only errors.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from skyward.errors import SpecError, invalid


class Profile(NamedTuple):
    """A MIG profile: the share of a GPU that it takes, and the memory slices at which it may begin."""

    compute: int
    memory: int
    starts: tuple[int, ...]


COMPUTE_SLICES, MEMORY_SLICES = 7, 8
"""What a GPU is divided into. NVIDIA Multi-Instance GPU User Guide, "Partitioning"."""
# NVIDIA Multi-Instance GPU User Guide, "Supported MIG Profiles"; the places are those that `nvidia-smi mig -lgipp`
# lists there. The seventh compute slice has its memory in the seventh memory slice: nothing small begins at the eighth.
_SHARES = (
    Profile(1, 1, (0, 1, 2, 3, 4, 5, 6)),
    Profile(1, 2, (0, 2, 4, 6)),
    Profile(2, 2, (0, 2, 4)),
    Profile(3, 4, (0, 4)),
    Profile(4, 4, (0,)),
    Profile(7, 8, (0,)),
)


def _mig(names: str) -> Mapping[str, Profile]:
    """Return profiles by their names, which are given smallest first; a GPU of 40 GB lacks the second."""
    listed = names.split()
    shares = _SHARES if len(listed) == len(_SHARES) else (_SHARES[0], *_SHARES[2:])
    return dict(zip(listed, shares, strict=True))


@dataclass(frozen=True, slots=True)
class Model:
    """One line of the table.

    Attributes
    ----------
    memory_gb
        GB per device; of several variants the first is what the plain name means.
    aliases
        What it is called too, but for case, dashes and spaces.
    mig
        MIG profiles by GB of memory.
    clouds
        Providers that have it.
    cores
        NeuronCores per device, and how many of them make a logical one unless told otherwise.
    """

    name: str
    vendor: str
    memory_gb: tuple[int, ...]
    form_factors: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    mig: Mapping[int, Mapping[str, Profile]] = field(default_factory=dict, compare=False, repr=False)
    clouds: tuple[str, ...] = ()
    cores: tuple[int, int] = (0, 1)


_80 = _mig("1g.10gb 1g.20gb 2g.20gb 3g.40gb 4g.40gb 7g.80gb")
_AWS, _VERDA, _AWS_VERDA, _ALL = ("aws",), ("verda",), ("aws", "verda"), ("aws", "digitalocean", "verda")

# Memory per device as the vendors' data sheets have it. Clouds as of 2025-07: Amazon EC2 User Guide, "Accelerated
# computing"; docs.digitalocean.com, "GPU Droplets"; Verda's list of instance types.
# NeuronCores: awsdocs-neuron.readthedocs-hosted.com, "Trainium2 Architecture" and its siblings, and "Logical NeuronCore
# configuration", by which two cores of a Trainium2 or later make one.
TABLE = (
    Model("T4", "NVIDIA", (16,), clouds=_AWS),
    Model("L4", "NVIDIA", (24,), clouds=_AWS),
    Model("L40", "NVIDIA", (48,)),
    Model("L40S", "NVIDIA", (48,), clouds=_ALL),
    Model("A10", "NVIDIA", (24,)),
    Model("A10G", "NVIDIA", (24,), clouds=_AWS),
    Model("V100", "NVIDIA", (16, 32), ("SXM", "PCIe"), clouds=_AWS_VERDA),
    Model("A100", "NVIDIA", (80, 40), ("SXM", "PCIe"), clouds=_AWS_VERDA,
          mig={40: _mig("1g.5gb 2g.10gb 3g.20gb 4g.20gb 7g.40gb"), 80: _80}),
    Model("H100", "NVIDIA", (80, 94), ("SXM", "PCIe", "NVL"), clouds=_ALL,
          mig={80: _80, 94: _mig("1g.12gb 1g.24gb 2g.24gb 3g.47gb 4g.47gb 7g.94gb")}),
    Model("H200", "NVIDIA", (141,), ("SXM", "NVL"), clouds=_ALL,
          mig={141: _mig("1g.18gb 1g.35gb 2g.35gb 3g.71gb 4g.71gb 7g.141gb")}),
    Model("B100", "NVIDIA", (192,), ("SXM",)),
    Model("B200", "NVIDIA", (180, 192), ("SXM",), clouds=_AWS_VERDA,
          mig={180: _mig("1g.23gb 1g.45gb 2g.45gb 3g.90gb 4g.90gb 7g.180gb")}),
    Model("B300", "NVIDIA", (288, 268), ("SXM",), clouds=_AWS_VERDA),
    Model("GB200", "NVIDIA", (186, 192), clouds=_AWS),
    Model("GH200", "NVIDIA", (96, 144), mig={96: _mig("1g.12gb 1g.24gb 2g.24gb 3g.48gb 4g.48gb 7g.96gb")}),
    Model("RTX-4000-Ada", "NVIDIA", (20,), aliases=("RTX4000",), clouds=("digitalocean",)),
    Model("RTX-6000-Ada", "NVIDIA", (48,), aliases=("RTX6000",), clouds=("digitalocean", "verda")),
    Model("RTX-A4000", "NVIDIA", (16,)),
    Model("RTX-A5000", "NVIDIA", (24,)),
    Model("RTX-A6000", "NVIDIA", (48,), clouds=_VERDA),
    Model("RTX-PRO-6000", "NVIDIA", (96,), clouds=_AWS_VERDA),
    Model("RTX-4090", "NVIDIA", (24,)),
    Model("RTX-5090", "NVIDIA", (32,)),
    Model("Trainium1", "AWS", (32,), aliases=("Trainium", "trn1"), clouds=_AWS, cores=(2, 1)),
    Model("Trainium2", "AWS", (96,), aliases=("trn2",), clouds=_AWS, cores=(8, 2)),
    Model("Trainium3", "AWS", (144,), aliases=("trn3",), clouds=_AWS, cores=(8, 2)),
    Model("Inferentia1", "AWS", (8,), aliases=("Inferentia", "inf1"), clouds=_AWS, cores=(4, 1)),
    Model("Inferentia2", "AWS", (32,), aliases=("inf2",), clouds=_AWS, cores=(2, 1)),
    Model("MI210", "AMD", (64,)),
    Model("MI250X", "AMD", (128,)),
    Model("MI300X", "AMD", (192,), clouds=("digitalocean",)),
    Model("MI325X", "AMD", (256,), clouds=("digitalocean",)),
    Model("MI350X", "AMD", (288,)),
    Model("MI355X", "AMD", (288,)),
    Model("TPU-v2", "Google", (16,)),
    Model("TPU-v3", "Google", (32,)),
    Model("TPU-v4", "Google", (32,)),
    Model("TPU-v5e", "Google", (16,)),
    Model("TPU-v5p", "Google", (95,)),
    Model("TPU-v6e", "Google", (32,)),
    Model("Gaudi1", "Habana", (32,), aliases=("Gaudi",)),
    Model("Gaudi2", "Habana", (96,)),
    Model("Gaudi3", "Habana", (128,)),
)  # fmt: skip


# --- by name ------------------------------------------------------------------------------------------------


def key(name: str) -> str:
    """Return what names are compared by: without case, dashes and spaces."""
    return "".join(c for c in name.upper() if c not in " -_.")


_MODELS = {key(m.name): m for m in TABLE}
_NAMES = _MODELS | {key(alias): m for m in TABLE for alias in m.aliases}


def find(name: str) -> Model | None:
    """Return the model of exactly this name, or with this alias."""
    return _NAMES.get(key(name))


def split(name: str) -> tuple[Model | None, str]:
    """Return the model whose name `name` begins with, the longest one, and what follows it."""
    text = key(name)
    for prefix in sorted(_NAMES, key=len, reverse=True):
        rest = text.removeprefix(prefix)
        if text.startswith(prefix) and (not rest or _is_qualifier(rest)):
            return _NAMES[prefix], rest
    return None, ""


def _is_qualifier(rest: str) -> bool:
    return re.fullmatch(r"(SXM\d?|PCIE|NVL|OAM)?(\d+GB)?(SXM\d?|PCIE|NVL|OAM)?", rest) is not None


def qualifiers(rest: str) -> tuple[int, str | None]:
    """Return the memory and the form factor that follow a model's name; 0 and None where they are not said."""
    # The generation of an SXM socket stands right before the memory in "SXM5-80GB".
    memory = re.search(r"(\d+)GB", re.sub(r"SXM[2-6]?(?=\D|\d{2,}GB|$)", "", rest))
    form = re.search(r"SXM|PCIE|NVL|OAM", rest)
    return (int(memory[1]) if memory else 0), (form[0] if form else None)


_MAKERS = {"NVIDIA", "TESLA", "GEFORCE", "QUADRO", "AMD", "INSTINCT"}


def recognise(text: str) -> Model | None:
    """Return the model that a driver or a cloud calls so, as in ``"NVIDIA A100-SXM4-80GB"``; None: one not known."""
    words = [word for word in re.split(r"[\s_-]+", text) if word.upper() not in _MAKERS]
    for count in range(len(words), 0, -1):
        if model := _NAMES.get(key("".join(words[:count]))):
            return model
    return None


def sold_by(cloud: str) -> list[str]:
    """Return the names of the models that a cloud has."""
    return [m.name for m in TABLE if cloud in m.clouds]


def memory_sizes(model: str) -> tuple[int, ...]:
    """Return the GB per device that a model comes with, the usual one first."""
    return _MODELS[key(model)].memory_gb


# --- checks -------------------------------------------------------------------------------------------------


def check_memory(model: Model, memory: int) -> int:
    if not memory:
        return model.memory_gb[0]
    if memory not in model.memory_gb:
        sizes = " or ".join(f"{m} GB" for m in sorted(model.memory_gb))
        raise bad(f"{model.name}-{memory}GB", f"{sizes} for {model.name}")
    return memory


def check_form_factor(model: Model, form_factor: str | None) -> str | None:
    if form_factor is None:
        return None
    found = {f.upper(): f for f in model.form_factors}.get(form_factor.upper())
    if found is None:
        accepted = f"one of {', '.join(model.form_factors)}" if model.form_factors else "none"
        raise bad(f"{model.name}-{form_factor}", f"as form factor of {model.name} {accepted}")
    return found


def unknown(text: Any) -> SpecError:
    names = {key(m.name): m.name for m in TABLE}
    near = difflib.get_close_matches(key(str(text).partition(":")[0]), names, n=3, cutoff=0.4)
    hint = f"; did you mean {' or '.join(repr(names[n]) for n in near)}?" if near else ""
    return bad(text, f"one of {', '.join(names.values())}{hint}")


def bad(value: Any, accepted: str) -> SpecError:
    shown = value if isinstance(value, str) else repr(value)
    return invalid("accelerator", value, accepted, shown=f"accelerator={shown!r}")


# --- MIG ----------------------------------------------------------------------------------------------------


def mig_profiles(model: str, memory: int) -> Mapping[str, int]:
    """Return the MIG profiles of a GPU model, each with how many of it fit on one device; empty without MIG."""
    profiles = _MODELS[key(model)].mig.get(memory, {})
    return {
        name: min(COMPUTE_SLICES // profile.compute, MEMORY_SLICES // profile.memory)
        for name, profile in profiles.items()
    }


def fit(model: Model, memory: int, mig: str | Sequence[str]) -> tuple[str, ...]:
    """Return the profiles of each device, or raise when they don't fit. One name means: as many as fit."""
    most = mig_profiles(model.name, memory)
    label = f"{model.name} with mig={mig!r}"
    if not most:
        raise bad(label, f"no mig: {model.name} ({memory} GB) can't be partitioned")
    wanted = [mig] if isinstance(mig, str) else list(mig)
    for profile in wanted:
        if profile not in most:
            raise bad(label, f"for mig of {model.name} ({memory} GB): {', '.join(most)}")
    if isinstance(mig, str):
        return (mig,) * most[mig]
    if placements(model, memory, wanted) is None:
        shares = [model.mig[memory][p] for p in wanted]
        raise bad(
            label,
            f"up to {COMPUTE_SLICES} compute and {MEMORY_SLICES} memory slices per GPU; "
            f"these profiles take {sum(s.compute for s in shares)} and {sum(s.memory for s in shares)}",
        )
    return tuple(wanted)


def placements(model: Model, memory: int, profiles: Sequence[str]) -> tuple[int, ...] | None:
    """Return the memory slice at which each of the profiles is to begin so that all fit; None when they don't."""
    shares = [model.mig[memory][p] for p in profiles]
    if sum(s.compute for s in shares) > COMPUTE_SLICES:
        return None
    # Large ones first: they have the fewest places to be.
    order = sorted(range(len(shares)), key=lambda i: (-shares[i].memory, len(shares[i].starts)))
    found = next(_places([shares[i] for i in order], frozenset()), None)
    if found is None:
        return None
    starts = dict(zip(order, found, strict=True))
    return tuple(starts[i] for i in range(len(shares)))


def _places(shares: Sequence[Profile], taken: frozenset[int]) -> Iterator[tuple[int, ...]]:
    if not shares:
        yield ()
        return
    first, *rest = shares
    for start in reversed(first.starts):
        mine = frozenset(range(start, start + first.memory))
        if not mine & taken:
            for others in _places(rest, taken | mine):
                yield (start, *others)
