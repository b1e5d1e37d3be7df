"""draftwing: speculative decoding with EAGLE heads that returns exactly what plain decoding would have returned."""

from draftwing.api import GenerateOutput, SpeculativeModel, custom_generate, load
from draftwing.decoding.plan import TreePlan
from draftwing.decoding.sampling import SamplingParams
from draftwing.decoding.statistics import Statistics

__version__ = "0.1.0"
__all__ = [
    "GenerateOutput",
    "SamplingParams",
    "SpeculativeModel",
    "Statistics",
    "TreePlan",
    "custom_generate",
    "load",
]
