"""The script that partitions a machine's NVIDIA GPUs, as text. What runs it is the cluster's business.

A GPU that is partitioned as wanted is left alone, so that a second run does nothing.
"""

from __future__ import annotations

import shlex

from skyward.accelerators import catalog
from skyward.accelerators.model import Accelerator
from skyward.scripts.steps import opening


def partition_script(accelerator: Accelerator, *, keep: bool) -> str:
    """Return the script that partitions the first ``accelerator.count`` GPUs, as its `mig` says.

    What its steps say is read by `skyward.scripts.steps.read_progress`. It needs root.

    Parameters
    ----------
    keep
        Whether to fail at a GPU that is already partitioned differently, instead of partitioning it again: right for
        machines that outlive the pool.
    """
    starts = catalog.placements(accelerator.facts, accelerator.memory, accelerator.mig)
    assert starts is not None, "an accelerator whose partitions don't fit can't be made"
    # Each with its place: the driver would put some where the next ones don't fit any more.
    places = ",".join(f"{profile}:{start}" for profile, start in zip(accelerator.mig, starts, strict=True))
    wanted = shlex.quote("".join(f"{profile} " for profile in sorted(accelerator.mig)))
    gpus = " ".join(str(i) for i in range(accelerator.count))
    return f"""{opening("mig.log")}
wanted={wanted}
places={shlex.quote(places)}

profiles_of() {{
    nvidia-smi -L | awk -v gpu="GPU $1:" '
        /^GPU / {{ here = index($0, gpu) == 1 }}
        here && $1 == "MIG" {{ print $2 }}' | LC_ALL=C sort | tr '\\n' ' '
}}
is_on() {{ [ "$(nvidia-smi -i "$1" --query-gpu=mig.mode.current --format=csv,noheader)" = Enabled ]; }}

turn_on() {{
    as_root nvidia-smi -i "$1" -mig 1
    # Before Hopper it takes a reset, which the driver leaves out when it can't have the GPU to itself.
    is_on "$1" || as_root nvidia-smi -i "$1" --gpu-reset
    is_on "$1" || {{
        echo "MIG mode of GPU $1 can't be turned on: it is not supported, or something uses the GPU. End what" \\
            "nvidia-smi shows, and services such as dcgm and nvsm, or turn it on with" \\
            "'nvidia-smi -i $1 -mig 1' and restart the machine"
        return 82
    }}
}}

partition_gpu() {{
    have=$(profiles_of "$1")
    {_refuse if keep else ":"}
    as_root true || {{
        echo "partitioning GPUs needs it: log in as root, or run there before" \\
            "'nvidia-smi -i $1 -mig 1 && nvidia-smi mig -i $1 -cgi $places -C'"
        return 77
    }}
    is_on "$1" || turn_on "$1" || return
    # What there is of other partitions, or of an attempt that was interrupted. It fails where there is nothing.
    as_root nvidia-smi mig -i "$1" -dci
    as_root nvidia-smi mig -i "$1" -dgi
    as_root nvidia-smi mig -i "$1" -cgi "$places" -C
    have=$(profiles_of "$1")
    [ "$have" = "$wanted" ] || {{
        echo "GPU $1 is to be partitioned into $wanted and has ${{have:-no partitions}}: nvidia-smi says above why." \\
            "Partitions in use stay; 'nvidia-smi mig -lgip' lists the profiles that this GPU knows"
        return 83
    }}
}}

partition_gpus() {{
    command -v nvidia-smi > /dev/null || {{
        echo "nvidia-smi is not on this machine: install NVIDIA's driver, or use an image that has it"; return 81
    }}
    for gpu in {gpus}; do
        [ "$(profiles_of "$gpu")" = "$wanted" ] || partition_gpu "$gpu" || return
    done
}}
step mig partition_gpus
say step done
"""


_refuse = """[ -z "$have" ] || {
        echo "GPU $1 is partitioned into $have and is to be into $wanted: ask for what there is, or end that with" \\
            "'nvidia-smi mig -i $1 -dci && nvidia-smi mig -i $1 -dgi'"
        return 84
    }"""
