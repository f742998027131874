"""Time for memory: recompute instead of keeping, chunks instead of whole logits. Each is a transform, and a function.

A compiler that sees a whole training step as one graph undoes plain checkpointing: the recomputed values equal those of
the forward, so common-subexpression elimination keeps one of them, the early one. What is recomputed here goes through
`barrier.hold_apart` first.
"""
