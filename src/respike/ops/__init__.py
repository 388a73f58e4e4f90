"""Functions of tensors: the definitions, and faster forms that are compared with them.

Letters, the same in the whole repository:

    B batch            T tokens             S cached tokens      D model width
    H query heads      G key/value heads    K key dim            V value dim
    F MLP width        C chunk              W window             N chunks or blocks
    L layers           P pulses (spike time steps; never T)

At every public border tensors are ``(B, T, H, K)``; transposes stay inside.
"""
