"""The implementation under test: the functions that Dovetail's training calls, or those of another framework.

Responsible for: `maths`, a module with the function names of `dovetail.maths`, and `forward`, one with
`token_logprobs`, `cross_entropy`, `token_values` and `last_scores` of `dovetail.model.forward`. To judge other code
with these tests, write one module of thin adapters and name it: DOVETAIL_CONFORMANCE_SUBJECT=my.adapters make test
"""

import os
from importlib import import_module

_named = os.environ.get("DOVETAIL_CONFORMANCE_SUBJECT")
maths = import_module(_named or "dovetail.maths")
forward = import_module(_named or "dovetail.model.forward")
