"""Finished models for everyone: an OpenAI-compatible server with a web chat.

Responsible for: the package's names being where they are; it imports nothing itself.
Not responsible for: generation (engine/), or what a conversation looks like in tokens (text/).
"""
