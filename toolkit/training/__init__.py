"""One stage: its trainer, its reference and the proof of it, what watches it, what it leaves to resume from."""
