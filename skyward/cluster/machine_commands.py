"""Shell commands for what a pool has on a machine, its folder and its processes: claim, watch and clean them."""

from __future__ import annotations

import shlex

from skyward.node.agent import LOG, SOCKET
from skyward.node.descendants import SEPARATE
from skyward.node.watch import BEAT
from skyward.scripts.dead_man import POWER_OFF
from skyward.scripts.steps import HOME, POOL

DETACHED = "$(command -v setsid || echo nohup)"
"""Shell word for the program that starts another one which outlives the login."""
_LOOKS = 4
"""Times that a watch looks for a heartbeat in vain before it ends the pool's processes."""
_PARENT_OF = r"s/^\([0-9]*\) (.*) [^Z] \([0-9]*\) .*/\1:\2/p"
"""Makes a line ``pid:parent`` of the state of a process that has not ended, for sed: see proc(5)."""


def pool_folder(pool_id: str) -> str:
    """Return the folder on a machine for what lives no longer than the pool. Short: a socket's path has a limit."""
    return f"/tmp/skyward-{pool_id}"


def claim_command(folder: str, mine: str) -> str:
    """Return the shell command that takes the pool's folder for one node, or names the node that has it and exits.

    The claim is a symbolic link: it gets its name and its text at once, and when two nodes try only one succeeds. Host
    keys and machine ids would not do: cloned hosts have the same.
    """
    claim = f"{folder}/node"
    return (
        f"mkdir -m 700 -p {folder} && {{ ln -s {shlex.quote(mine)} {claim} 2> /dev/null || "
        f'[ "$(readlink {claim})" = {shlex.quote(mine)} ] || {{ [ -x {folder} ] && [ ! -L {claim} ]; }} || '
        f'{{ echo "claimed $(readlink {claim} || ls -ld {folder})"; exit 1; }}; }}'
    )


def watch_command(pool_id: str, patience_s: float, *, power_off: bool) -> str:
    """Return the shell command that starts a watch on a machine: without beats for so long, it ends all of the pool.

    It does so until there is an agent, which has its own heartbeat.
    """
    folder = pool_folder(pool_id)
    end = clean_command(pool_id) + (f"; {POWER_OFF}" if power_off else "")
    watch = (
        f"missed=0; while [ $missed -lt {_LOOKS} ]; do sleep {patience_s / _LOOKS:g}; "
        f"[ -d {folder} ] && ! [ -S {folder}/{SOCKET} ] || exit 0; "
        f"if rm {folder}/{BEAT} 2> /dev/null; then missed=0; else missed=$((missed + 1)); fi; done; {end}"
    )
    return (
        f"mkdir -p {folder} && "
        f"{{ {POOL}={pool_id} {DETACHED} sh -c {shlex.quote(watch)} > /dev/null 2>&1 < /dev/null & }}"
    )


def facts_of(pid: str) -> str:
    """Return shell words for the state of a process, its parent and so on: field 20 is when it started (proc(5))."""
    return f"$(sed 's/.*) //' /proc/{pid}/stat)"


def logs_command(folder: str, *, cloud: bool) -> str:
    """Return the shell command that prints the ends of all logs that may tell why a machine failed."""
    logs = f'"{HOME}"/logs/*.log {folder}/{LOG}' + (" /var/log/cloud-init-output.log" if cloud else "")
    return f'for log in {logs}; do [ ! -r "$log" ] || {{ echo "== $log"; tail -c 500000 "$log"; echo; }}; done'


def clean_command(pool_id: str) -> str:
    """Return the shell command that ends all of a pool on a machine: its processes, however far away, and its files.

    The processes of a pool have its id in their environment, or descend from those that do: what has cleared its
    environment and lost its parent is a child of the agent, or of the process that workers are forked from. The
    processes that run this command may have the id too: they are spared, as are processes that something else ends.
    """
    separate = " ".join(f"-e {name}" for name in SEPARATE)
    mark = shlex.quote(f"{POOL}={pool_id}")
    # grep alone is not enough: behind a ForceCommand this whole command is in the environment of what sshd starts.
    clean = (
        f"own=' '; pid=$$; "
        f"while [ \"${{pid:-0}}\" -gt 1 ]; do own=\"$own$pid \"; set -- {facts_of('$pid')}; pid=$2; done; "
        f"for try in 1 2 3 4 5 6 7 8 9 10; do found=; "
        f"for pid in $(grep -lsaF {mark} /proc/[0-9]*/environ | tr -dc '0-9\\n'); do "
        f'case $own in *" $pid "*) continue;; esac; '
        f"2> /dev/null tr '\\0' '\\n' < /proc/$pid/environ | grep -qxF {mark} && found=\"$found $pid\"; done; "
        f"tree=; for pid in $found; do grep -qsaF -e skyward.node.agent -e multiprocessing /proc/$pid/cmdline && "
        f'tree="$tree $pid"; done; more=$tree; while [ -n "$more" ]; do more=; '
        f"for pair in $(2> /dev/null sed -n {shlex.quote(_PARENT_OF)} /proc/[0-9]*/stat); do "
        f'pid=${{pair%:*}}; case "$own$found $tree " in *" $pid "*) continue;; esac; '
        f'case "$tree " in *" ${{pair#*:}} "*) grep -qsaF {separate} /proc/$pid/cmdline || '
        f'{{ tree="$tree $pid"; found=" $pid$found"; more=yes; }};; esac; done; done; '
        f'[ -z "$found" ] && break; '
        # multiprocessing's tracker ends by itself when all others have, and only then removes their semaphores.
        f"for pid in $found; do [ $try -gt 6 ] || ! grep -qsaF resource_tracker /proc/$pid/cmdline && "
        f"kill -9 $pid 2> /dev/null; done; sleep 0.05; done; "
        f'rm -rf {pool_folder(pool_id)}; [ -z "$found" ] || {{ echo "still running:$found" >&2; exit 1; }}'
    )
    return f"( unset {POOL}; exec sh -c {shlex.quote(clean)} )"
