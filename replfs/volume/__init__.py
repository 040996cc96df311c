"""A volume: one disk in one mode, its graph of nodes, its saved state, and the life of both."""
