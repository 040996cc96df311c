"""The benchmark: replfs and QEMU's own block layer at the same work, on this machine, in turn.

:mod:`bench.sides` starts and stops what is compared, :mod:`bench.load` puts it to work and measures, :mod:`bench.workloads` says
which work, and which ratios are aimed at, :mod:`bench.report` prints what came out. ``scripts/bench.sh`` is the way to run it.
"""
