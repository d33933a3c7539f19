"""What runs on a machine beside its workers: the agent, its connections and its watch."""
