"""What an active pool holds, from its start to its end."""
