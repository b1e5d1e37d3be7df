"""The objectives of a recipe that train a head, by name: one line for each."""

from draftwing.drafts.eagle.objective import Eagle1Objective, Eagle3Objective
from draftwing.drafts.medusa.objective import MedusaObjective
from draftwing.drafts.objective import Objective

HEADS: dict[str, Objective] = {
    "eagle1": Eagle1Objective(),
    "eagle3": Eagle3Objective(),
    "medusa": MedusaObjective(),
}
