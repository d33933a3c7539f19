"""Machines of Verda."""
