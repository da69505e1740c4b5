"""What is asked for: a recipe file, read, checked and planned. Without torch."""
