"""The lock that scripts on a machine take before they change the skyward folder, as text for POSIX sh.

The folder is in a home, which hosts may share over NFS. There flock(1) fails, excludes only processes of one host, or
works, depending on versions and mount options. So a script takes two locks: with flock, which the programs that it
starts inherit and which thus lasts until they end, and a folder ``lock.d``, which mkdir(2) makes for only one host.
"""

from __future__ import annotations

BEAT_S = 2
"""Seconds between two changes of the file that shows that a lock's owner lives."""
STALE_S = 30
"""Seconds without a change after which others take the lock. Chosen, not measured: NFS clients may pause for ten."""


def shell() -> str:
    """Return the shell text that takes the lock on `home`, which it holds until the script ends, and `unlock`.

    It needs `say`. In the folder there is one file, named after its owner: host, boot and PID namespace, then the
    process and a random part. Others remove only the file of one that has ended, and then the folder with rmdir(1),
    which fails if there is a new owner's file in it. `flock` has status 1 only where another process has the lock.
    """
    return f"""
place="$(uname -n)_$(cat /proc/sys/kernel/random/boot_id)_$(readlink /proc/self/ns/pid | tr -dc 0-9)"
unique="$place.$$.$(tr -dc 0-9a-f < /proc/sys/kernel/random/uuid)"
lock="$home/lock.d"
mine="$lock/$unique"
no_flock=
if command -v flock > /dev/null; then
    # What this script starts holds this lock too, so that nothing is made twice when the script alone is killed.
    exec 9> "$home/lock"
    flock -n 9
    status=$?
    [ $status != 1 ] || say step wait
    while [ $status = 1 ]; do
        flock -w 5 9
        status=$?
        [ $status != 1 ] || say waiting
    done
    [ $status = 0 ] || no_flock="flock fails with status $status in $home"
fi
# Whether an owner has ended: on this host its process is gone, on another one its file has not changed for long.
is_stale() {{
    rest=${{1#"$place."}}
    [ "$rest" = "$1" ] || [ -d "/proc/${{rest%%.*}}" ] || return 0
    change="$1 $(cat "$lock/$1" 2> /dev/null)"
    [ "$change" = "$last" ] || {{ last=$change; quiet=0; }}
    [ $quiet -ge {STALE_S} ]
}}
take() {{
    error=$(LC_ALL=C mkdir "$lock" 2>&1) || case $error in
        *exists*) return 1 ;;
        *) echo "$error" >&2; exit 1 ;;
    esac
    : > "$mine" || {{ [ ! -d "$lock" ] || exit 1; return 1; }}  # the folder may be gone, the disk may be full
    [ "$(ls "$lock")" = "$unique" ] || {{ rm -f "$mine"; return 1; }}  # another one took an empty folder for stale
}}
last= quiet=0 waits=0
until take; do
    owner=$(ls "$lock" 2> /dev/null | head -n 1)
    if is_stale "$owner"; then
        [ -z "$owner" ] || rm -f "$lock/$owner"
        rmdir "$lock" 2> /dev/null
        last= quiet=0
        continue
    fi
    [ $waits != 0 ] || say step "wait: for ${{owner%%_*}}"
    [ $((waits % 5)) != 4 ] || say waiting
    sleep 1
    quiet=$((quiet + 1)) waits=$((waits + 1))
done
(
    # sleep too: no process stays when the script has ended. A shell that is about to become sleep may lose TERM.
    trap 'kill -9 $!; wait $!; exit' TERM
    beat=0
    while kill -0 $$ 2> /dev/null && [ -e "$mine" ]; do
        beat=$((beat + 1))
        echo $beat > "$mine"
        sleep {BEAT_S} &
        wait $!
    done
) > /dev/null 2>&1 < /dev/null 9>&- &
beats=$!
unlock() {{
    kill $beats
    wait $beats
    rm -f "$mine"
    rmdir "$lock"
}} > /dev/null 2>&1
trap unlock EXIT
"""
