"""The step that installs Debian packages: at first boot, and beside other package managers."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from skyward.scripts.steps import POOL, digest

_LOCK_S = 600
"""Seconds that cloud-init may take, and that other package managers may hold apt's locks. Chosen, not measured."""


def debian_packages(packages: Sequence[str], *, asked_by: str) -> str:
    """Return the step that installs packages, where they are not installed; `asked_by` is named where it can't."""
    names = sorted(set(packages))
    asked = " ".join(shlex.quote(n) for n in names)
    return f"""
# Each host has its own: they may share the folder.
stamp="$home/stamps/apt-{digest(*names)}-$(uname -n)-$(cat /etc/machine-id 2> /dev/null)"
has_packages() {{
    for name in {asked}; do
        dpkg-query -W -f '${{Status}} ' "$name" 2> /dev/null | grep -q ' installed ' || return 1
    done
}}
# Unmarked and without the lock: a package manager is not to be killed at its work, and may start what stays. While
# another one holds any of apt's locks it is run again; DPkg::Lock::Timeout covers only one of them.
apt() {{
    waits=no
    while :; do
        as_root env -u {POOL} LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive apt-get -q -o Acquire::Retries=3 "$@" \\
            > "$home/logs/apt.log" 2>&1 8>&- 9>&-
        status=$?
        if [ $status = 0 ] || [ $left = 0 ] || ! grep -q 'Could not get lock' "$home/logs/apt.log"; then break; fi
        [ $waits = yes ] || say step "apt: waiting for another package manager" >&8
        waits=yes left=$((left - 1))
        sleep 1
    done
    cat "$home/logs/apt.log"
    return $status
}}
# The lists may be incomplete although apt-get calls that a warning. The last try takes what it can get.
update_apt() {{
    for pause in 1 5 15; do
        apt -o APT::Update::Error-Mode=any update && return
        [ $left != 0 ] || return
        say step "apt: again in $pause s, $(sed -n 's/^[EW]: //p' "$home/logs/apt.log" | head -n 1)" >&8
        sleep $pause
    done
    apt update
}}
is_run_by_cloud_init() {{
    pid=$$
    while [ "${{pid:-0}}" -gt 1 ]; do
        ! grep -qsa cloud-init "/proc/$pid/cmdline" || return 0
        pid=$(sed -n 's/^PPid:[[:space:]]*//p' "/proc/$pid/status")
    done
    return 1
}}
# At first boot cloud-init writes apt's sources, and may install packages.
await_cloud_init() {{
    [ -e /run/cloud-init/status.json ] && ! [ -e /run/cloud-init/result.json ] || return
    ! is_run_by_cloud_init || return
    say step "apt: waiting for cloud-init" >&8
    timeout {_LOCK_S} cloud-init status --wait 8>&- 9>&- || echo "cloud-init has failed, or not ended in {_LOCK_S} s"
}}
install_apt() {{
    command -v apt-get > /dev/null || {{ echo "{asked_by} needs apt-get, which this machine lacks"; return 78; }}
    as_root true || return
    left={_LOCK_S}
    await_cloud_init
    update_apt && apt install -y --no-install-recommends -- {asked}
}}
if ! [ -e "$stamp" ]; then
    has_packages || step apt install_apt 8>&1  # for what a step says while it runs
    touch "$stamp"
fi
"""
