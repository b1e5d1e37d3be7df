"""draftwing: speculative decoding with EAGLE heads that returns exactly what plain decoding would have returned.

The names of the public API are imported when they are first asked for: most of them need torch and transformers, whose
import takes seconds that a help text or a mistake on the command line should not wait for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from draftwing.threads import wait_briefly

if TYPE_CHECKING:
    from draftwing.api import GenerateOutput, SpeculativeModel, load
    from draftwing.drop_in import custom_generate
    from draftwing.engine.generation import Committed
    from draftwing.engine.options import GenerateOptions
    from draftwing.engine.sampling import SamplingParams
    from draftwing.engine.statistics import Statistics
    from draftwing.engine.tree_plan import TreePlan

wait_briefly()  # which torch's threads learn while it is loaded

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
_HOMES = {
    "api": ("GenerateOutput", "SpeculativeModel", "load"),
    "engine.generation": ("Committed",),
    "engine.options": ("GenerateOptions",),
    "engine.tree_plan": ("TreePlan",),
    "engine.sampling": ("SamplingParams",),
    "engine.statistics": ("Statistics",),
    "drop_in": ("custom_generate",),
}
"""The public names by the module that each is imported from; the same as above, for the interpreter."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    for module, names in _HOMES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f"draftwing.{module}"), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
