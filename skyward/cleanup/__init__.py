"""What ends pools whatever happens: the journal, the guardian, signals, and the search for machines."""
