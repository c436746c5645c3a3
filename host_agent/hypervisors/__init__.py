"""Ways to start and reach a guest machine."""
