"""From data sources to token ids."""
