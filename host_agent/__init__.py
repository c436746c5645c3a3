"""The host's side: starts guests paused, relays what the firmware and the owner say, lets an attested guest run."""
