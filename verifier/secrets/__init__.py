"""Where secrets come from, and the one packet in which they leave."""
