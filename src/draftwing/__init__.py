"""draftwing: speculative decoding with EAGLE heads that returns exactly what plain decoding would have returned."""

from draftwing.threads import wait_briefly

wait_briefly()  # which torch's threads learn while it is loaded

# ruff: noqa: E402
from draftwing.api import GenerateOutput, SpeculativeModel, load
from draftwing.decoding.generate import Committed
from draftwing.decoding.options import GenerateOptions
from draftwing.decoding.plan import TreePlan
from draftwing.decoding.sampling import SamplingParams
from draftwing.decoding.statistics import Statistics
from draftwing.drop_in import custom_generate

__version__ = "0.1.0"
__all__ = [
    "Committed",
    "GenerateOptions",
    "GenerateOutput",
    "SamplingParams",
    "SpeculativeModel",
    "Statistics",
    "TreePlan",
    "custom_generate",
    "load",
]
