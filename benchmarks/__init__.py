"""What aiotracker does in a second, beside its peers on the same disk: `python -m benchmarks` lists the commands.

Every contender is a module of `benchmarks.contenders`, and every run of one is a process of its own with a fresh
folder on a real disk. Contenders take turns, for several rounds, and medians are told: a machine that slows down
half way slows all of them down. What each contender does for its figure, and whether it syncs, is its `BIAS`.
"""
