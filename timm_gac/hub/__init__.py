"""Model folders and the Hugging Face Hub: converting, publishing, fetching and verifying.

Weights are safetensors only: no pickle is written, published or read from the Hub.
"""

from .config import check_config, read_config
from .convert import convert_checkpoint, infer_model, read_checkpoint
from .folder import load_model, save_model_folder, save_quantized
from .golden import Verification, verify, write_golden
from .open import OpenedNetwork, calibrate, open_network
from .prepare import PublishConfig, prepare_folder
from .push import PushResult, push
from .remote import fetch_model, open_source

__all__ = [
    "OpenedNetwork",
    "PublishConfig",
    "PushResult",
    "Verification",
    "calibrate",
    "check_config",
    "convert_checkpoint",
    "fetch_model",
    "infer_model",
    "load_model",
    "open_network",
    "open_source",
    "prepare_folder",
    "push",
    "read_checkpoint",
    "read_config",
    "save_model_folder",
    "save_quantized",
    "verify",
    "write_golden",
]
