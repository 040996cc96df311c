"""Exports: they serve a block node to others, and check what comes from outside before a node sees it."""
