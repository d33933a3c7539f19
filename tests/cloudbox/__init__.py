"""Cloud in a box: machines that boot in a fraction of a second, for tests of all that happens on real ones.

A machine is a set of namespaces over this host's own file system, with a real sshd. Needs Linux and root.
``python -m tests.cloudbox up 3`` boots some to look at.
"""

from tests.cloudbox.machine import Machine, cloud_config
from tests.cloudbox.network import Network, why_not

__all__ = ["Machine", "Network", "cloud_config", "why_not"]
