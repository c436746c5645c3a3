"""Is it acceptable? Pure rules over verified evidence; whether it is genuine is decided in `common.sev`."""
