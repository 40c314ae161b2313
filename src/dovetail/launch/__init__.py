"""Start the processes of a run on one machine or several, watch them, and report a failure.

Torch's elastic agent, on which torchrun is built, starts and restarts the processes. This package decides how many
there are, where they meet and where their output goes, and turns a failure into one message.
"""
