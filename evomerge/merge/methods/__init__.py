"""Merge methods by their mergekit names."""

from evomerge.merge.methods.geometry import SLERP
from evomerge.merge.methods.linear import LINEAR, TASK_ARITHMETIC
from evomerge.merge.methods.method import Method, Option, Parameter, Scope, Table
from evomerge.merge.methods.sparsify import TIES

#: Every merge method. A new one is a module beside these and a line here.
METHODS: dict[str, Method] = {
    method.name: method for method in (LINEAR, TASK_ARITHMETIC, SLERP, TIES)
}

__all__ = ["METHODS", "Method", "Option", "Parameter", "Scope", "Table"]
