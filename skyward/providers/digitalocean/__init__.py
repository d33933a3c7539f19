"""Machines of DigitalOcean."""
