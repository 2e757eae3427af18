"""Custom kernels for training Llama, a compact Llama made of them, and what trains it.

Lazy: `import openllama` loads nothing; `from openllama.ops import rms_norm` loads torch and the native library.
"""

__version__ = "0.1.0"
