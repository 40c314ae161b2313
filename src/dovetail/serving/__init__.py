"""Serve finished models through an OpenAI-compatible API and a web chat.

This module imports nothing; import each name from the module that defines it.
Not responsible for: generation (engine/), the tokens of a conversation (text/).
"""
