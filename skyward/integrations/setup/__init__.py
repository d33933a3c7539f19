"""How a process on a worker is made ready for each framework: one module each, with a context manager `session`."""
