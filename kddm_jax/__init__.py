"""Knowledge distillation through distribution matching, in JAX."""

__version__ = "0.1.0"
