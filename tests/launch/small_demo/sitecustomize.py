"""Processes that find this module at their start take their recipes from the folder RECIPES."""

import os
from pathlib import Path

from dovetail.config import recipes

recipes.FOLDER = Path(os.environ["RECIPES"])
