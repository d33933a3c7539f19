"""The dead man's switch of a machine: timers that switch it off even if the caller is gone."""

from __future__ import annotations

from skyward.scripts.steps import POOL
from skyward.scripts.volumes import UNMOUNT_ALONE

POWER_OFF = "poweroff || sudo -n poweroff || shutdown -P now || sudo -n shutdown -P now"
"""Shell command that switches a machine off, for any of its users."""


def timer_at_boot(ttl_s: int) -> str:
    """Return a command for root that sends unsent data after `ttl_s` seconds and switches the machine off."""
    return (
        f"(trap '' HUP; exec setsid sh -c 'sleep {int(ttl_s)}; {UNMOUNT_ALONE}; {POWER_OFF}') "
        "> /dev/null 2>&1 < /dev/null &"
    )


def timer_once(ttl_s: int) -> str:
    """Return lines for any user that switch the machine off after `ttl_s` seconds; run twice, they count once.

    The timer does not bear the pool's mark: it has to outlive the pool.
    """
    return f"""
if ! [ -e /tmp/.skyward-dead-man ]; then
    : > /tmp/.skyward-dead-man
    ( trap '' HUP; exec env -u {POOL} sh -c '
        sleep {int(ttl_s)}; {POWER_OFF}
    ' ) > /dev/null 2>&1 < /dev/null 9>&- &
fi
"""
