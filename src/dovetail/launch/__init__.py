"""Several processes on one machine or many: who takes part, starting them, and what to say when one fails.

Torch's elastic agent, the machinery of torchrun, starts and restarts the processes; this package decides how
many, where they meet, where their output goes, and turns a failure into one message.
"""
