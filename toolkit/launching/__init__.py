"""How the processes of a run are started, counted, signalled and ended together."""
