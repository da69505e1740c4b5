"""What a stage will need of memory and disk, and what would need less."""
