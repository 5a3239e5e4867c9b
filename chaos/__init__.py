"""Chaos: the real service is killed, signalled and flooded at the worst moments, and nothing may be lost.

`python -m chaos` runs the scenarios and judges them. What each does: chaos/README.md.
"""
