"""What comes from AMD over a network: the key service for signed CEKs (`kds`)."""
