"""The caller: carries messages between host agent and verifier, and is the `sevattest` command; holds nothing secret."""
