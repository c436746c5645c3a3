"""Where launches, requests and audit records are kept: one Protocol, one embedded implementation."""
