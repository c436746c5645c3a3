"""The caller: carries messages between host agent and verifier; is the `sevattest` command; holds nothing secret."""
