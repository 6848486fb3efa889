"""`deepy.py --doctor`: what this machine has for a run, what each missing thing costs, and the command that mends it.

Each check is a function that returns findings and changes nothing but files of its own, which it removes. Invariant: a
check never raises: what it could not look at is a finding as well.
"""
