"""What tests say and ask, where it does not matter what."""

LAMP = "The lamp of the lighthouse burns through the night."
SHORE = "The northern shore is steep, and few boats land there."
ASK = "Who keeps the lamp?"
