"""Learning masks by gradient: one loop for every method and both objectives.

`learner.py` says what a method supplies.
"""
