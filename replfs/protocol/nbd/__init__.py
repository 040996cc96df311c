"""The NBD protocol, both sides, as bytes and values: names and sections are those of its specification (NBD's ``doc/proto.md``).

:mod:`.wire` has the numbers and layouts, :mod:`.server` and :mod:`.client` the two sides, :mod:`.uri` how an export is named.
"""
