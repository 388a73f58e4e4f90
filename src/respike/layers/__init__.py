"""Mixers and MLPs as torch modules. They take numbers, not configs; state goes in and comes out."""
