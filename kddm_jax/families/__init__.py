"""Computes the distances, one file for each kind; `kddm_jax.distances` lists them."""
