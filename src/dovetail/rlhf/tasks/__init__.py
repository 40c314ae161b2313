"""Tasks on which finished models and models in training are judged alike.

Responsible for: being a package; it imports nothing itself.
Not responsible for: the figures themselves (maths/evaluation.py, rlhf/evaluation.py).
"""
