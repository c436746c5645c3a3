"""What the processes say about themselves: logs now, metrics and traces later. Never a secret."""
