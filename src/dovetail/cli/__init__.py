"""The command line: thin commands over the stages. Nothing here imports torch before a command needs it."""
