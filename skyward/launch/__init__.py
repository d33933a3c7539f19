"""From what a pool needs to machines: offers, an ordered plan, launches and their cost."""
