"""The owner's documents as values: what a text must say, and nothing about where the text comes from."""
