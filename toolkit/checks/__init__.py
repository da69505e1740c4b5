"""Known before paying: what is wrong with a run, and its rows as the trainer will see them."""
