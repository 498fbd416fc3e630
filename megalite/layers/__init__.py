"""The layers of a Transformer, each split over the tensor axis where it pays.

Legend of shapes in names: B batch, S sequence, D hidden size, F MLP width, V vocabulary, H query heads, G key and value
heads, K head size. `_local` marks what one tensor rank holds of a split dimension.
"""
