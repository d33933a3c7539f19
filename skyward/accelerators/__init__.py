"""GPUs and other accelerators: the ones that skyward knows, what a pool asks for, what a machine has."""
