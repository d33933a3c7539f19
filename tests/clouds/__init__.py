"""Clouds in a box: HTTP servers that speak the clouds' own APIs and boot machines in a box.

``python -m tests.clouds aws`` starts one to look at.
"""
