"""The scripts that show buckets as folders on a machine, and take them away: plain POSIX sh, as text, like `bootstrap`.

rclone does it, with what the machine's own role may do (an instance profile); no credentials are copied. What is
written is on the machine first and in the bucket within seconds of the file being closed; other machines see it some
seconds later. The last writes are only safe when the script at `UNMOUNT` has run: a machine that is lost takes with it
what it had not sent. Empty folders and permissions do not last.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from skyward.scripts.apt import debian_packages
from skyward.scripts.steps import HOME, opening

if TYPE_CHECKING:
    from skyward.spec.volume import S3Volume

PACKAGES = ("fuse3", "rclone")
UNMOUNT = f"{HOME}/unmount.sh"
"""Where the script of `unmount_script` lies on a machine that has volumes, for everything that ends the machine."""
STALLED_S = 120
"""Seconds without progress after which files are given up that have not arrived. Chosen, not measured."""
LONGEST_S = 3600
"""Seconds that a machine without its caller may go on sending before it switches itself off. Chosen, not measured."""
UNMOUNT_ALONE = f": ${{HOME:=/root}}; export HOME; [ ! -e \"{UNMOUNT}\" ] || timeout {LONGEST_S} sh \"{UNMOUNT}\""
"""Shell command that sends and unmounts on a machine that is about to switch itself off."""


@dataclass(frozen=True, slots=True)
class Left:
    """What of one volume has not arrived in its bucket: files that are closed or open, and their bytes."""

    path: str
    files: int
    bytes: int

    def __str__(self) -> str:
        return f"{size(self.bytes)} in {self.files} file{'' if self.files == 1 else 's'}"


def read_left(line: str) -> Left | None:
    """Return what a line of the output of the script at `UNMOUNT` says is left to send; None for other lines."""
    found = re.fullmatch(r"::skyward left (\d+) (\d+) (.+)", line)
    return Left(found[3], int(found[1]), int(found[2])) if found else None


def size(count: float) -> str:
    """Return a number of bytes as ``"820 B"`` or ``"1.2 GB"``, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.4g} TB"


def mount_script(
    volumes: Sequence[S3Volume], *, region: str | None, patience_s: int = 60, stalled_s: int | None = None
) -> str:
    """Return the script that mounts `volumes`, to be run again at will: as root, or a user who may become root.

    It also writes the script of `unmount_script` to `UNMOUNT`.

    `skyward.scripts.steps.read_progress` reads its output. It fails where a bucket is missing or may not be listed.
    What it leaves running bears no pool's mark: it may only be ended by the script at `UNMOUNT`.

    Parameters
    ----------
    region
        Where the machine is; None: outside AWS.
    patience_s
        Seconds in which refusals are asked about again: a role that was just made is not known everywhere at once.
    stalled_s
        For `unmount_script`; None: `STALLED_S`.
    """
    unmount = unmount_script(volumes, region=region, stalled_s=STALLED_S if stalled_s is None else stalled_s)
    steps = [opening("volumes.log"), debian_packages(PACKAGES, asked_by="S3Volume"), _COMMON, _MOUNT]
    # Before the first mount: what is written from then on is sent at the end, whatever ends the machine.
    steps.append(_keep(unmount))
    # Outer paths first, so that an inner one lies in the outer one's folder.
    for number, volume in enumerate(sorted(volumes, key=lambda v: v.mount_path)):
        steps.append(
            f"mount_{number}() {{\n{_facts(volume, len(volumes), patience_s)}"
            f"    mount_volume {shlex.join(_remote_flags(volume, region))}\n}}\n"
            f"step {shlex.quote(f'volume {volume.mount_path}')} mount_{number}\n"
        )
    return "\n".join([*steps, "say step done\n"])


def unmount_script(volumes: Sequence[S3Volume], *, region: str | None = None, stalled_s: int = STALLED_S) -> str:
    """Return the script that sends what is not yet in the buckets and unmounts: for when all tasks have ended.

    It goes on as long as something is sent, tries every volume, also after a failure, and tells of each what is left,
    for `read_left`. A volume stays mounted when nothing of it was sent for `stalled_s` seconds: when its bucket does
    not take the files, or they are still open. Then the script may be run again.
    """
    steps = [opening("unmount.log"), _COMMON, _MOUNT, _UNMOUNT]
    for number, volume in enumerate(sorted(volumes, key=lambda v: v.mount_path, reverse=True)):
        steps.append(
            f"unmount_{number}() {{\n{_facts(volume, len(volumes), patience_s=5)}    stalled={int(stalled_s)}\n"
            f"    unmount_volume {shlex.join(_remote_flags(volume, region))}\n}}\n"
            # In a subshell, since a step that fails ends the shell.
            f"( step {shlex.quote(f'unmount {volume.mount_path}')} unmount_{number} ) || left=1\n"
        )
    return "\n".join([*steps, f'[ "$left" = 0 ] || exit 1\nrm -f "{UNMOUNT}"\nsay step done\n'])


def _keep(unmount: str) -> str:
    """Return the step that writes a script to `UNMOUNT`."""
    return f"""
keep_unmount() {{ printf '%s' {shlex.quote(unmount)} > "{UNMOUNT}.new" && mv "{UNMOUNT}.new" "{UNMOUNT}"; }}
step unmount-script keep_unmount
"""


def buckets(volumes: Sequence[S3Volume]) -> dict[str, str]:
    """Return where the volumes that may be written to are kept, as ``s3://bucket/prefix``, by their mount paths."""
    return {v.mount_path: f"s3://{v.bucket}/{v.prefix.strip('/')}" for v in volumes if not v.read_only}


def _facts(volume: S3Volume, count: int, patience_s: int) -> str:
    """Return the shell variables that say what a volume is, one of `count`."""
    prefix = volume.prefix.strip("/")
    parts = (volume.mount_path, volume.bucket, prefix, str(volume.read_only), volume.endpoint_url or "")
    facts = {
        "key": hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12],
        "path": volume.mount_path,
        "bucket": volume.bucket,
        "place": f":s3:{volume.bucket}/{prefix}/" if prefix else f":s3:{volume.bucket}/",
        "where": f" at {volume.endpoint_url}" if volume.endpoint_url else "",
        "mode": "--read-only" if volume.read_only else "",
        "patience": str(int(patience_s)),
        "shares": str(count + 1),
    }
    return "".join(f"    {name}={shlex.quote(value)}\n" for name, value in facts.items())


def _remote_flags(volume: S3Volume, region: str | None) -> list[str]:
    # no-check-bucket: or rclone makes a bucket that is missing. No config file: there is nothing in it for us.
    flags = ["--config", "", "--s3-env-auth", "--s3-no-check-bucket", "--s3-region", region or "us-east-1"]
    if volume.endpoint_url:
        return [*flags, "--s3-provider", "Other", "--s3-endpoint", volume.endpoint_url, "--s3-force-path-style"]
    # Without it rclone 1.60 asks for the ACL "private", which buckets refuse that allow no ACLs, the default since
    # April 2023: they take this one or none (Amazon S3 API Reference, PutObject, "Access Control List (ACL)").
    return [*flags, "--s3-provider", "AWS", "--s3-acl", "bucket-owner-full-control"]


_COMMON = """
# An empty environment: what rclone may do is what the machine's role may do, and it bears no pool's mark. Without the
# lock, since it lives on.
client() { as_root env -i PATH="$PATH" rclone "$@" 8>&- 9>&-; }
client_pid() { pgrep -f "^[^ ]*rclone mount2 .*/volumes/$key/cache " ; }
is_mounted() { findmnt -rn -M "$path" -t fuse.rclone > /dev/null 2>&1; }
client_log() { as_root grep -v Unimplemented "$home/logs/volume-$key.log" | tail -n 5; }
is_alive() { [ -n "$(client_pid)" ] && timeout 30 stat "$path" > /dev/null 2>&1; }
now() { date +%s; }
"""

_MOUNT = """
mount_volume() {
    as_root true || return
    own="$home/volumes/$key"
    if is_mounted && is_alive; then return 0; fi
    # What has died can't be looked at; what lives is another one's.
    if is_mounted && ! timeout 30 stat "$path" > /dev/null 2>&1; then as_root umount -l "$path"; fi
    if mountpoint -q "$path"; then echo "another file system is mounted at $path"; return 81; fi
    [ -e /dev/fuse ] || as_root modprobe fuse
    check_bucket "$@" || return
    ( umask 022; as_root mkdir -p "$path" ) || { echo "the folder $path can't be made"; return 82; }
    if [ -n "$(ls -A "$path")" ]; then echo "the folder $path has files, which would be hidden"; return 83; fi
    mkdir -p "$own/cache"
    room=$(df -Pk "$own" | awk -v shares="$shares" 'NR == 2 { printf "%d", $4 / shares }')
    # mount2, since mount as Debian and Ubuntu build it (1.60) answers questions for extended attributes with EIO, and
    # shutil.copy2 gives up. Chosen, not measured: how old a listing may be, how soon after its close a file is
    # sent, what of the disk may hold copies.
    client mount2 --daemon --cache-dir "$own/cache" "$@" $mode \\
        --allow-other --default-permissions --uid "$(id -u)" --gid "$(id -g)" --umask 022 \\
        --vfs-cache-mode full --vfs-cache-max-size "${room}K" --vfs-cache-max-age 24h --vfs-write-back 1s \\
        --dir-cache-time 5s --poll-interval 0 --use-server-modtime \\
        --log-file "$home/logs/volume-$key.log" "$place" "$path"
    # Older ones return before it is mounted.
    deadline=$(($(now) + 30))
    until is_mounted && is_alive; do
        if [ -z "$(client_pid)" ] || [ "$(now)" -ge "$deadline" ]; then
            client_log
            echo "bucket '$bucket'$where could not be mounted at $path"
            return 84
        fi
        sleep 0.2
    done
}

# Lists a place that is not there: however full the bucket is, one request tells of bucket and permission.
check_bucket() {
    deadline=$(($(now) + patience))
    set -- "$@" --retries 1 --low-level-retries 2 --contimeout 10s --timeout 30s
    until said=$(client lsf "$@" "$place.skyward/" 2>&1); do
        case $said in *'directory not found'*)
            echo "bucket '$bucket'$where does not exist"
            return 85
        esac
        if [ "$(now)" -ge "$deadline" ]; then
            printf '%s\\n' "$said" | tail -n 5
            echo "bucket '$bucket'$where can't be read: $(cause "$said")"
            return 86
        fi
        sleep 2
    done
}

cause() {
    case $1 in
        *NoCredentialProviders*|*'no EC2 IMDS role'*|*'refresh cached credentials'*)
            echo "this machine has no credentials, since no role (instance profile) was given to it" ;;
        *AccessDenied*|*Forbidden*|*'status code: 403'*|*'StatusCode: 403'*)
            echo "this machine's role may not list it (s3:ListBucket)" ;;
        *) echo "see above" ;;
    esac
}
"""

_UNMOUNT = """
left=0
exec 8>&1
# The other end takes silence for a machine that is gone.
( while sleep 5 > /dev/null 2>&1 8>&- 9>&-; do say alive; done ) 9>&- &
ticker=$!
trap 'kill "$ticker"; unlock' EXIT

unmount_volume() {
    own="$home/volumes/$key"
    if ! flushed "$@"; then
        unsent | head -n 10
        client_log
        echo "$(unsent | wc -l) files of $path have not arrived in bucket '$bucket'$where, or are still open"
        return 87
    fi
    if is_mounted; then
        # Someone who only stands in it need not keep us: all that was written is in the bucket.
        as_root umount "$path" 2> /dev/null || as_root umount -l "$path" || return 88
    fi
    deadline=$(($(now) + 2))
    while pid=$(client_pid); do
        [ "$(now)" -lt "$deadline" ] || { as_root kill -9 $pid; break; }
        sleep 0.1
    done
    as_root rm -rf "$own"
}

# rclone keeps a note about each file that it has a copy of, and in it whether the bucket has the same.
unsent() { as_root grep -rlE '"Dirty": *true' "$own/cache/vfsMeta" 2> /dev/null | sed 's,.*/vfsMeta/,,'; }

# Their bytes. A file that arrives meanwhile may be gone.
unsent_bytes() {
    unsent | sed "s,^,$own/cache/vfs/," | tr '\\n' '\\0' | as_root xargs -0 -r stat -c %s 2> /dev/null |
        awk '{ sum += $1 } END { printf "%.0f", sum }'
}

# All that the client has written: when no tasks run, what it sends.
written() {
    for pid in $(client_pid); do as_root cat "/proc/$pid/io" 2> /dev/null; done |
        awk '$1 == "wchar:" { sum += $2 } END { printf "%.0f", sum }'
}
attempts_failed() { as_root grep -c 'failed to upload try' "$home/logs/volume-$key.log"; }

# Sends all, as long as files arrive, or bytes are sent that were not sent in vain three times.
flushed() {
    [ -z "$mode" ] || return 0
    files=-1 moved=$(now)
    while :; do
        before=$files files=$(unsent | wc -l)
        if [ "$files" = 0 ]; then
            # Two looks, since a note that is being written can't be read.
            sleep 0.2
            [ -z "$(unsent)" ] && return 0
            continue
        fi
        # One that was killed, as by the kernel when memory is short, goes on where it was.
        [ -n "$(client_pid)" ] || mount_volume "$@" || { tell_left 0; return 1; }
        sent=$(written) failed=$(attempts_failed)
        if [ "$files" != "$before" ]; then
            began=$sent last=$sent failed_before=$failed failed_last=$failed moved=$(now)
        elif [ "$((failed - failed_before))" -lt 3 ] && [ "$sent" -ge "$((last + 65536))" ]; then
            last=$sent moved=$(now)
        fi
        [ "$failed" = "$failed_last" ] || { failed_last=$failed began=$sent; }
        tell_left "$((sent - began))"
        # Of a file that has not arrived, nothing has.
        [ "$(($(now) - moved))" -le "$stalled" ] || { tell_left 0; return 1; }
        sleep 0.5
    done
}

tell_left() {
    rest=$(($(unsent_bytes) - $1))
    [ "$rest" -ge 0 ] || rest=0
    say left "$files" "$rest" "$path" >&8
}
"""
