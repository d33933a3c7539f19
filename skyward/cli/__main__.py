"""``python -m skyward.cli``."""

from skyward.cli import main

main(prog_name="skyward")
