"""The network side of both servers: the address to listen at, certificates, and the names that they answer to.

Responsible for: being the package of these modules; it imports nothing itself.
Not responsible for: what is answered (serving/, serving/labelling/).
"""
