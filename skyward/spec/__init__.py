"""What a pool is asked to be: every option, checked before anything is started."""
