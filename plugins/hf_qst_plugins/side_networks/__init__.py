"""Several side networks in one ordinary Trainer."""

from hf_qst_plugins.side_networks.together import train_together

__all__ = ["train_together"]
