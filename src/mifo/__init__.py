"""mifo: supervised fine-tuning and reinforcement learning of language models together, without one erasing the other."""

__version__ = "0.1.0"
