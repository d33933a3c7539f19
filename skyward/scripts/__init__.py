"""Shell scripts for machines, as text: plain POSIX sh. The cluster runs them."""
