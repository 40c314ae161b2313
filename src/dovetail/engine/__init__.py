"""Generation inside the trainer's process, on the training modules' own parameters.

Responsible for: the package's public names.
Not responsible for: training, or what the generated tokens are used for.
"""

from dovetail.engine.hybrid import Generate, HybridEngine, Serve
from dovetail.engine.sampling import Sampling
from dovetail.engine.scheduler import Completion, FinishReason

__all__ = ["Completion", "FinishReason", "Generate", "HybridEngine", "Sampling", "Serve"]
