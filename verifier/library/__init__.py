"""Documents and artefacts on disk: read, measured, kept as one set that is replaced as a whole."""
