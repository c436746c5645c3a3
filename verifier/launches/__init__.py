"""The life of a launch: its states, what is frozen for it, and the flow from begin to release."""
