"""`sevattest owner …`: what the guest owner does with their verifier (docs/owner.md); `commands` has the words."""
