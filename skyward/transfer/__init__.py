"""What travels between caller and workers: pickles, and the shapes of messages."""
