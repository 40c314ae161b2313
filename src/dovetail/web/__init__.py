"""What both servers need of the network: an address to listen at, certificates, and which names they answer to.

Responsible for: the package's names being where they are; it imports nothing itself.
Not responsible for: what is answered (serving/, labelling/).
"""
