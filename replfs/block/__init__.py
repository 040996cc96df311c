"""Block nodes: everything that holds bytes of a disk or passes them on."""
