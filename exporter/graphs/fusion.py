"""The second stage of a level's twin: what lies between its matrix products in operators of the project's own.

The rules put the operators of `operators` where the first stage (`rewrite`) left several nodes that each pass over all
tokens. They go in small steps, so that each pattern is short; a step that finds nothing leaves the twin as it is:

=============================================  ====================================================================
in the twin                                    becomes
=============================================  ====================================================================
bias, then a branch (LoRA)                     the branch, then the bias
bias, gate, residual sum, ``Clip``             ``Residual``, ``GatedResidual``, ``…WithBranch``
``LayerNormalization`` with scale and shift    ``ModulatedNorm``; joined with the residual sum before it, ``…Norm``
bias, ``RMSNormalization``, ``Rotary…``        ``BiasNorm``, then ``BiasNormRotary``, of text and picture ``Joined…``
bias, ``FastGelu``, ``Concat``                 ``BiasGelu``, ``JoinedBiasGelu``, ``…WithBranch``
biases of text and picture, ``Concat``         ``JoinedBias``
heads taken apart and joined again             nothing
=============================================  ====================================================================

The kernels want channels that are a multiple of 8 and heads of a power of two. Where they are not, or not known, the
nodes stay.
"""

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.rewriter import RewritePass, RewriteRuleSet

from ddit.exporter.graphs import projections, sums
from ddit.exporter.graphs.operators import add_functions

# in this order: what a step makes is what the next ones look for
STEPS = [
    [sums.BranchFirst.rule()],
    RewriteRuleSet([sums.GatedResidual.rule(), sums.GatedResidualInFloat32.rule()], commute=True),
    [sums.GatedResidualWithBranch.rule(), sums.Residual.rule()],
    [sums.Limited.rule(operator) for operator in sums.SUMS],
    [sums.ModulatedNormInFloat32.rule(), sums.ModulatedNorm.rule()],
    [sums.SumAndNorm.rule(operator) for operator in sums.SUMS],
    [projections.HeadsOfBoth.rule()],
    [projections.BiasNorm.rule(), projections.BiasNormAcross.rule(), projections.WholeHeads.rule()],
    [projections.JoinedBiasNormRotary.rule(), projections.BiasNormRotary.rule(), projections.JoinedBias.rule()],
    [projections.BiasGelu.rule()],
    [projections.BiasGeluWithBranch.rule()],
    [projections.JoinedBiasGelu.rule(operator) for operator in projections.GELUS],
]


def fuse(model: ir.Model) -> None:
    """Put the operators of the domain ``ddit`` into a twin, in place, with the functions that say what they are."""
    for rules in STEPS:
        RewritePass(rules)(model)
    ir.passes.Sequential(
        common.RemoveUnusedNodesPass(),
        common.TopologicalSortPass(),  # the sum of a `…Norm` may be used before the norm was
    )(model)
    add_functions(model)
