"""The caller's Python environment: what is installed or locked here, and local packages as wheels."""
