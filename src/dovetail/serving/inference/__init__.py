"""Finished models in Python and on the command line, without a server.

Responsible for: being a package; it imports nothing itself.
Not responsible for: generation (engine/), or the tokens of a conversation (text/).
"""
