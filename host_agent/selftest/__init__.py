"""What only hardware can show: one guest launched paused, its owner played on the spot, every step checked.

`expectation.py` computes what the firmware must measure from the configured files, `steps.py` goes through the launch,
`cli.py` is the command. The keys live in this process's memory and nowhere else; the agent's service has no part in it.
"""
