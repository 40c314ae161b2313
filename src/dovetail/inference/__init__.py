"""Finished models in Python and on the command line, without a server.

Responsible for: the package's names being where they are; it imports nothing itself.
Not responsible for: generation (engine/), or what a conversation looks like in tokens (text/).
"""
