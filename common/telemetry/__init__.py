"""What the processes say about themselves: logs and metrics, traces later. Never a secret."""
