"""What a run left behind, for people to read. Without torch."""
