"""SAELens's files: activations for training, and the sparse autoencoders that come of it."""

from gemloupe.integrations.saelens.dataset import ActivationWriter
from gemloupe.integrations.saelens.sae import FeatureParts, Sae, load_sae

__all__ = ["ActivationWriter", "FeatureParts", "Sae", "load_sae"]
