"""The implementation under test: Dovetail's equations, or those of another framework.

Responsible for: `maths`, a module with the function names of `dovetail.maths`. To judge other code with these
tests, write a module of thin adapters and name it: DOVETAIL_CONFORMANCE_SUBJECT=my.adapters make test
"""

import os
from importlib import import_module

maths = import_module(os.environ.get("DOVETAIL_CONFORMANCE_SUBJECT", "dovetail.maths"))
