"""Merge methods by their mergekit names."""

from evomerge.merge.methods.arcee_fusion import ARCEE_FUSION
from evomerge.merge.methods.curves import DELLA, DELLA_LINEAR, RANK_BANDS
from evomerge.merge.methods.geometry import KARCHER, MODEL_STOCK, MULTISLERP, NUSLERP, SLERP
from evomerge.merge.methods.linear import LINEAR, TASK_ARITHMETIC
from evomerge.merge.methods.local import CONSENSUS, NEARSWAP, RAM
from evomerge.merge.methods.lora_factors import LORA_FACTORS
from evomerge.merge.methods.method import Method, Option, Parameter, Scope, Table
from evomerge.merge.methods.passthrough import PASSTHROUGH
from evomerge.merge.methods.sce import SCE
from evomerge.merge.methods.sparsify import SPARSIFY
from evomerge.merge.methods.widen import WIDEN
from evomerge.recipe import Recipe

#: Every merge method. A new one is a module beside these and a line here.
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        LINEAR, TASK_ARITHMETIC, SLERP, *SPARSIFY.values(), DELLA, DELLA_LINEAR, RANK_BANDS,
        SCE, NEARSWAP, ARCEE_FUSION, RAM, CONSENSUS, NUSLERP, MULTISLERP, KARCHER, MODEL_STOCK,
        WIDEN, PASSTHROUGH, LORA_FACTORS,
    )
}  # fmt: skip


#: Those that merge any experts, checkpoints and adapters alike.
OF_WEIGHTS = {name: method for name, method in METHODS.items() if not method.adapters}


def changed_options(recipe: Recipe) -> dict[str, str]:
    """Return the options of a recipe that are not its method's defaults, as a study file says."""
    method = METHODS.get(recipe.method)
    usual = {option.name: option.default for option in method.options} if method else {}
    return {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in recipe.options
        if name in usual and usual[name] != value
    }


__all__ = [
    "METHODS", "OF_WEIGHTS", "Method", "Option", "Parameter", "Scope", "Table", "changed_options",
]  # fmt: skip
