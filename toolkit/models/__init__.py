"""Base and adapters: loaded, stacked, put together, shared between prompts, sharded."""
