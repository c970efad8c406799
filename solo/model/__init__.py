"""model: one Transformer for text and image patches, in Hugging Face's clothes.

Importing it makes a checkpoint known to AutoConfig, AutoModelForCausalLM and AutoProcessor.
"""

from solo.model.causal_lm import SoloForCausalLM
from solo.model.config import SoloConfig
from solo.model.processor import SoloProcessor

__all__ = ["SoloConfig", "SoloForCausalLM", "SoloProcessor"]
