"""The guest owner's side: verifies platforms and measurements, and releases secrets; fails closed."""
