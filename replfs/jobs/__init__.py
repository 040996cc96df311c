"""Jobs: walks over nodes in the background, while these are in use."""
